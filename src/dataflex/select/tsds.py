"""TSDS: mass of target rows spread over their neighbours, corrected for near-duplicates, and draws from it.

"TSDS: Data Selection for Task-Specific Model Finetuning", NeurIPS 2024, arXiv 2410.11303, algorithm 1 with the
stop rule and the final step of the authors' code. Pure functions in float64.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dataflex.plan.domains import Rows
from dataflex.select.choose import Uniforms, gumbel_top_k, top_k, weighted_with_replacement
from dataflex.select.cluster import Cells, cells_of
from dataflex.select.neighbours import Search, nearest

_CELLS = 1 << 23  # products held at a time: 32 MiB of float32, and at worst five times that for their kernel values
_DENSE = 16  # where at least one pair in 16 is within the kernel, all kernel values are computed at once
_FIRST_WIDTH = 64  # neighbours of a query that the walk is first tried with
_EXACT_PAIRS = 1 << 31  # pairs compared before cells are used: about a minute of two cores at 512 dimensions
_CELL_ROWS = 1000
_PROBES = 10  # largest number of cells that a row is compared with


def epanechnikov(
    vectors_ND: NDArray[np.float32], sigma: float, k: int, of: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Return densities >= 1: the sum of max(0, 1 - distance**2 / sigma**2) over a vector's k nearest, with itself.

    ``of`` are the positions [m] whose densities are wanted; default all.
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

    ``products_BN`` are inner products of some vectors with others, ``squares_B`` and ``squares_N`` their squared norms,
    ``sigma`` > 0 the radius of the kernel. ``own_B`` is the position of each of the former among the latter, -1 where
    it is not there: the distance to itself is 0 exactly, whatever the rounding of the products.
    """
    # What rounding of the float32 products can hide; a pair that far out counts as 0 anyway.
    slack = 1e-5 * float(squares_N.max(initial=0.0))
    bound = (0.5 * squares_B - 0.5 * sigma**2 - slack).astype(np.float32)
    near = products_BN - (0.5 * squares_N).astype(np.float32) >= bound[:, None]
    there = np.flatnonzero(own_B >= 0)
    near[there, own_B[there]] = True
    if np.count_nonzero(near) * _DENSE >= near.size:
        dense = products_BN.astype(np.float64)
        dense *= -2.0
        dense += squares_B[:, None]
        dense += squares_N
        dense /= -(sigma**2)
        dense += 1.0
        np.clip(dense, 0.0, 1.0, out=dense)
        dense[there, own_B[there]] = 1.0
        sums: NDArray[np.float64] = dense.sum(axis=1)
        counts = np.count_nonzero(dense, axis=1)
        crowded = np.flatnonzero(counts > k)
        if crowded.size:
            sums[crowded] = np.partition(dense[crowded], -k, axis=1)[:, -k:].sum(axis=1)
        return sums, counts
    line, column = np.nonzero(near)
    away = squares_B[line] + squares_N[column] - 2.0 * products_BN[line, column]
    kernel = np.clip(1.0 - away / sigma**2, 0.0, 1.0)
    kernel[column == own_B[line]] = 1.0
    sums = np.bincount(line, weights=kernel, minlength=len(own_B)).astype(np.float64)
    counts = np.bincount(line, weights=kernel > 0, minlength=len(own_B)).astype(np.int64)
    ends = np.cumsum(np.bincount(line, minlength=len(own_B)))
    for one in np.flatnonzero(counts > k):
        values = kernel[(ends[one - 1] if one else 0) : ends[one]]
        sums[one] = np.partition(values, -k)[-k:].sum()
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


def tsds_widened(
    distances_MK: NDArray[np.float64],
    neighbours_MK: NDArray[np.int64],
    density_of: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    num_rows: int,
    *,
    alpha: float,
    c: float,
) -> NDArray[np.float64]:
    """Return the probability of each row, float64 [N] with sum 1; densities are asked for only as far as the walk goes.

    Query j's neighbours 0..last_j get 1 / (M s density) each, the next one what is left of 1 / M. Where the
    walk stops before a query's own first count, that share would exceed 1 / M: it is cut there (the authors'
    code stops with an assertion). The walk is first tried on the nearest few neighbours of each query, and again on
    four times as many while some query reaches the end of its list.

    ``distances_MK`` are those of each query to its neighbours, ascending, ``neighbours_MK`` their positions;
    ``density_of`` gives the densities [M, k] of rows [M, k]. ``alpha`` weighs closeness against diversity, 0 to 1;
    ``c`` > 0 is the scale of the distances.
    """
    num_queries, whole = distances_MK.shape
    if whole == 1:  # nothing to widen
        return np.bincount(neighbours_MK[:, 0], minlength=num_rows) / num_queries
    width = min(whole, _FIRST_WIDTH)
    while True:
        found = neighbours_MK[:, :width]
        places = 1.0 / density_of(found)
        count, last = _widen(distances_MK[:, :width].tolist(), places.tolist(), alpha, c)
        if width == whole or max(last) < width - 2:
            break
        width = min(whole, 4 * width)
    rank, end = np.arange(width), np.asarray(last)[:, None]
    reached = np.minimum(np.cumsum(np.where(rank <= end, places / (num_queries * count), 0.0), axis=1), 1 / num_queries)
    reached[rank[None, :] >= end + 1] = 1.0 / num_queries
    mass = np.diff(reached, axis=1, prepend=0.0)
    probabilities = np.bincount(found.ravel(), weights=mass.ravel(), minlength=num_rows)
    return probabilities / probabilities.sum()


