"""Uniform random rows: the baseline that every other selector has to beat.

The draw is keyed by row id, so it depends on the seed and the interval only, never on the number of
ranks or on the order in which the pool is handed over.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dataflex.method import Card, Context, Rows, Selection, Selector
from dataflex.method import Params as BaseParams
from dataflex.rng import uniforms
from dataflex.select.choose import top_k

__all__ = ["RandomRows"]


class RandomRows(Selector):
    """Draw rows uniformly, anew in every interval."""

    name = "random"
    card = Card(summary="Draws rows uniformly at random in every interval.", paper="baseline", cost="none")

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        """Parameters of the random selector."""

        replacement: bool = field(
            default=False, metadata={"help": "whether one interval may draw the same row several times"}
        )

    params: Params

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Draw ``budget`` rows of ``pool``, in random order.

        Without replacement a budget above ``len(pool)`` returns the whole pool once, in random order.

        Returns:
            Rows [budget], or [min(budget, len(pool))] without replacement. There are no scores.
        """
        if self.params.replacement:
            draws = np.arange(budget if len(pool) else 0, dtype=np.int64)
            u = uniforms(ctx.seed, "selector.random", ctx.interval.index, draws)
            rows = pool[np.minimum((u * len(pool)).astype(np.int64), len(pool) - 1)]
            return Selection(rows=rows, reason=f"{len(rows)} draws from {len(pool)} rows, with replacement")
        u = uniforms(ctx.seed, "selector.random", ctx.interval.index, pool)
        rows = pool[top_k(u, min(budget, len(pool)))]
        return Selection(rows=rows, reason=f"{len(rows)} of {len(pool)} rows at random")
