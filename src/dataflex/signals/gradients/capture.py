"""Takes the gradients of layer outputs out of one backward pass, and nothing else.

Each unit's output goes through ``_Tap``, an identity that also depends on an "anchor". Asking autograd for the anchor's
gradient alone runs the backward pass through every tap and never computes a gradient of a parameter. A tap hands the
gradient on the moment it arrives, with what it kept of the call, so that no output gradients pile up; what is kept goes
through ``save_for_backward``, as activation checkpointing (not reentrant) needs it. ``Capture.attached``,
``recording`` and ``finish`` serve a backward pass that somebody else runs as well.

A module without a formula is run again, for all samples at once (``vmap`` over ``grad`` of ``functional_call``), or one
after the other where its control flow looks at values. Its outputs are compared with those of the first run: a module
that mixes samples is found out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree

from dataflex.errors import UnsupportedError
from dataflex.signals.gradients.factors import SampleGradients, filled, together
from dataflex.signals.gradients.parameters import Unit, Units
from dataflex.signals.model_parts import attached

logger = logging.getLogger(__name__)

Tensors = tuple[torch.Tensor, ...]
_Run = Callable[[dict[str, torch.Tensor], Tensors], Tensors]
"""(parameters by name, input tensors) -> floating tensors of the output: a module's call, made again."""
_Again = tuple[dict[str, torch.Tensor], Tensors]
"""Per-sample gradients by name, and the outputs of the second run."""

_said: set[str] = set()


class HandUp(Exception):
    """A unit cannot keep samples apart; the module around it must answer."""

    def __init__(self, unit: Unit, reason: str) -> None:
        super().__init__(reason)
        self.unit, self.reason = unit, reason


