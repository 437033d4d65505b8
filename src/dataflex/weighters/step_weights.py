"""Weights of the rows of one optimizer step, worked out before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dataflex.method import BatchView, Rows

if TYPE_CHECKING:
    import torch

__all__ = ["StepWeights"]


class StepWeights:
    """Numbers by row id.

    Args:
        rows: Row ids of the step [n]; where one occurs twice, its first number counts.
        values: Their numbers [n].
    """

    def __init__(self, rows: Rows, values: NDArray[np.floating]) -> None:
        self._rows, first = np.unique(rows, return_index=True)
        self._values = np.asarray(values)[first]

    def of(self, rows: Rows) -> NDArray[np.float64]:
        """Return the numbers of ``rows``; 0 for rows that are not of the step (copies that even out a short one)."""
        if not len(self._rows):
            return np.zeros(len(rows))
        place = np.searchsorted(self._rows, rows).clip(max=len(self._rows) - 1)
        return np.where(self._rows[place] == rows, self._values[place], 0.0)

    def weights(self, batch: BatchView) -> torch.Tensor:
        """Return the numbers of the micro-batch's sequences, fp32 [B], times the micro-batches of the step.

        Numbers that sum to one over the step then make the mean over its micro-batches a sum over the step.
        A packed row's number is shared by its documents in equal parts.
        """
        values = self.of(batch.rows_B)
        if batch.sequence_BT is not None:
            _, inverse, counts = np.unique(batch.rows_B, return_inverse=True, return_counts=True)
            values = values / counts[inverse]
        found: torch.Tensor = batch.loss_B.new_tensor(values * batch.num_micro_batches)
        return found.masked_fill(batch.tokens_B == 0, 0.0)
