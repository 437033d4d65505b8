"""A selector in 30 lines: rows of middling loss, neither known by heart nor out of reach."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dataflex import Card, Context, Needs, Selection, Selector
from dataflex import Params as BaseParams
from dataflex.method import Rows
from dataflex.select.choose import top_k


class NearQuantile(Selector):
    """Keep the rows whose loss lies nearest to a quantile of the pool's losses."""

    name = "near_quantile"
    adaptive = True  # decides from the model as it is, so dynamic.interval_steps must be given
    needs = Needs(signals=frozenset({"losses"}), stages=("pt", "sft"))
    card = Card(summary="Keeps the rows of middling loss.", paper="baseline", cost="1 F", forward_per_pool_row=1.0)

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        """Parameters, checked and converted before anything is loaded."""

        quantile: float = field(default=0.5, metadata={"help": "quantile of losses", "minimum": 0.0, "maximum": 1.0})

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Return at most ``budget`` rows, best first, and a score for every row of the pool."""
        losses = ctx.signals.losses(pool)  # float32 [len(pool)]; NaN for rows without supervised tokens
        goal = np.nanquantile(losses, self.params.quantile)
        scores = -np.abs(losses - goal)
        return Selection(rows=pool[top_k(scores, budget)], scores=scores, reason=f"nearest to a loss of {goal:.3f}")
