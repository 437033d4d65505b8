"""Sentence embeddings: rows whose mean similarity to the target's rows is largest.

A baseline of "Compute-Constrained Data Selection", ICLR 2025, arXiv 2410.16208 (there GTR-T5-base on 256 tokens).
A row's score for a target is the mean of its cosines with the target's rows, and the largest over targets counts.
``near`` takes neighbours one by one instead, ``rds_plus`` lets target rows take turns by the model's own states.
A mean prefers rows that are a little like everything in the target; ``aggregate: max`` asks for one close row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Card
from dataflex.select.aggregates import Aggregate
from dataflex.select.scoring import AGGREGATE, Found, ScoringParams
from dataflex.selectors._lib import PooledParams, VectorSelector

__all__ = ["Embed"]


class Embed(VectorSelector):
    """Keep the rows whose embeddings are on average nearest to the targets'."""

    name = "embed"
    adaptive: ClassVar[bool] = True
    targets_take_turns = True
    card = Card(
        summary="Keeps the rows whose sentence embeddings have the largest mean cosine with those of a target.",
        paper="Compute-Constrained Data Selection, ICLR 2025, arXiv 2410.16208",
        cost="1 F of the encoder over the pool and the targets",
        forward_per_pool_row=1.0,
        forward_per_target_row=1.0,
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(PooledParams, ScoringParams):
        """Parameters of selection by sentence embeddings; ``aggregate`` and ``rule`` are the paper's."""

        aggregate: Aggregate | None = field(default=Aggregate.of("mean_then_max"), metadata=AGGREGATE)

    params: Params

    def by_task(self, found: Found) -> NDArray[np.float64]:
        """Return mean cosines one target at a time, the products of unit vectors with their mean; or the largest."""
        if self.aggregate.name in ("max", "round_robin"):
            return super().by_task(found)
        assert found.vectors is not None
        return np.stack([found.vectors @ queries.mean(axis=0) for queries in found.queries]).astype(np.float64)
