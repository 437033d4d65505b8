"""Paired differences over seeds: mean, bootstrap interval, p-value, and Holm's correction of many of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataflex.rng import stream

Floats = NDArray[np.float64]

_EVERY = 6  # up to this many seeds every resample is looked at
_FEWEST = 5  # seeds from which the interval is a bootstrap
_RESAMPLES = 20_000


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Values of one arm minus those of another, paired by seed."""

    pairs: int
    mean: float  # of the differences; NaN without pairs
    low: float | None  # interval; None with fewer than two pairs, or where all differ by the same
    high: float | None
    p: float | None  # two-sided; None likewise


def difference(values: Sequence[float], others: Sequence[float], level: float = 0.95) -> Difference:
    """Compare two arms whose values are paired by seed, [n] each.

    ``p`` is that of the paired t-test (two-sided). The interval is the bootstrap percentile interval of the mean,
    widened for few seeds (Hesterberg, The American Statistician 2015, "expanded percentile"): its tails are
    Phi(-sqrt(n / (n - 1)) t_{n-1}) instead of (1 - level) / 2, without which it would cover too rarely. Means of fewer
    than five differences never leave their range, which misses 0 by chance in 2^(1-n) of all cases: there it is the
    t-interval.
    """
    found = np.asarray(values, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    n, mean = len(found), float(found.mean()) if len(found) else math.nan
    if n < 2:
        return Difference(pairs=n, mean=mean, low=None, high=None, p=None)
    error = float(found.std(ddof=1)) / math.sqrt(n)
    if error <= 1e-12 * abs(mean):  # nothing varies: seeds without effect are one run, and say nothing of chance
        low, high, p = (0.0, 0.0, 1.0) if mean == 0 else (None, None, None)
        return Difference(pairs=n, mean=mean, low=low, high=high, p=p)
    from scipy import stats

    quantile = float(stats.t.ppf(0.5 + level / 2, n - 1))
    tail = float(stats.norm.cdf(-math.sqrt(n / (n - 1)) * quantile))
    low, high = mean - quantile * error, mean + quantile * error
    if n >= _FEWEST:
        low, high = np.quantile(resampled_means(found), [tail, 1 - tail])
    test = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return Difference(pairs=n, mean=mean, low=float(low), high=float(high), p=test)


def resampled_means(values: Floats) -> Floats:
    """Return the means of resamples of values [n]: of all n^n for few, else of 20,000 drawn ones."""
    n = len(values)
    if n <= _EVERY:
        places = np.array(list(itertools.product(range(n), repeat=n)))
    else:
        places = stream(0, "compare bootstrap", n).integers(0, n, size=(_RESAMPLES, n))
    means: Floats = values[places].mean(axis=1)
    return means


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values corrected for their number by Holm (1979): sorted, p_(i) (m - i + 1), never falling, at most 1.

    None is a test that came to no p-value, as of an arm whose runs failed: it counts as p = 1, so that the others are
    corrected for as many tests as were meant, and stays None.
    """
    known = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, at) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        corrected[at] = largest
    return corrected
