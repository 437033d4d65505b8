"""Nearest rows by Euclidean distance: exact by blocks, or approximate through faiss where that is asked for."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.core.neighbours import distances_to, nearest_euclidean, nearest_rows
from dataflex.errors import UnsupportedError

__all__ = ["Search", "nearest", "require_search", "similar_rows"]

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
    """Return what ``core.neighbours.nearest_euclidean`` returns.

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

    Args:
        unit_ND: Vectors of length one.
        k: How many for each row.
        search: With ``faiss`` a place that nothing was found for holds the row itself, with a cosine of 0.

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
    quantiser = faiss.IndexFlatL2(rows.shape[1]) if metric == "l2" else faiss.IndexFlatIP(rows.shape[1])
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFFlat(quantiser, rows.shape[1], cells, kind)
    index.cp.seed = 1234
    index.cp.min_points_per_centroid = 1  # no warning about small pools
    index.train(rows)
    index.add(rows)
    index.nprobe = min(cells, _PROBES)
    return index
