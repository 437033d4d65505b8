"""Directional derivatives of row losses by forward-mode differentiation: no backward pass, no gradients kept.

The derivative of row i's loss along a direction v equals <G_i, v>, so ranking by it is ranking by the
plain inner product with a target gradient. It knows no norms (no cosines) and no preconditioning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from dataflex.errors import UnsupportedError

__all__ = ["row_derivatives"]


class _Losses(nn.Module):
    """Makes the loss a module around the model, so that the model's parameters can be exchanged."""

    def __init__(self, model: nn.Module, loss: Callable[[dict[str, Any]], torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return row losses."""
        return self._loss(batch)


def row_derivatives(
    model: nn.Module,
    loss: Callable[[dict[str, Any]], torch.Tensor],
    batch: dict[str, Any],
    parameters: Mapping[str, nn.Parameter],
    direction: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Return the derivative of each row's loss along ``direction``, fp32 [b].

    Args:
        model: The module that ``loss`` runs.
        loss: Batch to row losses [b].
        batch: A collated batch on the device.
        parameters: The parameters that move, by their names in ``direction``.
        direction: Tensor of each parameter's shape; parameters that are left out stay.

    Raises:
        UnsupportedError: Parameters are partitioned over ranks, or an operation has no forward derivative.
    """
    if any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in parameters.values()):
        raise UnsupportedError("jvp needs whole parameters, but they are partitioned over ranks; use dot products")
    own = {id(parameter): f"model.{name}" for name, parameter in model.named_parameters()}
    moving = {name: parameter for name, parameter in parameters.items() if name in direction}
    primals = {own[id(parameter)]: parameter.detach() for parameter in moving.values()}
    tangents = {own[id(p)]: direction[name].to(p.device, p.dtype).view_as(p) for name, p in moving.items()}
    try:
        # Forward mode as such, not torch.func.jvp: inside that, hooks that mark inputs for checkpointing fail.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(value, tangents[name]) for name, value in primals.items()}
            losses = functional_call(_Losses(model, loss), duals, (batch,))
            derivative = forward_ad.unpack_dual(losses).tangent
    except (RuntimeError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0]
        raise UnsupportedError(f"jvp: this model cannot be differentiated forwards: {first}") from error
    return (torch.zeros_like(losses) if derivative is None else derivative).float()
