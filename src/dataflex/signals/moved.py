"""Models that are changed for the length of a pass: moved along a random direction, or with a low-rank probe."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dataflex.errors import UnsupportedError
from dataflex.rng import rademacher
from dataflex.signals.kinds import AdaptedLoss
from dataflex.signals.losses import row_losses
from dataflex.signals.model_access import ModelAccess
from dataflex.signals.model_parts import attached
from dataflex.signals.sweep import bucketed, fetch, to_device

logger = logging.getLogger(__name__)

_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def moved(parameters: Mapping[str, nn.Parameter], *, seed: int, direction: int, epsilon: float) -> Iterator[None]:
    """Add ``epsilon`` times a random direction to parameters; at the end they are copied back, whatever happened.

    Args:
        parameters: By name; the name and the place in the tensor determine the signs.
        seed: Seed of the directions.
        direction: Number of the direction.
        epsilon: Step, of either sign.

    Raises:
        UnsupportedError: A parameter is not float32: a small step would be rounded away.
    """
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            raise UnsupportedError(
                f"perturbed losses need float32 parameters, but {name} is {parameter.dtype}, in which a small step is "
                "rounded away; train in float32 (pure_bf16: false; LoRA's own parameters are float32 then)"
            )
    saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                signs = torch.from_numpy(rademacher(seed, name, direction, parameter.numel()))
                parameter.add_(signs.to(parameter.device).view_as(parameter), alpha=epsilon)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])


def warn_of_rounding(model: nn.Module) -> None:
    """Tell once of a model that computes in half precision, where small differences of losses are lost."""
    low = next((p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
    if low is not None and model not in _warned:
        _warned.add(model)
        logger.warning("perturbed losses: the model computes in %s; small differences drown in its rounding", low)


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

    def __init__(self, model: nn.Module, *, rank: int, alpha: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self._layers: list[tuple[nn.Linear, torch.Tensor, torch.Tensor]] = []
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear) or module is head or "lora_" in name:
                continue
            device, bound = module.weight.device, 1.0 / math.sqrt(module.in_features)
            a = torch.empty(rank, module.in_features).uniform_(-bound, bound, generator=generator).to(device)
            b = torch.zeros(module.out_features, rank, device=device)
            self._layers.append((module, a.requires_grad_(), b.requires_grad_()))
        if not self._layers:
            raise UnsupportedError("the model has no linear layers that a low-rank probe could be put beside")
        self._scale = alpha / rank
        self.parameters = [tensor for _, a, b in self._layers for tensor in (a, b)]
        """The probe's own leaf tensors."""

    def attached(self) -> AbstractContextManager[None]:
        """Add the probe's output to every layer while inside."""
        return attached(*(module.register_forward_hook(self._hook(a, b)) for module, a, b in self._layers))

    def _hook(self, a: torch.Tensor, b: torch.Tensor) -> Callable[..., torch.Tensor]:
        scale = self._scale

        def add(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
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
        """Train on the mean of all rows' losses, and return that mean before each step.

        Args:
            batches: The whole target, in batches on the device; one optimizer step sees all of them.
            loss: Batch to row losses [b], with gradient.
            steps: Number of optimizer steps.
            learning_rate: Of AdamW without weight decay.
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


def trained_probe(access: ModelAccess, signal: AdaptedLoss) -> LowRankProbe:
    """Return the probe that a signal asks for, trained on the whole of its target, the same on every rank."""
    sweep = access.target_sweep(signal.towards)
    batches = [
        to_device(sweep.collate(fetch(sweep.dataset, positions)), sweep.device)
        for positions in bucketed(sweep.lengths, sweep.token_budget)
    ]

    def losses(batch: dict[str, Any]) -> torch.Tensor:
        with access.autocast():
            return row_losses(access.model, batch)

    probe = LowRankProbe(access.model, rank=signal.rank, alpha=signal.alpha, seed=access.seed)
    history = probe.train(batches, losses, steps=signal.depth_steps, learning_rate=signal.learning_rate)
    logger.info("probe on target %s: losses before each step %s", signal.towards, [round(x, 4) for x in history])
    return probe
