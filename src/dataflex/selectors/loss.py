"""Rows of high, medium or low loss, preferred but not exclusively.

A baseline without a paper: rows fall into three buckets by quantiles of their current loss, and the
focused bucket is drawn more often. High loss can mean noise and low loss nothing left to learn, so
it is a yardstick more than a recommendation. It refuses to choose rows that have no finite loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Card, Context, Needs, Rows, Selection, Selector
from dataflex.method import Params as BaseParams
from dataflex.rng import uniforms
from dataflex.select.choose import gumbel_top_k
from dataflex.selectors.finite import finite_rows

__all__ = ["Focus", "LossSelector", "focused", "log_weights"]

Focus = Literal["high", "medium", "low"]

_WEIGHT_FLOOR = 1e-12  # a focus_weight of 0 leaves its rows drawable, after all others


def focused(losses: NDArray[np.floating], focus: Focus, quantiles: tuple[float, float]) -> NDArray[np.bool_]:
    """Return which finite losses [n] lie in the focused bucket.

    With the two quantiles q1 <= q2 (linear interpolation): low is ``loss <= q1``, medium is
    ``q1 < loss <= q2``, high is ``loss > q2``. Ties can leave a bucket empty.
    """
    low, high = np.quantile(losses.astype(np.float64), quantiles)
    if focus == "low":
        return losses <= low
    if focus == "medium":
        return (losses > low) & (losses <= high)
    return losses > high


def log_weights(in_focus: NDArray[np.bool_], focus_weight: float, temperature: float) -> NDArray[np.float64]:
    """Return unnormalized log probabilities [n]: ``log(w + 1e-12) / T`` with w = focus_weight in focus, else 1."""
    return np.where(in_focus, math.log(focus_weight + _WEIGHT_FLOOR), math.log1p(_WEIGHT_FLOOR)) / temperature


class LossSelector(Selector):
    """Draw rows with a preference for one third of the loss range."""

    name = "loss"
    adaptive: ClassVar[bool] = True
    needs = Needs(signals=frozenset({"losses"}), stages=("pt", "sft", "dpo", "kto"))
    card = Card(
        summary="Draws rows at random, preferring those whose current loss is high, medium or low.",
        paper="baseline (no paper)",
        cost="1 F over the pool per interval",
        forward_per_pool_row=1.0,
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        """Parameters of the loss selector."""

        focus: Focus = field(
            default="high",
            metadata={"help": "which bucket of losses is preferred"},
        )
        focus_weight: float = field(
            default=5.0,
            metadata={"help": "how many times likelier a row of the focused bucket is drawn first", "minimum": 0.0},
        )
        quantiles: tuple[float, float] = field(
            default=(0.33, 0.66),
            metadata={
                "help": "the two quantiles of the losses that separate the buckets",
                "minimum": 0.0,
                "maximum": 1.0,
            },
        )
        temperature: float = field(
            default=1.0, metadata={"help": "flattens the preference as it grows; .inf draws uniformly", "above": 0.0}
        )
        replacement: bool = field(
            default=False, metadata={"help": "whether one interval may draw the same row several times"}
        )

        def __post_init__(self) -> None:
            if len(self.quantiles) != 2 or not 0.0 <= self.quantiles[0] <= self.quantiles[1] <= 1.0:
                raise ValueError(f"quantiles: {list(self.quantiles)} must be two rising numbers from 0 to 1")

    params: Params

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Draw up to ``budget`` rows with probability proportional to ``w ** (1 / temperature)``.

        Without replacement the draw is sequential (Gumbel top-k keyed by row id). Rows without a
        finite loss are never drawn, so fewer than ``budget`` rows come back when there are not enough.

        Returns:
            Rows in order of drawing, and the losses of the pool as scores (NaN where not finite).

        Raises:
            DataError: No row of a non-empty pool has a finite loss.
        """
        if len(pool) == 0:
            return Selection(rows=pool, scores=np.empty(0, dtype=np.float32), reason="empty pool")
        losses = ctx.signals.losses(pool)
        finite = finite_rows(self.name, losses, len(pool))
        eligible = pool[finite]
        in_focus = focused(losses[finite], self.params.focus, self.params.quantiles)
        log_w = log_weights(in_focus, self.params.focus_weight, self.params.temperature)
        chosen = self._draw(log_w, eligible, budget, ctx)
        return Selection(
            rows=eligible[chosen],
            scores=np.where(finite, losses, np.nan),
            reason=self._reason(in_focus, chosen, len(pool)),
        )

    def _draw(self, log_w: NDArray[np.float64], eligible: Rows, budget: int, ctx: Context) -> NDArray[np.int64]:
        """Return positions in ``eligible``, in order of drawing."""
        stream = (ctx.seed, "selector.loss", ctx.interval.index)
        if not self.params.replacement:
            return gumbel_top_k(log_w, min(budget, len(eligible)), uniforms(*stream, eligible))
        cumulative = np.cumsum(np.exp(log_w - log_w.max()))
        u = uniforms(*stream, np.arange(budget, dtype=np.int64))
        positions = np.searchsorted(cumulative, u * cumulative[-1], side="right")
        return np.minimum(positions, len(eligible) - 1).astype(np.int64)

    def _reason(self, in_focus: NDArray[np.bool_], chosen: NDArray[np.int64], num_pool: int) -> str:
        focus = self.params.focus
        reason = f"{len(chosen)} of {num_pool} rows, {int(in_focus[chosen].sum())} of them of {focus} loss"
        if not in_focus.any():
            reason += f"; no row is of {focus} loss (ties), so the draw was uniform"
        if len(in_focus) < num_pool:
            reason += f"; {num_pool - len(in_focus)} rows have no finite loss"
        return reason
