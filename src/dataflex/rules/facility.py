"""Facility location: the rows that represent all rows best, by lazy greedy over lists of similar rows."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataflex.rules.search import Search, similar_rows
from dataflex.rules.spread import unit

__all__ = ["facility_location", "greedy_cover"]


def facility_location(
    vectors_ND: NDArray[np.float32], k: int, *, neighbours: int = 64, search: Search = "exact"
) -> NDArray[np.int64]:
    """Choose ``k`` rows that maximise the sum over rows of the largest similarity with a chosen one, greedily.

    The similarity is the cosine where it is above 0, and where the chosen row is among the ``neighbours`` rows most
    similar to the other; else 0. The greedy choice reaches at least 1 - 1/e of the best value (Nemhauser, Wolsey and
    Fisher 1978; lazy: Minoux 1978).

    Args:
        vectors_ND: Vectors, finite, N >= 1.
        k: How many.
        neighbours: Similar rows that can represent a row, itself among them.
        search: How similar rows are looked for.

    Returns:
        int64 [min(k, N)], in the order chosen; ties by position.
    """
    places, cosines = similar_rows(unit(vectors_ND), neighbours, search)
    return greedy_cover(places, cosines, k)


def greedy_cover(places_NL: ArrayLike, similarities_NL: ArrayLike, k: int) -> NDArray[np.int64]:
    """Choose rows by their gains; see ``facility_location``.

    Args:
        places_NL: For each row, the positions of the rows that can represent it.
        similarities_NL: How well each does; what is below 0 counts as 0.
        k: How many.

    Returns:
        int64 [min(k, N)], in the order chosen.
    """
    places = np.asarray(places_NL)
    worth = np.maximum(np.asarray(similarities_NL, dtype=np.float64), 0.0)
    num_rows, width = places.shape
    # Turned round: whom each row represents, and how well.
    by_place = np.argsort(places.ravel(), kind="stable")
    ends = np.searchsorted(places.ravel()[by_place], np.arange(num_rows + 1))
    served, how_well = by_place // width, worth.ravel()[by_place]
    reached = np.zeros(num_rows)

    def gain(position: int) -> float:
        part = slice(ends[position], ends[position + 1])
        more = how_well[part] - reached[served[part]]
        return float(more[more > 0].sum())

    first = np.bincount(places.ravel(), weights=worth.ravel(), minlength=num_rows)
    heap = [(-value, position) for position, value in enumerate(first.tolist())]
    heapq.heapify(heap)
    seen = np.zeros(num_rows, dtype=np.int64)
    chosen = np.empty(min(k, num_rows), dtype=np.int64)
    for turn in range(len(chosen)):
        while seen[heap[0][1]] != turn:
            bound, position = heap[0]
            seen[position] = turn
            # Gains only fall; rounding must not make one rise.
            heapq.heapreplace(heap, (max(bound, -gain(position)), position))
        position = heapq.heappop(heap)[1]
        chosen[turn] = position
        part = slice(ends[position], ends[position + 1])
        np.maximum.at(reached, served[part], how_well[part])
    return chosen
