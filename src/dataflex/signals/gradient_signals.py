"""Passes over rows that ask for gradients: scores towards targets, and norms. All passes are collective.

Nothing of size rows x parameters is kept: a batch's per-sample gradients are compared with one mean
gradient per target as they come (LESS, arXiv 2402.04333, without its projection).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import torch

from dataflex.dist import comm
from dataflex.signals.answers import Answer
from dataflex.signals.gradients import (
    Dots,
    GradientEngine,
    Moments,
    Norms,
    Precondition,
    Sketch,
    TargetBuilder,
    TargetVectors,
    choose_parameters,
    moments_of,
    preconditioner,
)
from dataflex.signals.gradients.precondition import Preconditioner
from dataflex.signals.gradients.sketch import buckets_and_signs
from dataflex.signals.handle import ModelHandle
from dataflex.signals.identity import state_identity
from dataflex.signals.losses import row_losses
from dataflex.signals.resumable import ResumablePass
from dataflex.signals.specs import GradientSpec
from dataflex.signals.sweep import Sweep, stored_pass, vector_pass

__all__ = ["GradientSource", "sketched"]

Score = Callable[[dict[str, Any]], torch.Tensor]


class GradientSource:
    """Per-sample gradients of the model under training, as one ``GradientSpec`` asks for them.

    Args:
        handle: The model and its optimizer.
        spec: Which gradients, and how they are compared.

    Raises:
        ConfigError: Unknown preset, or no trainable parameter is left.
    """

    def __init__(self, handle: ModelHandle, spec: GradientSpec) -> None:
        self._handle, self._spec = handle, spec
        self._kind = replace(Precondition.preset(spec.precondition), include_momentum=spec.include_momentum)
        device = next(handle.model.parameters()).device.type

        def half() -> AbstractContextManager[Any]:
            return torch.autocast(device_type=device, dtype=torch.bfloat16)

        self._engine = GradientEngine(
            handle.model,
            loss=lambda batch: row_losses(handle.model, batch),
            autocast=half if spec.bf16 else handle.autocast,
            parameters=choose_parameters(handle.model, pattern=spec.parameters, last_blocks=spec.last_blocks),
            release=handle.release,
        )

    def scores(self, sweep: Sweep, targets: Sequence[Sweep], work: ResumablePass | None) -> Answer:
        """Return the comparison of each row with each target's mean gradient [n, targets].

        Raises:
            UnsupportedError: The optimizer has no moments for each element.
            DataError: A target without a supervised token.
        """
        score = self._scorer(self._target_vectors(targets), self._precondition())
        return self._pass(sweep, score, (len(targets),), work)

    def norms(self, sweep: Sweep, work: ResumablePass | None) -> Answer:
        """Return the norm of each row's gradient [n] (GraNd, arXiv 2107.07075)."""
        precondition = self._precondition()

        def score(batch: dict[str, Any]) -> torch.Tensor:
            return self._engine.run(batch, [Norms()], precondition=precondition)["norms"]

        return self._pass(sweep, score, (), work)

    def moments_identity(self) -> str:
        """Name the moments that scores depend on; "" where they depend on none (collective)."""
        if self._kind.kind != "adam":
            return ""
        moments = self._moments().items()
        return state_identity(
            (f"{name} {which}", tensor)
            for name, kept in moments
            for which, tensor in (("first", kept.first), ("second", kept.second))
        )

    def _moments(self) -> dict[str, Moments]:
        backend: Literal["plain", "zero"] = "zero" if self._handle.backend == "zero" else "plain"
        return moments_of(self._handle.optimizer(), self._engine.parameters, backend)

    def _precondition(self) -> Preconditioner | None:
        return preconditioner(self._kind, self._moments() if self._kind.kind == "adam" else None)

    def _pass(self, sweep: Sweep, score: Score, tail: tuple[int, ...], work: ResumablePass | None) -> Answer:
        with self._engine.observing():
            return vector_pass(sweep, score, tail) if work is None else stored_pass(sweep, score, work)

    def _target_vectors(self, sweeps: Sequence[Sweep]) -> TargetVectors:
        """Return one mean gradient per target, equal on every rank."""
        mean_of_cosines = self._spec.normalise and self._spec.mean_of_cosines
        builder = TargetBuilder(self._engine, num_tasks=len(sweeps), normalise_rows=mean_of_cosines)
        with self._engine.observing():
            for task, sweep in enumerate(sweeps):
                for turn in sweep.turns():
                    # A rank that only keeps step with the others adds nothing.
                    builder.add(turn.batch, torch.full((len(turn.positions),), task if turn.mine else -1))
        return builder.finish(reduce=comm.gather_sum)

    def _scorer(self, targets: TargetVectors, precondition: Preconditioner | None) -> Score:
        spec, engine = self._spec, self._engine
        if spec.sketch_size is None:
            how: Literal["none", "row", "both"] = "row" if spec.mean_of_cosines else "both"
            dots = Dots(targets, normalise=how if spec.normalise else "none")
            return lambda batch: engine.run(batch, [dots], precondition=precondition)["dots"]
        sketch = Sketch(size=spec.sketch_size, seed=spec.sketch_seed)
        wanted = sketched(targets, sketch)
        if spec.normalise and not spec.mean_of_cosines:
            wanted = wanted / targets.norms().to(wanted.device).clamp_min(1e-30).unsqueeze(1)

        def score(batch: dict[str, Any]) -> torch.Tensor:
            found = engine.run(batch, [sketch], precondition=precondition)
            scores = found["sketch"] @ wanted.to(found["sketch"].device).t()
            return scores / found["sketch.norms"].clamp_min(1e-30).unsqueeze(1) if spec.normalise else scores

        return score


def sketched(targets: TargetVectors, sketch: Sketch) -> torch.Tensor:
    """Return the sketches of target vectors, fp32 [M, size], by the same hash as the rows'."""
    sums: torch.Tensor | None = None
    for name in targets.tensors:
        flat = targets.flat(name)
        if sums is None:
            sums = torch.zeros(sketch.size, len(flat), device=flat.device)
        buckets, signs = buckets_and_signs(
            sketch.seed,
            name,
            slice(0, flat.shape[1]),
            size=sketch.size,
            nonzeros=sketch.nonzeros,
            device=flat.device,
        )
        for where, sign in zip(buckets, signs, strict=True):
            sums.index_add_(0, where, flat.t() * sign.unsqueeze(1))
    assert sums is not None
    return sums.t() / sketch.nonzeros**0.5
