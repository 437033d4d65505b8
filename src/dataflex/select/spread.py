"""Rules that keep rows apart: a threshold on similarity (DEITA), near-duplicates, k-center and facility location."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataflex.select.cluster import cells_of
from dataflex.select.neighbours import Search, similar_rows
from dataflex.state import blake2b

_BLOCK = 1024  # rows compared with the kept ones at a time
_EAGER = 64  # centres after which distances are brought up to date only where it matters
_CELL_ROWS = 20_000  # rows of a cell within which near-duplicates are looked for
_WHOLE_ROWS = 100_000  # rows that are compared all with all


def unit(vectors_ND: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return vectors of length one, float32 [N, D]; a zero vector stays zero. No copy where they are so already."""
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND, dtype=np.float64))
    if vectors_ND.dtype == np.float32 and np.abs(lengths - 1.0).max(initial=0.0) < 1e-6:
        return np.asarray(vectors_ND)
    return np.asarray(vectors_ND / np.where(lengths > 0, lengths, 1.0)[:, None], dtype=np.float32)


def apart(unit_ND: NDArray[np.float32], order: NDArray[np.int64], threshold: float, k: int) -> NDArray[np.int64]:
    """Walk rows in ``order`` and keep at most ``k`` whose cosine with every row kept before is at most ``threshold``.

    The rule of DEITA (What Makes Good Data for Alignment?, ICLR 2024, arXiv 2312.15685): the order is that of the
    scores, best first. A row is compared with kept rows only, one after another. Vectors have length one.
    """
    chosen: list[int] = []
    kept = np.empty((0, unit_ND.shape[1]), dtype=np.float32)
    count = 0
    for start in range(0, len(order), _BLOCK):
        part = order[start : start + _BLOCK]
        block = unit_ND[part]
        free = np.ones(len(part), dtype=np.bool_)
        for first in range(0, count, 16 * _BLOCK):
            free &= (block @ kept[first : min(count, first + 16 * _BLOCK)].T).max(axis=1) <= threshold
        inside = np.flatnonzero(free)
        among = block[inside] @ block[inside].T > threshold
        barred = np.zeros(len(inside), dtype=np.bool_)
        taken = []
        for i in range(len(inside)):
            if barred[i]:
                continue
            taken.append(int(inside[i]))
            if len(chosen) + len(taken) == k:
                break
            barred |= among[i]
        chosen += part[taken].tolist()
        if len(chosen) >= k:
            break
        count += len(taken)
        if count > len(kept):
            kept = np.concatenate([kept, np.empty((max(count, len(kept)), kept.shape[1]), dtype=np.float32)])
        kept[count - len(taken) : count] = block[taken]
    return np.array(chosen[:k], dtype=np.int64)


def near_duplicates(vectors_ND: NDArray[np.float32], order: NDArray[np.int64], threshold: float) -> NDArray[np.bool_]:
    """Return which rows [N] repeat a row that comes before them in ``order`` of all positions: to be dropped.

    Exact copies are found by a hash of the vector; of the others a row is dropped when its cosine with an earlier one
    that stays is above ``threshold``. More than 100,000 rows are compared within cells of about 20,000, as SemDeDup
    (arXiv 2303.09540) does within clusters: copies that fall into different cells stay.
    """
    dropped = np.ones(len(vectors_ND), dtype=np.bool_)
    seen: dict[bytes, int] = {}
    for position in order.tolist():
        seen.setdefault(blake2b(vectors_ND[position].tobytes()), position)
    left = np.fromiter(seen.values(), dtype=np.int64, count=len(seen))
    rank = np.empty(len(vectors_ND), dtype=np.int64)
    rank[order] = np.arange(len(order))
    groups = [left] if len(left) <= _WHOLE_ROWS else cells_of(vectors_ND, np.sort(left), _CELL_ROWS).members
    for group in groups:
        members = group[np.argsort(rank[group])]
        dropped[members[apart(unit(vectors_ND[members]), np.arange(len(members)), threshold, len(members))]] = False
    return dropped


