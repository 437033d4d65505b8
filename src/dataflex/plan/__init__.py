"""From proportions and chosen rows to the rows that each rank serves; no torch, no model."""
