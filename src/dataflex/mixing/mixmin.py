"""Weights of domains whose proxies together explain a target best (MixMin, Thudi et al., ICML 2025, arXiv 2502.10510).

F(w) = -mean_x [ log sum_d w_d p_d(x) / len(x) ] is convex in w. Minimised by exponentiated gradient
from equal weights: w <- w exp(-lr grad F), renormalised.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataflex.core.rng import stream
from dataflex.errors import DataError

__all__ = ["Weights", "check_matrix", "objective", "solve", "split_rows"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What ``solve`` found.

    Attributes:
        weights: float64 [K] on the simplex.
        value: F there, in nats per token.
        gap: Most by which F exceeds its minimum.
        steps: Steps taken.
    """

    weights: Floats
    value: float
    gap: float
    steps: int


def check_matrix(loglik_NK: Floats, lengths_N: Floats) -> None:
    """Raise unless the numbers are log-likelihoods of texts.

    Raises:
        DataError: Wrong shapes, NaN, a positive log-likelihood of discrete text, or an empty text.
    """
    if loglik_NK.ndim != 2 or loglik_NK.shape[1] < 2 or len(loglik_NK) < 1:
        raise DataError(f"log-likelihoods: expected [texts, domains >= 2], found shape {list(loglik_NK.shape)}")
    if lengths_N.shape != loglik_NK.shape[:1]:
        raise DataError(f"lengths: expected one per text ({len(loglik_NK)}), found shape {list(lengths_N.shape)}")
    bad = ~np.isfinite(loglik_NK)
    if bad.any():
        row, column = map(int, np.argwhere(bad)[0])
        raise DataError(f"log-likelihoods: {int(bad.sum())} are not finite, the first of text {row}, domain {column}")
    if not (np.isfinite(lengths_N) & (lengths_N > 0)).all():
        raise DataError("lengths: every text needs a length in tokens above 0")


def objective(weights_K: Floats, loglik_NK: Floats, lengths_N: Floats) -> tuple[float, Floats]:
    """Return F in nats per token, and its gradient [K].

    Args:
        weights_K: Weights >= 0, sum 1 [K].
        loglik_NK: Log-likelihood of each text under each domain's proxy [N, K], in nats.
        lengths_N: Tokens of each text [N].
    """
    top_N = loglik_NK.max(axis=1, keepdims=True)
    ratio_NK = np.exp(loglik_NK - top_N)
    mixed_N = ratio_NK @ weights_K
    with np.errstate(divide="ignore"):
        value = -float(((np.log(mixed_N) + top_N[:, 0]) / lengths_N).mean())
    with np.errstate(divide="ignore", invalid="ignore"):
        gradient = -(ratio_NK / (mixed_N * lengths_N)[:, None]).mean(axis=0)
    return value, gradient


def solve(
    loglik_NK: Floats, lengths_N: Floats, *, rate: float = 1.0, most_steps: int = 100, tolerance: float = 1e-4
) -> Weights:
    """Minimise F.

    Args:
        loglik_NK: Log-likelihoods [N, K].
        lengths_N: Tokens of each text [N].
        rate: Step size.
        most_steps: Steps after which to stop.
        tolerance: Gap (in nats per token) at which to stop. By convexity F - min F <= <grad, w> - min grad.
    """
    weights = np.full(loglik_NK.shape[1], 1.0 / loglik_NK.shape[1])
    steps = 0
    while True:
        value, gradient = objective(weights, loglik_NK, lengths_N)
        gap = float(weights @ gradient - gradient.min())
        if gap <= tolerance or steps == most_steps:
            return Weights(weights=weights, value=value, gap=max(gap, 0.0), steps=steps)
        logs = -rate * (gradient - gradient.min())
        weights = weights * np.exp(logs)
        weights /= weights.sum()
        steps += 1


def split_rows(num_rows: int, test_share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return row numbers to fit and to test on, disjoint; 0.2 is the paper's share of the latter."""
    order = stream(seed, "mixing.mixmin").permutation(num_rows)
    num_test = round(test_share * num_rows)
    return np.sort(order[num_test:]), np.sort(order[:num_test])
