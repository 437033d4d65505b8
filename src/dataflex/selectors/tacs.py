"""TACS: rows that get easier for the model when it has taken a few steps towards the target.

The model is read twice: as it is, and with a small low-rank probe trained on the target alone. Rows
whose loss the probe lowers most, relative to where it was, are kept. Nothing is differentiated on
the pool. It refuses partitioned parameters, since the probe is added to whole layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ComponentError
from dataflex.method import Card, Context, Needs, Rows
from dataflex.select.scoring import Found, ScoringParams, ScoringSelector

__all__ = ["Tacs", "relative_gain"]

_EPS = 1e-8  # the paper's guard of the denominator; it matters only when floor is 0


def relative_gain(
    loss_start: NDArray[np.floating], loss_adapted: NDArray[np.floating], floor: float
) -> NDArray[np.float64]:
    """Return ``(l_start - l_adapted) / (max(l_start, floor) + 1e-8)`` [n], NaN where either loss is not finite.

    The floor is ours: without it a row that the model already knows by heart gets a huge score from
    a tiny change.
    """
    start = np.where(np.isfinite(loss_start), loss_start, np.nan).astype(np.float64)
    adapted = np.where(np.isfinite(loss_adapted), loss_adapted, np.nan).astype(np.float64)
    return (start - adapted) / (np.maximum(start, floor) + _EPS)


class Tacs(ScoringSelector):
    """Keep the rows whose loss falls most, relatively, on the way to a target."""

    name = "tacs"
    lacking = "no finite loss"
    adaptive: ClassVar[bool] = True
    needs = Needs(signals=frozenset({"losses"}), targets=True, stages=("pt", "sft"), zero3=False)
    card = Card(
        summary="Keeps the rows whose loss falls most when a small probe is trained on the target.",
        paper="Let the Target Select for Itself: Data Selection via Target-Aligned Paths, arXiv 2605.09404",
        cost="(1 + number of targets) F over the pool per interval, plus depth_steps (F + B) over each target",
        forward_per_pool_row=2.0,
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ScoringParams):
        """Parameters of TACS; the defaults are the paper's, but for ``floor``."""

        depth_steps: int = field(
            default=2, metadata={"help": "full-batch steps of the probe on the target", "minimum": 1}
        )
        learning_rate: float = field(default=1e-5, metadata={"help": "learning rate of the probe", "above": 0.0})
        rank: int = field(default=1, metadata={"help": "rank of the low-rank probe", "minimum": 1})
        alpha: float = field(default=4.0, metadata={"help": "LoRA alpha of the probe", "above": 0.0})
        floor: float = field(
            default=0.05,
            metadata={
                "help": "least starting loss in the denominator, in nats per token; 0 as published",
                "minimum": 0.0,
            },
        )

    params: Params

    def pool_passes(self, num_targets: int) -> tuple[float, float]:
        """One F as the model is, and one with the probe of each target."""
        return 1.0 + num_targets, 0.0

    @property
    def target_passes(self) -> tuple[float, float]:
        """The probe is trained on all rows of its target in every step."""
        return float(self.params.depth_steps), float(self.params.depth_steps)

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return relative gains by target [T, N].

        Raises:
            ComponentError: The probe of a target diverged.
        """
        start = ctx.signals.losses(pool)
        if not np.isfinite(start).any():
            return np.full(len(pool), np.nan)  # no probe can tell them apart
        return np.stack([self._gain(pool, start, target, ctx) for target in ctx.targets])

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return what the rows are kept by."""
        return f"by relative fall of the loss towards {', '.join(ctx.targets)}"

    def _gain(self, pool: Rows, start: NDArray[np.float32], target: str, ctx: Context) -> NDArray[np.float64]:
        p = self.params
        adapted = ctx.signals.adapted_losses(
            pool,
            towards=target,
            depth_steps=p.depth_steps,
            learning_rate=p.learning_rate,
            rank=p.rank,
            alpha=p.alpha,
        )
        if adapted.shape != start.shape:
            raise ComponentError(
                f"tacs: asked for the adapted losses of {len(pool):,} rows, was given shape {adapted.shape}"
            )
        gain = relative_gain(start, adapted, p.floor)
        if not np.isfinite(gain).any():
            raise ComponentError(
                f"tacs: the probe trained towards {target!r} gives no finite loss. "
                f"Lower learning_rate (now {p.learning_rate:g}) or depth_steps (now {p.depth_steps})."
            )
        return gain
