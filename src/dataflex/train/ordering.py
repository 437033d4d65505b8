"""What the orderer decided: keys of rows, and epochs in their order.

Which rows are served, a selection, a mixture or the whole pool says; the orderer says in which order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Context, Orderer, Rows, Selection, State
from dataflex.plan.orders import Keys, OrderedEpochs, arranged
from dataflex.plan.plan import BatchShape
from dataflex.plan.planner import ResumedEpochs, epoch_stream
from dataflex.plan.schedule import Interval, Schedule
from dataflex.rng import uniforms
from dataflex.train.row_space import RowSpace
from dataflex.validate import check_sort_keys, order_of


@dataclass(kw_only=True)
class Ordering:
    """Asks an orderer for keys, which stand until it is asked anew, and puts rows in their order.

    ``context`` makes what the orderer may look at. ``whole_pool``: no other method says which rows are served.
    """

    orderer: Orderer
    space: RowSpace
    schedule: Schedule
    shape: BatchShape
    seed: int
    context: Callable[[Interval], Context]
    whole_pool: bool

    def __post_init__(self) -> None:
        self._order = order_of(self.orderer)
        self.epochs: OrderedEpochs | None = None  # of the whole pool or of a selection, without a mixer
        self._keys: Keys | None = None  # what the orderer gave last [N]
        self._standing: Keys | None = None  # keys in force [N]
        self._until = 0  # the step to whose beginning they were asked for
        self._selected: dict[str, Any] = {"at": 0}  # of which selection the epochs are, and how much is planned
        if self.whole_pool:
            self.begin("", self.shape.rows_per_epoch(self.space.num_rows))

    def begin(self, name: str, length: int | None = None) -> OrderedEpochs:
        """Return new epochs over all rows, which are served from now on."""
        self.epochs = OrderedEpochs(self.space.all_rows(), name, self.seed, self._order, length=length)
        return self.epochs

    def keys(
        self,
        interval: Interval,
        rows: Callable[[int], NDArray[np.integer]],
        *,
        fresh: bool = False,
        scores: NDArray[np.floating] | None = None,
    ) -> tuple[Keys, str]:
        """Return the orderer's keys [N], NaN for rows that it was not asked about, and the reason.

        They stand while it is not asked anew, but for a ``fresh`` selection. During warm-up they are random. ``rows``
        gives the rows to ask about, for sequences until its next decision; ``scores`` are the selector's [N].
        """
        own, asked = self.schedule.own_interval("orderer", interval, 0 if self._standing is None else self._until)
        needs, reason = self.orderer.requires(), self.orderer.reason
        if own.kind == "warmup" or (needs.selector_scores and fresh and scores is None):
            reason = "order: random in warm-up" if own.kind == "warmup" else "order: random, without scores"
        if self._standing is not None and not fresh and (not asked or needs.selector_scores):
            return self._standing, reason
        self._until = own.stop_step
        every = self.space.all_rows()
        if reason != self.orderer.reason:
            self._standing = uniforms(self.seed, "order/random", interval.index, every)
            return self._standing, reason
        same = not needs.needs_interval and not needs.selector_scores
        if self._keys is None or not same:
            asked_for = every if same else np.unique(rows(own.steps * self.shape.global_batch)).astype(np.int64)
            given = self.orderer.sort_keys(asked_for, replace(self.context(own), scores=scores))
            self._keys = np.full(len(every), np.nan)
            self._keys[asked_for] = check_sort_keys(self.orderer, given, asked_for)
        self._standing = self._keys
        return self._keys, reason

    def _keys_within(self, interval: Interval, pool: Rows, selection: Selection, fresh: bool) -> tuple[Keys, str]:
        """Return keys of a selection's rows, and the reason."""
        scores = None
        if selection.scores is not None:
            scores = np.full(self.space.num_rows, np.nan)
            scores[pool] = selection.scores
        return self.keys(interval, lambda count: selection.rows, fresh=fresh, scores=scores)

    def quota(self, interval: Interval, pool: Rows, selection: Selection, fresh: bool, rows: Rows) -> tuple[Rows, str]:
        """Return laid-out rows of a selection, those of each domain in order among its places, and the reason."""
        keys, reason = self._keys_within(interval, pool, selection, fresh)
        groups, name = self.space.domains.domain_of[rows], f"quota {interval.index}"
        return arranged(rows, keys, groups, self._order, self.seed, name), reason

    def selection(self, interval: Interval, pool: Rows, selection: Selection, laid: Rows | None) -> tuple[Rows, str]:
        """Return the rows of an interval from a selection in order, and the reason.

        ``laid`` are the rows that the selection serves until the next one; None where the last one stands.
        """
        if laid is not None:
            own, times = np.unique(laid, return_counts=True)
            self._select({"rows": own, "times": times, "number": interval.index, "at": 0})
        assert self.epochs is not None
        keys, reason = self._keys_within(interval, pool, selection, laid is not None)
        at, count = self._selected["at"], interval.steps * self.shape.global_batch
        self.epochs.decide(at, keys, lambda number: 0, 1)
        self._selected["at"] = at + count
        return self.epochs.take(at, count).astype(np.int64), reason

    def _select(self, selected: dict[str, Any]) -> None:
        self._selected, name = selected, f"selection {selected['number']}"
        self.epochs = OrderedEpochs(selected["rows"], name, self.seed, self._order, times=selected["times"])

    def pool(self, interval: Interval, resumed: ResumedEpochs | None) -> tuple[Rows, str]:
        """Return the rows of an interval of the whole pool in order, and the reason."""
        assert self.epochs is not None
        batch, num, step, epochs = self.shape.global_batch, self.space.num_rows, interval.start_step, self.epochs
        at, count = step * batch, interval.steps * batch
        if resumed is not None:
            at = resumed.at(step)
        elif not self.orderer.paced:
            epoch, within = divmod(step, self.shape.steps_per_epoch(num))
            at = epoch * self.shape.rows_per_epoch(num) + within * batch
        keys, reason = self.keys(interval, lambda count: epochs.wanted(at, count))
        epochs.decide(at, keys, lambda number: number // batch, self.schedule.total_steps)
        if resumed is not None:
            rows = resumed.stream(interval)
        elif self.orderer.paced:
            rows = epochs.take(at, count).astype(np.int64)
        else:
            rows = epoch_stream(self.space.all_rows(), interval, self.shape, self.seed, epochs)
        self._selected["at"] = at + int((rows >= 0).sum())
        return rows, reason

    def state_dict(self) -> State:
        """Return the epochs in progress, and the keys where they cannot be asked for again."""
        needs, warm = self.orderer.requires(), self.schedule.of("orderer").warmup_steps > 0
        changes = needs.needs_interval or needs.selector_scores or warm
        return {
            "ordered": {} if self.epochs is None else self.epochs.state_dict(self._selected["at"]),
            "selected": self._selected,
            "standing": self._standing if self.schedule.own and changes else None,
            "standing_until": self._until,
        }

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self._selected, self._standing = {**state["selected"]}, state["standing"]
        self._until = state["standing_until"]
        if "rows" in self._selected:
            self._select(self._selected)
        if self.epochs is not None:
            self.epochs.load_state_dict(state["ordered"])
