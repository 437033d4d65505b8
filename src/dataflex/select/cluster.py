"""Clusters: k-means, the same on every rank for a given seed, and cells, a coarse partition.

k-means is Euclidean by scikit-learn, spherical by a short loop of its own. Clusters without members are dropped and
the rest renumbered, so that every label has rows.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError
from dataflex.rng import keys
from dataflex.version import install

_BLOCK = 1 << 24  # products of rows and centres held at a time: 64 MiB of float32
_SAMPLE = 32  # rows per centre that improve the centres
_FIT_ROWS = 256  # rows of each cluster that centres are found on


def require_kmeans() -> None:
    """Raise ConfigError, before a model is loaded, if scikit-learn is not installed; imports nothing."""
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError(
            f"k-means needs scikit-learn, which is not installed; install the extra: {install('cluster')}"
        )


def kmeans(
    vectors: NDArray[np.floating], k: int, rng: np.random.Generator, *, iterations: int = 50
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Cluster finite vectors [n, d], n >= 1, by Euclidean distance (Lloyd, first centres by k-means++ from ``rng``).

    Gives labels int64 [n], 0 <= label < K, and centres float32 [K, d]; K <= k, every cluster has a row, and with k >= n
    every row is a cluster of its own. Without scikit-learn it raises ConfigError.
    """
    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    seed = int(rng.integers(2**31 - 1))
    if k >= len(rows):
        return np.arange(len(rows), dtype=np.int64), rows.copy()
    require_kmeans()
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(limits=1):  # threads add up centres in any order
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than k: clusters are dropped below
        found = KMeans(n_clusters=k, n_init=1, max_iter=iterations, random_state=seed, algorithm="lloyd").fit(rows)
    return _compact(found.labels_.astype(np.int64), found.cluster_centers_.astype(np.float32))


def spherical_kmeans(
    vectors: NDArray[np.floating], k: int, rng: np.random.Generator, *, iterations: int = 50
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Cluster by cosine: centres are means of unit vectors, scaled to length one after every round.

    First centres are rows drawn without replacement. A cluster that loses its rows is started again at the
    row that is farthest from its own centre. Arguments and answer are those of ``kmeans``; rows are scaled to length
    one, a zero row stays zero, and it ends early when no label changes.
    """
    rows = _units(np.asarray(vectors, dtype=np.float32))
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


def members(labels: NDArray[np.integer], num_clusters: int = 0) -> list[NDArray[np.int64]]:
    """Return the positions of each cluster, ascending; labels are 0 .. K - 1, K at least ``num_clusters``."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels, minlength=num_clusters))[:-1])


def _units(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1.0), dtype=np.float32)


def _nearest(rows: NDArray[np.float32], centres: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the centre of largest inner product of each row, ties to the smaller, and that product."""
    labels = np.empty(len(rows), dtype=np.int64)
    best = np.empty(len(rows), dtype=np.float32)
    step = max(1, _BLOCK // len(centres))
    for start in range(0, len(rows), step):
        products = rows[start : start + step] @ centres.T
        labels[start : start + step] = products.argmax(axis=1)
        best[start : start + step] = products.max(axis=1)
    return labels, best


def _compact(
    labels: NDArray[np.integer], centres: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    used, labels = np.unique(labels, return_inverse=True)
    return labels.reshape(-1).astype(np.int64), centres[used]


def kmeans_labels(vectors_ND: NDArray[np.float32], clusters: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the k-means cluster of each row, int64 [N], N >= 1; labels without rows are possible.

    Centres are found on at most 256 rows a cluster; then every row joins the nearest. ``rng`` must be equal on every
    rank. Without scikit-learn it raises ConfigError.
    """
    enough = _FIT_ROWS * clusters
    if len(vectors_ND) <= enough:
        return kmeans(vectors_ND, clusters, rng)[0]
    sample = np.sort(rng.choice(len(vectors_ND), size=enough, replace=False))
    centres = kmeans(vectors_ND[sample], clusters, rng)[1]
    return nearest_centres(vectors_ND, np.arange(len(vectors_ND)), centres).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Cells:
    """A partition of positions."""

    members: list[NDArray[np.int64]]
    """Positions of each cell, ascending; no cell is empty."""
    centres: NDArray[np.float32]
    """Mean of each cell's sample [C, D]."""

    def around(self, cell: int, probes: int) -> list[int]:
        """Return the ``probes`` cells whose centres are nearest to a cell's, itself first."""
        away = ((self.centres - self.centres[cell]) ** 2).sum(axis=1)
        away[cell] = -1.0
        return list(np.argsort(away, kind="stable")[:probes].tolist())

    def probes(
        self, vectors_ND: NDArray[np.float32], places: NDArray[np.int64], most: int, radius: float
    ) -> list[NDArray[np.int64]]:
        """Return, by cell, the indices into ``places`` [n] of rows that may have a neighbour within ``radius`` there.

        A row within ``radius`` of another lies in a cell whose centre is at most 2 radii further from the other than
        the nearest centre: only such cells are named, and of them the ``most`` nearest ones.
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
        row = np.concatenate(rows)
        return [row[asking] for asking in members(np.concatenate(cells), len(self.members))]


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
    """Sort the rows at distinct ``places`` [n], n >= 1, into cells of about ``size`` rows."""
    count = max(1, round(len(places) / size))
    order = np.argsort(keys(0, "rules.cells", 0, places), kind="stable")
    centres = vectors_ND[places[np.sort(order[:count])]].astype(np.float32)
    sample = places[np.sort(order[: _SAMPLE * count])]
    joined = nearest_centres(vectors_ND, sample, centres)
    for cell in range(count):
        own = sample[joined == cell]
        if len(own):
            centres[cell] = vectors_ND[own].mean(axis=0)
    cells, centres = _compact(nearest_centres(vectors_ND, places, centres), centres)
    return Cells(members=[np.sort(places[own]) for own in members(cells)], centres=centres)