class Densities:
    """The kernel density of rows among others, computed when first asked for.

    Up to 2**31 pairs are all compared. Beyond, a row is compared with the rows of at most 10 cells of an inverted
    file, as in the authors' code: the nearest ones of those that can hold a row within sigma. ``among`` are the
    distinct positions of the rows that count [n], ascending. With ``sigma`` 0 every density is 1.
    """

    def __init__(self, vectors_ND: NDArray[np.float32], among: NDArray[np.int64], sigma: float, k: int) -> None:
        self._vectors, self._among, self._sigma, self._k = vectors_ND, among, sigma, k
        self._known = np.full(len(among), np.nan)
        self._cells: Cells | None = None

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the densities of rows that are among the counted ones, of any shape, each at least 1."""
        if self._sigma == 0:
            return np.ones(places.shape)
        index = np.searchsorted(self._among, places)
        new = np.unique(index[np.isnan(self._known[index])])
        if len(new):
            self._compute(new)
        return self._known[index]

    def _compute(self, new: NDArray[np.int64]) -> None:
        if self._cells is None and len(new) * len(self._among) <= _EXACT_PAIRS:
            every = len(self._among) == len(self._vectors)
            whole = self._vectors if every else self._vectors[self._among]
            self._known[new] = epanechnikov(whole, self._sigma, self._k, of=new)
            return
        if self._cells is None:
            self._cells = cells_of(self._vectors, self._among, _CELL_ROWS)
        self._known[new], counts = self._by_cell(self._cells, new)
        crowded = new[counts > self._k]
        if len(crowded):
            self._known[crowded] = self._crowded(self._cells, crowded)

    def _by_cell(self, cells: Cells, new: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the sums of all kernel values above 0 of each row, and their numbers."""
        places = self._among[new]
        squares = np.einsum("nd,nd->n", self._vectors, self._vectors, dtype=np.float64)
        sums, counts = np.zeros(len(new)), np.zeros(len(new), dtype=np.int64)
        probing = cells.probes(self._vectors, places, _PROBES, self._sigma)
        for members, asking in zip(cells.members, probing, strict=True):
            theirs = self._vectors[members]
            for start in range(0, len(asking), _CELL_ROWS):
                part = asking[start : start + _CELL_ROWS]
                own = np.searchsorted(members, places[part])
                own[(own == len(members)) | (members[np.minimum(own, len(members) - 1)] != places[part])] = -1
                products = self._vectors[places[part]] @ theirs.T
                found = kernel_sums(products, squares[places[part]], squares[members], self._sigma, len(members), own)
                sums[part] += found[0]
                counts[part] += found[1]
        return sums, counts

    def _crowded(self, cells: Cells, index: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the densities of rows with more than k others near: the k nearest in their own cell and those next."""
        density = np.empty(len(index))
        owner = np.empty(len(self._vectors), dtype=np.int64)
        for cell, members in enumerate(cells.members):
            owner[members] = cell
        by_cell = owner[self._among[index]]
        order = np.argsort(by_cell, kind="stable")
        for asked in np.split(order, np.flatnonzero(np.diff(by_cell[order])) + 1):
            cell = int(by_cell[asked[0]])
            near = np.concatenate([cells.members[each] for each in cells.around(cell, _PROBES)])
            own = np.searchsorted(cells.members[cell], self._among[index[asked]])
            density[asked] = epanechnikov(self._vectors[near], self._sigma, self._k, of=own)
        return density


def probabilities(
    queries_MD: NDArray[np.float32],
    vectors_ND: NDArray[np.float32],
    *,
    max_k: int,
    kde_k: int,
    sigma: float,
    alpha: float,
    c: float,
    search: Search = "exact",
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the probability of each row (sum 1), and its distance to the nearest query, both float64 [N].

    ``queries_MD`` are vectors of the targets' rows, ``vectors_ND`` those of the rows; finite, M >= 1, N >= 1. The
    other arguments are the parameters of the rule ``knn_kde``.
    """
    num_rows = len(vectors_ND)
    # The paper's cap of a tenth leaves nothing to widen in a tiny pool: two neighbours are the least.
    width = min(num_rows, max(2, min(max_k, num_rows // 10)))
    neighbours, distances, away = nearest(queries_MD, vectors_ND, width, search)
    density = Densities(vectors_ND, np.unique(neighbours), sigma, max(1, min(kde_k, num_rows // 10)))
    return tsds_widened(distances, neighbours, density, num_rows, alpha=alpha, c=c), away


def draw(
    probability: NDArray[np.floating],
    away: NDArray[np.float64],
    k: int,
    rows: Rows,
    uniforms: Uniforms,
    *,
    replacement: bool,
) -> NDArray[np.int64]:
    """Draw ``k`` positions; without replacement, those of probability 0 follow by distance where the others run out.

    ``probability`` [N] has sum 1, ``away`` [N] is the distance to the nearest query; draws without replacement are
    keyed by ``rows`` [N]. The paper draws with replacement.
    """
    if replacement:
        return weighted_with_replacement(probability, k, uniforms("draws", np.arange(k, dtype=np.int64)))
    positive = probability > 0
    with np.errstate(divide="ignore"):
        log_p = np.log(probability)
    drawn = gumbel_top_k(log_p, k, uniforms("gumbel", rows))
    return np.concatenate([drawn, top_k(np.where(positive, -np.inf, -away), k - len(drawn))])
