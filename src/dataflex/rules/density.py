"""Densities of TSDS, asked for row by row: near-duplicates among the rows that any target row found."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dataflex.core.transport import epanechnikov, kernel_sums
from dataflex.rules.cells import Cells, cells_of

__all__ = ["Densities"]

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
