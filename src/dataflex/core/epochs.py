"""Reading a set of rows over and over, each time in another order, at any position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dataflex.core.protocols import Rows
from dataflex.core.rng import permutations, stream

__all__ = ["ShuffledEpochs", "serve"]

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
