"""Divides a run into intervals: warm-up, then stretches before each of which the data is decided anew."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A stretch of optimizer steps served from one decision."""

    index: int  # position among the intervals of the whole run, from 0
    kind: Literal["warmup", "dynamic"]  # ``warmup`` (uniform data, nothing decided) or ``dynamic``
    start_step: int  # first optimizer step, counted from 0
    stop_step: int  # one past the last

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.stop_step - self.start_step


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up, then intervals of equal length; the last one is cut at the end.

    Where methods have cadences of their own (``own``), an interval ends whenever one of them decides anew, and the
    other numbers are those of the ``dynamic`` block.

    Raises:
        ConfigError: There is no step, or no interval in a cycle.
    """

    warmup_steps: int = 0  # optimizer steps before the first decision
    interval_steps: int  # optimizer steps between decisions
    total_steps: int  # optimizer steps of the run
    cycle_steps: int | None = None  # steps after which warm-up and intervals start again; None: never
    own: Mapping[str, Schedule] = field(default_factory=dict)  # schedules that differ, by kind of method; all or none

    def __post_init__(self) -> None:
        assert self.warmup_steps >= 0, self
        assert self.interval_steps >= 1, self
        if self.total_steps < 1:
            raise ConfigError(f"total steps: must be a whole number >= 1, got {self.total_steps}")
        if self.cycle_steps is not None and self.cycle_steps <= self.warmup_steps:
            raise ConfigError(
                f"dynamic.cycle_steps: a cycle of {self.cycle_steps} steps is all warm-up "
                f"(dynamic.warmup_steps is {self.warmup_steps}); make it longer or lower warmup_steps"
            )

    def of(self, kind: str) -> Schedule:
        """Return the schedule of one kind of method."""
        return self.own.get(kind, self)

    def own_interval(self, kind: str, interval: Interval, until: int) -> tuple[Interval, bool]:
        """Return the rest of a method's own interval, and whether it is asked at the beginning of ``interval``.

        It is not while its last decision, for the steps before ``until`` (0: none), holds to the end of its own
        interval and another method's begins. The end of a shorter run cuts a decision.
        """
        step = interval.start_step
        own = self.of(kind).interval(step)
        cut = all(self.of(each).interval(step).start_step < step for each in self.own or (kind,))
        due = until < own.stop_step and (own.kind == "dynamic" or kind != "selector")
        asked = own.start_step == step or cut or due
        return replace(own, index=interval.index, start_step=step), asked

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """First steps of all intervals, where methods have schedules of their own."""
        each = [np.arange(own.warmup_steps, self.total_steps, own.interval_steps) for own in self.own.values()]
        return np.unique(np.concatenate([np.zeros(1, dtype=np.int64), *each]))

    def _merged(self, step: int) -> Interval:
        starts, total = self._starts, self.total_steps
        index = int(np.searchsorted(starts, step, side="right")) - 1
        kinds = {own.interval(step).kind for own in self.own.values()}
        return Interval(
            index=index,
            kind="dynamic" if "dynamic" in kinds else "warmup",
            start_step=int(starts[index]),
            stop_step=int(starts[index + 1]) if index + 1 < len(starts) else total,
        )

    def _index_in_cycle(self, step: int) -> int:
        if step < self.warmup_steps:
            return 0
        return (self.warmup_steps > 0) + (step - self.warmup_steps) // self.interval_steps

    def interval(self, step: int) -> Interval:
        """Return the interval that holds optimizer step ``step``, in constant time."""
        assert 0 <= step < self.total_steps, f"step {step} is outside the run of {self.total_steps} steps"
        if self.own:
            return self._merged(step)
        period = self.total_steps if self.cycle_steps is None else self.cycle_steps
        cycle, local = divmod(step, period)
        start = cycle * period
        stop = min(start + period, self.total_steps)
        index = cycle * (self._index_in_cycle(period - 1) + 1) + self._index_in_cycle(local)
        if local < self.warmup_steps:
            return Interval(
                index=index, kind="warmup", start_step=start, stop_step=min(start + self.warmup_steps, stop)
            )
        first = start + self.warmup_steps + (local - self.warmup_steps) // self.interval_steps * self.interval_steps
        return Interval(index=index, kind="dynamic", start_step=first, stop_step=min(first + self.interval_steps, stop))

    def intervals(self) -> Iterator[Interval]:
        """Yield all intervals in order; together they cover every step exactly once."""
        step = 0
        while step < self.total_steps:
            interval = self.interval(step)
            yield interval
            step = interval.stop_step

    @property
    def num_intervals(self) -> int:
        """Number of intervals of the run."""
        return self.interval(self.total_steps - 1).index + 1

    @property
    def all_warmup_steps(self) -> int:
        """Optimizer steps of all warm-ups together."""
        period = self.cycle_steps or self.total_steps
        cycles, rest = divmod(self.total_steps, period)
        return cycles * min(self.warmup_steps, period) + min(self.warmup_steps, rest)

    @property
    def num_decisions(self) -> int:
        """Number of intervals that have a decision."""
        period = self.cycle_steps or self.total_steps
        return self.num_intervals - (math.ceil(self.total_steps / period) if self.warmup_steps else 0)

    @property
    def first_decision(self) -> Interval | None:
        """The first interval that has a decision; none is longer."""
        return None if self.warmup_steps >= self.total_steps else self.interval(self.warmup_steps)

    def decided(self) -> Iterator[Interval]:
        """Yield the intervals that have a decision."""
        return (interval for interval in self.intervals() if interval.kind == "dynamic")


_PILOT_SHARE = 0.05
_FEWEST_PILOTS, _MOST_PILOTS = 32, 4096


def pool_sizes(num_rows: int, pool_fraction: float, screen_fraction: float) -> tuple[int, int]:
    """Return the rows drawn for a pool, and those left once they are screened; shares are of all rows."""
    drawn = max(1, round(pool_fraction * num_rows))
    return drawn, max(1, round(screen_fraction * drawn))


def wanted_rows(interval: Interval, global_batch: int, pool_rows: int, keep_ratio: float | None, mixes: bool) -> int:
    """Return how many rows a selector is asked for: those of the interval, or ``keep_ratio`` of ``pool_rows``.

    With ``mixes`` a mixer sets quotas over what is kept, which may then be more than the interval serves.
    """
    sequences = interval.steps * global_batch
    if keep_ratio is None:
        assert not mixes
        return sequences
    share = max(1, round(keep_ratio * pool_rows))
    return share if mixes else min(sequences, share)


def pilot_rows(num_rows: int) -> int:
    """Return how many of ``num_rows`` rows screening by a pilot scores exactly."""
    return min(num_rows, max(_FEWEST_PILOTS, min(_MOST_PILOTS, round(_PILOT_SHARE * num_rows))))
