"""The longest rows: a baseline that needs no model and that many selectors fail to beat.

Length is in tokens of the whole row as it is trained on, prompt included, after ``cutoff_len``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Card, Context, Rows
from dataflex.select.scoring import Found, ScoringSelector

__all__ = ["Longest"]


class Longest(ScoringSelector):
    """Keep the rows of most tokens."""

    name = "longest"
    card = Card(summary="Keeps the rows of most tokens.", paper="baseline", cost="none")

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return lengths in tokens [N].

        Raises:
            DataError: The data set does not give the token count of every row.
        """
        if ctx.domains.lengths is None:
            raise DataError("longest: it needs the token count of every row, which this data set does not give")
        return ctx.domains.lengths[pool].astype(np.float64)

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return the length of the shortest row kept."""
        assert found.scores is not None
        return f"of at least {int(found.scores[kept].min())} tokens" if len(kept) else "by length"
