"""Probabilities of TSDS: mass of target rows spread over their neighbours, corrected for near-duplicates.

"TSDS: Data Selection for Task-Specific Model Finetuning", NeurIPS 2024, arXiv 2410.11303, algorithm 1 with the
stop rule and the final step of the authors' code. Pure functions in float64.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["epanechnikov", "tsds_probabilities"]

_CELLS = 1 << 24  # distances held at a time: 128 MiB of float64


def epanechnikov(vectors_ND: NDArray[np.float32], sigma: float, k: int) -> NDArray[np.float64]:
    """Return each density: the sum of max(0, 1 - distance**2 / sigma**2) over the k nearest, itself among them.

    Args:
        vectors_ND: Vectors [N, D], finite.
        sigma: Radius of the kernel, > 0.
        k: Vectors counted at most, >= 1.

    Returns:
        float64 [N], each at least 1.
    """
    squares = np.einsum("nd,nd->n", vectors_ND, vectors_ND, dtype=np.float64)
    density = np.empty(len(vectors_ND))
    size = max(1, _CELLS // max(1, len(vectors_ND)))
    for start in range(0, len(vectors_ND), size):
        part = slice(start, start + size)
        kernel = (vectors_ND[part] @ vectors_ND.T).astype(np.float64)
        kernel *= -2.0
        kernel += squares[part, None]
        kernel += squares
        np.clip(1.0 - kernel / sigma**2, 0.0, 1.0, out=kernel)
        # A vector's distance to itself is 0 exactly, whatever the rounding of the products.
        kernel[np.arange(len(kernel)), start + np.arange(len(kernel))] = 1.0
        crowded = np.flatnonzero(np.count_nonzero(kernel, axis=1) > k)
        density[part] = kernel.sum(axis=1)
        if crowded.size:
            density[start + crowded] = np.partition(kernel[crowded], -k, axis=1)[:, -k:].sum(axis=1)
    return density


def _widen(distances: list[list[float]], places: list[list[float]], alpha: float, c: float) -> tuple[float, list[int]]:
    """Return the count s at which the walk stops, and the last neighbour that each query took whole.

    ``places[j][k]`` is 1 / density. All queries grow in step: the one of the smallest count goes next.
    """
    num_queries, width = len(distances), len(distances[0])
    heap = [(places[j][0], 0, j) for j in range(num_queries)]
    heapq.heapify(heap)
    moved = [distances[j][0] * places[j][0] for j in range(num_queries)]
    cost = [0.0] * num_queries
    last = [0] * num_queries
    total = count = 0.0
    while heap:
        count, k, j = heapq.heappop(heap)
        total -= cost[j]
        cost[j] = distances[j][k + 1] * count - moved[j]
        total += cost[j]
        if alpha / c * total >= (1.0 - alpha) * num_queries:
            break
        last[j] = k
        if k < width - 2:
            heapq.heappush(heap, (count + places[j][k + 1], k + 1, j))
            moved[j] += distances[j][k + 1] * places[j][k + 1]
    return count, last


def tsds_probabilities(
    distances: ArrayLike, neighbours: ArrayLike, densities: ArrayLike, num_rows: int, *, alpha: float, c: float
) -> NDArray[np.float64]:
    """Return the probability of each row.

    Query j's neighbours 0..last_j get 1 / (M s density) each, the next one what is left of 1 / M. Where the
    walk stops before a query's own first count, that share would exceed 1 / M: it is cut there (the authors'
    code stops with an assertion).

    Args:
        distances: Distance of each query to its neighbours, ascending [M, K].
        neighbours: Their positions, 0 <= position < num_rows [M, K].
        densities: Their densities, >= 1 [M, K].
        num_rows: Number of rows N.
        alpha: Weight of closeness against diversity, 0 to 1.
        c: Scale of the distances, > 0.

    Returns:
        float64 [N] with sum 1.
    """
    found = np.asarray(neighbours, dtype=np.int64)
    places = 1.0 / np.asarray(densities, dtype=np.float64)
    far = np.asarray(distances, dtype=np.float64)
    num_queries, width = far.shape
    assert found.shape == places.shape == far.shape, "one neighbour and one density per distance"
    if width == 1:  # nothing to widen
        return np.bincount(found[:, 0], minlength=num_rows) / num_queries
    count, last = _widen(far.tolist(), places.tolist(), alpha, c)
    rank, end = np.arange(width), np.asarray(last)[:, None]
    whole = np.where(rank <= end, places / (num_queries * count), 0.0)
    reached = np.minimum(np.cumsum(whole, axis=1), 1.0 / num_queries)
    reached[rank[None, :] >= end + 1] = 1.0 / num_queries
    mass = np.diff(reached, axis=1, prepend=0.0)
    probabilities = np.bincount(found.ravel(), weights=mass.ravel(), minlength=num_rows)
    return probabilities / probabilities.sum()
