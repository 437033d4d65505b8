"""NEAR: the nearest neighbours of every target row by an embedding model, walked rank by rank.

A baseline of existing DataFlex without a paper. First the nearest row of every target row, then the second
nearest of every one, and so on; rows met before are passed over, until the budget is full. (Round-robin, as in
``rds_plus``, lets a target row go on to its next free row in the same turn.) The search is exact, so that lists
hold no gaps and never run out before the pool does. ``encoder`` is meant to be a sentence-embedding model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dataflex.method import Card
from dataflex.select.rules import Rule
from dataflex.select.scoring import RULE, ScoringParams
from dataflex.selectors._lib import PooledParams, VectorSelector

__all__ = ["Near"]


class Near(VectorSelector):
    """Keep the nearest neighbours of the targets' rows."""

    name = "near"
    adaptive: ClassVar[bool] = True
    card = Card(
        summary="Keeps the nearest neighbours of the targets' rows by embeddings, rank by rank.",
        paper="baseline (no paper)",
        cost="1 F of the encoder over the pool and the targets, and a product of each row with each target row",
        forward_per_pool_row=1.0,
        forward_per_target_row=1.0,
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(PooledParams, ScoringParams):
        """Parameters of NEAR: the rows of all targets take turns, and lose one where their row is taken."""

        rule: Rule = field(default=Rule.of("round_robin", taken="lose_turn"), metadata=RULE)

    params: Params
