"""What a subset rule may look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataflex.plan.domains import Rows
from dataflex.rng import uniforms

__all__ = ["Candidates", "Uniforms"]

Uniforms = Callable[[str, NDArray[np.int64]], NDArray[np.float64]]
"""(what for, ids [n]) to numbers in (0, 1) [n] that depend on each id alone."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Rows to choose from, and what is known about them. A rule gets what it needs; the rest may be None.

    Attributes:
        rows: Row ids [n]; draws are keyed by them.
        uniforms: Random numbers by id.
        scores: Larger is better, finite [n].
        by_query: Score of every row for every query that takes turns, or for every task, finite [Q, n]; None: the
            ``queries`` take turns.
        vectors: One vector a row, finite, float32 [n, D].
        queries: Vectors of the targets' rows, finite, float32 [M, D].
        lengths: Tokens of each row [n].
        groups: Group of each row, as its domain, int [n].
    """

    rows: Rows
    uniforms: Uniforms
    scores: NDArray[np.floating] | None = None
    by_query: NDArray[np.floating] | None = None
    vectors: NDArray[np.float32] | None = None
    queries: NDArray[np.float32] | None = None
    lengths: NDArray[np.int64] | None = None
    groups: NDArray[np.integer] | None = None

    @staticmethod
    def stream(seed: int, name: str, index: int) -> Uniforms:
        """Return the random numbers of one decision, a stream of its own for each purpose."""
        return lambda purpose, ids: uniforms(seed, f"{name}.{purpose}", index, ids)
