"""What an optimizer would make of a gradient: Adam's direction with its moments held fixed, Muon's, or signs.

Adam, for all samples alike: m' = beta1 m + (1 - beta1) g, v' = beta2 v + (1 - beta2) g^2 and direction = m' / (sqrt(v')
+ eps). Source: LESS (arXiv 2402.04333), equation in section 3.1; its code puts eps inside the root and leaves out the
bias correction, which with the tiny moments of real LoRA runs is another ranking: both are presets. Under Muon, as
LLaMA-Factory has it, matrices go through its polynomial (``muon``), and what it leaves to AdamW through Adam. Any other
optimizer without moments for each element is refused: another direction would be a silent error.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import torch

from dataflex import comm
from dataflex.errors import ConfigError, UnsupportedError, did_you_mean
from dataflex.signals.gradients.consumers import Block, Columns, Segment
from dataflex.signals.gradients.factors import SampleGradients
from dataflex.signals.gradients.muon import Momentum
from dataflex.signals.gradients.parameters import shape_of


@dataclass(frozen=True, kw_only=True)
class Preconditioner:
    """Turns per-sample gradients into directions: those of some matrices as a whole, all others element by element.

    Attributes:
        elements: (what the columns are, fp32 gradients [b, columns]) -> directions; may change the gradients in place.
            Columns of matrices stay as they are.
        matrices: By parameter name, from a matrix's uses to those of its directions.
    """

    elements: Callable[[tuple[Segment, ...], torch.Tensor], torch.Tensor]
    matrices: Mapping[str, Callable[[list[SampleGradients]], list[SampleGradients]]] = field(default_factory=dict)

    def __call__(self, segments: tuple[Segment, ...], gradient: torch.Tensor) -> torch.Tensor:
        """Return what ``elements`` does."""
        return self.elements(segments, gradient)


@dataclass(frozen=True, kw_only=True)
class Precondition:
    """How gradients are preconditioned.

    Without ``own_square`` all samples are scaled alike, in a linear way and without a momentum term, by
    (1 - beta1) sqrt(1 - beta2^t) / (1 - beta1^t) / (sqrt(v) + eps), t the coming step (OPUS, arXiv 2602.05400).
    """

    kind: Literal["none", "adam", "sign", "ekfac"] = "none"  # ekfac: of the targets, rows stay as they are
    eps_mode: Literal["outside", "inside"] = "outside"  # sqrt(v) + eps, or sqrt(v + eps)
    bias_correction: bool = True  # divide the moments by 1 - beta^(t + 1), t being the optimizer's steps so far
    include_momentum: bool = True  # keep the term beta1 m, which all samples share
    own_square: bool = True  # add the sample's own g^2 to v
    betas: tuple[float, float] | None = None  # instead of the optimizer's own
    eps: float | None = None  # instead of the optimizer's own

    @classmethod
    def preset(cls, name: str) -> Precondition:
        """Return a preset by name; ConfigError for an unknown one."""
        if name not in PRESETS:
            meant, known = did_you_mean(name, list(PRESETS)), ", ".join(PRESETS)
            raise ConfigError(f"gradients: unknown precondition {name!r}{meant} (known: {known})")
        return PRESETS[name]


PRESETS: dict[str, Precondition] = {
    "none": Precondition(),
    "sign": Precondition(kind="sign"),
    "ekfac": Precondition(kind="ekfac"),
    "true_adam": Precondition(kind="adam"),
    "adam_scale": Precondition(kind="adam", own_square=False, include_momentum=False),
    "paper_repo": Precondition(kind="adam", eps_mode="inside", bias_correction=False, betas=(0.9, 0.999), eps=1e-8),
}


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Adam's state of one parameter."""

    first: torch.Tensor  # running mean of gradients, fp32, the parameter's full shape
    second: torch.Tensor  # running mean of squared gradients, likewise
    step: int  # number of optimizer steps so far
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


OptimizerState: TypeAlias = Moments | Momentum
"""Of one parameter: Adam's, or Muon's of a matrix."""


