"""The selector that leaves the data alone: every row, in the order given."""

from __future__ import annotations

from typing import ClassVar

from dataflex.method import Card, Context, Rows, Selection, Selector

__all__ = ["AllRows"]


class AllRows(Selector):
    """Keep the whole pool as it is; epochs and order stay those of the run."""

    name = "all"
    selects_subset: ClassVar[bool] = False
    card = Card(summary="Keeps every row of the pool in its order.", paper="baseline", cost="none")

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Return ``pool`` unchanged; ``budget`` is not looked at."""
        return Selection(rows=pool, reason=f"all {len(pool)} rows of the pool")
