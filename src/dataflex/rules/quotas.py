"""Rules that give every group its share: water-filling and proportional quotas, over domains or k-means clusters."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataflex.core.choose import largest_remainder
from dataflex.core.cluster import kmeans
from dataflex.rules.cells import nearest_centres

__all__ = ["Quota", "by_quota", "kmeans_labels", "quotas", "water_filling"]

Quota = Literal["water_filling", "proportional"]

_FIT_ROWS = 256  # rows of each cluster that centres are found on


def water_filling(sizes: ArrayLike, total: int) -> NDArray[np.int64]:
    """Share ``total`` out equally, groups too small for their share giving all they have to the rest.

    Groups ascend by size, ties by index; each gets what is left divided by the groups left, rounded down, or all
    it has (S2L: SmallToLarge, NeurIPS 2024, arXiv 2403.07384). Sizes (2, 10, 50) and 30 give (2, 10, 18).

    Args:
        sizes: Rows of each group [G], >= 0.
        total: Rows wanted, >= 0.

    Returns:
        int64 [G] with sum min(total, sum of sizes), none above its size.
    """
    counts = np.asarray(sizes, dtype=np.int64)
    result = np.zeros(len(counts), dtype=np.int64)
    left = int(total)
    for turn, group in enumerate(np.argsort(counts, kind="stable").tolist()):
        result[group] = min(int(counts[group]), left // (len(counts) - turn))
        left -= int(result[group])
    return result


def quotas(sizes: ArrayLike, total: int, quota: Quota) -> NDArray[np.int64]:
    """Return each group's number of rows [G], none above its size, with sum min(total, sum of sizes)."""
    counts = np.asarray(sizes, dtype=np.int64)
    if quota == "water_filling":
        return water_filling(counts, total)
    total = min(total, int(counts.sum()))
    return largest_remainder(total, counts) if total else np.zeros_like(counts)


def by_quota(groups: NDArray[np.integer], preference: NDArray[np.floating], k: int, quota: Quota) -> NDArray[np.int64]:
    """Let every group give its quota of rows, those of largest preference.

    Args:
        groups: Group of each row [n], >= 0.
        preference: Larger is better, finite [n]; ties by position.
        k: Rows wanted.
        quota: How ``k`` is shared out.

    Returns:
        int64 [min(k, n)], in order of preference.
    """
    sizes = np.bincount(groups) if len(groups) else np.zeros(0, dtype=np.int64)
    there = np.flatnonzero(sizes)
    wanted = np.zeros(len(sizes), dtype=np.int64)
    wanted[there] = quotas(sizes[there], k, quota)
    order = np.argsort(-np.asarray(preference, dtype=np.float64), kind="stable")
    grouped = order[np.argsort(groups[order], kind="stable")]
    starts = np.cumsum(sizes) - sizes
    rank = np.empty(len(groups), dtype=np.int64)
    rank[grouped] = np.arange(len(groups)) - starts[groups[grouped]]
    return order[rank[order] < wanted[groups[order]]].astype(np.int64)


def kmeans_labels(vectors_ND: NDArray[np.float32], clusters: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the k-means cluster of each row, int64 [N]; labels without rows are possible.

    Centres are found on at most 256 rows a cluster, by ``core.cluster.kmeans``; then every row joins the nearest.

    Args:
        vectors_ND: Vectors, finite, N >= 1; distances are Euclidean.
        clusters: Clusters at most, >= 1.
        rng: Draws the rows that centres are found on, and the first centres; equal on every rank.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    enough = _FIT_ROWS * clusters
    if len(vectors_ND) <= enough:
        return kmeans(vectors_ND, clusters, rng)[0]
    sample = np.sort(rng.choice(len(vectors_ND), size=enough, replace=False))
    centres = kmeans(vectors_ND[sample], clusters, rng)[1]
    return nearest_centres(vectors_ND, np.arange(len(vectors_ND)), centres).astype(np.int64)
