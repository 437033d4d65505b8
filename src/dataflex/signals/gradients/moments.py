"""Adam's moments of the parameters under training, wherever the optimizer keeps them.

Matched by parameter identity, never by position in the optimizer's groups. An optimizer that has no
moments for each element is refused with a reason: another direction under Adam's name would be a
silent error.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from dataflex import comm
from dataflex.errors import UnsupportedError
from dataflex.signals.gradients.units import shape_of

__all__ = ["Backend", "Moments", "moments_of"]

Backend = Literal["plain", "zero"]

_REASONS = {
    "adafactor": "it keeps row and column means of the second moment",
    "adabelief": "its second moment is of differences",
    "adamax": "its second moment is a running maximum",
    "apollo": "it keeps moments of a projected gradient",
    "badam": "it keeps moments of one block of parameters at a time",
    "dummy": "each parameter has an optimizer of its own, stepped during the backward pass",
    "galore": "it keeps moments of a projected gradient",
    "lion": "it has no second moment",
    "lomo": "each parameter is stepped during the backward pass",
    "mini": "it keeps one second moment for a block of elements",
    "muon": "it orthogonalizes the momentum and has no second moment",
    "nadam": "its direction looks one step ahead",
    "radam": "its direction is rectified",
    "schedulefree": "its moments belong to another sequence of parameters",
    "shampoo": "it preconditions whole matrices",
    "soap": "it keeps moments in a rotated basis",
}
_INSTEAD = "use an Adam or AdamW optimizer, or precondition: none or sign"


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Adam's state of one parameter.

    Attributes:
        first: Running mean of gradients, fp32, the parameter's full shape.
        second: Running mean of squared gradients, likewise.
        step: Optimizer steps so far.
        betas: Adam's betas.
        eps: Adam's eps.
    """

    first: torch.Tensor
    second: torch.Tensor
    step: int
    betas: tuple[float, float]
    eps: float


def moments_of(optimizer: Any, parameters: Mapping[str, Any], backend: Backend = "plain") -> dict[str, Moments]:
    """Return Adam's moments by parameter name. Collective where parameters are sharded (FSDP2, ZeRO).

    Before the optimizer's first step the moments are zero, as Adam itself has them. Where they are whole
    and fp32, they are the optimizer's own tensors and no copies: use them before its next step.

    Args:
        optimizer: The Trainer's optimizer; wrappers of accelerate and DeepSpeed are looked through.
        parameters: The model's parameters by name, the very objects that the optimizer was given.
        backend: "zero" for DeepSpeed ZeRO-1/2/3, else "plain" (also DDP and FSDP2).

    Raises:
        UnsupportedError: The optimizer keeps no moments for each element, or not of these parameters.
    """
    base, wrappers = optimizer, []
    while hasattr(base, "optimizer"):
        wrappers.append(base)
        base = base.optimizer
    name = type(base).__name__
    for word, reason in _REASONS.items():
        if word in name.lower().replace("_", ""):
            raise _refusal(name, reason)
    if any("betas" not in group or "eps" not in group for group in base.param_groups):
        raise _refusal(name, "its groups have no betas and eps")
    if any(group.get("amsgrad") for group in base.param_groups):
        raise _refusal(name, "amsgrad divides by the largest second moment so far")
    if backend == "zero":
        return _zero_moments(base, parameters, wrappers)
    groups = {id(parameter): group for group in base.param_groups for parameter in group["params"]}
    missing = [key for key, parameter in parameters.items() if id(parameter) not in groups]
    if missing:
        raise UnsupportedError(f"{name} does not train {', '.join(missing[:5])} (and {len(missing)} in all)")
    return {key: _plain_moments(base, parameter, groups[id(parameter)], key) for key, parameter in parameters.items()}


def _refusal(name: str, reason: str) -> UnsupportedError:
    return UnsupportedError(f"{name} cannot precondition gradients by element: {reason}; {_INSTEAD}")