def _largest_first(
    values: NDArray[np.number], turns: range, anew: Callable[[int, int, int], float]
) -> Iterator[tuple[int, int]]:
    """Yield each turn and the position of the largest value then, ties by position; -inf is left out.

    Values only fall. One is computed anew, by ``anew(position, turn of its value, turn)``, only when it would be next.
    """
    heap = [(-value, position) for position, value in enumerate(values.tolist()) if value > -np.inf]
    heapq.heapify(heap)
    seen = np.full(len(values), turns.start)
    for turn in turns:
        while seen[heap[0][1]] != turn:
            bound, position = heap[0]
            since, seen[position] = int(seen[position]), turn
            heapq.heapreplace(heap, (max(bound, -anew(position, since, turn)), position))  # rounding may make it rise
        yield turn, heapq.heappop(heap)[1]


def k_center(vectors_ND: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Take the first row, then again and again the row furthest (Euclidean) from all taken; ties by position.

    Greedy k-center (Sener and Savarese, ICLR 2018, arXiv 1708.00489), within twice the least possible largest
    distance. Gives int64 [min(k, N)], in the order taken.
    """
    count = min(k, len(vectors_ND))
    squares = np.einsum("nd,nd->n", vectors_ND, vectors_ND, dtype=np.float64)
    centres = np.empty((count, vectors_ND.shape[1]), dtype=np.float32)
    chosen = np.empty(count, dtype=np.int64)
    away = np.full(len(vectors_ND), np.inf)
    eager = min(count, _EAGER)
    for turn in range(eager):
        new = chosen[turn] = int(away.argmax())
        centres[turn] = vectors_ND[new]
        np.minimum(away, squares + squares[new] - 2.0 * (vectors_ND @ centres[turn]), out=away)
        away[new] = -np.inf

    def distance(position: int, since: int, turn: int) -> float:
        products = centres[since:turn] @ vectors_ND[position]
        return float((squares[chosen[since:turn]] - 2.0 * products).min()) + squares[position]

    for turn, position in _largest_first(away, range(eager, count), distance):
        chosen[turn], centres[turn] = position, vectors_ND[position]
    return chosen


def facility_location(
    vectors_ND: NDArray[np.float32], k: int, *, neighbours: int = 64, search: Search = "exact"
) -> NDArray[np.int64]:
    """Choose ``k`` rows that maximize the sum over rows of the largest similarity with a chosen one, greedily.

    The similarity is the cosine where it is above 0, and where the chosen row is among the ``neighbours`` rows most
    similar to the other, itself among them; else 0. The greedy choice reaches at least 1 - 1/e of the best value
    (Nemhauser, Wolsey and Fisher 1978; lazy: Minoux 1978). Gives int64 [min(k, N)], in the order chosen; ties by
    position.
    """
    places, cosines = similar_rows(unit(vectors_ND), neighbours, search)
    return greedy_cover(places, cosines, k)


def greedy_cover(places_NL: ArrayLike, similarities_NL: ArrayLike, k: int) -> NDArray[np.int64]:
    """Choose rows by their gains; see ``facility_location``.

    For each row, ``places_NL`` are the rows that can represent it, and ``similarities_NL`` how well each does.
    """
    places = np.asarray(places_NL)
    worth = np.maximum(np.asarray(similarities_NL, dtype=np.float64), 0.0)
    num_rows, width = places.shape
    # Turned round: whom each row represents, and how well.
    by_place = np.argsort(places.ravel(), kind="stable")
    ends = np.searchsorted(places.ravel()[by_place], np.arange(num_rows + 1))
    served, how_well = by_place // width, worth.ravel()[by_place]
    reached = np.zeros(num_rows)

    def gain(position: int, since: int, turn: int) -> float:
        part = slice(ends[position], ends[position + 1])
        more = how_well[part] - reached[served[part]]
        return float(more[more > 0].sum())

    first = np.bincount(places.ravel(), weights=worth.ravel(), minlength=num_rows)
    chosen = []
    for _, position in _largest_first(first, range(min(k, num_rows)), gain):
        chosen.append(position)
        part = slice(ends[position], ends[position + 1])
        np.maximum.at(reached, served[part], how_well[part])
    return np.array(chosen, dtype=np.int64)
