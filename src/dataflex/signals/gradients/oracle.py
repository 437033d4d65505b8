"""The slow, obviously right reference: one row, one backward pass; and a check of the engine against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dataflex.signals.gradients.units import shape_of

__all__ = ["batch_rows", "batch_tokens", "oracle_row_gradients", "row_of"]


def batch_rows(batch: Mapping[str, Any]) -> int:
    """Return the number of samples of a batch."""
    return len(batch["input_ids"] if "input_ids" in batch else next(v for v in batch.values() if torch.is_tensor(v)))


def batch_tokens(batch: Mapping[str, Any]) -> int:
    """Return the number of positions of a sample, padding included; 1 where there are no token ids."""
    return batch["input_ids"].shape[1] if "input_ids" in batch else 1


def row_of(batch: Mapping[str, Any], row: int) -> dict[str, Any]:
    """Return a batch of one row; tensors without the samples in front are passed on."""
    rows = batch_rows(batch)
    return {
        key: value[row : row + 1] if torch.is_tensor(value) and value.dim() and len(value) == rows else value
        for key, value in batch.items()
    }


def oracle_row_gradients(
    loss: Callable[[dict[str, Any]], torch.Tensor],
    batch: Mapping[str, Any],
    row: int,
    parameters: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return the gradient of one row's loss by autograd, fp32; zeros for parameters that it does not use.

    A row without labels has no gradient: zeros.

    Use it in eval mode, on a model whose parameters are whole; ``.grad`` is not touched.

    Args:
        loss: Batch to row losses [b].
        batch: A collated batch.
        row: Which row of it.
        parameters: By name; they must require gradients.
    """
    with torch.enable_grad():
        total = loss(row_of(batch, row)).sum()
    gradients: tuple[torch.Tensor | None, ...] = (None,) * len(parameters)
    if total.requires_grad:
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros(shape_of(parameter)) if gradient is None else gradient.float()
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }
