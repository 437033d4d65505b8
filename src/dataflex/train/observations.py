"""What training steps and passes showed of rows, and which of it is on a level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Rows
from dataflex.signals.specs import LEAST_ROWS

Floats = NDArray[np.float64]

_KEPT_ROWS, _KEPT_SKETCHES = 2**20, 4096  # newest observations that are kept, and those with sketches
_FITTED_ROWS = 2**14
_KEPT_NUMBERS = 2**25  # of rows' newest scores, and of their embeddings


def levels(steps: NDArray[np.int64], pilots: NDArray[np.bool_], goals: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return numbers of what has a level of its own: neighbouring steps with ``LEAST_ROWS`` of them, or pilots.

    What all gradients of a step share moves from step to step, most of all while the learning rate rises. Rows of
    targets (``goals``) have the level of the pilots of their decision, or of the last steps before it.
    """
    keys, index = np.unique(2 * steps + ~(pilots | goals), return_inverse=True)
    counts = np.bincount(index, ~goals, len(keys))  # a pass of its own comes before the step of its number
    passes, blocks, size = keys % 2 == 0, np.zeros(len(keys), dtype=np.int64), 0.0
    for i in range(1, len(keys)):
        size += counts[i - 1]
        apart = counts[i] >= LEAST_ROWS if passes[i] else passes[i - 1] or size >= LEAST_ROWS
        blocks[i] = blocks[i - 1] + apart
        size = 0.0 if apart else size
    last = blocks == blocks[-1]
    if counts[last].sum() < LEAST_ROWS and not last.all() and not passes[np.flatnonzero(~last)[-1]]:
        blocks[last] -= 1
    return blocks[index]


def centred(values: Floats, groups: NDArray[np.int64]) -> Floats:
    """Return ``values`` [n, K] less the means of their groups, which are numbered from 0."""
    counts = np.bincount(groups)[:, None]
    means = np.stack([np.bincount(groups, column) for column in values.T], axis=1) / counts
    found: Floats = values - means[groups]
    return found


def fitted_to(pilots: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return which observations a regression is fitted to: the newest pilots, and served rows evenly, 2^14 of each."""
    served = np.flatnonzero(~pilots)
    if len(served) > _FITTED_ROWS:
        served = served[np.linspace(0, len(served) - 1, _FITTED_ROWS).astype(np.int64)]
    return np.sort(np.concatenate([np.flatnonzero(pilots)[-_FITTED_ROWS:], served]))


def spreads(values: Floats, kinds: NDArray[np.int64], counted: Any) -> Floats:
    """Return the standard deviation of the ``counted`` values [n] of each one's kind, for each of ``values`` [n, K].

    Where none of a kind is counted it is that of the kind before.
    """
    found, scale = np.ones_like(values), np.ones(values.shape[1])
    for kind in np.unique(kinds):
        own = kinds == kind
        if (own & counted).any():
            scale = np.maximum(values[own & counted].std(axis=0), 1e-30)
        found[own] = scale
    return found


@dataclass(frozen=True, kw_only=True)
class Newest:
    """What the newest step that served a row showed of it, of the rows that were served last."""

    rows: Rows  # [n], each once, in the order of their steps
    steps: NDArray[np.int64]  # [n]
    values: NDArray[np.float32]  # [n, D]

    def and_(self, *more: Newest) -> Newest:
        """Return what is the newest of these and of ``more``, which are later; at most ``_KEPT_NUMBERS`` numbers."""
        rows, steps, values = (np.concatenate([getattr(one, name) for one in (self, *more)]) for name in vars(self))
        kept = np.sort(len(rows) - 1 - np.unique(rows[::-1], return_index=True)[1])
        kept = kept[-max(_KEPT_NUMBERS // values.shape[1], 1) :]
        return Newest(rows=rows[kept], steps=steps[kept], values=values[kept])


@dataclass(frozen=True, kw_only=True)
class Observations:
    """What became known of rows."""

    rows: Rows  # [n]; those of targets follow those of the pool
    intervals: NDArray[np.int64]  # in which they were looked at [n]
    steps: NDArray[np.int64]  # likewise [n]
    sketches: NDArray[np.float32]  # of their gradients [n, D]; D = 0 where no target asks for them
    values: Floats  # what else is asked of them [n, Q]
    scores: Floats  # pilots': by their decision's directions, others': by the newest [n, K]; NaN until then
    unbiased: NDArray[np.bool_]  # whether they were drawn uniformly [n]
    pilots: NDArray[np.bool_]  # whether they were looked at in a pass of their own [n]

    @property
    def kinds(self) -> NDArray[np.int64]:
        """Numbers of what has a scale of its own, since gradients shrink: rows of an interval, and pilots [n]."""
        return 2 * self.intervals + self.pilots

    def where(self, kept: Any) -> Observations:
        """Return some of them."""
        return Observations(**{name: value[kept] for name, value in vars(self).items()})

    def and_(self, more: Observations) -> Observations:
        """Return the newest of them and ``more``."""
        kept = _KEPT_SKETCHES if self.sketches.shape[1] else _KEPT_ROWS
        both = {name: np.concatenate([value, vars(more)[name]])[-kept:] for name, value in vars(self).items()}
        return Observations(**both)
