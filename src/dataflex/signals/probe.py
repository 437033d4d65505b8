"""A low-rank probe: what the model's losses would be after a little training on a target.

The probe adds B A x * (alpha / rank) to the output of every linear layer inside the model's blocks
through forward hooks. Its matrices are its own leaf tensors, trained with AdamW on the whole
target as one batch per step; parameters, gradients and optimizer of the model are never touched.
Source: TACS (arXiv 2605.09404), a rank-1 adapter trained on the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from dataflex.errors import UnsupportedError

__all__ = ["LowRankProbe"]


class LowRankProbe:
    """Low-rank matrices beside the linear layers of a model.

    Args:
        model: The plain (not partitioned) model.
        rank: Rank of the matrices.
        alpha: Scale; the output is multiplied by alpha / rank.
        seed: Seed of the matrices A; B starts at zero, so an untrained probe changes nothing.

    Raises:
        UnsupportedError: The model has no linear layer besides its head.
    """

    def __init__(self, model: torch.nn.Module, *, rank: int, alpha: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self._layers: list[tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]] = []
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear) or module is head or "lora_" in name:
                continue
            if module.weight.numel() == 0:
                raise UnsupportedError("a low-rank probe needs whole parameters, but they are partitioned over ranks")
            device = module.weight.device
            bound = 1.0 / math.sqrt(module.in_features)
            a = torch.empty(rank, module.in_features).uniform_(-bound, bound, generator=generator).to(device)
            b = torch.zeros(module.out_features, rank, device=device)
            self._layers.append((module, a.requires_grad_(), b.requires_grad_()))
        if not self._layers:
            raise UnsupportedError("the model has no linear layers that a low-rank probe could be put beside")
        self._scale = alpha / rank

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The probe's own leaf tensors."""
        return [tensor for _, a, b in self._layers for tensor in (a, b)]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Add the probe's output to every layer while inside."""
        handles = [module.register_forward_hook(self._hook(a, b)) for module, a, b in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, a: torch.Tensor, b: torch.Tensor) -> Callable[..., torch.Tensor]:
        scale = self._scale

        def add(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x = inputs[0]
            return output + (F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale).to(output.dtype)

        return add

    def train(
        self,
        batches: list[dict[str, Any]],
        loss: Callable[[dict[str, Any]], torch.Tensor],
        *,
        steps: int,
        learning_rate: float,
    ) -> list[float]:
        """Train on the mean of all rows' losses; one optimizer step sees every batch.

        Args:
            batches: The whole target, in batches on the device.
            loss: Batch to row losses [b], with gradient.
            steps: Optimizer steps.
            learning_rate: Of AdamW without weight decay.

        Returns:
            Mean loss before each step.
        """
        optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0)
        history = []
        with self.attached(), torch.enable_grad():
            for _ in range(steps):
                grads = [torch.zeros_like(tensor) for tensor in self.parameters]
                total, count = 0.0, 0
                for batch in batches:
                    row_losses = loss(batch)
                    kept = row_losses[torch.isfinite(row_losses)]
                    if not len(kept):
                        continue
                    parts = torch.autograd.grad(kept.sum(), self.parameters)
                    for grad, part in zip(grads, parts, strict=True):
                        grad += part
                    total += float(kept.detach().sum())
                    count += len(kept)
                for tensor, grad in zip(self.parameters, grads, strict=True):
                    tensor.grad = grad / max(count, 1)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                history.append(total / max(count, 1))
        return history
