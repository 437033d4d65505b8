"""Gaussian-kernel density of a cluster, and the rows that stand for it best: greedy maximum mean discrepancy.

The parts of COINCIDE (arXiv 2406.10995) that look inside a cluster. Kernels are float64, since differences of
close means are lost in fewer digits, and made in stripes: all pairs of a cluster are never held at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["density", "gaussian_kernel", "greedy_mmd"]

_CELLS = 1 << 22  # kernel values held at a time: 32 MiB


def gaussian_kernel(left: NDArray[np.floating], right: NDArray[np.floating], gamma: float = 1.0) -> NDArray[np.float64]:
    """Return exp(-|x - y|^2 / (2 gamma^2)) of all pairs, float64 [n, m]."""
    a, b = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    squares = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2.0 * (a @ b.T)
    return np.asarray(np.exp(np.maximum(squares, 0.0) / (-2.0 * gamma * gamma)))


def _row_means(rows: NDArray[np.float64], gamma: float) -> Iterator[NDArray[np.float64]]:
    step = max(1, _CELLS // len(rows))
    for start in range(0, len(rows), step):
        yield gaussian_kernel(rows[start : start + step], rows, gamma).mean(axis=1)


def density(rows: NDArray[np.floating], gamma: float = 1.0) -> float:
    """Return D: the mean kernel over all pairs of rows [n, d], each with itself included; n >= 1."""
    return float(np.concatenate(list(_row_means(np.asarray(rows, dtype=np.float64), gamma))).mean())


def greedy_mmd(rows: NDArray[np.floating], count: int, gamma: float = 1.0) -> NDArray[np.int64]:
    """Return positions of rows whose distribution is closest to that of all rows, added one at a time.

    Each step adds the row x that makes the squared maximum mean discrepancy of the chosen rows S (m of them) to all
    rows least: (Q + 2 b_x + k(x, x)) / (m + 1)^2 - 2 (A + a_x) / (m + 1), with a_x the mean kernel of x with all
    rows, b_x its sum with S, Q the sum over pairs of S, and A the sum of a over S. O(n d) a step.

    Args:
        rows: Vectors [n, d], finite.
        count: How many.
        gamma: Width of the kernel.

    Returns:
        int64 [min(count, n)] in the order added; ties to the smaller position.
    """
    vectors = np.asarray(rows, dtype=np.float64)
    chosen = np.empty(min(count, len(vectors)), dtype=np.int64)
    if not len(chosen):
        return chosen
    means = np.concatenate(list(_row_means(vectors, gamma)))
    near = np.zeros(len(vectors))
    free = np.ones(len(vectors), dtype=np.bool_)
    pairs = aligned = 0.0
    for m in range(len(chosen)):
        # k(x, x) = 1.
        value = (pairs + 2.0 * near + 1.0) / (m + 1) ** 2 - 2.0 * (aligned + means) / (m + 1)
        best = int(np.argmin(np.where(free, value, np.inf)))
        chosen[m], free[best] = best, False
        pairs += 2.0 * near[best] + 1.0
        aligned += means[best]
        near += gaussian_kernel(vectors[best : best + 1], vectors, gamma)[0]
    return chosen
