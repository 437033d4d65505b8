"""Shares of n-grams in a small target, smoothed towards those of the pool (a Dirichlet prior).

A target of n n-grams, c of which fall into a bucket that has the share p of the pool's, has there the share

    (c + s p) / (n + s),

as if s n-grams of the pool had been seen beside it. An n-gram that the target does not have is then s / (n + s) times
as likely in the target as in the pool, whichever it is: a rare one is no evidence against a row, as it is when every
bucket gets the same count. The strength s is the one under which each row of the target is likeliest given the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["bucket_counts", "held_out_strength", "prior_ratios"]

_FACTORS = np.geomspace(0.01, 100.0, 33)
"""Strengths that are tried, in n-grams of the target."""
_ALONE = 3.0
"""Strength for a target of one row, in its n-grams, where nothing can be held out."""
_MOST_HELD = 512
"""Rows that are held out at most, evenly spaced."""


def bucket_counts(rows: Iterable[NDArray[np.integer]], buckets: int) -> NDArray[np.int64]:
    """Return how many n-grams fall into each bucket [buckets].

    Args:
        rows: Bucket of every n-gram of each row.
        buckets: Number of buckets.
    """
    total = np.zeros(buckets, dtype=np.int64)
    for row in rows:
        np.add.at(total, row, 1)
    return total


def prior_ratios(counts: NDArray[np.int64], p_pool: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
    """Return log of the smoothed share of each bucket in the target over its share in the pool, 0 where that is 0.

    Args:
        counts: n-grams of the target by bucket.
        p_pool: Shares in the pool.
        strength: s, n-grams of the pool that count beside the target's, above 0.
    """
    found = np.zeros(len(counts))
    known = p_pool > 0
    found[known] = np.log((counts[known] / p_pool[known] + strength) / (counts.sum() + strength))
    return found


def held_out_strength(rows: Sequence[NDArray[np.integer]], p_pool: NDArray[np.float64]) -> float:
    """Return the strength under which the target's rows are likeliest, each given the others.

    n-grams that neither the pool nor another row has are left out: they are impossible under every strength.

    Args:
        rows: Bucket of every n-gram of each of the target's rows, at least one row.
        p_pool: Shares of the buckets in the pool.
    """
    counts = bucket_counts(rows, len(p_pool))
    strengths = _FACTORS * counts.sum()
    if len(rows) < 2:
        return float(_ALONE * counts.sum())
    likelihoods = np.zeros(len(strengths))
    for place in np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _MOST_HELD)).astype(np.int64)):
        buckets, times = np.unique(rows[place], return_counts=True)
        left, shares = counts[buckets] - times, p_pool[buckets]
        known = (left > 0) | (shares > 0)
        left, shares, times = left[known], shares[known], times[known]
        total = counts.sum() - len(rows[place])
        likelihoods += np.log((left + strengths[:, None] * shares) / (total + strengths[:, None])) @ times
    return float(strengths[int(np.argmax(likelihoods))])
