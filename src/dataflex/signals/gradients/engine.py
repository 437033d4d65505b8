"""Per-sample gradients of a model under training: one forward and one backward pass to layer outputs a batch.

Nothing of the model's is changed: gradients are taken with respect to layer outputs, hooks are gone when a pass ends,
modes and random states are put back. The sum of the rows' own losses is differentiated: rows do not see one another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from dataflex.errors import UnsupportedError
from dataflex.signals.gradients.capture import Capture, Distrusted, HandUp
from dataflex.signals.gradients.consumers import Block, Consumer, Segment
from dataflex.signals.gradients.factors import Factors, FactorShape, SampleGradients, filled, formed
from dataflex.signals.gradients.parameters import Units, choose_parameters
from dataflex.signals.gradients.precondition import Preconditioner
from dataflex.signals.losses import IGNORE, model_inputs, row_sums, token_cross_entropy
from dataflex.signals.model_parts import attached, logits_in, model_parts
from dataflex.signals.preferences import Sums
from dataflex.signals.sweep import preserve_state

_BLOCK_NUMBERS = 2**22
# Smaller parameters share a block of at least this many numbers (for each sample): the fixed cost of a block counts.
_SMALL = 2**15

Batch = dict[str, Any]
Loss = Callable[[Batch], torch.Tensor]


class GradientEngine:
    """Feeds per-sample gradients to consumers.

    Args:
        model: The inner module (not the DDP or DeepSpeed engine around it).
        loss: Batch on the device to the samples' losses [b], NaN for those without labels; ``supervised_losses`` if
            None. A sample may be several rows of the batch, one after the other: the answers of a pair.
        autocast: The Trainer's mixed-precision context.
        parameters: What is differentiated, by name; all trainable parameters if None.
        release: Lets go of what a pass left gathered under ZeRO-3 (``empty_partition_cache``).
        block_numbers: Size of the blocks in which formed gradients are handled (all samples together).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Loss | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        parameters: Mapping[str, nn.Parameter] | None = None,
        release: Callable[[], None] | None = None,
        block_numbers: int = _BLOCK_NUMBERS,
    ) -> None:
        self.model = model
        self.parameters = dict(choose_parameters(model) if parameters is None else parameters)
        self._loss = supervised_losses(model, self.parameters.values()) if loss is None else loss
        self._autocast, self._release, self._block_numbers = autocast, release, block_numbers
        self.units = Units(model, self.parameters)
        self._observing = False

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Full shapes of the differentiated parameters by name, in the model's order."""
        return self.units.shapes

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters.values())).device

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Hold the model in eval mode for several runs; modes and random states are put back at the end."""
        if self._observing:
            yield
            return
        with preserve_state(self.model):
            self.model.eval()
            self._observing = True
            try:
                yield
            finally:
                self._observing = False
                if self._release is not None:
                    self._release()

    def run(
        self, batch: Batch, consumers: Sequence[Consumer], *, precondition: Preconditioner | None = None
    ) -> dict[str, torch.Tensor]:
        """Run a collated batch on the device, samples in front.

        ``precondition`` makes directions of the gradients that ``consumers``, of different names, take. Results are
        "losses" fp32 [b], and the consumers' [b, ...] by name and suffix; NaN for samples without a loss.

        Raises:
            UnsupportedError: Some parameters' gradients cannot be told apart by sample; names all of them.
        """
        assert len({consumer.name for consumer in consumers}) == len(consumers), "two consumers of the same name"
        with self.observing():
            while True:
                try:
                    return self._attempt(batch, consumers, precondition)
                except Distrusted as signal:
                    self.units.distrust(signal.unit, signal.reason)
                except HandUp as signal:
                    self.units.hand_up(signal.unit, signal.reason)

    def _attempt(
        self, batch: Batch, consumers: Sequence[Consumer], precondition: Preconditioner | None
    ) -> dict[str, torch.Tensor]:
        feeder = _Feeder(self.shapes, consumers, precondition, self._block_numbers)
        capture = Capture(
            units=self.units,
            rows=batch["input_ids"].shape[0],
            tokens=batch["input_ids"].shape[1],
            take=feeder.take,
            autocast=self._autocast,
        )
        labelled = True
        if "labels" in batch and not batch["labels"][:, 1:].ne(IGNORE).any():
            # Some labels, so that all ranks run the same passes; its rows do not count.
            labelled, batch = False, {**batch, "labels": batch["input_ids"]}
        with capture.attached(), torch.enable_grad():
            with self._autocast():
                losses = self._loss(batch)
            capture.per_sample = capture.rows // len(losses)
            if not losses.requires_grad:
                raise UnsupportedError("per-sample gradients: the losses do not depend on any layer's output")
            finite = torch.isfinite(losses.detach())
            total = torch.where(finite, losses, 0.0).sum()
            finite = finite & labelled
            if not finite.all():
                capture.finite = finite.repeat_interleave(capture.per_sample)
            for consumer in consumers:
                consumer.begin(finite)
            capture.backward(total)
        feeder.flush()
        self.units.require_all()
        results = {"losses": losses.detach().float()}
        for consumer in consumers:
            results.update({consumer.name + suffix: values for suffix, values in consumer.finish().items()})
        missing = None if capture.finite is None else finite
        return {key: filled(values, missing, torch.nan) for key, values in results.items()}

    def jvp(self, batch: Batch, direction: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the derivative of each row's loss along ``direction``, fp32 [b], by forward-mode differentiation.

        It equals <G_i, v>, the inner product with a target gradient, without a backward pass, norms or preconditioning.
        UnsupportedError where parameters are partitioned over ranks, or an operation has no forward derivative.
        """
        if any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in self.parameters.values()):
            raise UnsupportedError("jvp needs whole parameters, but they are partitioned over ranks; use dot products")
        own = {id(parameter): f"model.{name}" for name, parameter in self.model.named_parameters()}
        moving = {own[id(p)]: (p.detach(), direction[name]) for name, p in self.parameters.items() if name in direction}
        losses = _Losses(self.model, lambda one: self._loss(one))  # no module twice, should the loss be one
        with self.observing():
            try:
                # Forward mode as such, not torch.func.jvp: inside that, hooks that mark inputs for checkpointing fail.
                with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), self._autocast():
                    duals = {
                        name: forward_ad.make_dual(value, tangent.to(value.device, value.dtype).view_as(value))
                        for name, (value, tangent) in moving.items()
                    }
                    found = functional_call(losses, duals, (batch,))
                    derivative = forward_ad.unpack_dual(found).tangent
            except (RuntimeError, NotImplementedError) as error:
                first = str(error).strip().splitlines()[0]
                raise UnsupportedError(f"jvp: this model cannot be differentiated forwards: {first}") from error
        return (torch.zeros_like(found) if derivative is None else derivative).float()


