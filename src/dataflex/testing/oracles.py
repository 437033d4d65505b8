"""A slow, obvious oracle of gradients by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def oracle_row_gradients(
    loss: Callable[[dict[str, Any]], torch.Tensor],
    batch: Mapping[str, Any],
    row: int,
    parameters: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return the gradient of one row's loss by autograd, fp32; zeros for parameters that it does not use.

    A row without labels has no gradient: zeros. Use it in eval mode, on a model whose parameters are whole; ``.grad``
    is not touched.

    Args:
        loss: Batch to row losses [b].
        batch: A collated batch; tensors without the samples in front are passed on.
        row: Which row of it.
        parameters: By name; they must require gradients.
    """
    import torch

    rows = len(batch["input_ids"])
    one = {
        key: value[row : row + 1] if torch.is_tensor(value) and value.dim() and len(value) == rows else value
        for key, value in batch.items()
    }
    with torch.enable_grad():
        total = loss(one).sum()
    gradients: tuple[torch.Tensor | None, ...] = (None,) * len(parameters)
    if total.requires_grad:
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros(parameter.shape) if gradient is None else gradient.float()
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }
