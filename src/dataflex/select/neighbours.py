"""Nearest rows of many queries, in blocks: the similarities of all pairs are never held at once.

Pure functions on inner products. Ties go to the smaller position. Lists of nearest rows start short and
grow only when a rule runs out of them, so that memory follows the budget, not queries x rows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import UnsupportedError
from dataflex.select.choose import take_turns, top_k
from dataflex.version import install

_CELLS = 1 << 25  # similarities held at a time: 128 MiB of float32
_SHORTEST = 64  # length that lists of nearest rows start with at least
_WINDOW = 256  # positions of a list turned into Python numbers at a time
_SHARE = 16  # share of the rows, one in 16, whose best similarities bound those of the nearest rows from below


def _blocks(queries_MD: NDArray[np.float32], rows_ND: NDArray[np.float32]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the number of a block's first query, and the inner products of its queries with all rows."""
    size = max(1, _CELLS // max(1, len(rows_ND)))
    for start in range(0, len(queries_MD), size):
        yield start, queries_MD[start : start + size] @ rows_ND.T


def best_similarity(
    queries_MD: NDArray[np.float32], rows_ND: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return each row's largest inner product with any query [N], and that query [N]; there must be a query."""
    best, which = np.full(len(rows_ND), -np.inf, dtype=np.float32), np.zeros(len(rows_ND), dtype=np.int64)
    for start, block in _blocks(queries_MD, rows_ND):
        of_block = block.argmax(axis=0)
        largest = block[of_block, np.arange(len(best))]
        better = largest > best
        best[better], which[better] = largest[better], start + of_block[better]
    return best, which


def nearest_lists(queries_MD: NDArray[np.float32], rows_ND: NDArray[np.float32], k: int) -> NDArray[np.int32]:
    """Return the positions of the ``k`` rows of largest inner product with each query [M, min(k, N)], best first."""
    lists = np.empty((len(queries_MD), min(k, len(rows_ND))), dtype=np.int32)
    for start, block in _blocks(queries_MD, rows_ND):
        for j, found in enumerate(_best_of_each(block, k), start):
            lists[j] = found
    return lists


def _best_of_each(block_BN: NDArray[np.float32], k: int) -> Iterator[NDArray[np.int64]]:
    """Yield ``top_k`` of each line.

    The k-th largest value of a line's beginning is a lower bound of that of the whole line; only values that reach it
    are sorted.
    """
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

    Positions int64 and distances float64 [M, k], ascending; and each row's distance to its nearest query [N].
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


def round_robin_nearest(
    queries_MD: NDArray[np.float32], rows_ND: NDArray[np.float32], k: int, *, lose_turn: bool = False
) -> NDArray[np.int64]:
    """Let queries take turns, each taking its nearest row that is not yet taken: positions [min(k, N)].

    ``select.choose.round_robin`` on the inner products, without holding them. At worst (all queries alike)
    memory is 4 bytes x M x k for the lists.
    """
    limit = min(k, len(rows_ND))
    first = min(limit, max(_SHORTEST, 4 * -(-limit // len(queries_MD))))
    lists = nearest_lists(queries_MD, rows_ND, first)

    def walk(query: int) -> Iterator[int]:
        nonlocal lists
        place = 0
        while place < limit:
            if place == lists.shape[1]:
                lists = nearest_lists(queries_MD, rows_ND, min(limit, 4 * place))
            part = lists[query, place : place + _WINDOW].tolist()
            yield from part
            place += len(part)

    return take_turns([walk(query) for query in range(len(queries_MD))], limit, lose_turn=lose_turn)


Search = Literal["exact", "faiss"]

_PROBES = 10  # cells looked at per query, as in the code of TSDS


def require_search(search: Search) -> None:
    """Raise UnsupportedError, before a model is loaded, if faiss is asked for and not installed; imports nothing."""
    if search == "faiss" and importlib.util.find_spec("faiss") is None:
        raise UnsupportedError(f"search: faiss is not installed; {install('ann')}, or set 'search: exact'")


def nearest(
    queries_MD: NDArray[np.float32], rows_ND: NDArray[np.float32], k: int, search: Search
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return what ``nearest_euclidean`` returns.

    With ``faiss`` (else UnsupportedError) an inverted file of sqrt(N) / 2 cells is searched, 10 cells a query; a query
    that finds fewer than ``k`` rows is searched for exactly. Rows that no query found count as further than any found.
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

    Vectors have length one. With ``faiss`` (else UnsupportedError) a place that nothing was found for holds the row
    itself, with a cosine of 0.
    """
    if search == "exact":
        shape = (len(unit_ND), min(k, len(unit_ND)))
        places, products = np.empty(shape, dtype=np.int32), np.empty(shape, dtype=np.float32)
        for start, block in _blocks(unit_ND, unit_ND):
            for j, best in enumerate(_best_of_each(block, k)):
                places[start + j], products[start + j] = best, block[j, best]
        return places, products
    cosines, found = _inverted_file(unit_ND, "product").search(unit_ND, min(k, len(unit_ND)))
    missing = found < 0
    found = np.where(missing, np.arange(len(unit_ND))[:, None], found)
    return found.astype(np.int32), np.where(missing, 0.0, cosines).astype(np.float32)


def _inverted_file(rows_ND: NDArray[np.float32], metric: Literal["l2", "product"]) -> Any:
    require_search("faiss")
    import faiss

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
