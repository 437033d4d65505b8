"""Rewards: what an answer of the model is worth, as a number; a black box that is never differentiated."""
