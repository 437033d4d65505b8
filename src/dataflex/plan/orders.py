"""Rows in an orderer's order: the epochs of a pool or domain, and rows that were laid out without one.

Keys rank rows, smallest first, ties in file order, NaN last; an orderer's ``ranks`` say which rank is served at each
place. A key array holds one number for every training row [N].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import CheckpointError
from dataflex.plan.domains import Rows
from dataflex.plan.proportions import whole_part
from dataflex.rng import stream
from dataflex.state import State

Keys = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What an orderer says beside the keys."""

    ranks: Callable[[int, np.random.Generator], NDArray[np.int64]]  # a permutation of 0 to count - 1
    available: Callable[[int, int], float] | None  # share of an epoch by its first step; None: epochs hold all rows


def _ranked(rows: NDArray[np.integer], keys: Keys) -> NDArray[np.integer]:
    """Return ``rows``, which are ascending, by their keys."""
    return rows[np.argsort(keys[rows], kind="stable")]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Epoch:
    """An epoch from some place on."""

    number: int
    start: int  # number in the stream of its first row
    size: int  # number of its places
    first: int  # number in the stream of order[0]
    order: NDArray[np.integer]  # rows from there on


class OrderedEpochs:
    """The endless stream of a group of rows, epoch by epoch in an orderer's order.

    An epoch holds every row once; under a pace, the rows of smallest keys that are available at the step at which it
    begins. The ranks of its places are those of (seed, name, epoch). Keys may change during an epoch (``decide``): each
    place that is left gets the row of its rank among the rows that are left. So no row is served again before its
    epoch is over, and with the same keys the order goes on as it was, wherever it is cut. ``length`` is how many rows
    of an epoch are served, all if left out. With ``times`` [n] the stream is finite: epoch e holds the rows that are
    served more than e times.
    """

    def __init__(
        self,
        rows: Rows,
        name: str,
        seed: int,
        order: Order,
        *,
        length: int | None = None,
        times: NDArray[np.integer] | None = None,
    ) -> None:
        rows = np.asarray(rows, dtype=np.int64)
        fits = rows.size == 0 or int(rows.max()) <= np.iinfo(np.int32).max
        self._rows: NDArray[np.integer] = rows.astype(np.int32) if fits else rows
        self._name, self._seed, self._order = f"order:{name}", seed, order
        self._length = len(rows) if length is None else length
        self._times = times
        self._keys: Keys | None = None
        self._epochs: list[_Epoch] = []
        self._step_of: Callable[[int], int] = lambda number: 0
        self._total_steps = 1

    def wanted(self, at: int, count: int) -> NDArray[np.integer]:
        """Return the rows on whose keys rows number ``at`` to ``at + count - 1`` of the stream may depend."""
        epoch = self._epoch_at(at)
        whole = epoch is None or self._stop(epoch) < at + count
        return self._rows if epoch is None or whole else np.sort(epoch.order[at - epoch.first :])

    def decide(self, at: int, keys: Keys, step_of: Callable[[int], int], total_steps: int) -> None:
        """Serve from row number ``at`` of the stream on by these keys.

        ``step_of`` gives the optimizer step of a row's number in the stream, for the pace over ``total_steps``.
        """
        if not len(self._rows):
            return
        self._step_of, self._total_steps = step_of, total_steps
        epoch, same = self._epoch_at(at), keys is self._keys
        self._keys = keys
        if epoch is None:
            last = self._epochs[-1] if self._epochs else None
            if last is not None and self._stop(last) == at:
                number, start = last.number + 1, at
            elif self._order.available is not None:
                number, start = 0, at
            else:  # what was served before is not known: it counts as served by these keys
                number = at // self._length
                start = number * self._length
            epoch = self._begun(number, start)
        elif not same:
            left = _ranked(np.sort(epoch.order[at - epoch.first :]), keys)
            ranks = self._ranks(epoch.number, epoch.size)[at - epoch.start :]
            places = np.empty(len(ranks), dtype=np.int64)
            places[np.argsort(ranks)] = np.arange(len(ranks))
            epoch = _Epoch(number=epoch.number, start=epoch.start, size=epoch.size, first=at, order=left[places])
        self._epochs = [epoch]

    def begin(self, number: int, served: Rows) -> None:
        """Make an epoch in progress of which these rows were served before; a paced one begins afresh."""
        if self._order.available is None:
            left, start = np.setdiff1d(self._rows, served), number * self._length
            size, first = len(self._rows), start + len(self._rows) - len(left)
            self._keys, self._epochs = None, [_Epoch(number=number, start=start, size=size, first=first, order=left)]

    def take(self, first: int, count: int) -> NDArray[np.integer]:
        """Return rows number ``first`` to ``first + count - 1`` of the stream [count], from the last decision on.

        Raises:
            ValueError: A finite stream ends before.
        """
        parts = [self._rows[:0]]
        while self._stop(self._epochs[-1]) < first + count:
            last = self._epochs[-1]
            epoch = self._begun(last.number + 1, self._stop(last))
            if not epoch.size:
                raise ValueError(f"{first + count:,} rows are wanted of an order that ends after {epoch.start:,}")
            self._epochs.append(epoch)
        for epoch in self._epochs:
            low, high = max(first, epoch.first), min(first + count, self._stop(epoch))
            if low < high:
                parts.append(epoch.order[low - epoch.first : high - epoch.first])
        return np.concatenate(parts)

    def head(self, number: int, count: int) -> NDArray[np.integer]:
        """Return the first rows of an epoch as it would be by the keys of the last decision."""
        return self._begun(number, number * self._length).order[:count]

    def _stop(self, epoch: _Epoch) -> int:
        return epoch.start + min(epoch.size, self._length)

    def _epoch_at(self, at: int) -> _Epoch | None:
        return next((epoch for epoch in self._epochs if epoch.first <= at < self._stop(epoch)), None)

    def _ranks(self, number: int, size: int) -> NDArray[np.int64]:
        return self._order.ranks(size, stream(self._seed, self._name, number))

    def _begun(self, number: int, start: int) -> _Epoch:
        """Return a whole epoch."""
        assert self._keys is not None, "decide comes before take"
        own = self._rows if self._times is None else self._rows[self._times > number]
        rows = _ranked(own, self._keys)
        if self._order.available is not None:
            share = self._order.available(self._step_of(start), self._total_steps)
            rows = rows[: max(1, min(len(rows), whole_part(share, len(rows))))]
        order = rows[self._ranks(number, len(rows))]
        return _Epoch(number=number, start=start, size=len(rows), first=start, order=order)

    def state_dict(self, at: int) -> State:
        """Return what a resumed run needs when it has served the rows before number ``at``."""
        epoch = self._epoch_at(at) or (self._epochs[-1] if self._epochs else None)
        if epoch is None:
            return {}
        left = np.zeros(len(self._rows), dtype=np.bool_)
        left[np.searchsorted(self._rows, epoch.order[at - epoch.first :])] = True
        named = {"epoch": epoch.number, "start": epoch.start, "size": epoch.size, "at": at}
        return {**named, "left": np.packbits(left), "rows": len(self._rows)}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave; CheckpointError if it is of other rows."""
        self._keys, self._epochs = None, []
        if not state:
            return
        if state["rows"] != len(self._rows):
            raise CheckpointError(f"resume: the order is of {state['rows']:,} rows, and there are {len(self._rows):,}")
        left = np.unpackbits(state["left"], count=len(self._rows)).astype(np.bool_)
        epoch = _Epoch(
            number=int(state["epoch"]),
            start=int(state["start"]),
            size=int(state["size"]),
            first=int(state["at"]),
            order=self._rows[left],
        )
        self._epochs = [epoch]


def arranged(rows: Rows, keys: Keys, groups: NDArray[np.integer], order: Order, seed: int, name: str) -> Rows:
    """Return laid-out rows [n] with those of each group put in order among the places that the group has.

    ``groups`` [n] are numbers. A row that occurs several times comes once in each of as many epochs.
    """
    result = rows.copy()
    for group in np.unique(groups).tolist():
        places = np.flatnonzero(groups == group)
        own, times = np.unique(rows[places], return_counts=True)
        epochs = OrderedEpochs(own, f"{name}/{group}", seed, order, times=times)
        epochs.decide(0, keys, lambda number: 0, 1)
        result[places] = epochs.take(0, len(places))
    return result
