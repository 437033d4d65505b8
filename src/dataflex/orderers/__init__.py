"""Orderers: the order in which rows are served. One file per family; see ``dataflex.method``."""
