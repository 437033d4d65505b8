"""Arithmetic on domain weights that every exponentiated-gradient mixer shares, in float64.

Weights are held as logarithms. A weight of zero is a logarithm of minus infinity: such a domain is out of
the simplex, gets nothing from smoothing and stays at zero.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["RunningMean", "exponentiated", "logs", "normalized_logs", "smoothed", "softmax"]

Floats = NDArray[np.float64]


def logs(proportions: Floats) -> Floats:
    """Return the logarithms of ``proportions`` [K] >= 0, minus infinity where they are 0."""
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(proportions, dtype=np.float64))


def normalized_logs(log_weights: Floats) -> Floats:
    """Return ``log_weights`` [K] less their log-sum-exp; at least one must be finite."""
    top = log_weights.max()
    assert np.isfinite(top), "no domain is in the simplex"
    return np.asarray(log_weights - (top + np.log(np.exp(log_weights - top).sum())))


def softmax(log_weights: Floats) -> Floats:
    """Return the weights [K] of ``log_weights``: their softmax, which sums to 1."""
    shifted = np.exp(log_weights - log_weights.max())
    return np.asarray(shifted / shifted.sum())


def smoothed(values: Floats, smoothing: float, prior: Floats | None = None) -> Floats:
    """Return (1 - c) p + c u.

    Args:
        values: Weights p [K], summing to 1.
        smoothing: c, 0 to 1.
        prior: u [K]; None is uniform over the domains whose weight is above 0.
    """
    if smoothing == 0.0:
        return values
    if prior is None:
        inside = values > 0
        prior = inside / inside.sum()
    return np.asarray((1.0 - smoothing) * values + smoothing * prior)


def exponentiated(
    log_weights: Floats, scores: Floats, *, eta: float, smoothing: float = 0.0, prior: Floats | None = None
) -> Floats:
    """Return the logarithms of the next weights: p exp(eta s), normalized, then smoothed.

    Args:
        log_weights: Logarithms of the weights p [K].
        scores: s [K], finite where the weight is above 0.
        eta: Step size.
        smoothing: See ``smoothed``; the uniform part goes to domains within the simplex only.
        prior: See ``smoothed``.
    """
    inside = np.isfinite(log_weights)
    moved = np.where(inside, log_weights + eta * np.where(inside, scores, 0.0), -np.inf)
    moved = normalized_logs(moved)
    if smoothing == 0.0:
        return moved
    if prior is None:
        prior = inside / inside.sum()  # a weight that underflowed is within: smoothing brings it back
    return logs(smoothed(softmax(moved), smoothing, prior))


class RunningMean:
    """Mean of the vectors given so far, in the form x <- (x (n - 1) + v) / n.

    Args:
        first: A vector that counts as the first one, or None to begin with the first ``add``.
    """

    def __init__(self, first: Floats | None = None) -> None:
        self.count = 0 if first is None else 1
        self.value = np.zeros(0) if first is None else np.array(first, dtype=np.float64)

    def add(self, vector: Floats) -> None:
        """Take in one vector."""
        self.count += 1
        before = self.value if self.count > 1 else np.zeros_like(vector)
        self.value = np.asarray((before * (self.count - 1) + vector) / self.count)
