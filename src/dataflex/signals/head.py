"""Logits of chosen positions, computed inside the model's own forward pass, so that those of all never exist.

Some models scale or cap their logits after the head: the first batch compares the model's own logits with the
head's raw output, bit for bit, and where they differ the model's logits are computed in full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from dataflex import comm
from dataflex.signals.anatomy import Anatomy, anatomy
from dataflex.signals.losses import model_inputs

__all__ = ["LogitReader", "LogitsOf"]

T = TypeVar("T")
LogitsOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows [S], positions [S] of the batch) -> logits [S, V] in the model's type."""


class LogitReader:
    """Hands the logits of a batch to a function; use it without gradient, in eval mode, in autocast.

    Collective in its first call: all ranks settle on the same way.

    Args:
        model: The outermost module to call, not the DDP or DeepSpeed engine.

    Raises:
        UnsupportedError: No transformers model inside.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parts: Anatomy = anatomy(model)
        self.through_head: bool | None = None if self._parts.head is not None else False
        """Whether the head is applied to chosen positions; None until the first batch has been seen."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model's configuration knows."""
        return int(self._parts.text_config.vocab_size)

    def __call__(self, batch: dict[str, Any], use: Callable[[LogitsOf, int], T]) -> T:
        """Run the model on a collated batch and return what ``use`` makes of its logits.

        Args:
            batch: On the device.
            use: Given how to get logits, and their width V; may be called twice for the first batch.
        """
        if self.through_head is not False:
            found = self._in_head(batch, use)
            if self.through_head:
                return found[0]
        logits = _logits(self._parts.root(**model_inputs(batch), use_cache=False))
        return use(lambda rows, positions: logits[rows, positions], logits.shape[-1])

    def _in_head(self, batch: dict[str, Any], use: Callable[[LogitsOf, int], T]) -> list[T]:
        """Call ``use`` inside the head's call, whose parameters are whole only then (ZeRO-3)."""
        head = self._parts.head
        assert head is not None
        found: list[T] = []
        raw: list[torch.Tensor] = []

        def inside(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, *rest = inputs
            last = hidden[:, -1:]
            if self.through_head is None:
                raw.append(head.forward(last, *rest))
            found.append(use(lambda rows, positions: head.forward(hidden[rows, positions], *rest), self.vocabulary))
            return (last, *rest)

        handle = head.register_forward_pre_hook(inside)
        try:
            outputs = self._parts.root(**model_inputs(batch), use_cache=False)
        finally:
            handle.remove()
        if self.through_head is None:
            same = len(raw) == 1 and torch.equal(raw[0].float(), _logits(outputs).float())
            agreed = comm.gather_sum(torch.tensor(int(same), device=batch["labels"].device))
            self.through_head = int(agreed) == comm.world()
        return found


def _logits(outputs: Any) -> torch.Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs.logits