def adam_direction(
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    spec: Precondition,
    *,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.Tensor:
    """Return the direction of Adam's next step for each gradient [b, n], fp32.

    ``first`` and ``second`` are the moments m and v [n] after ``step`` optimizer steps.
    """
    beta1, beta2 = betas
    if not spec.own_square:
        factor = (1 - beta1) * (1 - beta2 ** (step + 1)) ** 0.5 / (1 - beta1 ** (step + 1))
        return gradient * (factor / (second.sqrt() + eps))
    correct1 = 1 - beta1 ** (step + 1) if spec.bias_correction else 1.0
    correct2 = 1 - beta2 ** (step + 1) if spec.bias_correction else 1.0
    # Corrections are moved into the scalars and the moments, so that the large tensor is read fewer times:
    # (m' / c1) / (sqrt(v' / c2) + eps) = (m' sqrt(c2) / c1) / (sqrt(v') + eps sqrt(c2)).
    scale = correct2**0.5 / correct1
    if spec.eps_mode == "inside":
        root = torch.addcmul(second * beta2 + eps * correct2, gradient, gradient, value=1 - beta2).sqrt_()
    else:
        root = torch.addcmul(second * beta2, gradient, gradient, value=1 - beta2).sqrt_().add_(eps * correct2**0.5)
    if spec.include_momentum:
        return torch.add(first * (beta1 * scale), gradient, alpha=(1 - beta1) * scale).div_(root)
    return (gradient * ((1 - beta1) * scale)).div_(root)


def preconditioner(spec: Precondition, moments: Mapping[str, OptimizerState] | None = None) -> Preconditioner | None:
    """Return what turns blocks of gradients into directions; None where gradients stay as they are.

    ``moments`` are by parameter name, from ``moments_of``; only ``kind`` "adam" needs them.

    Raises:
        UnsupportedError: Moments are Muon's, and ``spec`` repeats another code's Adam.
    """
    if spec.kind in ("none", "ekfac"):
        return None
    if spec.kind == "sign":
        return Preconditioner(elements=lambda _segments, gradient: gradient.sign_())
    assert moments is not None
    adam = {name: state for name, state in moments.items() if isinstance(state, Moments)}
    muon = {name: state for name, state in moments.items() if isinstance(state, Momentum)}
    if muon and spec.betas is not None:
        raise _refusal("Muon", "the preset is of another code's Adam")
    first = Columns(lambda name: adam[name].first.flatten())
    second = Columns(lambda name: adam[name].second.flatten())

    def settings(name: str) -> dict[str, Any] | None:
        if name in muon:
            return None
        state = adam[name]
        eps = state.eps if spec.eps is None else spec.eps
        return {"step": state.step, "betas": spec.betas or state.betas, "eps": eps}

    def direction(segments: tuple[Segment, ...], gradient: torch.Tensor) -> torch.Tensor:
        options = settings(segments[0].name)
        if any(settings(one.name) != options for one in segments[1:]):
            parts = Block(segments=segments, values=gradient).parts()
            return torch.cat([direction((segment,), values) for segment, values in parts], dim=1)
        if options is None:
            return gradient
        m, v = (moment.of(segments, gradient.device) for moment in (first, second))
        return adam_direction(gradient, m, v, spec, **options)

    shared = spec.include_momentum and spec.own_square
    matrices = {name: partial(state.directions, include_momentum=shared) for name, state in muon.items()}
    return Preconditioner(elements=direction, matrices=matrices)


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
    "muon": "it orthogonalizes the momentum, and is not LLaMA-Factory's",
    "nadam": "its direction looks one step ahead",
    "radam": "its direction is rectified",
    "schedulefree": "its moments belong to another sequence of parameters",
    "shampoo": "it preconditions whole matrices",
    "soap": "it keeps moments in a rotated basis",
}
_INSTEAD = "use an Adam or AdamW optimizer, or precondition: none or sign"


def moments_of(
    optimizer: Any, parameters: Mapping[str, Any], backend: Literal["plain", "zero"] = "plain"
) -> dict[str, OptimizerState]:
    """Return Adam's moments, or Muon's, by parameter name. Collective where parameters are sharded (FSDP2, ZeRO).

    ``parameters`` are the very objects that the optimizer was given; wrappers of accelerate and DeepSpeed around it are
    looked through. ``backend`` is "zero" for DeepSpeed, else "plain" (also DDP and FSDP2). Before the optimizer's first
    step the moments are zero. Where they are whole and fp32, they are the optimizer's own tensors: use them before its
    next step.

    Raises:
        UnsupportedError: The optimizer keeps no moments for each element, or not of these parameters.
    """
    base, wrappers = optimizer, []
    while hasattr(base, "optimizer"):
        wrappers.append(base)
        base = base.optimizer
    name = type(base).__name__
    muon = name == "Muon" and all("adamw_betas" in group for group in base.param_groups)
    if muon and backend == "zero":
        raise _refusal(name, "DeepSpeed keeps no matrices")
    for word, reason in _REASONS.items() if not muon else ():
        if word in name.lower().replace("_", ""):
            raise _refusal(name, reason)
    if not muon and any("betas" not in group or "eps" not in group for group in base.param_groups):
        raise _refusal(name, "its groups have no betas and eps")
    if any(group.get("amsgrad") for group in base.param_groups):
        raise _refusal(name, "amsgrad divides by the largest second moment so far")
    groups = {id(parameter): group for group in base.param_groups for parameter in group["params"]}
    if backend == "zero" and groups.keys().isdisjoint(map(id, parameters.values())):  # else stage 0 in fp32
        return _zero_moments(base, parameters, wrappers)
    missing = [key for key, parameter in parameters.items() if id(parameter) not in groups]
    if missing:
        raise UnsupportedError(f"{name} does not train {', '.join(missing[:5])} (and {len(missing)} in all)")
    read = _of_muon if muon else _plain_moments
    return {
        key: read(name, base.state.get(parameter, {}), parameter, groups[id(parameter)], key)
        for key, parameter in parameters.items()
    }


