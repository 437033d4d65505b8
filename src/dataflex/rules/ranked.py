"""Rules that follow a ranking: the best rows, or the best rows that a number of tokens holds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dataflex.core.choose import top_k

__all__ = ["ranking", "token_budget", "top_k"]

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
