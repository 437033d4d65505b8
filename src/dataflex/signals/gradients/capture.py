"""Takes the gradients of layer outputs out of one backward pass, and nothing else.

Each unit's output goes through ``_Tap``, an identity that also depends on an "anchor". Asking
autograd for the anchor's gradient alone then runs the backward pass through every tap and never
computes a gradient of a parameter; ``.grad`` is not touched, and nothing upstream of the lowest tap
is visited. A tap hands the gradient on the moment it arrives, together with what it kept of the
call, so that no output gradients pile up. What is kept goes through ``save_for_backward``: autograd
watches it for changes in place, and activation checkpointing (not reentrant) recomputes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dataflex.errors import UnsupportedError
from dataflex.signals.gradients.documents import Documents
from dataflex.signals.gradients.local import LocalCall, NotSeparable, local_gradients
from dataflex.signals.gradients.pieces import Piece
from dataflex.signals.gradients.units import Unit, Units

__all__ = ["Capture", "Distrusted", "HandUp"]


class HandUp(Exception):
    """A unit cannot keep samples apart; the module around it must answer."""

    def __init__(self, unit: Unit, reason: str) -> None:
        super().__init__(reason)
        self.unit, self.reason = unit, reason


class Distrusted(HandUp):
    """A layer's formula does not hold for it."""


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of a unit: who called, how samples lie in it, and how to hand its gradient on."""

    capture: Capture
    unit: Unit
    num_outputs: int
    flat: bool = False
    misfit: str = ""
    local: LocalCall | None = None


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
    """Hooks on a model's units during one forward and backward pass.

    Attributes:
        units: Who answers for which parameter.
        rows: Samples in the batch.
        tokens: Positions of a sample, for layers that are called with samples and positions flattened.
        take: Called with a parameter's name and its pieces once all of its uses are there.
        autocast: The context in which modules are run again.
        dtype: Output gradients are cast to this dtype first; None leaves them.
        documents: Samples are these documents instead of the rows.
    """

    units: Units
    rows: int
    tokens: int
    take: Callable[[str, list[Piece]], None]
    autocast: Callable[[], Any]
    dtype: torch.dtype | None = None
    documents: Documents | None = None
    finite: torch.Tensor | None = None
    """Set before the backward pass: samples [b] whose gradients count; the others are zeroed. None: all."""
    anchor: torch.Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    _recording: bool = True
    _muted: bool = False
    _expected: dict[str, int] = field(default_factory=dict)
    _pending: dict[str, list[Piece]] = field(default_factory=dict)
    _called: set[str] = field(default_factory=set)
    _blind: dict[str, Unit] = field(default_factory=dict)

    @contextmanager
    def attached(self) -> Iterator[Capture]:
        """Keep the hooks on the model while inside."""
        handles = [unit.module.register_forward_hook(self._hook(unit), with_kwargs=True) for unit in self.units]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def backward(self, total: torch.Tensor) -> None:
        """Run the backward pass of the summed row losses; ``take`` has seen every parameter when it ends."""
        self._recording = False
        silent = [unit for unit in self.units if unit.name not in self._called]
        behind = [
            (unit, parameter)
            for unit in silent
            for local in unit.parameters
            if (parameter := unit.module.get_parameter(local)).requires_grad and parameter.is_leaf
        ]
        # Parameters of modules that were never called must have no gradient; asking costs nothing where that is so.
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
        for unit in self._blind.values():
            if not any(name in self._expected for name in unit.parameters.values()):
                raise HandUp(unit, "it ran without recording gradients")
        for name, pieces in list(self._pending.items()):
            self.take(name, pieces)  # some of its uses did not take part in the loss
        self._pending.clear()

    def _hook(self, unit: Unit) -> Callable[..., Any]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._muted:
                return None
            self._called.add(unit.name)
            if not torch.is_grad_enabled():
                self._blind[unit.name] = unit
                return None
            if unit.kind is None:
                return self._tap_local(unit, args, kwargs, output)
            return self._tap_layer(unit, module, args, kwargs, output)

        return record

    def _tap_layer(
        self, unit: Unit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        assert unit.kind is not None
        kept = tuple(tensor.detach() for tensor in unit.kind.keep(module, args, kwargs, output))
        if not unit.checked and unit.kind.check is not None:
            reason = unit.kind.check(module, kept, output.detach())
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
        call = _Call(capture=self, unit=unit, num_outputs=1, flat=flat, misfit=misfit)
        if self._recording and not misfit:
            self._expect(unit)
        return _Tap.apply(self.anchor, call, output, *kept)

    def _tap_local(self, unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        local = LocalCall.of(args, kwargs, output)
        call = _Call(capture=self, unit=unit, num_outputs=len(local.outputs), local=local.without_tensors())
        if self._recording:
            self._expect(unit)
        tapped = _Tap.apply(self.anchor, call, *local.outputs, *local.kept)
        return local.output_with(tapped if isinstance(tapped, tuple) else (tapped,))

    def _expect(self, unit: Unit) -> None:
        for name in unit.parameters.values():
            self._expected[name] = self._expected.get(name, 0) + 1

    def deliver(self, call: _Call, kept: tuple[torch.Tensor, ...], grads: tuple[torch.Tensor, ...]) -> None:
        """Turn one call's output gradients into pieces of its parameters' per-sample gradients."""
        unit = call.unit
        if call.misfit:
            raise HandUp(unit, call.misfit)
        if call.flat:
            grads = tuple(grad.reshape(self.rows, -1, *grad.shape[1:]) for grad in grads)
            kept = tuple(tensor.reshape(self.rows, len(tensor) // self.rows, *tensor.shape[1:]) for tensor in kept)
        if self.documents is not None:
            if call.local is not None:
                raise UnsupportedError(f"gradients by document: {unit} has no formula for its gradients")
            grads, kept = (tuple(map(self.documents.apart, tensors)) for tensors in (grads, kept))
        if call.local is not None:
            pieces = self._run_locally(unit, call.local, kept, grads)
        else:
            assert unit.kind is not None
            grad = grads[0] if self.dtype is None else grads[0].to(self.dtype)
            if self.finite is not None:
                grad = grad.masked_fill(~self.finite.view(-1, *([1] * (grad.dim() - 1))), 0.0)
            pieces = dict(unit.kind.sample(unit.module, kept, grad, unit.wanted))
        for local, name in unit.parameters.items():
            pending = self._pending.setdefault(name, [])
            pending.append(pieces[local])
            if len(pending) == self._expected[name]:
                self.take(name, self._pending.pop(name))

    def _run_locally(
        self, unit: Unit, local: LocalCall, kept: tuple[torch.Tensor, ...], grads: tuple[torch.Tensor, ...]
    ) -> dict[str, Piece]:
        self._muted = True
        try:
            with self.autocast():
                found = local_gradients(unit.module, unit.wanted, local, kept, grads, rows=self.rows)
        except NotSeparable as error:
            raise HandUp(unit, str(error)) from error
        finally:
            self._muted = False
        if self.finite is not None:
            for name, gradient in found.items():
                found[name] = gradient.masked_fill(~self.finite.view(-1, *([1] * (gradient.dim() - 1))), 0.0)
        return dict[str, Piece](found)
