"""Vectors sorted into cells, so that only those of neighbouring cells need to be compared.

An inverted file as in large neighbour search: some rows are taken as centres, improved once, and every row joins
the nearest. What is near to a row lies in its own cell or in one next to it, mostly: neighbours across the border of
cells that are far apart are missed. Nothing here draws from a generator: centres are picked by a hash of the position.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataflex.core.rng import keys

__all__ = ["Cells", "cells_of", "nearest_centres"]

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
