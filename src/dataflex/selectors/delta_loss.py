"""Rows by how far their loss has fallen since the first decision, in a window that slides over the run.

A method of existing DataFlex without a paper. The first decision records the losses and draws uniformly. Later
ones rank rows by the fall of their loss since then; a window over the ranks moves from those that fell most to
those that fell less, along a sigmoid, and rows in it are preferred. Rows whose loss rose are never in the window;
when none is left in it (small pools, or a model that got worse), the draw is uniform and the reason says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Card, Context, Needs, Rows, State
from dataflex.select.rules import Rule
from dataflex.select.scoring import RULE, Found, ScoringParams, ScoringSelector
from dataflex.selectors.tacs import relative_gain

__all__ = ["DeltaLoss", "window"]


def window(num_rows: int, progress: float, size: float, steepness: float) -> tuple[int, int]:
    """Return the first rank of the window and the one past its last; fractions are cut, not rounded.

    Args:
        num_rows: Ranked rows N.
        progress: Share of the updates behind us, 0 at the first and 1 at the last.
        size: Length of the window as a share of the rows.
        steepness: Slope of the sigmoid.
    """
    place = 1.0 / (1.0 + math.exp(-steepness * (progress - 0.5)))
    start = int(place * (1.0 - size) * num_rows)
    return start, start + int(size * num_rows)


class DeltaLoss(ScoringSelector):
    """Draw rows, preferring a sliding window over the falls of their loss."""

    name = "delta_loss"
    lacking = "no finite loss"
    adaptive: ClassVar[bool] = True
    needs = Needs(signals=frozenset({"losses"}), stages=("pt", "sft", "dpo", "kto"))
    card = Card(
        summary="Draws rows at random, first preferring those whose loss fell most, later slower ones.",
        paper="baseline (no paper)",
        cost="1 F over the pool per interval",
        forward_per_pool_row=1.0,
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ScoringParams):
        """Parameters of the delta-loss selector. The rule draws by the weights, keyed by row."""

        rule: Rule = field(default=Rule.of("gumbel_top_k"), metadata=RULE)
        updates: int = field(
            metadata={"help": "decisions after the first; at the last of them the window is at its end", "minimum": 1}
        )
        window_size: float = field(
            default=0.2, metadata={"help": "length of the window, as a share of the pool", "above": 0.0, "maximum": 1.0}
        )
        steepness: float = field(
            default=10.0,
            metadata={"help": "slope of the sigmoid that moves the window", "above": 0.0, "maximum": 100.0},
        )
        outside_weight: float = field(
            default=0.025, metadata={"help": "weight of rows outside the window, against 1 inside", "above": 0.0}
        )
        relative: bool = field(default=False, metadata={"help": "divide the fall by the first loss"})

    params: Params

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self._decisions = 0
        self._first = np.zeros(0, dtype=np.float32)

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.floating]:
        """Return how far losses have fallen since the first decision [N]; a row that joins later counts from its first.

        Raises:
            DataError: The data set is not the one that the first losses belong to.
        """
        losses = ctx.signals.losses(pool)
        finite = np.isfinite(losses)
        falls = np.full(len(pool), np.nan)
        falls[finite] = self._falls(pool[finite], losses[finite], ctx.signals.num_rows())
        self._decisions += 1
        return falls

    def preference(self, found: Found, ctx: Context) -> NDArray[np.floating]:
        """Return log weights of the draw, by window."""
        assert found.scores is not None
        return np.where(self._preferred(found.scores)[0], 0.0, math.log(self.params.outside_weight))

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return where the window was and how many rows are of it."""
        assert found.scores is not None
        in_window, how = self._preferred(found.scores)
        return how.format(int(in_window[kept].sum()))

    def _falls(self, rows: Rows, losses: NDArray[np.float32], num_rows: int) -> NDArray[np.float64]:
        if not len(self._first):
            self._first = np.full(num_rows, np.nan, dtype=np.float32)
        if len(self._first) != num_rows:
            raise DataError(
                f"delta_loss: the first losses are those of {len(self._first):,} rows, but the training set has "
                f"{num_rows:,}. Resume with the data set that the run began with."
            )
        self._first[rows] = np.where(np.isnan(self._first[rows]), losses, self._first[rows])
        first = self._first[rows].astype(np.float64)
        return relative_gain(first, losses, 0.0) if self.params.relative else first - losses

    def _preferred(self, falls: NDArray[np.floating]) -> tuple[NDArray[np.bool_], str]:
        """Return which rows are in the window, and what the reason says, with a place for their number."""
        p, inside = self.params, np.zeros(len(falls), dtype=np.bool_)
        if self._decisions <= 1:
            return inside, "drawn uniformly while first losses are recorded"
        progress = min(1.0, (self._decisions - 2) / max(1, p.updates - 1))
        start, stop = window(len(falls), progress, p.window_size, p.steepness)
        stop = min(stop, int(np.count_nonzero(falls >= 0)))
        if start >= stop:
            return inside, f"drawn uniformly: no row whose loss fell ranks {start} or later"
        inside[np.argsort(-falls, kind="stable")[start:stop]] = True
        return inside, f"drawn, {{}} of them of ranks {start} to {stop - 1} by the fall of their loss"

    def state_dict(self) -> State:
        """Return the number of decisions and the first losses."""
        return {"decisions": self._decisions, "first": self._first.copy()} if self._decisions else {}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave.

        Raises:
            ValueError: The state is not one of ours.
        """
        if state and set(state) != {"decisions", "first"}:
            raise ValueError(f"delta_loss keeps decisions and first, but was given {sorted(state)}")
        self._decisions = int(state["decisions"]) if state else 0
        self._first = np.array(state["first"] if state else [], dtype=np.float32)
