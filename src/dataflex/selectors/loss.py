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

from dataflex.method import Card, Context, Needs, Rows
from dataflex.select.rules import Rule
from dataflex.select.scoring import RULE, Found, ScoringParams, ScoringSelector, default_of

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


class LossSelector(ScoringSelector):
    """Draw rows with a preference for one third of the loss range."""

    name = "loss"
    lacking = "no finite loss"
    adaptive: ClassVar[bool] = True
    needs = Needs(signals=frozenset({"losses"}), stages=("pt", "sft", "dpo", "kto"))
    card = Card(
        summary="Draws rows at random, preferring those whose current loss is high, medium or low.",
        paper="baseline (no paper)",
        cost="1 F over the pool per interval",
        forward_per_pool_row=1.0,
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ScoringParams):
        """Parameters of the loss selector. The rule draws by the preference, ``gumbel_top_k`` without replacement."""

        rule: Rule = field(default=Rule.of("gumbel_top_k"), metadata=RULE)
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
            if self.replacement and self.rule != default_of(self, "rule"):
                raise ValueError(f"replacement: has no effect beside the rule {self.rule.name}; remove one of the two")

    params: Params

    @property
    def rule(self) -> Rule:
        """Draws are repeated where ``replacement`` says so."""
        again = self.params.replacement
        return Rule.of("multinomial", weights="softmax", replacement=True) if again else super().rule

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float32]:
        """Return losses [N]."""
        return ctx.signals.losses(pool)

    def preference(self, found: Found, ctx: Context) -> NDArray[np.floating]:
        """Return log weights of the draw, by bucket."""
        assert found.scores is not None
        in_focus = focused(found.scores, self.params.focus, self.params.quantiles)
        return log_weights(in_focus, self.params.focus_weight, self.params.temperature)

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return how many rows are of the focused bucket."""
        assert found.scores is not None
        focus = self.params.focus
        in_focus = focused(found.scores, focus, self.params.quantiles)
        how = f"drawn, {int(in_focus[kept].sum())} of them of {focus} loss"
        return how if in_focus.any() else f"{how}; no row is of {focus} loss (ties), so the draw was uniform"
