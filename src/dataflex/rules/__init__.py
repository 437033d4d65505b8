"""Subset rules: from scores, vectors or queries to the rows that are kept. No torch, no model, no Trainer.

Each rule is a plain function with plain arguments in a module of its kind. ``registry`` names them, with their
parameters and what they need, for selectors and for whoever chooses from stored scores.
"""

from dataflex.rules.candidates import Candidates
from dataflex.rules.registry import RULES, Rule, choose

__all__ = ["RULES", "Candidates", "Rule", "choose"]
