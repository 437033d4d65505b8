"""Subset rules and exact counts: from scores to positions, from proportions to whole numbers.

Pure functions. Positions point into the array that was given; a score that is NaN or -inf is never
chosen; ties go to the smaller position, on every machine. Nothing here draws random numbers: those
that need some are given uniforms, which come from ``dataflex.rng``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataflex.errors import ComponentError, DataError

__all__ = [
    "gumbel_top_k",
    "largest_remainder",
    "round_robin",
    "take_turns",
    "top_k",
    "weighted_with_replacement",
    "weighted_without_replacement",
]

_WINDOW = 256  # candidates of a query turned into Python numbers at a time


def top_k(scores: ArrayLike, k: int) -> NDArray[np.int64]:
    """Return the positions of the ``k`` largest scores, best first, ties by position.

    Linear in the number of scores, plus sorting the chosen ones.

    Args:
        scores: Scores [n]; NaN and -inf are never chosen.
        k: How many, >= 0.

    Returns:
        int64 [min(k, eligible)].
    """
    assert k >= 0, f"k is {k}"
    values = np.asarray(scores)
    if not np.issubdtype(values.dtype, np.floating):
        values = values.astype(np.float64)
    assert values.ndim == 1, f"scores have shape {values.shape}"
    clean = np.where(np.isnan(values), -np.inf, values)
    k = min(k, int(np.count_nonzero(clean > -np.inf)))
    if k == 0:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(clean, clean.size - k)[clean.size - k]
    above = np.flatnonzero(clean > threshold)
    tied = np.flatnonzero(clean == threshold)[: k - above.size]
    order = np.argsort(-clean[above], kind="stable")
    return np.concatenate([above[order], tied]).astype(np.int64, copy=False)


def gumbel_top_k(log_weights: ArrayLike, k: int, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """Sample ``k`` positions without replacement with probability proportional to exp(log_weights).

    The k largest of log w_i + G_i with G = -ln(-ln U) are distributed as sequential draws without
    replacement (Kool, van Hoof, Welling: Stochastic Beams and Where to Find Them, ICML 2019,
    arXiv 1903.06059, section 2.3).

    Args:
        log_weights: Logarithms of weights [n], any offset; -inf and NaN are never taken.
        k: How many.
        uniforms: One number in (0, 1) per position [n], best drawn by row id, so that the result
            does not depend on how rows are spread over ranks.

    Returns:
        int64 [k], in the order of the draw.

    Raises:
        DataError: Fewer than ``k`` positions have a weight.
    """
    weights = np.asarray(log_weights, dtype=np.float64)
    clipped = np.clip(np.asarray(uniforms, dtype=np.float64), 1e-20, 1 - 1e-7)
    assert weights.shape == clipped.shape, f"{weights.shape} weights, {clipped.shape} uniforms"
    chosen = top_k(weights - np.log(-np.log(clipped)), k)
    if chosen.size < k:
        raise DataError(
            f"{k:,} rows are to be drawn without replacement, but only {chosen.size:,} of {weights.size:,} "
            "have a weight above zero"
        )
    return chosen


def weighted_without_replacement(weights: ArrayLike, k: int, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """Sample ``k`` positions without replacement with probability proportional to ``weights``.

    Args:
        weights: Weights [n], >= 0, any scale; 0 and NaN are never taken.
        k: How many.
        uniforms: One number in (0, 1) per position [n].

    Returns:
        int64 [k], in the order of the draw.

    Raises:
        ComponentError: A negative weight.
        DataError: Fewer than ``k`` positions have a weight.
    """
    values = np.asarray(weights, dtype=np.float64)
    negative = np.flatnonzero(values < 0)
    if negative.size:
        raise ComponentError(f"weight {values[negative[0]]} at position {negative[0]}: weights must be >= 0")
    with np.errstate(divide="ignore"):
        return gumbel_top_k(np.log(values), k, uniforms)


def weighted_with_replacement(weights: ArrayLike, k: int, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """Sample ``k`` positions independently with probability proportional to ``weights``; positions may repeat.

    Args:
        weights: Weights [n], >= 0, any scale, at least one above 0 where ``k`` is.
        k: How many.
        uniforms: One number in (0, 1) per draw [k].

    Returns:
        int64 [k], in the order of the draw; a position of weight 0 is never drawn.
    """
    values = np.asarray(weights, dtype=np.float64)
    if k == 0:
        return np.empty(0, dtype=np.int64)
    cumulative = np.cumsum(values)
    positions = np.searchsorted(cumulative, np.asarray(uniforms) * cumulative[-1], side="right")
    return np.minimum(positions, np.flatnonzero(values)[-1]).astype(np.int64)


def take_turns(lists: Sequence[NDArray[np.int64]], k: int) -> NDArray[np.int64]:
    """Let lists take turns, each giving its next position that is not yet taken.

    Args:
        lists: Positions in order of preference, each list without repeats; a list of length ``k`` never runs out.
        k: How many.

    Returns:
        int64, at most ``k``, in the order taken: fewer where all lists have run out.
    """
    queues = [iter(one.tolist()) for one in lists]
    taken: dict[int, None] = {}
    while queues and len(taken) < k:
        waiting = []
        for queue in queues:
            position = next((each for each in queue if each not in taken), None)
            if position is None:
                continue
            waiting.append(queue)
            taken[position] = None
            if len(taken) == k:
                break
        queues = waiting
    return np.fromiter(taken, dtype=np.int64, count=len(taken))


def _best_first(scores: NDArray[np.floating], first: int) -> Iterator[int]:
    """Yield eligible positions best first; the sorted list is extended only when it runs out."""
    done, size = 0, first
    while True:
        top = top_k(scores, size)
        for start in range(done, top.size, _WINDOW):
            yield from top[start : start + _WINDOW].tolist()
        if top.size < size:
            return
        done, size = size, 4 * size


def round_robin(
    scores_QN: NDArray[np.floating], k: int, order: ArrayLike | None = None, *, lose_turn: bool = False
) -> NDArray[np.int64]:
    """Let queries take turns, each taking its best position that is not yet taken.

    The rule of RDS+ (Ivison et al.: Large-Scale Data Selection for Instruction Tuning,
    arXiv 2503.01807). The result depends on the order of the queries: shuffle it with a seed.

    Args:
        scores_QN: Scores of n positions for each query [Q, n]; NaN and -inf are never chosen.
        k: How many.
        order: Query indices in the order of their turns; default 0..Q-1.
        lose_turn: A query whose next best position is taken gets nothing in this turn, instead of the one after it.

    Returns:
        int64 [min(k, positions eligible for some query)], in the order taken.
    """
    scores = np.asarray(scores_QN)
    assert scores.ndim == 2, f"scores have shape {scores.shape}, must be [queries, rows]"
    num_queries, num_rows = scores.shape
    turns = range(num_queries) if order is None else np.asarray(order).tolist()
    assert sorted(turns) == list(range(num_queries)), "order must be a permutation of the queries"
    limit = min(k, num_rows)
    chosen = np.empty(limit, dtype=np.int64)
    taken = bytearray(num_rows)
    count = 0
    queues = [_best_first(scores[j], 2 * limit // num_queries + 16) for j in turns]
    while queues and count < limit:
        waiting = []
        for queue in queues:
            for position in queue:
                if not taken[position] or lose_turn:
                    break
            else:
                continue  # nothing left for this query
            waiting.append(queue)
            if taken[position]:
                continue
            taken[position] = True
            chosen[count] = position
            count += 1
            if count == limit:
                break
        queues = waiting
    return chosen[:count]


def largest_remainder(total: int, proportions: ArrayLike) -> NDArray[np.int64]:
    """Split ``total`` into whole numbers that follow proportions (Hamilton), ties by index.

    Args:
        total: Whole number >= 0.
        proportions: Shares [K] >= 0 of any sum; a share of 0 gets nothing.

    Returns:
        int64 [K] with sum ``total``; each within 1 of its exact share.

    Raises:
        ComponentError: A negative or non-finite share, or none above zero.
    """
    shares = np.asarray(proportions, dtype=np.float64)
    if not np.isfinite(shares).all() or (shares < 0).any() or not (shares > 0).any():
        raise ComponentError(f"proportions must be finite, >= 0 and not all 0, got {shares.tolist()}")
    mass = float(shares.sum())
    exact = (shares if abs(mass - 1.0) < 1e-12 else shares / mass) * total
    counts = np.floor(exact).astype(np.int64)
    fractions = np.where(shares > 0, exact - counts, -1.0)
    counts[np.argsort(-fractions, kind="stable")[: total - int(counts.sum())]] += 1
    return counts
