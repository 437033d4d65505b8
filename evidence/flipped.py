"""LESS with its sign flipped: keeps the rows that help the targets least, as a check of the suite that holds it."""

from __future__ import annotations

from typing import Any

from dataflex.method import Card, Context, Rows
from dataflex.selectors.influence import Less


class FlippedLess(Less):
    """Give each row the negative of its score."""

    name = "less_flipped"
    card = Card(summary="LESS, the worst rows first.", paper="baseline: a check", cost=Less.card.cost)

    def score(self, pool: Rows, ctx: Context) -> Any:
        """Return scores of the pool's rows [N], larger is better."""
        return -super().score(pool, ctx)
