"""Limits on how often a domain's rows are repeated, and what a mixture will cost in epochs."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["AtCap", "cap_limits", "expected_epochs", "without"]

AtCap = Literal["error", "redistribute", "stop"]

_NO_LIMIT = np.iinfo(np.int64).max


def cap_limits(sizes: NDArray[np.int64], max_epochs: ArrayLike | None) -> NDArray[np.int64]:
    """Return how many sequences each domain may serve in all.

    Args:
        sizes: Rows of each domain, int64 [K].
        max_epochs: Largest number of epochs of each domain [K] (or one for all), fractions allowed;
            NaN and inf mean no limit.

    Returns:
        int64 [K].
    """
    limits = np.full(sizes.size, _NO_LIMIT)
    if max_epochs is not None:
        caps = np.broadcast_to(np.asarray(max_epochs, dtype=np.float64), sizes.shape)
        assert not (caps < 0).any(), f"max_epochs {caps.tolist()}"
        finite = np.isfinite(caps)
        # The small addend keeps 0.29 epochs of 100 rows at 29.
        limits[finite] = np.floor(caps[finite] * sizes[finite] + 1e-6).astype(np.int64)
    return limits


def without(proportions: NDArray[np.float64], closed: NDArray[np.bool_]) -> NDArray[np.float64] | None:
    """Give the share of closed domains to the others in proportion; None when no other has a share."""
    left = np.where(closed, 0.0, proportions)
    total = float(left.sum())
    return left / total if total > 0 else None


def expected_epochs(
    sizes: NDArray[np.int64],
    proportions: NDArray[np.float64],
    total: int,
    max_epochs: ArrayLike | None = None,
    at_cap: AtCap = "error",
    drawn: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """Return the epochs of each domain after ``total`` more sequences at fixed proportions.

    Args:
        sizes: Rows of each domain, int64 [K], > 0.
        proportions: Proportions of sequences, float64 [K].
        total: Sequences to be drawn.
        max_epochs: Cap of each domain [K] (or one for all), NaN or inf for none.
        at_cap: ``redistribute`` and ``stop`` are followed; for ``error`` the caps are left aside, so
            that the result shows by how much they would be passed.
        drawn: Sequences already drawn by domain, int64 [K].

    Returns:
        float64 [K].
    """
    served = np.zeros(sizes.size) if drawn is None else drawn.astype(np.float64)
    limits = cap_limits(sizes, None if at_cap == "error" else max_epochs).astype(np.float64)
    left = float(total)
    closed = served >= limits
    while left > 0:
        shares = without(proportions, closed)
        if shares is None or (at_cap == "stop" and (closed & (proportions > 0)).any()):
            break
        active = np.flatnonzero(shares > 0)
        steps = (limits - served)[active] / shares[active]
        step = min(left, float(steps.min()))
        served = np.minimum(served + step * shares, limits)
        left -= step
        # The domains that bounded the step are full, whatever rounding says.
        full = active[steps <= step]
        served[full] = limits[full]
        closed[full] = True
    return served / sizes
