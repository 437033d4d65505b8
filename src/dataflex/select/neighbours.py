"""Exact nearest rows of many queries, in blocks: the similarities of all pairs are never held at once.

Pure functions on inner products. Ties go to the smaller position. Lists of nearest rows start short and
grow only when a rule runs out of them, so that memory follows the budget, not queries x rows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataflex.errors import UnsupportedError
from dataflex.select.choose import top_k

_CELLS = 1 << 25  # similarities held at a time: 128 MiB of float32
_SHORTEST = 64  # length that lists of nearest rows start with at least
_WINDOW = 256  # rows of a list looked at together
_SHARE = 16  # one row in so many tells how good a row must be to come into question


def _blocks(queries_MD: NDArray[np.float32], rows_ND: NDArray[np.float32]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the number of a block's first query, and the inner products of its queries with all rows."""
    size = max(1, _CELLS // max(1, len(rows_ND)))
    for start in range(0, len(queries_MD), size):
        yield start, queries_MD[start : start + size] @ rows_ND.T


def best_similarity(queries_MD: NDArray[np.float32], rows_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return each row's largest inner product with any query [N]; there must be a query."""
    best = np.full(len(rows_ND), -np.inf, dtype=np.float32)
    for _, block in _blocks(queries_MD, rows_ND):
        np.maximum(best, block.max(axis=0), out=best)
    return best


def nearest_lists(queries_MD: NDArray[np.float32], rows_ND: NDArray[np.float32], k: int) -> NDArray[np.int32]:
    """Return the positions of the ``k`` rows of largest inner product with each query [M, min(k, N)], best first."""
    lists = np.empty((len(queries_MD), min(k, len(rows_ND))), dtype=np.int32)
    for start, block in _blocks(queries_MD, rows_ND):
        for j, found in enumerate(_best_of_each(block, k), start):
            lists[j] = found
    return lists


def nearest_rows(vectors_ND: NDArray[np.float32], k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return the ``k`` rows of largest inner product with each row, itself among them where it is.

    Positions int32 [N, min(k, N)], best first, and the inner products float32 of the same shape.
    """
    shape = (len(vectors_ND), min(k, len(vectors_ND)))
    places, products = np.empty(shape, dtype=np.int32), np.empty(shape, dtype=np.float32)
    for start, block in _blocks(vectors_ND, vectors_ND):
        for j, found in enumerate(_best_of_each(block, k)):
            places[start + j], products[start + j] = found, block[j, found]
    return places, products


def _best_of_each(block_BN: NDArray[np.float32], k: int) -> Iterator[NDArray[np.int64]]:
    """Yield ``top_k`` of each line; a sample of a line tells first which positions can be left out."""
    num_rows = block_BN.shape[1]
    sample = max(num_rows // _SHARE, 2 * k)
    if k == 0 or 2 * sample > num_rows:
        for line in block_BN:
            yield top_k(line, k)
        return
    least = np.partition(block_BN[:, :sample], sample - k, axis=1)[:, sample - k]
    for line, bound in zip(block_BN, least, strict=True):
        fitting = np.flatnonzero(line >= bound)
        yield fitting[top_k(line[fitting], k)]


def nearest_euclidean(
    queries_MD: NDArray[np.float32], rows_ND: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the ``k`` rows, 1 <= k <= N, nearest to each query by Euclidean distance; M >= 1.

    Returns:
        Positions int64 [M, k] and distances float64 [M, k], ascending; each row's distance to its nearest query [N].
    """
    half = 0.5 * np.einsum("nd,nd->n", rows_ND, rows_ND)
    places = np.empty((len(queries_MD), k), dtype=np.int64)
    distances = np.empty((len(queries_MD), k))
    nearest = np.full(len(rows_ND), np.inf)
    for start, block in _blocks(queries_MD, rows_ND):
        block -= half  # half of |query|**2 - distance**2
        for j, closeness in enumerate(block, start):
            query = queries_MD[j].astype(np.float64)
            np.minimum(nearest, query @ query - 2.0 * closeness, out=nearest)
        for j, found in enumerate(_best_of_each(block, k), start):
            places[j], distances[j] = distances_to(queries_MD[j], rows_ND, found)
    return places, distances, np.sqrt(np.maximum(nearest, 0.0))


def distances_to(
    query_D: NDArray[np.float32], rows_ND: NDArray[np.float32], found: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return positions ``found`` [k] and their Euclidean distances float64 [k], nearest first, ties by position.

    They are made of differences: products cancel where a row is close to the query.
    """
    exact = np.linalg.norm(rows_ND[found] - query_D.astype(np.float64), axis=1)
    order = np.lexsort((found, exact))
    return found[order], exact[order]


def _first_length(limit: int, num_queries: int) -> int:
    return min(limit, max(_SHORTEST, 4 * -(-limit // num_queries)))


def _free(nearest: NDArray[np.int32], head: int, taken: NDArray[np.bool_]) -> int:
    """Return the place, from ``head`` on, of the first row of a list that is not taken, or the list's length."""
    while head < nearest.size:
        free = ~taken[nearest[head : head + _WINDOW]]
        step = int(free.argmax())
        if free[step]:
            return head + step
        head += _WINDOW
    return nearest.size


def round_robin_nearest(
    queries_MD: NDArray[np.float32], rows_ND: NDArray[np.float32], k: int, order: ArrayLike | None = None
) -> NDArray[np.int64]:
    """Let queries take turns, in ``order``, each taking its nearest row that is not yet taken: positions [min(k, N)].

    ``select.choose.round_robin`` on the inner products, without holding them. At worst (all queries alike)
    memory is 4 bytes x M x k for the lists.
    """
    queries = queries_MD if order is None else queries_MD[np.asarray(order)]
    limit = min(k, len(rows_ND))
    lists = nearest_lists(queries, rows_ND, _first_length(limit, len(queries)))
    taken = np.zeros(len(rows_ND), dtype=np.bool_)
    heads = [0] * len(queries)
    chosen = np.empty(limit, dtype=np.int64)
    for turn in range(limit):
        j = turn % len(queries)
        while (head := _free(lists[j], heads[j], taken)) == lists.shape[1]:
            # Fewer than limit rows are taken, so a list of limit rows never runs out.
            lists = nearest_lists(queries, rows_ND, min(limit, 4 * lists.shape[1]))
        position = lists[j, head]
        heads[j] = head + 1
        taken[position] = True
        chosen[turn] = position
    return chosen


def walk_by_rank(queries_MD: NDArray[np.float32], rows_ND: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Take the nearest row of every query, then the second nearest of every query, and so on: positions [min(k, N)].

    Repeats are passed over: unlike in round-robin, a query whose row of this rank is taken takes nothing in this turn.
    """
    limit = min(k, len(rows_ND))
    lists = nearest_lists(queries_MD, rows_ND, _first_length(limit, len(queries_MD)))
    taken = np.zeros(len(rows_ND), dtype=np.bool_)
    parts: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    count = rank = 0
    while count < limit:
        if rank == lists.shape[1]:
            lists = nearest_lists(queries_MD, rows_ND, min(limit, 4 * rank))
        column = lists[:, rank]
        fresh = column[~taken[column]]
        fresh = fresh[np.sort(np.unique(fresh, return_index=True)[1])]
        taken[fresh] = True
        parts.append(fresh.astype(np.int64))
        count += fresh.size
        rank += 1
    return np.concatenate(parts)[:limit]


Search = Literal["exact", "faiss"]

_PROBES = 10  # cells looked at per query, as in the code of TSDS
_MISSING = "search: faiss is not installed; pip install 'dataflex[faiss]', or set 'search: exact'"


def require_search(search: Search) -> None:
    """Raise the error of a search that lacks its library now, before a model is loaded; nothing is imported.

    Raises:
        UnsupportedError: faiss is asked for and not installed.
    """
    if search == "faiss" and importlib.util.find_spec("faiss") is None:
        raise UnsupportedError(_MISSING)


def nearest(
    queries_MD: NDArray[np.float32], rows_ND: NDArray[np.float32], k: int, search: Search
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return what ``select.neighbours.nearest_euclidean`` returns.

    With ``faiss`` an inverted file of sqrt(N) / 2 cells is searched, 10 cells a query; a query that finds fewer than
    ``k`` rows there is searched for exactly. Rows that no query found count as further than any that was found.

    Raises:
        UnsupportedError: faiss is not installed.
    """
    if search == "exact":
        return nearest_euclidean(queries_MD, rows_ND, k)
    found = _inverted_file(rows_ND, "l2").search(np.ascontiguousarray(queries_MD), k)[1]
    places = np.empty((len(queries_MD), k), dtype=np.int64)
    away = np.empty((len(queries_MD), k))
    short = np.flatnonzero((found < 0).any(axis=1))
    if len(short):
        found[short] = nearest_euclidean(queries_MD[short], rows_ND, k)[0]
    for j, one in enumerate(found):
        places[j], away[j] = distances_to(queries_MD[j], rows_ND, one)
    closest = np.full(len(rows_ND), 2.0 * float(away.max()) + 1.0)
    np.minimum.at(closest, places, away)
    return places, away, closest


def similar_rows(unit_ND: NDArray[np.float32], k: int, search: Search) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return the ``k`` rows of largest cosine with each row, itself among them: positions and cosines [N, min(k, N)].

    Vectors have length one. With ``faiss`` a place that nothing was found for holds the row itself, with a cosine of 0.

    Raises:
        UnsupportedError: faiss is not installed.
    """
    if search == "exact":
        return nearest_rows(unit_ND, k)
    cosines, found = _inverted_file(unit_ND, "product").search(unit_ND, min(k, len(unit_ND)))
    missing = found < 0
    found = np.where(missing, np.arange(len(unit_ND))[:, None], found)
    return found.astype(np.int32), np.where(missing, 0.0, cosines).astype(np.float32)


def _inverted_file(rows_ND: NDArray[np.float32], metric: Literal["l2", "product"]) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UnsupportedError(_MISSING) from error
    rows = np.ascontiguousarray(rows_ND, dtype=np.float32)
    cells = max(1, int(np.sqrt(len(rows))) // 2)
    quantizer = faiss.IndexFlatL2(rows.shape[1]) if metric == "l2" else faiss.IndexFlatIP(rows.shape[1])
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFFlat(quantizer, rows.shape[1], cells, kind)
    index.cp.seed = 1234
    index.cp.min_points_per_centroid = 1  # no warning about small pools
    index.train(rows)
    index.add(rows)
    index.nprobe = min(cells, _PROBES)
    return index
