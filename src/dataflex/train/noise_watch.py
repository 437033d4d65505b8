"""Tells when a mixer feeds a domain that does not learn: its loss stays far above the others' while it is weighed up.

Domains of pure noise have the highest loss for ever, so that every mixer that follows losses runs after them.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

__all__ = ["NoiseWatch", "outlying"]

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]

_UPDATES = 5
_DEVIATIONS = 3.0


def outlying(loss_K: Floats) -> NDArray[np.bool_]:
    """Return which losses are above median + 3 MAD, the median absolute deviation [K]; NaN is never."""
    known = loss_K[np.isfinite(loss_K)]
    if not known.size:
        return np.zeros(loss_K.shape, dtype=np.bool_)
    middle = np.median(known)
    deviation = np.median(np.abs(known - middle))
    return np.asarray(loss_K > middle + _DEVIATIONS * deviation)


class NoiseWatch:
    """Warns once of each domain that is outlying at five updates in a row that raise its weight.

    Kept in memory only: a resumed run counts anew.

    Args:
        names: Names of the domains [K].
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._weights: Floats | None = None
        self._rises = np.zeros(len(names), dtype=np.int64)
        self._told = np.zeros(len(names), dtype=np.bool_)
        self._loss, self._tokens = np.zeros(len(names)), np.zeros(len(names))

    def step(self, loss_sum: Floats, tokens: Floats, weights: Floats) -> list[str]:
        """Take in one optimizer step and return the domains to be told about, which are logged too.

        Args:
            loss_sum: Sum of plain token losses by domain [K].
            tokens: Supervised tokens by domain [K].
            weights: The domains' proportions, or their weights in the loss, of this step [K].
        """
        before, self._weights = self._weights, weights.copy()
        found: list[str] = []
        if before is not None and not np.array_equal(before, weights):  # an update, made from the steps before
            mean = np.divide(self._loss, self._tokens, out=np.full(len(weights), np.nan), where=self._tokens > 0)
            self._rises = np.where(outlying(mean) & (weights > before), self._rises + 1, 0)
            new = (self._rises >= _UPDATES) & ~self._told
            self._told |= new
            for k in np.flatnonzero(new).tolist():
                found.append(self._names[k])
                logger.warning(
                    "domain %r: its loss of %.3g nats per token is far above the other domains' (more than the median "
                    "and %g median absolute deviations) and its weight rose %d times in a row, to %.3g. If it is noise "
                    "(logs, encoded data), the mixer runs after it: leave it out, cap it (max_epochs), or use a "
                    "mixer with a reference or target losses",
                    self._names[k],
                    mean[k],
                    _DEVIATIONS,
                    _UPDATES,
                    weights[k],
                )
            self._loss, self._tokens = np.zeros(len(weights)), np.zeros(len(weights))
        self._loss, self._tokens = self._loss + loss_sum, self._tokens + tokens
        return found