def _refusal(name: str, reason: str) -> UnsupportedError:
    return UnsupportedError(f"{name} cannot precondition gradients by element: {reason}; {_INSTEAD}")


def _zeros(parameter: Any) -> torch.Tensor:
    return torch.zeros(shape_of(parameter), dtype=torch.float32, device=parameter.device)


def _of_muon(name: str, state: Mapping[str, Any], parameter: Any, group: Mapping[str, Any], key: str) -> OptimizerState:
    """Return what LLaMA-Factory's Muon keeps of a parameter: of a matrix, or of one that it leaves to AdamW."""
    if state["use_muon"]:
        buffer: Any = state.get("momentum_buffer")
        if hasattr(buffer, "full_tensor"):
            buffer = buffer.full_tensor()
        return Momentum(
            buffer=None if buffer is None else buffer.detach().float(),
            decay=float(group["momentum"]),
            nesterov=bool(group["nesterov"]),
            steps=int(group["ns_steps"]),
        )
    own = {"moment1": "exp_avg", "moment2": "exp_avg_sq", "step": "step"}
    state = {known: state[theirs] for theirs, known in own.items() if theirs in state}
    options = {"betas": group["adamw_betas"], "eps": group["adamw_eps"]}
    return _plain_moments(name, state, parameter, options, key)


def _plain_moments(name: str, state: Mapping[str, Any], parameter: Any, group: Mapping[str, Any], key: str) -> Moments:
    shape = shape_of(parameter)
    found = [] if state else [_zeros(parameter)] * 2
    kinds = (("exp_avg", "state1", "1"), ("exp_avg_sq", "state2", "2")) if state else ()
    for ours, theirs, quantized in kinds:
        value = state.get(ours, state.get(theirs))
        if value is not None and value.dtype == torch.uint8:
            value = _dequantized(state, value, quantized, name)
        if value is not None and hasattr(value, "full_tensor"):
            value = value.full_tensor()
        if value is None or value.shape != shape:
            what = f"the state of {key} has {sorted(state)}"
            what += "" if value is None else f", {ours} of shape {list(value.shape)} for {list(shape)}"
            raise _refusal(name, what)
        found.append(value.detach().float())
    (beta1, beta2), eps = map(float, group["betas"]), float(group["eps"])
    return Moments(first=found[0], second=found[1], step=int(state.get("step", 0)), betas=(beta1, beta2), eps=eps)


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


def _zero_moments(base: Any, parameters: Mapping[str, Any], wrappers: list[Any]) -> dict[str, OptimizerState]:
    from deepspeed.utils import safe_get_full_optimizer_state

    settings = {(*map(float, group["betas"]), float(group["eps"])) for group in base.param_groups}
    if len(settings) != 1:
        raise _refusal(type(base).__name__, f"its groups differ in betas or eps ({sorted(settings)})")
    beta1, beta2, eps = settings.pop()
    # The largest of all ranks: a rank whose partition is empty has counted nothing.
    steps = [int(state["step"]) for state in base.state.values() if "step" in state]
    step = max(comm.gather_objects(max(steps, default=0)))
    for wrapper in wrappers if step else ():
        # DeepSpeed links every group's states to its parameters (ZeRO-1/2) once, after the first group's first step,
        # when the other groups have no state yet.
        if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
            wrapper._hp_optimizer_states_linked = False
            wrapper._lazy_init_hp_params_optimizer_state()
    moments: dict[str, OptimizerState] = {}
    there = False
    for key, parameter in parameters.items():
        # Asked before the first step, DeepSpeed fails on one rank and leaves the others waiting.
        names = ("exp_avg", "exp_avg_sq") if step else ()
        pair = [safe_get_full_optimizer_state(parameter, which) for which in names]
        there = there or any(value is not None for value in pair)
        if all(value is None for value in pair):
            pair = [_zeros(parameter)] * 2
        if any(value is None for value in pair):
            raise _refusal(type(base).__name__, f"DeepSpeed gives no moments of {key}")
        first, second = (value.detach().float().view(shape_of(parameter)) for value in pair)
        moments[key] = Moments(first=first, second=second, step=step, betas=(beta1, beta2), eps=eps)
    if step and parameters and not there:
        raise _refusal(type(base).__name__, "DeepSpeed gives no moments of any parameter")
    return moments
