"""Densities of TSDS, asked for row by row: near-duplicates among the rows that any target row found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataflex.plan.domains import Rows
from dataflex.rng import keys
from dataflex.select.candidates import Uniforms
from dataflex.select.choose import gumbel_top_k, top_k, weighted_with_replacement
from dataflex.select.neighbours import Search, nearest
from dataflex.select.transport import epanechnikov, kernel_sums, tsds_widened

__all__ = ["Cells", "Densities", "cells_of", "draw", "nearest_centres", "probabilities"]

_BLOCK = 1 << 24  # products held at a time: 64 MiB of float32
_SAMPLE = 32  # rows per centre that improve the centres


@dataclass(frozen=True, kw_only=True)
class Cells:
    """A partition of positions.

    Attributes:
        members: Positions of each cell, ascending; no cell is empty.
        centres: Mean of each cell's sample, float32 [C, D].
    """

    members: list[NDArray[np.int64]]
    centres: NDArray[np.float32]

    def around(self, cell: int, probes: int) -> list[int]:
        """Return the ``probes`` cells whose centres are nearest to a cell's, itself first."""
        away = ((self.centres - self.centres[cell]) ** 2).sum(axis=1)
        away[cell] = -1.0
        return list(np.argsort(away, kind="stable")[:probes].tolist())

    def probes(
        self, vectors_ND: NDArray[np.float32], places: NDArray[np.int64], most: int, radius: float
    ) -> list[NDArray[np.int64]]:
        """Return, by cell, the indices into ``places`` of the rows that may have a neighbour there.

        A row within ``radius`` of another lies in a cell whose centre is at most 2 radii further from the other than
        the nearest centre: only such cells are named, and of them the ``most`` nearest ones.

        Args:
            vectors_ND: Vectors of all rows.
            places: Positions of the rows [n].
            most: Cells named for a row at most.
            radius: How near a neighbour is.
        """
        most = min(most, len(self.members))
        squares = np.einsum("cd,cd->c", self.centres, self.centres)
        rows: list[NDArray[np.int64]] = []
        cells: list[NDArray[np.int64]] = []
        size = max(1, _BLOCK // max(len(self.centres), vectors_ND.shape[1]))
        for start in range(0, len(places), size):
            part = vectors_ND[places[start : start + size]]
            own = np.einsum("nd,nd->n", part, part)
            away = np.sqrt(np.maximum(own[:, None] + squares - 2.0 * (part @ self.centres.T), 0.0))
            nearest = np.argpartition(away, most - 1, axis=1)[:, :most]
            found = np.take_along_axis(away, nearest, axis=1)
            line, rank = np.nonzero(found <= found.min(axis=1, keepdims=True) + 2.0 * radius)
            rows.append(start + line)
            cells.append(nearest[line, rank])
        row, cell = np.concatenate(rows), np.concatenate(cells)
        order = np.argsort(cell, kind="stable")
        ends = np.searchsorted(cell[order], np.arange(len(self.members) + 1))
        return [row[order[ends[i] : ends[i + 1]]] for i in range(len(self.members))]


def nearest_centres(
    vectors: NDArray[np.float32], places: NDArray[np.int64], centres: NDArray[np.float32]
) -> NDArray[np.intp]:
    """Return the nearest centre, by Euclidean distance, of the rows at ``places`` [n]; ties to the smaller."""
    half = 0.5 * np.einsum("cd,cd->c", centres, centres)
    found = np.empty(len(places), dtype=np.intp)
    size = max(1, _BLOCK // max(len(centres), vectors.shape[1]))
    for start in range(0, len(places), size):
        part = vectors[places[start : start + size]]
        found[start : start + size] = (part @ centres.T - half).argmax(axis=1)
    return found


def cells_of(vectors_ND: NDArray[np.float32], places: NDArray[np.int64], size: int) -> Cells:
    """Sort rows into cells of about ``size`` rows.

    Args:
        vectors_ND: Vectors, finite.
        places: Distinct positions of the rows to sort [n], n >= 1.
        size: Rows of a cell, about.
    """
    count = max(1, round(len(places) / size))
    order = np.argsort(keys(0, "rules.cells", 0, places), kind="stable")
    centres = vectors_ND[places[np.sort(order[:count])]].astype(np.float32)
    sample = places[np.sort(order[: _SAMPLE * count])]
    joined = nearest_centres(vectors_ND, sample, centres)
    for cell in range(count):
        own = sample[joined == cell]
        if len(own):
            centres[cell] = vectors_ND[own].mean(axis=0)
    joined = nearest_centres(vectors_ND, places, centres)
    by_cell = np.argsort(joined, kind="stable")
    ends = np.searchsorted(joined[by_cell], np.arange(count + 1))
    filled = [cell for cell in range(count) if ends[cell] < ends[cell + 1]]
    members = [np.sort(places[by_cell[ends[cell] : ends[cell + 1]]]) for cell in filled]
    return Cells(members=members, centres=centres[filled])


_EXACT_PAIRS = 1 << 31  # pairs compared before cells are used: about a minute of two cores at 512 dimensions
_CELL_ROWS = 1000
_PROBES = 10  # cells that a row is compared with at most


class Densities:
    """The kernel density of rows among others, computed when first asked for.

    All pairs are compared while that is at most some 2 thousand million; beyond, a row is compared with those of at
    most 10 cells of an inverted file, as in the authors' code. That is all of those where something can lie within
    sigma, unless there are more of them.

    Args:
        vectors_ND: Vectors of all rows, finite.
        among: Distinct positions of the rows that count [n], ascending.
        sigma: Radius of the kernel; 0: every density is 1.
        k: Rows counted in a density at most.
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
        """Return the sums of kernel values of rows, however many, and their numbers."""
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

    Args:
        queries_MD: Vectors of the targets' rows, finite, M >= 1.
        vectors_ND: Vectors of the rows, finite, N >= 1.
        max_k: Neighbours of a query at most; also a tenth of the rows, but at least two.
        kde_k: Rows in a density at most; also a tenth of the rows.
        sigma: Radius within which rows count as duplicates; 0: never.
        alpha: Weight of closeness against diversity, 0 to 1.
        c: Scale of the distances, > 0.
        search: How neighbours are looked for.
    """
    num_rows = len(vectors_ND)
    # The paper's cap of a tenth leaves nothing to widen in a tiny pool: two neighbours are the least.
    width = min(num_rows, max(2, min(max_k, num_rows // 10)))
    neighbours, distances, away = nearest(queries_MD, vectors_ND, width, search)
    density = Densities(vectors_ND, np.unique(neighbours), sigma, max(1, min(kde_k, num_rows // 10)))
    return tsds_widened(distances, neighbours, density, num_rows, alpha=alpha, c=c), away


def draw(
    probability: NDArray[np.float64],
    away: NDArray[np.float64],
    k: int,
    rows: Rows,
    uniforms: Uniforms,
    *,
    replacement: bool,
) -> NDArray[np.int64]:
    """Draw ``k`` positions; without replacement, those of probability 0 follow by distance where the others run out.

    Args:
        probability: Of each row [N], sum 1.
        away: Distance of each row to its nearest query [N].
        k: How many.
        rows: Row ids [N], which draws without replacement are keyed by.
        uniforms: Random numbers.
        replacement: Whether rows may repeat, as in the paper.

    Returns:
        int64 [k], or [min(k, N)] without replacement, in the order drawn.
    """
    if replacement:
        return weighted_with_replacement(probability, k, uniforms("draws", np.arange(k, dtype=np.int64)))
    positive = probability > 0
    with np.errstate(divide="ignore"):
        log_p = np.log(probability)
    drawn = gumbel_top_k(log_p, min(k, int(positive.sum())), uniforms("gumbel", rows))
    return np.concatenate([drawn, top_k(np.where(positive, -np.inf, -away), k - len(drawn))])
