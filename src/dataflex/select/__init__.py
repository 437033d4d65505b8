"""Subset rules and the searches under them; no torch, no model."""
