"""The longest rows: a baseline that needs no model and that many selectors fail to beat.

Length is in tokens of the whole row as it is trained on, prompt included, after ``cutoff_len``.
"""

from __future__ import annotations

import numpy as np

from dataflex.errors import DataError
from dataflex.method import Card, Context, Rows, Selection, Selector
from dataflex.select.choose import top_k

__all__ = ["Longest"]


class Longest(Selector):
    """Keep the rows of most tokens."""

    name = "longest"
    card = Card(summary="Keeps the rows of most tokens.", paper="baseline", cost="none")

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Keep the ``budget`` longest rows; ties by pool order.

        Returns:
            Rows, longest first; scores [len(pool)] are their lengths in tokens.

        Raises:
            DataError: The data set does not give the token count of every row.
        """
        if ctx.domains.lengths is None:
            raise DataError("longest: it needs the token count of every row, which this data set does not give")
        lengths = ctx.domains.lengths[pool].astype(np.float64)
        kept = top_k(lengths, budget)
        shortest = f", of at least {int(lengths[kept[-1]])} tokens" if len(kept) else ""
        return Selection(rows=pool[kept], scores=lengths, reason=f"{len(kept)} of {len(pool)} rows{shortest}")
