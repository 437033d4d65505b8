"""What weighters share: values by sequence, by rank, and over the micro-batch of all ranks. No torch at import."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dataflex.core.protocols import BatchView
from dataflex.errors import ComponentError

if TYPE_CHECKING:
    import torch

__all__ = ["by_position", "reference_losses", "sequence_means"]


def by_position(values_B: torch.Tensor, batch: BatchView) -> torch.Tensor:
    """Return each position's sequence's value [R, T]; 0 where nothing is supervised."""
    if batch.sequence_BT is None:
        return values_B[:, None] * batch.mask_BT
    spread = values_B[batch.sequence_BT] if len(values_B) else values_B.new_zeros(batch.mask_BT.shape)
    return spread * batch.mask_BT


def sequence_means(values_BT: torch.Tensor, batch: BatchView) -> torch.Tensor:
    """Return the mean of ``values_BT`` [R, T] over each sequence's supervised tokens [B]; 0 without any.

    Args:
        values_BT: Values by position, 0 where nothing is supervised.
        batch: The micro-batch; its sequences are rows, or the documents of packed rows.
    """
    if batch.sequence_BT is None:
        sums = values_BT.sum(dim=1)
    else:
        count = len(batch.rows_B)  # none where nothing is supervised: every index is still 0
        sums = values_BT.new_zeros(max(count, 1)).index_add(0, batch.sequence_BT.flatten(), values_BT.flatten())
        sums = sums[:count]
    return sums / batch.tokens_B.clamp(min=1)


def reference_losses(name: str, batch: BatchView) -> torch.Tensor:
    """Return the reference model's token losses [R, T].

    Raises:
        ComponentError: The batch has none.
    """
    if batch.reference_BT is None:
        raise ComponentError(f"{name}: the micro-batch carries no losses of a reference model")
    return batch.reference_BT
