"""Lays out the rows of an interval: whole epochs as the stock Trainer serves them, or chosen rows.

Pure functions of (pool, interval, seed). The arithmetic of epochs is that of transformers' Trainer
with accelerate's even batches, so that every row in file order gives the stock run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError, DataError
from dataflex.plan.domains import Rows
from dataflex.plan.schedule import Interval
from dataflex.rng import permutations, stream


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True, kw_only=True)
class EpochLayout:
    """How many micro-batches and optimizer steps an epoch over the whole pool has.

    Attributes:
        num_rows: Rows of the pool.
        global_batch: Sequences of an optimizer step over all ranks and micro-batches.
        micro_batch_size: Sequences per rank and micro-batch.
        world: Data-parallel ranks.
        drop_last: Whether micro-batches that would not be full on every rank are dropped.

    Raises:
        ConfigError: The global batch is no multiple of world * micro_batch_size.
        DataError: An epoch would be empty.
    """

    num_rows: int
    global_batch: int
    micro_batch_size: int
    world: int
    drop_last: bool = False

    def __post_init__(self) -> None:
        for name in ("global_batch", "micro_batch_size", "world"):
            assert getattr(self, name) >= 1, f"{name} is {getattr(self, name)}"
        if self.global_batch % (self.world * self.micro_batch_size):
            raise ConfigError(
                f"a global batch of {self.global_batch} sequences cannot be split over {self.world} ranks with "
                f"{self.micro_batch_size} sequences per device. Make per_device_train_batch_size x "
                f"gradient_accumulation_steps x {self.world} equal {self.global_batch}."
            )
        if self.num_rows < 1:
            raise DataError("the training set has no rows")
        if self.micro_batches_per_epoch == 0:
            raise DataError(
                f"dataloader_drop_last leaves nothing of {self.num_rows:,} rows: {self.world} ranks x "
                f"{self.micro_batch_size} sequences need {self.world * self.micro_batch_size:,}. Use smaller batches."
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches of a full optimizer step."""
        return self.global_batch // (self.world * self.micro_batch_size)

    @property
    def micro_batches_per_epoch(self) -> int:
        """Micro-batches of each rank in an epoch: the length of its data loader."""
        if self.drop_last:
            return self.num_rows // self.micro_batch_size // self.world
        return _ceil_div(_ceil_div(self.num_rows, self.micro_batch_size), self.world)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last may be short."""
        return _ceil_div(self.micro_batches_per_epoch, self.accumulation)

    @property
    def rows_per_epoch(self) -> int:
        """Rows served in an epoch, not counting those that only even out the ranks."""
        return self.micro_batches_per_epoch * self.world * self.micro_batch_size if self.drop_last else self.num_rows

    def rows_in_step(self, step: int) -> int:
        """Rows of optimizer step ``step`` of the run, not counting those that only even out the ranks."""
        within = step % self.steps_per_epoch
        return min(self.global_batch, self.rows_per_epoch - within * self.global_batch)


@lru_cache(maxsize=1)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> Rows:
    """Order of one epoch; kept, because consecutive intervals mostly lie in the same one."""
    order = stream(seed, "epoch", epoch).permutation(num_rows)
    order.flags.writeable = False
    return order


def _epoch_rows(pool: Rows, start: int, stop: int, seed: int, shuffle: bool, epoch: int) -> Rows:
    """Places ``start`` to ``stop - 1`` of an epoch."""
    return pool[_epoch_order(len(pool), seed, epoch)[start:stop]] if shuffle else pool[start:stop]


def epoch_stream(pool: Rows, interval: Interval, layout: EpochLayout, seed: int, shuffle: bool) -> Rows:
    """Return an interval of the stream of whole epochs over the pool.

    Step s of the run lies in epoch s // steps_per_epoch. No other epoch is generated.

    Args:
        pool: Row ids [layout.num_rows].
        interval: Steps of the run.
        layout: Arithmetic of an epoch.
        seed: Seed of the run.
        shuffle: A new permutation every epoch, else the order of ``pool``.

    Returns:
        int64 [interval.steps * global_batch], short steps filled up with -1.
    """
    assert len(pool) == layout.num_rows, f"{len(pool)} rows, but the layout is of {layout.num_rows}"
    batch = layout.global_batch
    rows = np.full(interval.steps * batch, -1, dtype=np.int64)
    step = interval.start_step
    while step < interval.stop_step:
        epoch, within = divmod(step, layout.steps_per_epoch)
        stop_step = min(interval.stop_step, (epoch + 1) * layout.steps_per_epoch)
        start = within * batch
        stop = min(start + (stop_step - step) * batch, layout.rows_per_epoch)
        place = (step - interval.start_step) * batch
        rows[place : place + stop - start] = _epoch_rows(pool, start, stop, seed, shuffle, epoch)
        step = stop_step
    return rows


def epoch_fill(pool: Rows, interval: Interval, layout: EpochLayout, seed: int, shuffle: bool) -> Rows:
    """Return the rows that even out the short last step of an epoch over ranks.

    As accelerate does: the first rows of the epoch. They serve any number of ranks. Where an interval
    ends several shuffled epochs, the first of these gives them.

    Returns:
        int64 [min(pool, global_batch)], or empty when no step of the interval is short.
    """
    last_of_epoch = (interval.start_step // layout.steps_per_epoch + 1) * layout.steps_per_epoch - 1
    if last_of_epoch >= interval.stop_step or layout.rows_in_step(last_of_epoch) == layout.global_batch:
        return np.empty(0, dtype=np.int64)
    epoch = last_of_epoch // layout.steps_per_epoch
    return _epoch_rows(pool, 0, layout.global_batch, seed, shuffle, epoch).copy()


def spread(
    rows: Rows,
    steps: int,
    global_batch: int,
    rng: np.random.Generator | None,
    repeat: bool,
    *,
    pool_rows: int | None = None,
) -> Rows:
    """Lay a selector's rows out over the steps of an interval.

    Args:
        rows: Chosen row ids in order of preference [n].
        steps: Optimizer steps of the interval.
        global_batch: Sequences per step.
        rng: Shuffles what is served; None keeps the order.
        repeat: Whether rows may be served several times when there are too few: then whole copies and
            a part of one, each shuffled anew, so that every row appears floor or ceil of the mean times.
        pool_rows: Size of the pool that was chosen from, for the message.

    Returns:
        int64 [steps * global_batch]; the first that many of ``rows`` when there are more.

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
    copies = _ceil_div(wanted, rows.size)
    return np.concatenate([rows if rng is None else rng.permutation(rows) for _ in range(copies)])[:wanted]


