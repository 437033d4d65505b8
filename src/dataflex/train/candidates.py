"""The candidates of online batch selection: the next rows of shuffled epochs, of which an interval keeps a part."""

from __future__ import annotations

import numpy as np

from dataflex.errors import ConfigError, DataError
from dataflex.method import Rows
from dataflex.plan.planner import ShuffledEpochs
from dataflex.plan.schedule import Interval, Schedule

__all__ = ["Candidates"]


class Candidates:
    """Gives every interval its pool, a function of (seed, optimizer step) alone.

    Every row is a candidate once before any is one again, whether it was chosen or not. Nothing is remembered: a
    resumed run, or one on other ranks, is given the same.

    Args:
        usable: Rows with a supervised token, the only ones that can be chosen [n].
        batches: Candidates for each row that is served.
        global_batch: Rows of one optimizer step.
        schedule: Intervals of the run; warm-up takes no candidates.
        seed: Seed of the run.

    Raises:
        ConfigError: An interval would look at more rows than there are.
        DataError: No row has a supervised token.
    """

    def __init__(self, usable: Rows, *, batches: int, global_batch: int, schedule: Schedule, seed: int) -> None:
        if not len(usable):
            raise DataError("no training row has a supervised token, so there is no candidate to choose")
        self._per_step = batches * global_batch
        self._first_step = schedule.warmup_steps
        wanted = self._per_step * min(schedule.interval_steps, max(1, schedule.total_steps - schedule.warmup_steps))
        if wanted > len(usable):
            raise ConfigError(
                f"dynamic.candidate_batches: {batches} x {schedule.interval_steps:,} steps x {global_batch:,} rows are "
                f"{wanted:,} candidates, and only {len(usable):,} rows have a supervised token; lower it, or "
                "interval_steps"
            )
        self._epochs = ShuffledEpochs(usable, "dynamic.candidate_batches", seed)

    def pool(self, interval: Interval) -> Rows:
        """Return the candidates of an interval, ascending and distinct.

        Where one epoch ends and the next begins, a row that is in both parts is one candidate, so that there may be
        fewer than usual; with two batches or more they are enough.
        """
        first = (interval.start_step - self._first_step) * self._per_step
        return np.unique(self._epochs.take(first, interval.steps * self._per_step)).astype(np.int64)
