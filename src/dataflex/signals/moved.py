"""Models that are changed for the length of a pass: moved along a random direction, or with a low-rank probe."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from dataflex.errors import UnsupportedError
from dataflex.rng import rademacher
from dataflex.signals.gradients.parameters import choose_parameters
from dataflex.signals.losses import row_losses
from dataflex.signals.model_access import ModelAccess
from dataflex.signals.model_parts import attached
from dataflex.signals.specs import Perturbation, Probe
from dataflex.signals.sweep import bucketed, fetch, to_device

logger = logging.getLogger(__name__)

_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def perturbed(access: ModelAccess, signal: Perturbation) -> Iterator[None]:
    """Move the parameters that a signal names for the length of a block, without mixed precision."""
    chosen = choose_parameters(access.model, pattern=signal.parameters)
    full = torch.autocast(device_type=access.device.type, enabled=False)
    with full, moved(chosen, seed=signal.seed, direction=signal.direction, epsilon=signal.epsilon):
        low = next((p.dtype for p in access.model.parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
        if low is not None and access.model not in _warned:
            _warned.add(access.model)
            logger.warning("perturbed losses: the model computes in %s; small differences drown in its rounding", low)
        yield


@contextmanager
def moved(parameters: Mapping[str, nn.Parameter], *, seed: int, direction: int, epsilon: float) -> Iterator[None]:
    """Add ``epsilon`` times a random direction to parameters; at the end they are copied back, whatever happened.

    The seed, the number of the direction, a parameter's name and the place in it determine a sign.
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


@contextmanager
def probed(access: ModelAccess, signal: Probe) -> Iterator[None]:
    """Put a low-rank probe beside the linear layers, trained on a signal's target, equal on every rank.

    A is drawn from the run's seed; B starts at zero, so an untrained probe changes nothing. Every step of AdamW takes
    the mean of all rows' losses.
    """
    layers = _probe_layers(access.model, signal.rank, access.seed)
    parameters = [tensor for _, a, b in layers for tensor in (a, b)]
    sweep = access.target_sweep(signal.towards)
    batches = [
        to_device(sweep.collate(fetch(sweep.dataset, positions)), sweep.device)
        for positions in bucketed(sweep.lengths, sweep.token_budget)
    ]
    optimizer = torch.optim.AdamW(parameters, lr=signal.learning_rate, weight_decay=0.0)
    history = []
    scale = signal.alpha / signal.rank
    with attached(*(module.register_forward_hook(_addition(a, b, scale)) for module, a, b in layers)):
        with torch.enable_grad():
            for _ in range(signal.depth_steps):
                grads, total, count = [torch.zeros_like(tensor) for tensor in parameters], 0.0, 0
                for batch in batches:
                    with access.autocast():
                        losses = row_losses(access.model, batch)
                    kept = losses[torch.isfinite(losses)]
                    if len(kept):
                        for grad, part in zip(grads, torch.autograd.grad(kept.sum(), parameters), strict=True):
                            grad += part
                        total += float(kept.detach().sum())
                        count += len(kept)
                for tensor, grad in zip(parameters, grads, strict=True):
                    tensor.grad = grad / max(count, 1)
                optimizer.step()
                history.append(total / max(count, 1))
        logger.info("probe on target %s: losses before each step %s", signal.towards, [round(x, 4) for x in history])
        yield


def _probe_layers(model: nn.Module, rank: int, seed: int) -> list[tuple[nn.Linear, torch.Tensor, torch.Tensor]]:
    """Return the linear layers of a model, each with matrices A [rank, in] and B [out, rank]."""
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name:
            device, bound = module.weight.device, 1.0 / math.sqrt(module.in_features)
            a = torch.empty(rank, module.in_features).uniform_(-bound, bound, generator=generator).to(device)
            b = torch.zeros(module.out_features, rank, device=device)
            layers.append((module, a.requires_grad_(), b.requires_grad_()))
    if not layers:
        raise UnsupportedError("the model has no linear layers that a low-rank probe could be put beside")
    return layers


def _addition(a: torch.Tensor, b: torch.Tensor, scale: float) -> Callable[..., torch.Tensor]:
    def add(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        return output + (F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale).to(output.dtype)

    return add
