"""Losses under parameters that are moved a little along a random direction, and put back bit for bit.

What zeroth-order methods look at: with f(p + e x) and f(p - e x), the central difference is the derivative of the
loss along x up to O(e^2), without a backward pass. Directions are signs (SPSA) made from counters, so that training
and target rows, and all ranks, meet the same ones without storing them.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dataflex.errors import UnsupportedError
from dataflex.rng import rademacher
from dataflex.signals.answers import Answer
from dataflex.signals.gradients import choose_parameters
from dataflex.signals.losses import row_losses
from dataflex.signals.passes import preserved
from dataflex.signals.sweep import Sweep, vector_pass

__all__ = ["moved", "perturbed_row_losses"]

logger = logging.getLogger(__name__)

_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def moved(parameters: Mapping[str, nn.Parameter], *, seed: int, direction: int, epsilon: float) -> Iterator[None]:
    """Add ``epsilon`` times the direction to the parameters; at the end they are copied back, whatever happened.

    Args:
        parameters: By name; the name and the place in the tensor determine the signs.
        seed: Seed of the directions.
        direction: Number of the direction.
        epsilon: Step, of either sign.

    Raises:
        UnsupportedError: A parameter is not float32 (a small step would be rounded away), or partitioned.
    """
    for name, parameter in parameters.items():
        if hasattr(parameter, "ds_id") or hasattr(parameter, "full_tensor"):
            raise UnsupportedError(f"perturbed losses need whole parameters, but {name} is partitioned over ranks")
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


def perturbed_row_losses(
    model: nn.Module, sweep: Sweep, *, seed: int, direction: int, epsilon: float, pattern: str | None = None
) -> Answer:
    """Return token-mean losses of rows [n] under moved parameters, equal on every rank (collective).

    Runs without autocast, since half precision would round the step away.

    Args:
        model: The outermost module to call, not the DDP engine.
        sweep: The rows.
        seed: Seed of the directions.
        direction: Number of the direction.
        epsilon: Step, of either sign.
        pattern: Regular expression of the names of the trainable parameters that move; None: all of them.

    Raises:
        UnsupportedError: Parameters that move are not float32, or are partitioned.
    """

    def score(batch: dict[str, Any]) -> torch.Tensor:
        return row_losses(model, batch)

    with (
        preserved(model),
        torch.no_grad(),
        torch.autocast(device_type=sweep.device.type, enabled=False),
        moved(choose_parameters(model, pattern=pattern), seed=seed, direction=direction, epsilon=epsilon),
    ):
        _warn_of_rounding(model)
        model.eval()
        return vector_pass(sweep, score, ())


def _warn_of_rounding(model: nn.Module) -> None:
    low = next((p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
    if low is not None and model not in _warned:
        _warned.add(model)
        logger.warning("perturbed losses: the model computes in %s; small differences drown in its rounding", low)
