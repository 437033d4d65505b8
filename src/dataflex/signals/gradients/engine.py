"""Per-sample gradients of a model under training: one forward and one backward pass to layer outputs a batch.

Nothing of the model's is changed: gradients are taken with respect to layer outputs, hooks are gone
when a pass ends, modes and random states are put back. The scalar that is differentiated is the sum
of the rows' own losses, so rows do not see one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from dataflex.errors import UnsupportedError
from dataflex.signals.gradients.assemble import Assembler
from dataflex.signals.gradients.capture import Capture, Distrusted, HandUp
from dataflex.signals.gradients.consume import Consumer
from dataflex.signals.gradients.documents import Documents, document_losses
from dataflex.signals.gradients.jvp import row_derivatives
from dataflex.signals.gradients.narrow import supervised_losses, supervised_tokens
from dataflex.signals.gradients.oracle import batch_rows, batch_tokens
from dataflex.signals.gradients.precondition import Preconditioner
from dataflex.signals.gradients.units import Units, choose_parameters
from dataflex.signals.sweep import preserve_state

__all__ = ["GradientEngine"]

_IGNORE = -100
_BLOCK_NUMBERS = 2**22

Batch = dict[str, Any]


class GradientEngine:
    """Feeds per-sample gradients to consumers.

    Args:
        model: The inner module (not the DDP or DeepSpeed engine around it).
        loss: Batch on the device to row losses [b]: each row's own token mean, NaN for rows without labels.
            None: ``supervised_losses``.
        autocast: The Trainer's mixed-precision context.
        parameters: What is differentiated, by name; all trainable parameters if None (see ``choose_parameters``).
        dtype: Layer products are computed in this dtype; None: as the backward pass gives them.
        release: Called by ``finish``; under ZeRO-3 the DeepSpeed engine's ``empty_partition_cache``.
        block_numbers: Formed gradients are handled in blocks of about so many numbers (all samples together).
        by_document: Samples are the documents of packed rows, in the order of ``documents.Documents``, each with
            its own token mean, instead of the rows. ``loss`` must be None then.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Callable[[Batch], torch.Tensor] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        parameters: Mapping[str, nn.Parameter] | None = None,
        dtype: torch.dtype | None = None,
        release: Callable[[], None] | None = None,
        block_numbers: int = _BLOCK_NUMBERS,
        by_document: bool = False,
    ) -> None:
        self.model = model
        self.parameters = dict(choose_parameters(model) if parameters is None else parameters)
        self._loss = supervised_losses(model, self.parameters.values()) if loss is None else loss
        assert loss is None or not by_document, "documents have losses of their own"
        self._by_document = document_losses(supervised_tokens(model, self.parameters.values())) if by_document else None
        self._autocast, self._dtype, self._release = autocast, dtype, release
        self._units = Units(model, self.parameters)
        self._block_numbers = block_numbers
        self._depth = 0

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Full shapes of the differentiated parameters by name, in the model's order."""
        return dict(self._units.shapes)

    @property
    def layers(self) -> dict[str, str]:
        """How each parameter is differentiated: names of layer kinds or ``torch.func``, " + " between several uses."""
        found: dict[str, str] = {}
        for unit in self._units:
            for name in unit.parameters.values():
                kind = unit.kind.name if unit.kind else "torch.func"
                found[name] = f"{found[name]} + {kind}" if name in found else kind
        return found

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Hold the model in eval mode for several runs; modes and random states are put back at the end."""
        if self._depth:
            yield
            return
        with preserve_state(self.model):
            self.model.eval()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                self.finish()

    def finish(self) -> None:
        """Let go of what a pass left gathered (ZeRO-3)."""
        if self._release is not None:
            self._release()

    def run(
        self, batch: Batch, consumers: Sequence[Consumer], *, precondition: Preconditioner | None = None
    ) -> dict[str, torch.Tensor]:
        """Run one batch.

        Args:
            batch: Collated, on the device, samples in front.
            consumers: What is made of the gradients; names must differ.
            precondition: From ``preconditioner``; consumers marked ``raw`` see the gradients before it.

        Returns:
            "losses" fp32 [b], and for each consumer its name (and name + suffix) with the samples in
            front; NaN for samples without a finite loss. By document also "row" and "document" [b]:
            which row of the batch a sample is from, and its number in there.

        Raises:
            UnsupportedError: Some parameters' gradients cannot be told apart by sample; names all of them.
                By document: the documents of a row see one another, or a layer has no formula.
        """
        assert len({consumer.name for consumer in consumers}) == len(consumers), "two consumers of the same name"
        with self.observing():
            while True:
                try:
                    return self._attempt(batch, consumers, precondition)
                except Distrusted as signal:
                    self._units.distrust(signal.unit, signal.reason)
                except HandUp as signal:
                    self._units.hand_up(signal.unit, signal.reason)

    def _attempt(
        self, batch: Batch, consumers: Sequence[Consumer], precondition: Preconditioner | None
    ) -> dict[str, torch.Tensor]:
        documents = None if self._by_document is None else Documents.of(batch)
        assembler = Assembler(self.shapes, consumers, precondition, self._block_numbers)
        capture = Capture(
            units=self._units,
            rows=batch_rows(batch),
            tokens=batch_tokens(batch),
            take=assembler.take,
            autocast=self._autocast,
            dtype=self._dtype,
            documents=documents,
        )
        batch, labelled = _with_labels(batch)
        with capture.attached(), torch.enable_grad():
            with self._autocast():
                row_losses = self._losses(batch, documents)
            if not row_losses.requires_grad:
                raise UnsupportedError("per-sample gradients: the losses do not depend on any layer's output")
            finite = torch.isfinite(row_losses.detach())
            total = torch.where(finite, row_losses, 0.0).sum()
            finite = finite & (labelled if documents is None or not labelled.dim() else labelled[documents.row])
            if not finite.all():
                capture.finite = finite
            for consumer in consumers:
                consumer.begin(finite)
            capture.backward(total)
        assembler.flush()
        self._units.require_all()
        results = {"losses": row_losses.detach().float()}
        for consumer in consumers:
            for suffix, values in consumer.finish().items():
                results[consumer.name + suffix] = values
        if capture.finite is not None:
            missing = ~finite
            results = {
                key: values.masked_fill(missing.view(-1, *([1] * (values.dim() - 1))), torch.nan)
                for key, values in results.items()
            }
        if documents is not None:
            results |= {"row": documents.row, "document": documents.number}
        return results

    def _losses(self, batch: Batch, documents: Documents | None) -> torch.Tensor:
        if documents is None or self._by_document is None:
            return self._loss(batch)
        return self._by_document(batch, documents)

    def jvp(self, batch: Batch, direction: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the derivative of each row's loss along a direction, fp32 [b] (see ``jvp.row_derivatives``)."""

        def loss(inputs: Batch) -> torch.Tensor:
            with self._autocast():
                return self._losses(inputs, None if self._by_document is None else Documents.of(inputs))

        with self.observing():
            return row_derivatives(self.model, loss, batch, self.parameters, direction)


def _with_labels(batch: Batch) -> tuple[Batch, torch.Tensor]:
    """Give a batch without any label some, so that all ranks run the same passes; its rows count for nothing."""
    if "labels" not in batch or batch["labels"][:, 1:].ne(_IGNORE).any():
        return batch, torch.ones((), dtype=torch.bool)
    labels = batch["labels"]
    return {**batch, "labels": batch["input_ids"]}, torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