class _Losses(nn.Module):
    """Makes the loss a module around the model, so that the model's parameters can be exchanged."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.forward = model, loss


class _Feeder:
    """Brings per-sample gradients to the consumers: factored or formed, preconditioned, in blocks that fit."""

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        consumers: Sequence[Consumer],
        precondition: Preconditioner | None,
        block_numbers: int,
    ) -> None:
        self._shapes, self._consumers, self._precondition = shapes, consumers, precondition
        self._block_numbers, self._small = block_numbers, min(_SMALL, block_numbers)
        self._waiting: list[tuple[Segment, torch.Tensor]] = []

    def take(self, name: str, uses: list[SampleGradients]) -> None:
        """Feed one parameter, whose uses are all there."""
        shape, own = self._shapes[name], None if self._precondition is None else self._precondition.matrices.get(name)
        uses = uses if own is None else own(uses)
        factors = [use for use in uses if isinstance(use, Factors)]
        by_element = self._precondition is not None and own is None
        if len(factors) == len(uses) and not by_element and self._ghost_is_cheaper(factors, shape):
            for consumer in self._consumers:
                consumer.add_factors(name, factors, shape)
            return
        rows = len(uses[0].right) if isinstance(uses[0], Factors) else len(uses[0])
        length = shape[0] if shape else 1
        stride = math.prod(shape[1:])
        if length * stride < self._small:
            self._waiting.append((Segment(name, 0, length * stride), formed(uses, 0, length)))
            if sum(segment.stop for segment, _ in self._waiting) >= self._small:
                self.flush()
            return
        step = max(1, self._block_numbers // max(rows * stride, 1))
        for start in range(0, length, step):
            stop = min(start + step, length)
            self._feed((Segment(name, start * stride, stop * stride),), formed(uses, start, stop))

    def flush(self) -> None:
        """Feed the small parameters that wait for others."""
        if self._waiting:
            segments, values = zip(*self._waiting, strict=True)
            self._waiting = []
            self._feed(segments, torch.cat(values, dim=1) if len(values) > 1 else values[0])

    def _feed(self, segments: tuple[Segment, ...], values: torch.Tensor) -> None:
        if self._precondition is not None:
            values = self._precondition(segments, values)
        for consumer in self._consumers:
            consumer.add(Block(segments=segments, values=values))

    def _ghost_is_cheaper(self, factors: list[Factors], shape: torch.Size) -> bool:
        tokens = sum(use.right.shape[1] for use in factors)
        m, n = shape
        sizes = FactorShape(tokens, m, n, 1 if all(use.one_hot for use in factors) else m)
        forming = sizes.tokens * sizes.n * sizes.left_width + sizes.m * sizes.n
        ghost = sum(consumer.ghost_cost(sizes) for consumer in self._consumers)
        return ghost < forming + sum(consumer.dense_cost(sizes) for consumer in self._consumers)


def supervised_losses(model: nn.Module, parameters: Collection[nn.Parameter]) -> Loss:
    """Return a function from a collated batch to token-mean row losses [b], NaN for rows without labels."""
    sums_of = supervised_sums(model, parameters)

    def losses(batch: Batch) -> torch.Tensor:
        sums, tokens = sums_of(batch)
        return sums / tokens

    return losses


def supervised_sums(model: nn.Module, parameters: Collection[nn.Parameter]) -> Sums:
    """Return a function from a collated batch to the sums of the rows' token losses [b], and their numbers [b].

    A training step computes logits for every position. Where the head's own parameters are not among the differentiated
    ``parameters`` (LoRA, frozen embeddings), its input is narrowed to the positions that have a label: the same values
    and gradients; with a large vocabulary the logits are most of a pass's memory.
    """
    head, differentiated = model_parts(model).head, {id(parameter) for parameter in parameters}
    if head is None or any(id(parameter) in differentiated for parameter in head.parameters()):
        return lambda batch: row_sums(model, batch)

    def sums_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        targets = F.pad(batch["labels"], (0, 1), value=IGNORE)[..., 1:]
        row, position = targets.ne(IGNORE).nonzero(as_tuple=True)
        narrowed: list[bool] = []

        def narrow(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            whole = bool(inputs) and inputs[0].shape[:2] == targets.shape
            narrowed.append(whole)
            return (inputs[0][row, position].unsqueeze(0), *inputs[1:]) if whole else None

        with attached(head.register_forward_pre_hook(narrow)):
            outputs = model(**model_inputs(batch), use_cache=False)
        logits = logits_in(outputs)
        picked = logits[0] if narrowed == [True] else logits[row, position]
        values, _ = token_cross_entropy(picked, targets[row, position])
        sums = torch.zeros(len(targets), dtype=torch.float32, device=values.device)
        return sums.index_add(0, row, values), torch.bincount(row, minlength=len(targets))

    return sums_of
