"""k-means, the same on every rank for a given seed: Euclidean by scikit-learn, spherical by a short loop of its own.

Clusters without members are dropped and the rest numbered anew, so that every label has rows.
"""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError

__all__ = ["kmeans", "members", "require_kmeans", "spherical_kmeans"]

_CELLS = 1 << 24  # similarities of rows and centres held at a time: 64 MiB of float32
_MISSING = "k-means needs scikit-learn, which is not installed; install the extra: pip install 'dataflex[cluster]'"


def require_kmeans() -> None:
    """Raise the error of a ``kmeans`` that lacks its library now, before a model is loaded; nothing is imported.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError(_MISSING)


def kmeans(
    vectors: NDArray[np.floating], k: int, rng: np.random.Generator, *, iterations: int = 50
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Cluster by Euclidean distance (Lloyd, first centres by k-means++).

    Args:
        vectors: Finite [n, d], n >= 1.
        k: Clusters, >= 1; with k >= n every row is a cluster of its own.
        rng: Seeds the first centres.
        iterations: Rounds at most.

    Returns:
        Labels int64 [n], 0 <= label < K, and centres float32 [K, d]; K <= k, every cluster has a row.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    assert rows.ndim == 2, f"vectors have shape {rows.shape}"
    assert len(rows) >= 1
    assert k >= 1, f"k is {k}"
    seed = int(rng.integers(2**31 - 1))
    if k >= len(rows):
        return np.arange(len(rows), dtype=np.int64), rows.copy()
    try:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ConfigError(_MISSING) from error
    with warnings.catch_warnings(), threadpool_limits(limits=1):  # threads add up centres in any order
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than k: clusters are dropped below
        found = KMeans(n_clusters=k, n_init=1, max_iter=iterations, random_state=seed, algorithm="lloyd").fit(rows)
    return _compact(found.labels_.astype(np.int64), found.cluster_centers_.astype(np.float32))


def spherical_kmeans(
    vectors: NDArray[np.floating], k: int, rng: np.random.Generator, *, iterations: int = 50
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Cluster by cosine: centres are means of unit vectors, scaled to length one after every round.

    First centres are rows drawn without replacement. A cluster that loses its rows is started again at the
    row that is farthest from its own centre.

    Args:
        vectors: Finite [n, d], n >= 1; rows are scaled to length one, a zero row stays zero.
        k: Clusters, >= 1; with k >= n every row is a cluster of its own.
        rng: Draws the first centres.
        iterations: Rounds at most; it ends earlier when no label changes.

    Returns:
        Labels int64 [n] and centres of length one float32 [K, d]; K <= k, every cluster has a row.
    """
    rows = _units(np.asarray(vectors, dtype=np.float32))
    assert rows.ndim == 2, f"vectors have shape {rows.shape}"
    assert len(rows) >= 1
    assert k >= 1, f"k is {k}"
    first = rng.choice(len(rows), size=min(k, len(rows)), replace=False)
    if k >= len(rows):
        return np.arange(len(rows), dtype=np.int64), rows
    centres = rows[np.sort(first)]
    labels, closeness = _nearest(rows, centres)
    for _ in range(iterations):
        sums = np.zeros((k, rows.shape[1]), dtype=np.float64)
        np.add.at(sums, labels, rows)
        empty = np.setdiff1d(np.arange(k), labels)
        sums[empty] = rows[np.argsort(closeness, kind="stable")[: len(empty)]]
        centres = _units(sums.astype(np.float32))
        before = labels
        labels, closeness = _nearest(rows, centres)
        if np.array_equal(labels, before):
            break
    return _compact(labels, centres)


def members(labels: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return the positions of each cluster, ascending; labels are 0 .. K - 1."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels))[:-1])


def _units(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1.0), dtype=np.float32)


def _nearest(rows: NDArray[np.float32], centres: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the centre of largest inner product of each row, ties to the smaller, and that product."""
    labels = np.empty(len(rows), dtype=np.int64)
    best = np.empty(len(rows), dtype=np.float32)
    step = max(1, _CELLS // len(centres))
    for start in range(0, len(rows), step):
        products = rows[start : start + step] @ centres.T
        labels[start : start + step] = products.argmax(axis=1)
        best[start : start + step] = products.max(axis=1)
    return labels, best


def _compact(labels: NDArray[np.int64], centres: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    used, labels = np.unique(labels, return_inverse=True)
    return labels.reshape(-1).astype(np.int64), centres[used]
