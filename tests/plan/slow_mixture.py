"""A mixture sampler that makes one row at a time from Python lists: slow, obvious, the oracle of the fast one."""

from __future__ import annotations

import math

import numpy as np

from dataflex.plan.planner import ShuffledEpochs
from dataflex.rng import keys


def slow_block(proportions, block, residual):
    """Counts of one block and the residual after it."""
    need = [p * block + e for p, e in zip(proportions, residual, strict=True)]
    counts = [max(math.floor(x), 0) for x in need]
    left = [x - c for x, c in zip(need, counts, strict=True)]
    served = [k for k, p in enumerate(proportions) if p > 0]
    while sum(counts) < block:
        k = max(served, key=lambda k: (left[k], -k))
        counts[k] += 1
        left[k] -= 1.0
    while sum(counts) > block:
        k = min((k for k in served if counts[k]), key=lambda k: (left[k], k))
        counts[k] -= 1
        left[k] += 1.0
    return counts, left


class SlowMixture:
    def __init__(self, rows, names, seed, block, limits=None, redistribute=False):
        self.rows, self.names, self.seed, self.block = rows, names, seed, block
        self.limits = limits or [math.inf] * len(rows)
        self.redistribute = redistribute
        self.drawn = [0] * len(rows)
        self.residual = [0.0] * len(rows)
        self.segment = -1
        self.starts = []
        self.position = 0

    def append(self, proportions):
        self._open(np.array(proportions))
        if self.redistribute:
            self._close_full()

    def _open(self, proportions):
        if self.segment >= 0 and self.place:
            served = self.labels[: self.place]
            pairs = enumerate(zip(self.proportions, self.residual, strict=True))
            self.residual = [e + (p * self.place - served.count(k)) for k, (p, e) in pairs]
        residual = np.where(proportions > 0, self.residual, 0.0)
        self.residual = (residual - residual.sum() * proportions).tolist()
        self.proportions = proportions.tolist()
        self.segment += 1
        self.starts.append(self.position)
        self.number, self.place, self.labels = 0, 0, None

    def _close_full(self):
        full = [d >= n and p > 0 for d, n, p in zip(self.drawn, self.limits, self.proportions, strict=True)]
        if any(full):
            left = np.where(full, 0.0, self.proportions)
            self._open(left / float(left.sum()))

    def _label(self):
        if self.labels is None:
            counts, self.after = slow_block(self.proportions, self.block, self.residual)
            in_order = [k for k, count in enumerate(counts) for _ in range(count)]
            places = np.arange(self.number * self.block, (self.number + 1) * self.block)
            by_key = keys(self.seed, "mixture", self.segment, places).tolist()
            self.labels = [in_order[i] for i in sorted(range(self.block), key=lambda i: by_key[i])]
        return self.labels[self.place]

    def next(self):
        """Row id of the next sequence; None when its domain is at its cap (unless redistributing)."""
        k = self._label()
        if self.drawn[k] >= self.limits[k]:
            if not self.redistribute:
                return None
            self._close_full()
            k = self._label()
        epoch, index = divmod(self.drawn[k], len(self.rows[k]))
        fresh = ShuffledEpochs(np.array(self.rows[k]), self.names[k], self.seed)
        row = int(fresh.take(epoch * len(self.rows[k]), len(self.rows[k]))[index])
        self.drawn[k] += 1
        self.position += 1
        self.place += 1
        if self.place == self.block:
            self.residual = self.after
            self.place, self.labels = 0, None
            self.number += 1
        return row