def warmup_rows(pool: Rows, interval: Interval, global_batch: int, seed: int, earlier: Rows | None = None) -> Rows:
    """Return uniformly drawn rows for an interval before the first decision.

    Without replacement; when the interval is longer than the pool, re-shuffled copies of it.

    Args:
        pool: Row ids [n].
        interval: Steps to serve.
        global_batch: Sequences per step.
        seed: Seed of the run; with the interval's index the only source of randomness.
        earlier: What the warm-up served before this interval, where the end of a shorter run cut it. The rows
            that it served least come first, so that none is served twice before all were served once.

    Returns:
        int64 [interval.steps * global_batch].

    Raises:
        DataError: The pool is empty.
    """
    if len(pool) == 0:
        raise DataError("the training set has no rows")
    wanted = interval.steps * global_batch
    rng = stream(seed, "warmup", interval.index)
    copies = []
    if earlier is not None and len(earlier):
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
    epoch last read is kept. Where nothing is shuffled, every epoch has the order of ``rows``.

    Args:
        rows: Row ids, int64 [n], n > 0.
        name: Name of the domain.
        seed: Seed of the run.
        shuffle: Whether the rows of an epoch are shuffled.
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
        """Epochs ``first`` to ``first + num - 1``, one after another."""
        if not self._shuffle:
            return np.tile(self._rows, num)
        if self._rows.size < _SMALL:
            return self._rows[permutations(self._seed, self._name, first, num, self._rows.size)].reshape(-1)
        epochs = [stream(self._seed, self._name, e).permutation(self._rows) for e in range(first, first + num)]
        return epochs[0] if num == 1 else np.concatenate(epochs)


def serve(
    labels: NDArray[np.unsignedinteger],
    used: NDArray[np.int64],
    drawn: NDArray[np.int64],
    streams: Sequence[ShuffledEpochs],
) -> Rows:
    """Give every label the next row of its domain.

    Args:
        labels: Domain of each sequence [n].
        used: Occurrences of each domain in ``labels`` [K].
        drawn: Rows of each domain read before [K].
        streams: The domains' rows [K].

    Returns:
        Row ids int64 [n].
    """
    by_domain = np.empty(labels.size, dtype=np.int64)
    stop = 0
    for k in np.flatnonzero(used).tolist():
        start, stop = stop, stop + int(used[k])
        by_domain[start:stop] = streams[k].take(int(drawn[k]), int(used[k]))
    rows = np.empty_like(by_domain)
    rows[np.argsort(labels, kind="stable")] = by_domain
    return rows
