"""Rules that follow a ranking: the best rows, or the best rows that a number of tokens holds."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataflex.errors import DataError
from dataflex.plan.domains import Rows
from dataflex.select.candidates import Uniforms
from dataflex.select.choose import (
    gumbel_top_k,
    largest_remainder,
    top_k,
    weighted_with_replacement,
    weighted_without_replacement,
)
from dataflex.select.cluster import kmeans
from dataflex.select.density import nearest_centres

__all__ = [
    "Quota",
    "by_quota",
    "gumbel",
    "kmeans_labels",
    "log_weights",
    "multinomial",
    "quotas",
    "ranking",
    "token_budget",
    "top_k",
    "water_filling",
]

_FIRST = 4096  # rows ranked at first; four times as many where they do not fill the budget


def ranking(scores: NDArray[np.floating]) -> NDArray[np.int64]:
    """Return all positions best first, ties by position; NaN and -inf are left out."""
    return top_k(scores, len(scores))


def token_budget(
    scores: NDArray[np.floating], lengths: NDArray[np.integer], tokens: int, k: int, *, skip: bool = True
) -> NDArray[np.int64]:
    """Take rows best first while they fit into a number of tokens.

    Args:
        scores: Scores [n]; NaN and -inf are never chosen.
        lengths: Tokens of each row [n], >= 0.
        tokens: Tokens of the chosen rows together, at most.
        k: Rows at most.
        skip: Pass over a row that no longer fits and go on with the next; else stop there.

    Returns:
        int64, best first.
    """
    size = min(len(scores), _FIRST)
    while True:
        order = top_k(scores, size)
        chosen, full = _fill(order, lengths, tokens, k, skip)
        if full or len(order) < size or size == len(scores):
            return chosen
        size = min(len(scores), 4 * size)


def _fill(
    order: NDArray[np.int64], lengths: NDArray[np.integer], tokens: int, k: int, skip: bool
) -> tuple[NDArray[np.int64], bool]:
    """Return the rows taken, and whether nothing after ``order`` could be taken."""
    taken: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    count, left = 0, tokens
    while len(order) and count < k:
        total = np.cumsum(lengths[order], dtype=np.int64)
        fitting = min(int(np.searchsorted(total, left, side="right")), k - count)
        taken.append(order[:fitting])
        count += fitting
        left -= int(total[fitting - 1]) if fitting else 0
        if fitting == len(order):
            break
        if not skip:
            return np.concatenate(taken), True
        rest = order[fitting:]
        order = rest[lengths[rest] <= left]
    return np.concatenate(taken), count >= k or (left == 0 and not (lengths == 0).any())


def log_weights(scores: NDArray[np.floating], temperature: float, standardize: bool) -> NDArray[np.float64]:
    """Return ``scores / temperature`` [n], of scores with mean 0 and standard deviation 1 where asked for.

    QuRating (ICML 2024, arXiv 2402.09739) draws with p ~ exp(s / tau) of standardized scores, tau = 2.
    """
    values = np.asarray(scores, dtype=np.float64)
    if standardize and len(values):
        spread = float(values.std())
        values = (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)
    return values / temperature


def gumbel(log_w: NDArray[np.float64], k: int, rows: Rows, uniforms: Uniforms) -> NDArray[np.int64]:
    """Draw ``k`` positions without replacement with probability proportional to exp(log_w), keyed by row id.

    A row's number depends on its id only: neither on the order of the pool nor on the number of ranks.

    Returns:
        int64 [min(k, rows of finite log weight)], in the order of the draw.
    """
    return gumbel_top_k(log_w, min(k, int(np.isfinite(log_w).sum())), uniforms("gumbel", rows))


def multinomial(
    weights: NDArray[np.floating], k: int, rows: Rows, uniforms: Uniforms, *, replacement: bool
) -> NDArray[np.int64]:
    """Draw ``k`` positions with probability proportional to ``weights`` [n].

    Returns:
        int64 in the order of the draw: [k] with replacement; without, [min(k, rows of weight above 0)].

    Raises:
        DataError: A negative weight, or none above 0.
    """
    values = np.asarray(weights, dtype=np.float64)
    if len(values) == 0 or k == 0:
        return np.empty(0, dtype=np.int64)
    if (values < 0).any() or not (values > 0).any():
        found: Literal["negative", "all 0"] = "negative" if (values < 0).any() else "all 0"
        raise DataError(
            f"multinomial: scores are taken for weights, and some are {found}. Set 'weights: softmax', or use "
            "the rule gumbel_top_k."
            if found == "negative"
            else f"multinomial: the weights of {len(values):,} rows are {found}; there is nothing to draw from."
        )
    if replacement:
        return weighted_with_replacement(values, k, uniforms("draws", np.arange(k, dtype=np.int64)))
    return weighted_without_replacement(values, min(k, int((values > 0).sum())), uniforms("gumbel", rows))


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

    Centres are found on at most 256 rows a cluster, by ``select.cluster.kmeans``; then every row joins the nearest.

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
