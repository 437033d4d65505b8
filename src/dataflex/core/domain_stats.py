"""What one optimizer step made of each domain: the only thing that online mixers learn from.

Sums over every rank and micro-batch of the step, of the plain losses (before any weights), so that each
rank holds the same float64 numbers and makes the same update without a broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SUMS", "DomainStats"]

SUMS: tuple[str, ...] = (
    "loss_sum",
    "square_sum",
    "excess_sum",
    "excess_tokens",
    "tokens",
    "sequences",
    "micro_batches",
)
"""The fields that are added up over ranks and micro-batches, in the order of ``DomainStats.of``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DomainStats:
    """Sums of one optimizer step by domain; every array is float64 [K], in the order of ``names``.

    Attributes:
        names: Names of the domains.
        step: Optimizer step, counted from 0.
        total_steps: Optimizer steps of the run.
        loss_sum: Sum of token losses, nats.
        square_sum: Sum of squared token losses.
        excess_sum: Sum of max(loss - reference loss, 0) over tokens; 0 without a reference.
        excess_tokens: Tokens whose loss is above the reference's.
        tokens: Supervised tokens.
        sequences: Sequences with a supervised token; packed rows count once.
        micro_batches: Micro-batches (of all ranks) that held a supervised token of the domain.
        proportions: Sampling proportions of sequences under which the step was drawn.
        learning_rate: Learning rate of the step.
    """

    names: tuple[str, ...]
    step: int
    total_steps: int
    loss_sum: NDArray[np.float64]
    square_sum: NDArray[np.float64]
    excess_sum: NDArray[np.float64]
    excess_tokens: NDArray[np.float64]
    tokens: NDArray[np.float64]
    sequences: NDArray[np.float64]
    micro_batches: NDArray[np.float64]
    proportions: NDArray[np.float64]
    learning_rate: float = 0.0

    @classmethod
    def of(cls, sums: NDArray[np.float64], *, names: Sequence[str], **rest: Any) -> DomainStats:
        """Build the statistics from rows of sums [len(SUMS), K]."""
        assert sums.shape == (len(SUMS), len(names)), f"{sums.shape} sums for {len(names)} domains"
        return cls(names=tuple(names), **dict(zip(SUMS, sums, strict=True)), **rest)

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Which domains had a supervised token in the step [K]."""
        return self.tokens > 0

    def mean_loss(self) -> NDArray[np.float64]:
        """Return the mean token loss of each domain [K]; NaN where the domain was absent."""
        return self._over_tokens(self.loss_sum)

    def mean_excess(self) -> NDArray[np.float64]:
        """Return the mean of the clipped token excess of each domain [K]; NaN where it was absent."""
        return self._over_tokens(self.excess_sum)

    def _over_tokens(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.divide(sums, self.tokens, out=np.full(len(self.names), np.nan), where=self.seen)
