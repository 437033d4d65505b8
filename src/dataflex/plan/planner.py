"""Lays out the rows of an interval: whole epochs as the stock Trainer serves them, or chosen rows.

Pure functions of (pool, interval, seed). Every row in file order gives the stock run.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError, DataError
from dataflex.plan.domains import Domains, Rows
from dataflex.plan.orders import OrderedEpochs
from dataflex.plan.plan import BatchShape
from dataflex.plan.proportions import carried_counts, normalized
from dataflex.plan.schedule import Interval, Schedule
from dataflex.rng import permutations, stream
from dataflex.state import State


@lru_cache(maxsize=1)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> Rows:
    """Return the order of one epoch; kept, because consecutive intervals mostly lie in the same one."""
    order = stream(seed, "epoch", epoch).permutation(num_rows)
    order.flags.writeable = False
    return order


def epoch_stream(
    pool: Rows, interval: Interval, shape: BatchShape, seed: int, ordered: OrderedEpochs | None = None
) -> Rows:
    """Return an interval of the stream of whole epochs over the pool, int64 [interval.steps * global_batch].

    With ``shape.shuffle`` each epoch permutes the pool anew, unless it is ``ordered``. Short steps are filled up with
    -1.
    """
    batch, num = shape.global_batch, len(pool)
    epoch_steps, epoch_rows = shape.steps_per_epoch(num), shape.rows_per_epoch(num)
    rows = np.full(interval.steps * batch, -1, dtype=np.int64)
    step = interval.start_step
    while step < interval.stop_step:
        epoch, within = divmod(step, epoch_steps)
        stop_step = min(interval.stop_step, (epoch + 1) * epoch_steps)
        start = within * batch
        stop = min(start + (stop_step - step) * batch, epoch_rows)
        place = (step - interval.start_step) * batch
        if ordered is not None:
            ids = ordered.take(epoch * epoch_rows + start, stop - start)
        else:
            ids = pool[_epoch_order(num, seed, epoch)[start:stop]] if shape.shuffle else pool[start:stop]
        rows[place : place + stop - start] = ids
        step = stop_step
    return rows


class ResumedEpochs:
    """Whole epochs over a pool that was changed after ``step`` optimizer steps.

    Rows that were not served in the epoch in progress come first, then whole epochs follow; ``served`` are the rows [N]
    that were, and ``epochs`` those of all rows. Steps are as long as those of ``epoch_stream``.
    """

    def __init__(
        self, served: NDArray[np.bool_], step: int, shape: BatchShape, epochs: ShuffledEpochs | OrderedEpochs
    ) -> None:
        self._served, self._step, self._shape, self._epochs = served, step, shape, epochs
        epochs.begin(0, np.flatnonzero(served))
        self._first = int(served.sum()) - self._rows_before(step)

    def _rows_before(self, step: int) -> int:
        """Return the rows of all steps before ``step`` under this shape."""
        num, shape = len(self._served), self._shape
        epoch, within = divmod(step, shape.steps_per_epoch(num))
        return epoch * shape.rows_per_epoch(num) + min(within * shape.global_batch, shape.rows_per_epoch(num))

    def at(self, step: int) -> int:
        """Return the number in the stream of the first row of ``step``."""
        return self._first + self._rows_before(step)

    def stream(self, interval: Interval) -> Rows:
        """Return an interval of the stream, int64 [interval.steps * global_batch]."""
        rows = np.arange(len(self._served), dtype=np.int64)
        rows = epoch_stream(rows, interval, replace(self._shape, shuffle=False), 0)  # shows where a step is short
        places = np.flatnonzero(rows >= 0)
        rows[places] = self._epochs.take(self.at(interval.start_step), len(places))
        return rows

    def state_dict(self) -> State:
        """Return the change."""
        return {"served": np.packbits(self._served), "step": self._step}


def epoch_fill(
    pool: Rows, interval: Interval, shape: BatchShape, seed: int, ordered: OrderedEpochs | None = None
) -> Rows:
    """Return the rows that even out the short last step of an epoch over any number of ranks; empty without one.

    As in accelerate they are the first rows of the epoch, int64 [min(pool, global_batch)]. Where an interval ends
    several shuffled epochs, the first of these gives them.
    """
    epoch_steps, batch = shape.steps_per_epoch(len(pool)), shape.global_batch
    epoch = interval.start_step // epoch_steps
    if (epoch + 1) * epoch_steps > interval.stop_step or shape.rows_per_epoch(len(pool)) % batch == 0:
        return np.empty(0, dtype=np.int64)
    if ordered is not None:
        return ordered.head(epoch, batch).astype(np.int64)
    return pool[_epoch_order(len(pool), seed, epoch)[:batch]] if shape.shuffle else pool[:batch].copy()


def spread(
    rows: Rows,
    steps: int,
    global_batch: int,
    rng: np.random.Generator | None,
    repeat: bool,
    *,
    pool_rows: int | None = None,
) -> Rows:
    """Lay a selector's rows [n], in order of preference, out over the steps of an interval.

    ``rng`` shuffles them, None keeps the order. Where they are too few, ``repeat`` serves them in copies, each shuffled
    anew, the last one cut. ``pool_rows`` is the size of the pool, for the message.

    Returns:
        int64 [steps * global_batch].

    Raises:
        DataError: Too few rows and ``repeat`` is off, or none at all.
    """
    rows = np.asarray(rows, dtype=np.int64)
    wanted = steps * global_batch
    if rows.size == 0 or (rows.size < wanted and not repeat):
        of = "" if pool_rows is None else f" of {pool_rows:,}"
        advice = "Lower interval_steps or set 'repeat: true'." if rows.size else "Check the selector and its scores."
        raise DataError(f"interval of {steps} steps wants {wanted:,} rows; selector kept {rows.size:,}{of}. {advice}")
    rows = rows[:wanted]
    copies = -(-wanted // rows.size)
    return np.concatenate([rows if rng is None else rng.permutation(rows) for _ in range(copies)])[:wanted]


def warmup_rows(pool: Rows, interval: Interval, global_batch: int, seed: int, earlier: Rows) -> Rows:
    """Return uniformly drawn rows for an interval before the first decision, int64 [interval.steps * global_batch].

    Without replacement; when the interval is longer than the pool, re-shuffled copies of it. ``earlier`` are the rows
    of the warm-up before this interval, where the end of a shorter run cut it: the rows served least come first, so
    that none is served twice before all were served once.
    """
    wanted = interval.steps * global_batch
    rng = stream(seed, "warmup", interval.index)
    copies = []
    if len(earlier):
        times = np.bincount(earlier, minlength=int(pool.max()) + 1)[pool]
        least = np.flatnonzero(times == times.min())
        copies.append(rng.permutation(least if len(least) < len(pool) else 0)[:wanted])
        wanted -= len(copies[0])
    whole, part = divmod(wanted, len(pool))
    copies += [rng.permutation(len(pool)) for _ in range(whole)]
    # `choice` costs only what it draws, so a short warm-up over a huge pool is cheap.
    copies.append(rng.choice(len(pool), part, replace=False))
    return np.asarray(pool, dtype=np.int64)[np.concatenate(copies)]


_SMALL = 4096  # below, many epochs are made at once; above, one shuffle per epoch is faster and leaner


class ShuffledEpochs:
    """The endless stream of a domain: every row once, shuffled, then all again in another order.

    Epoch e is a permutation keyed by (seed, name, e) alone, so reading may start anywhere. Only the
    epoch last read is kept. Without ``shuffle`` every epoch has the order of ``rows`` [n].
    """

    def __init__(self, rows: Rows, name: str, seed: int, *, shuffle: bool = True) -> None:
        rows = np.asarray(rows, dtype=np.int64)
        # Half the memory for most data sets.
        fits = rows.size == 0 or int(rows.max()) <= np.iinfo(np.int32).max
        self._rows: NDArray[np.integer] = rows.astype(np.int32) if fits else rows
        self._seed, self._shuffle = seed, shuffle
        self._name = f"domain:{name}"
        self._epoch = -1
        self._order: NDArray[np.integer] = self._rows[:0]
        self._begun: tuple[int, Rows] | None = None

    def begin(self, epoch: int, served: Rows) -> None:
        """Make an epoch in progress of which these rows were served before: they are its first ones."""
        self._begun, self._epoch = (epoch, served), -1

    def take(self, first: int, count: int) -> NDArray[np.integer]:
        """Return rows number ``first`` to ``first + count - 1`` of the stream [count]; do not write to them."""
        size = self._rows.size
        epoch, last = first // size, (first + count - 1) // size
        order = self._order
        if self._epoch != epoch or last > epoch:
            low = epoch + 1 if self._epoch == epoch else epoch
            made = self._shuffled(low, last + 1 - low)
            order = made if low == epoch else np.concatenate([order, made])
            self._epoch = last
            self._order = order if order.size == size else order[-size:].copy()
        begin = first - epoch * size
        return order[begin : begin + count]

    def _shuffled(self, first: int, num: int) -> NDArray[np.integer]:
        """Return epochs ``first`` to ``first + num - 1``, one after another."""
        epochs = self._permuted(first, num)
        if self._begun is not None and first <= self._begun[0] < first + num:
            epoch = epochs.reshape(num, -1)[self._begun[0] - first]
            served = np.isin(epoch, self._begun[1])
            epoch[:] = np.concatenate([epoch[served], epoch[~served]])
        return epochs

    def _permuted(self, first: int, num: int) -> NDArray[np.integer]:
        if not self._shuffle:
            return np.tile(self._rows, num)
        if self._rows.size < _SMALL:
            return self._rows[permutations(self._seed, self._name, first, num, self._rows.size)].reshape(-1)
        epochs = [stream(self._seed, self._name, e).permutation(self._rows) for e in range(first, first + num)]
        return epochs[0] if num == 1 else np.concatenate(epochs)


class Candidates:
    """Gives every interval its pool, a function of (seed, optimizer step) alone.

    Every row with a supervised token (``usable`` [n]) is a candidate once before any is one again, whether it was
    chosen or not. There are ``batches`` candidates for each row that is served; warm-up takes none.

    Raises:
        ConfigError: An interval would need more candidates than there are rows.
        DataError: There is no usable row.
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

        A row at the end of one epoch and the beginning of the next is one candidate, so that there may be fewer than
        usual.
        """
        first = (interval.start_step - self._first_step) * self._per_step
        return np.unique(self._epochs.take(first, interval.steps * self._per_step)).astype(np.int64)


def quota_rows(
    kept: Rows,
    shares: NDArray[np.float64],
    total: int,
    interval: Interval,
    domains: Domains,
    *,
    seed: int,
    repeat: bool,
    shuffle: bool,
    earlier: Rows,
    carried: NDArray[np.float64],
) -> tuple[Rows, NDArray[np.float64]]:
    """Serve each domain's quota of ``total`` rows from the kept rows, without replacement while they last.

    ``shares`` are proportions of sequences by domain [K]. Domains come in random order, and so do the rows of a domain
    with ``shuffle``, else in the selector's order. With ``repeat`` rows are served again when a quota is larger than
    what was kept. Rows that were served since the selection was made (``earlier``) come last, by how often they were.
    ``carried`` is what quotas were rounded off before [K]; it is added, and what is carried on is returned beside. A
    domain of which nothing was kept waits, and is owed one row at most; its share goes to the others.

    Raises:
        DataError: A domain cannot fill its quota, or nothing was kept of any domain with a share.
    """
    domain_of = domains.domain_of[kept]
    waits = (np.bincount(domain_of, minlength=len(shares)) == 0) & (shares > 0)
    if waits.sum() == (shares > 0).sum():
        lost = ", ".join(repr(domains.names[k]) for k in np.flatnonzero(waits))
        raise DataError(
            f"interval {interval.index}: the selector kept no row of any domain that the mixer serves ({lost}). Raise "
            "dynamic.keep_ratio, or give other domains a proportion."
        )
    counts, rest = carried_counts(total, normalized(np.where(waits, 0.0, shares)), carried)
    carried = np.where(waits, np.minimum(carried + shares * total, 1.0), rest)
    times = np.bincount(earlier, minlength=len(domains.domain_of))
    parts = []
    for index, count in enumerate(counts.tolist()):
        if count == 0:
            continue
        name = domains.names[index]
        rows = kept[domain_of == index]
        if count > len(rows) and not repeat:
            raise DataError(
                f"interval {interval.index} wants {count:,} rows of domain {name!r}; the selector kept "
                f"{len(rows):,} of it. Raise dynamic.keep_ratio, lower interval_steps or set 'repeat: true'."
            )
        order = stream(seed, f"quota/{name}", interval.index)
        copies = [order.permutation(rows) if shuffle else rows for _ in range(-(-count // len(rows)))]
        copies = [copy[np.argsort(times[copy], kind="stable")] for copy in copies]
        parts.append(np.concatenate(copies)[:count])
    rows = np.concatenate(parts)
    places = stream(seed, "order", interval.index).permutation(len(rows))
    if not shuffle:  # the places that were drawn for a domain's rows take them in their order
        ends = np.cumsum([len(part) for part in parts])
        places[:] = np.argsort(np.searchsorted(ends, places, side="right"), kind="stable").argsort()
    return rows[places], carried
