"""Scores of a data set without training, and subsets of it by those scores."""