def _plain_moments(base: Any, parameter: Any, group: Mapping[str, Any], key: str) -> Moments:
    state = base.state.get(parameter, {})
    betas, eps = (float(group["betas"][0]), float(group["betas"][1])), float(group["eps"])
    shape = shape_of(parameter)
    if not state:
        zeros = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
        return Moments(first=zeros, second=zeros, step=0, betas=betas, eps=eps)
    found = []
    for ours, theirs, quantized in (("exp_avg", "state1", "1"), ("exp_avg_sq", "state2", "2")):
        value = state.get(ours, state.get(theirs))
        if value is not None and value.dtype == torch.uint8:
            value = _dequantized(state, value, quantized, type(base).__name__)
        if value is not None and hasattr(value, "full_tensor"):
            value = value.full_tensor()
        if value is None or value.shape != shape:
            what = f"the state of {key} has {sorted(state)}"
            what += "" if value is None else f", {ours} of shape {list(value.shape)} for {list(shape)}"
            raise _refusal(type(base).__name__, what)
        found.append(value.detach().float())
    return Moments(first=found[0], second=found[1], step=int(state.get("step", 0)), betas=betas, eps=eps)


def _dequantized(state: Mapping[str, Any], value: torch.Tensor, which: str, name: str) -> torch.Tensor:
    """Return an 8-bit moment of bitsandbytes in fp32."""
    try:
        dequantize = importlib.import_module("bitsandbytes.functional").dequantize_blockwise
        absmax, code = state[f"absmax{which}"], state[f"qmap{which}"]
    except (ImportError, AttributeError, KeyError) as error:
        raise _refusal(name, f"its 8-bit moments cannot be dequantized here ({error})") from error
    sizes = (256, 2048, 512, 1024, 4096, 128, 64)  # bitsandbytes' own; its present default first
    fitting = [size for size in sizes if -(-value.numel() // size) == absmax.numel()]
    if not fitting:
        raise _refusal(name, f"its 8-bit moments have {absmax.numel()} blocks for {value.numel()} elements")
    return dequantize(value, absmax=absmax, code=code, blocksize=fitting[0]).view(value.shape)


def _link_states(wrappers: list[Any]) -> None:
    """Link every group's states to its parameters (ZeRO-1/2).

    DeepSpeed does so once, after the first group's first step, when the other groups have no state yet.
    """
    for wrapper in wrappers:
        if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
            wrapper._hp_optimizer_states_linked = False
            wrapper._lazy_init_hp_params_optimizer_state()


def _zero_moments(base: Any, parameters: Mapping[str, Any], wrappers: list[Any]) -> dict[str, Moments]:
    from deepspeed.utils import safe_get_full_optimizer_state

    settings = {(*map(float, group["betas"]), float(group["eps"])) for group in base.param_groups}
    if len(settings) != 1:
        raise _refusal(type(base).__name__, f"its groups differ in betas or eps ({sorted(settings)})")
    beta1, beta2, eps = settings.pop()
    steps = [int(state["step"]) for state in base.state.values() if "step" in state]
    step = _largest(max(steps, default=0))
    if step:
        _link_states(wrappers)
    moments = {}
    for key, parameter in parameters.items():
        if step == 0:  # asked before the first step, DeepSpeed fails on one rank and leaves the others waiting
            zeros = torch.zeros(shape_of(parameter), device=parameter.device)
            moments[key] = Moments(first=zeros, second=zeros, step=0, betas=(beta1, beta2), eps=eps)
            continue
        pair = [safe_get_full_optimizer_state(parameter, which) for which in ("exp_avg", "exp_avg_sq")]
        if all(value is None for value in pair):
            pair = [torch.zeros(shape_of(parameter), device=parameter.device) for _ in pair]
        if any(value is None for value in pair):
            raise _refusal(type(base).__name__, f"DeepSpeed gives no moments of {key}")
        first, second = (value.detach().float().view(shape_of(parameter)) for value in pair)
        moments[key] = Moments(first=first, second=second, step=step, betas=(beta1, beta2), eps=eps)
    return moments


def _largest(step: int) -> int:
    """Return the largest of all ranks' numbers: a rank whose partition is empty has counted nothing."""
    if comm.world() == 1:
        return step
    seen: list[int] = [0] * comm.world()
    dist.all_gather_object(seen, step)
    return max(seen)