class Distrusted(HandUp):
    """A layer's formula does not hold for it."""


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of a unit: how samples lie in it, and how to make the call again where the unit has no formula."""

    capture: Capture
    unit: Unit
    num_outputs: int
    flat: bool = False
    misfit: str = ""
    run: _Run | None = None


class _Tap(torch.autograd.Function):
    """Identity on ``outputs``; ``tensors`` are the outputs followed by what is kept."""

    @staticmethod
    def forward(ctx: Any, _anchor: torch.Tensor, call: _Call, *tensors: torch.Tensor) -> Any:
        ctx.call = call
        ctx.num_kept = len(tensors) - call.num_outputs
        ctx.save_for_backward(*tensors[call.num_outputs :])
        # detach, not view_as: the model may go on changing the output in place
        outputs = tuple(tensor.detach() for tensor in tensors[: call.num_outputs])
        return outputs if len(outputs) > 1 else outputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.call.capture.deliver(ctx.call, ctx.saved_tensors, grads)
        return (None, None, *grads, *([None] * ctx.num_kept))


@dataclass(eq=False, kw_only=True)
class Capture:
    """Hooks on a model's units during one forward and backward pass."""

    units: Units  # who answers for which parameter
    rows: int  # number of rows in the batch
    tokens: int  # number of positions of a sample, for layers that are called with samples and positions flattened
    take: Callable[[str, list[SampleGradients]], None]  # a parameter's name, its gradients by use
    autocast: Callable[[], Any]  # the context in which modules are run again
    finite: torch.Tensor | None = None  # rows [b] whose gradients count, set before the backward pass; None: all
    per_sample: int = 1  # rows of a sample, one after the other, whose gradients are added up
    anchor: torch.Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    recording: bool = True  # False from the backward pass on, in which checkpointing calls modules again
    _muted: bool = False
    _expected: dict[str, int] = field(default_factory=dict)
    _pending: dict[str, list[SampleGradients]] = field(default_factory=dict)
    _called: set[str] = field(default_factory=set)
    _blind: dict[str, Unit] = field(default_factory=dict)

    @contextmanager
    def attached(self) -> Iterator[Capture]:
        """Keep the hooks on the model while inside."""
        hooks = [unit.module.register_forward_hook(self._hook(unit), with_kwargs=True) for unit in self.units]
        with attached(*hooks):
            yield self

    def backward(self, total: torch.Tensor) -> None:
        """Run the backward pass of the summed row losses; ``take`` has seen every parameter when it ends."""
        self.recording = False
        # Parameters of modules that were never called must have no gradient; asking costs nothing where that is so.
        behind = [
            (unit, parameter)
            for unit in self.units
            if unit.name not in self._called
            for local in unit.parameters
            if (parameter := unit.module.get_parameter(local)).requires_grad and parameter.is_leaf
        ]
        try:
            found = torch.autograd.grad(total, [self.anchor, *(p for _, p in behind)], allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise UnsupportedError(
                "per-sample gradients: the model keeps reentrant activation checkpointing in eval mode; "
                "use the kind that is not reentrant"
            ) from error
        for (unit, _), gradient in zip(behind, found[1:], strict=True):
            if gradient is not None:
                raise HandUp(unit, "its parameters are used without calling it")
        self.finish()

    def finish(self) -> None:
        """Hand on the parameters of which some uses took no part in the loss, after a backward pass."""
        for unit in self._blind.values():
            if not any(name in self._expected for name in unit.parameters.values()):
                raise HandUp(unit, "it ran without recording gradients")
        for name, uses in list(self._pending.items()):
            self.take(name, uses)
        self._pending.clear()

    def _hook(self, unit: Unit) -> Callable[..., Any]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._muted:
                return None
            self._called.add(unit.name)
            if not torch.is_grad_enabled():
                self._blind[unit.name] = unit
                return None
            return (self._tap_module if unit.kind is None else self._tap_layer)(unit, args, kwargs, output)

        return record

    def _tap_layer(self, unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> Any:
        assert unit.kind is not None
        kept = tuple(tensor.detach() for tensor in unit.kind.keep(unit.module, args, kwargs, output))
        if not unit.checked and unit.kind.check is not None:
            reason = unit.kind.check(unit.module, kept, output.detach())
            if reason is not None:
                raise Distrusted(unit, reason)
        unit.checked = True
        lead, flat, misfit = output.shape[0], False, ""
        if lead == 1 < self.rows:  # shared by all samples (positions): one copy for each keeps them apart
            output = output.expand(self.rows, *output.shape[1:])
            kept = tuple(tensor.expand(self.rows, *tensor.shape[1:]) for tensor in kept)
        elif lead != self.rows:
            flat = output.dim() == 2 and (self.rows == 1 or lead == self.rows * self.tokens)
            misfit = "" if flat else f"called with {lead} rows for {self.rows} samples"
        return self._tap(_Call(capture=self, unit=unit, num_outputs=1, flat=flat, misfit=misfit), (output,), kept)

    def _tap_module(self, unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        out_leaves, out_spec = pytree.tree_flatten(output)
        tensor_at = tuple(i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf))
        out_at = tuple(i for i, leaf in enumerate(out_leaves) if torch.is_tensor(leaf) and leaf.is_floating_point())
        outputs = tuple(out_leaves[i] for i in out_at)
        kept = (*(leaves[i].detach() for i in tensor_at), *(tensor.detach() for tensor in outputs))
        rest = [None if i in tensor_at else leaf for i, leaf in enumerate(leaves)]

        def run(weights: dict[str, torch.Tensor], inputs: Tensors) -> Tensors:
            again_args, again_kwargs = pytree.tree_unflatten(_replaced(rest, tensor_at, inputs), spec)
            again = functional_call(unit.module, weights, again_args, again_kwargs, tie_weights=False)
            found = pytree.tree_leaves(again)
            return tuple(found[i] for i in out_at)

        tapped = self._tap(_Call(capture=self, unit=unit, num_outputs=len(outputs), run=run), outputs, kept)
        tapped = tapped if isinstance(tapped, tuple) else (tapped,)
        return pytree.tree_unflatten(_replaced(out_leaves, out_at, tapped), out_spec)

    def _tap(self, call: _Call, outputs: Tensors, kept: Tensors) -> Any:
        if self.recording and not call.misfit:
            for name in call.unit.parameters.values():
                self._expected[name] = self._expected.get(name, 0) + 1
        return _Tap.apply(self.anchor, call, *outputs, *kept)

    def deliver(self, call: _Call, kept: Tensors, grads: Tensors) -> None:
        """Turn one call's output gradients into per-sample gradients of its parameters."""
        unit = call.unit
        if call.misfit:
            raise HandUp(unit, call.misfit)
        if call.flat:
            grads = tuple(grad.reshape(self.rows, -1, *grad.shape[1:]) for grad in grads)
            kept = tuple(tensor.reshape(self.rows, len(tensor) // self.rows, *tensor.shape[1:]) for tensor in kept)
        found: dict[str, SampleGradients]
        if call.run is not None:
            self._muted = True
            try:
                with self.autocast():
                    again = _run_again(unit, call.run, kept, grads, self.rows)
            finally:
                self._muted = False
            found = {name: filled(gradient, self.finite, 0.0) for name, gradient in again.items()}
        else:
            assert unit.kind is not None
            found = dict(
                unit.kind.sample(unit.module, kept, filled(grads[0], self.finite, 0.0), frozenset(unit.parameters))
            )
        for local, name in unit.parameters.items():
            pending = self._pending.setdefault(name, [])
            pending.append(found[local] if self.per_sample == 1 else together(found[local], self.per_sample))
            if len(pending) == self._expected[name]:
                self.take(name, self._pending.pop(name))


def _replaced(leaves: list[Any], places: tuple[int, ...], tensors: Tensors) -> list[Any]:
    replaced = list(leaves)
    for place, tensor in zip(places, tensors, strict=True):
        replaced[place] = tensor
    return replaced


def _run_again(unit: Unit, run: _Run, kept: Tensors, grads: Tensors, rows: int) -> dict[str, torch.Tensor]:
    """Return per-sample gradients of a module's parameters for one of its calls, fp32 [b, *parameter.shape] by name.

    ``kept`` are its inputs, then its outputs. Inputs [b, n, ...] are taken apart by sample; the others are shared.
    """
    module, num_inputs = unit.module, len(kept) - len(grads)
    inputs, outputs = kept[:num_inputs], kept[num_inputs:]
    if any(tensor.dim() == 0 or tensor.shape[0] != rows for tensor in outputs):
        raise HandUp(unit, "its outputs do not have the samples in front")
    split = tuple(tensor.dim() >= 2 and tensor.shape[0] == rows for tensor in inputs)
    parameters = {name: module.get_parameter(name).detach() for name in sorted(unit.parameters)}
    if any(type(p) not in (torch.Tensor, nn.Parameter) or hasattr(p, "ds_id") for p in parameters.values()):
        raise HandUp(unit, "its parameters are partitioned over ranks, and it has no formula")
    try:
        found, again = _vectorized(run, parameters, inputs, split, grads)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        kind, reason = type(module).__name__, (str(error).strip().splitlines() or [type(error).__name__])[0]
        if kind not in _said:
            _said.add(kind)
            logger.warning("%s cannot be vectorized, samples are looped over: %s", kind, reason)
        try:
            found, again = _looped(run, parameters, inputs, split, grads)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise HandUp(unit, f"it cannot be run sample by sample: {type(error).__name__}: {error}") from error
    for first, second in zip(outputs, again, strict=True):
        tolerance = 1e-4 if first.dtype == torch.float32 else 3e-2
        if not torch.allclose(first.float(), second.float(), rtol=tolerance, atol=tolerance, equal_nan=True):
            raise HandUp(unit, "run again sample by sample, it gave other outputs: it mixes samples or keeps a state")
    return {name: gradient.float() for name, gradient in found.items()}


def _vectorized(
    run: _Run, parameters: dict[str, torch.Tensor], inputs: Tensors, split: tuple[bool, ...], grads: Tensors
) -> _Again:
    def product(weights: dict[str, torch.Tensor], one: Tensors, one_grads: Tensors) -> tuple[torch.Tensor, Tensors]:
        mine = tuple(tensor.unsqueeze(0) if apart else tensor for tensor, apart in zip(one, split, strict=True))
        outs = run(weights, mine)
        total = sum((out.squeeze(0).float() * g.float()).sum() for out, g in zip(outs, one_grads, strict=True))
        return total, tuple(out.squeeze(0) for out in outs)

    dims = tuple(0 if apart else None for apart in split)
    return vmap(grad(product, has_aux=True), in_dims=(None, dims, 0))(parameters, inputs, grads)


def _looped(
    run: _Run, parameters: dict[str, torch.Tensor], inputs: Tensors, split: tuple[bool, ...], grads: Tensors
) -> _Again:
    found: dict[str, list[torch.Tensor]] = {name: [] for name in parameters}
    again: list[Tensors] = []
    weights = {name: parameter.requires_grad_() for name, parameter in parameters.items()}
    for i in range(len(grads[0])):
        mine = tuple(tensor[i : i + 1] if apart else tensor for tensor, apart in zip(inputs, split, strict=True))
        with torch.enable_grad():
            outs = run(weights, mine)
        one = torch.autograd.grad(outs, list(weights.values()), [g[i : i + 1] for g in grads], allow_unused=True)
        again.append(tuple(out.detach() for out in outs))
        for (name, parameter), gradient in zip(weights.items(), one, strict=True):
            found[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
    by_name = {name: torch.stack(gradients) for name, gradients in found.items()}
    return by_name, tuple(torch.cat(outs) for outs in zip(*again, strict=True))
