"""What weighters share: values by sequence, by rank, and over the micro-batch of all ranks. No torch at import."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dataflex.errors import ComponentError
from dataflex.method import BatchView
from dataflex.sequences import Sequences

if TYPE_CHECKING:
    import torch


def sequences_of(batch: BatchView) -> Sequences:
    """Return the sequences of a micro-batch."""
    return Sequences(rows_B=batch.rows_B, index_BT=batch.sequence_BT)


def sequence_means(values_BT: torch.Tensor, batch: BatchView) -> torch.Tensor:
    """Return the mean of ``values_BT`` [R, T] over each sequence's supervised tokens [B]; 0 without any.

    Args:
        values_BT: Values by position, 0 where nothing is supervised.
        batch: The micro-batch; its sequences are rows, or the documents of packed rows.
    """
    return sequences_of(batch).sums(values_BT) / batch.tokens_B.clamp(min=1)


def reference_losses(name: str, batch: BatchView) -> torch.Tensor:
    """Return the reference model's token losses [R, T].

    Raises:
        ComponentError: The batch has none.
    """
    if batch.reference_BT is None:
        raise ComponentError(f"{name}: the micro-batch carries no losses of a reference model")
    return batch.reference_BT
