"""Probabilities of TSDS: mass of target rows spread over their neighbours, corrected for near-duplicates.

"TSDS: Data Selection for Task-Specific Model Finetuning", NeurIPS 2024, arXiv 2410.11303, algorithm 1 with the
stop rule and the final step of the authors' code. Pure functions in float64.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["epanechnikov", "kernel_sums", "tsds_probabilities", "tsds_widened"]

_CELLS = 1 << 23  # products held at a time: 32 MiB of float32, and at worst five times that for their kernel values
_DENSE = 16  # one pair in so many within the kernel: all kernel values are computed at once
_FIRST_WIDTH = 64  # neighbours of a query that the walk is first tried with


def epanechnikov(
    vectors_ND: NDArray[np.float32], sigma: float, k: int, of: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Return densities: the sum of max(0, 1 - distance**2 / sigma**2) over a vector's k nearest, itself among them.

    Args:
        vectors_ND: Vectors [N, D], finite.
        sigma: Radius of the kernel, > 0.
        k: Vectors counted at most, >= 1.
        of: Positions [m] whose densities are wanted; default all.

    Returns:
        float64 [m], each at least 1.
    """
    places = np.arange(len(vectors_ND)) if of is None else of
    squares = np.einsum("nd,nd->n", vectors_ND, vectors_ND, dtype=np.float64)
    density = np.empty(len(places))
    size = max(1, _CELLS // max(1, len(vectors_ND)))
    for start in range(0, len(places), size):
        part = places[start : start + size]
        products = vectors_ND[part] @ vectors_ND.T
        density[start : start + size] = kernel_sums(products, squares[part], squares, sigma, k, part)[0]
    return density


def kernel_sums(
    products_BN: NDArray[np.float32],
    squares_B: NDArray[np.float64],
    squares_N: NDArray[np.float64],
    sigma: float,
    k: int,
    own_B: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the sum of the k largest kernel values of each line [B], and how many are above 0 [B].

    Args:
        products_BN: Inner products of some vectors with others.
        squares_B: Squared norms of the former.
        squares_N: Squared norms of the latter.
        sigma: Radius of the kernel, > 0.
        k: Values counted at most, >= 1.
        own_B: Place of each of the former among the latter; -1 where it is not there. The distance to itself
            is 0 exactly, whatever the rounding of the products.
    """
    half = (0.5 * squares_N).astype(np.float32)
    # What rounding of the float32 products can hide; a pair that far out counts as 0 anyway.
    slack = 1e-5 * float(squares_N.max(initial=0.0))
    bound = (0.5 * squares_B - 0.5 * sigma**2 - slack).astype(np.float32)
    near = products_BN - half >= bound[:, None]
    there = np.flatnonzero(own_B >= 0)
    near[there, own_B[there]] = True
    sums = _sparse_sums if np.count_nonzero(near) * _DENSE < near.size else _dense_sums
    return sums(products_BN, near, squares_B, squares_N, sigma, k, own_B)


def _dense_sums(
    products: NDArray[np.float32],
    _: NDArray[np.bool_],
    squares_B: NDArray[np.float64],
    squares_N: NDArray[np.float64],
    sigma: float,
    k: int,
    own: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return what ``kernel_sums`` returns, from the kernel of every pair."""
    kernel = products.astype(np.float64)
    kernel *= -2.0
    kernel += squares_B[:, None]
    kernel += squares_N
    kernel /= -(sigma**2)
    kernel += 1.0
    np.clip(kernel, 0.0, 1.0, out=kernel)
    there = np.flatnonzero(own >= 0)
    kernel[there, own[there]] = 1.0
    sums: NDArray[np.float64] = kernel.sum(axis=1)
    counts = np.count_nonzero(kernel, axis=1)
    crowded = np.flatnonzero(counts > k)
    if crowded.size:
        sums[crowded] = np.partition(kernel[crowded], -k, axis=1)[:, -k:].sum(axis=1)
    return sums, counts


def _sparse_sums(
    products: NDArray[np.float32],
    near: NDArray[np.bool_],
    squares_B: NDArray[np.float64],
    squares_N: NDArray[np.float64],
    sigma: float,
    k: int,
    own: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return what ``kernel_sums`` returns, from those pairs whose kernel can be above 0, as ``near`` says."""
    line, column = np.nonzero(near)
    away = squares_B[line] + squares_N[column] - 2.0 * products[line, column]
    kernel = np.clip(1.0 - away / sigma**2, 0.0, 1.0)
    kernel[column == own[line]] = 1.0
    sums = np.bincount(line, weights=kernel, minlength=len(own)).astype(np.float64)
    counts = np.bincount(line, weights=kernel > 0, minlength=len(own)).astype(np.int64)
    ends = np.cumsum(np.bincount(line, minlength=len(own)))
    for crowded in np.flatnonzero(counts > k):
        values = kernel[(ends[crowded - 1] if crowded else 0) : ends[crowded]]
        sums[crowded] = np.partition(values, -k)[-k:].sum()
    return sums, counts


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
    assert found.shape == places.shape == far.shape, "one neighbour and one density per distance"
    return _spread(far, found, places, num_rows, alpha, c)[0]


def tsds_widened(
    distances_MK: NDArray[np.float64],
    neighbours_MK: NDArray[np.int64],
    density_of: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    num_rows: int,
    *,
    alpha: float,
    c: float,
) -> NDArray[np.float64]:
    """Return what ``tsds_probabilities`` gives, asking for the densities of the neighbours only as far as it walks.

    The walk is first tried on the nearest few neighbours of each query. Where no query reaches their end, wider lists
    would have been walked alike; else it is tried again with four times as many.

    Args:
        distances_MK: As there.
        neighbours_MK: As there.
        density_of: Gives the densities [M, k] of rows [M, k].
        num_rows: As there.
        alpha: As there.
        c: As there.

    Returns:
        float64 [N] with sum 1.
    """
    whole = distances_MK.shape[1]
    width = min(whole, _FIRST_WIDTH)
    while True:
        found, far = neighbours_MK[:, :width], distances_MK[:, :width]
        probabilities, reached = _spread(far, found, 1.0 / density_of(found), num_rows, alpha, c)
        if width == whole or reached < width - 2:
            return probabilities
        width = min(whole, 4 * width)


def _spread(
    far: NDArray[np.float64],
    found: NDArray[np.int64],
    places: NDArray[np.float64],
    num_rows: int,
    alpha: float,
    c: float,
) -> tuple[NDArray[np.float64], int]:
    """Return the probabilities, and the last neighbour that any query took whole."""
    num_queries, width = far.shape
    if width == 1:  # nothing to widen
        return np.bincount(found[:, 0], minlength=num_rows) / num_queries, 0
    count, last = _widen(far.tolist(), places.tolist(), alpha, c)
    rank, end = np.arange(width), np.asarray(last)[:, None]
    whole = np.where(rank <= end, places / (num_queries * count), 0.0)
    reached = np.minimum(np.cumsum(whole, axis=1), 1.0 / num_queries)
    reached[rank[None, :] >= end + 1] = 1.0 / num_queries
    mass = np.diff(reached, axis=1, prepend=0.0)
    probabilities = np.bincount(found.ravel(), weights=mass.ravel(), minlength=num_rows)
    return probabilities / probabilities.sum(), max(last)
