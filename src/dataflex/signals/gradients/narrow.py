"""Row losses whose output head sees supervised positions only: the same values and gradients for less.

A training step computes logits for every position, prompt and padding included. Where the head's own
parameters are not differentiated (LoRA, frozen embeddings), its input can be narrowed to the positions
that have a label; with a large vocabulary the logits are most of a pass's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dataflex.signals.losses import model_inputs, row_losses, token_cross_entropy
from dataflex.signals.model_parts import anatomy

__all__ = ["TokenLoss", "supervised_losses", "supervised_tokens"]

_IGNORE = -100

Loss = Callable[[dict[str, Any]], torch.Tensor]
TokenLoss = Callable[[dict[str, Any]], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def supervised_losses(model: nn.Module, parameters: Collection[nn.Parameter]) -> Loss:
    """Return a function from a collated batch to token-mean row losses [b], NaN for rows without labels.

    Args:
        model: The outermost module to call, not the DDP or DeepSpeed engine.
        parameters: What is differentiated; if the head has a part in it, the head sees every position.

    Raises:
        UnsupportedError: No transformers model inside.
    """
    if _free_head(model, parameters) is None:
        return lambda batch: row_losses(model, batch)
    tokens = supervised_tokens(model, parameters)

    def losses(batch: dict[str, Any]) -> torch.Tensor:
        row, _, values = tokens(batch)
        rows = len(batch["labels"])
        sums = torch.zeros(rows, dtype=torch.float32, device=values.device)
        return sums.index_add(0, row, values) / torch.bincount(row, minlength=rows)

    return losses


def supervised_tokens(model: nn.Module, parameters: Collection[nn.Parameter]) -> TokenLoss:
    """Return a function from a collated batch to the losses of its supervised tokens [S].

    It gives each one's row, the position that it is predicted from, and its loss, with gradient.

    Args:
        model: As ``supervised_losses``.
        parameters: As ``supervised_losses``.

    Raises:
        UnsupportedError: No transformers model inside.
    """
    head = _free_head(model, parameters)
    return lambda batch: _token_losses(model, head, batch)


def _free_head(model: nn.Module, parameters: Collection[nn.Parameter]) -> nn.Module | None:
    """Return the head if none of its parameters is differentiated."""
    head = anatomy(model).head
    differentiated = {id(parameter) for parameter in parameters}
    if head is None or any(id(parameter) in differentiated for parameter in head.parameters()):
        return None
    return head


def _token_losses(
    model: nn.Module, head: nn.Module | None, batch: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    targets = F.pad(batch["labels"], (0, 1), value=_IGNORE)[..., 1:]
    row, position = targets.ne(_IGNORE).nonzero(as_tuple=True)
    narrowed: list[bool] = []

    def narrow(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        whole = bool(inputs) and inputs[0].shape[:2] == targets.shape
        narrowed.append(whole)
        return (inputs[0][row, position].unsqueeze(0), *inputs[1:]) if whole else None

    handle = None if head is None else head.register_forward_pre_hook(narrow)
    try:
        outputs = model(**model_inputs(batch), use_cache=False)
    finally:
        if handle is not None:
            handle.remove()
    logits = outputs[0] if isinstance(outputs, tuple) else outputs.logits
    picked = logits[0] if narrowed == [True] else logits[row, position]
    losses, _ = token_cross_entropy(picked, targets[row, position], _IGNORE)
    return row, position, losses
