"""Passes over rows that ask for gradients: scores towards targets, and norms. All passes are collective.

Nothing of size rows x parameters is kept: a batch's per-sample gradients are compared with one mean
gradient per target as they come (LESS, arXiv 2402.04333, without its projection).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from dataflex import comm
from dataflex.errors import ConfigError
from dataflex.signals.cache import Answer
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
from dataflex.signals.gradients.rows import held_rows, row_products, rows_at_once
from dataflex.signals.gradients.sketch import sketched
from dataflex.signals.identity import state_identity
from dataflex.signals.model_access import ModelAccess
from dataflex.signals.policy import policy_vectors
from dataflex.signals.specs import GradientSpec, WeightedAnswer
from dataflex.signals.store import ResumablePass
from dataflex.signals.sweep import Sweep, row_pass

__all__ = ["GradientSource"]

_KEPT_NUMBERS = 2**28  # targets of more numbers (1 GiB in fp32) are made anew by every call

Score = Callable[[dict[str, Any]], torch.Tensor]


class GradientSource:
    """Per-sample gradients of the model under training, as one ``GradientSpec`` asks for them.

    Args:
        handle: The model and its optimizer.
        spec: Which gradients, and how they are compared.

    Raises:
        ConfigError: Unknown preset, or no trainable parameter is left.
    """

    def __init__(self, handle: ModelAccess, spec: GradientSpec) -> None:
        self._handle, self._spec = handle, spec
        self._kind = replace(Precondition.preset(spec.precondition), include_momentum=spec.include_momentum)
        device = next(handle.model.parameters()).device.type

        def half() -> AbstractContextManager[Any]:
            return torch.autocast(device_type=device, dtype=torch.bfloat16)

        self._engine = GradientEngine(
            handle.model,
            autocast=half if spec.bf16 else handle.autocast,
            parameters=choose_parameters(handle.model, pattern=spec.parameters, last_blocks=spec.last_blocks),
            release=handle.release,
        )

    def scores(
        self,
        sweep: Sweep,
        targets: Sequence[Sweep],
        work: ResumablePass | None,
        kept: dict[str, TargetVectors] | None = None,
        name: str = "",
    ) -> Answer:
        """Return the comparison of each row with each target's mean gradient [n, targets].

        Args:
            sweep: The rows.
            targets: Rows of each target.
            work: Where the answers go.
            kept: Mean gradients that were made of the same model before, and are kept for the next call.
            name: Names the targets' data in ``kept``.

        Raises:
            ConfigError: Forward mode with cosines, preconditioning or sketches.
            UnsupportedError: The optimizer has no moments for each element.
            DataError: A target without a supervised token.
        """
        if self._spec.forward_mode:
            return self._derivatives(sweep, targets, work)
        mean_of_cosines = self._spec.normalize and self._spec.mean_of_cosines
        spec, vectors = self._spec, None
        key = repr((name, spec.parameters, spec.last_blocks, spec.bf16, mean_of_cosines))
        if kept is None or key not in kept:
            vectors = self._target_vectors(targets, mean_of_cosines)
            if kept is not None and sum(tensor.numel() for tensor in vectors.tensors.values()) <= _KEPT_NUMBERS:
                kept[key] = vectors
        else:
            vectors = kept[key]
        score = self._scorer(vectors, self._precondition())
        return self._pass(sweep, score, (len(targets),), work)

    def _derivatives(self, sweep: Sweep, targets: Sequence[Sweep], work: ResumablePass | None) -> Answer:
        """Return the derivative of each row's loss along each target's mean gradient [n, targets]."""
        if self._spec.normalize or self._kind.kind != "none" or self._spec.sketch_size is not None:
            raise ConfigError("gradients: forward mode knows plain inner products only, no cosines or preconditioning")
        aims = self._target_vectors(targets, False)

        def score(batch: dict[str, Any]) -> torch.Tensor:
            return torch.stack([self._engine.jvp(batch, aims.one(task)) for task in range(len(targets))], dim=1)

        return self._pass(sweep, score, (len(targets),), work)

    def answer_scores(
        self, sweep: Sweep, tasks: Sequence[Sequence[WeightedAnswer]], work: ResumablePass | None
    ) -> Answer:
        """Return the comparison of each row with each task's weighted answers [n, tasks].

        Raises:
            UnsupportedError: The optimizer has no moments for each element.
            DataError: A task without answers.
        """
        directions = self._spec.normalize and self._spec.mean_of_cosines
        vectors = policy_vectors(self._engine, self._handle, tasks, normalize_groups=directions)
        return self._pass(sweep, self._scorer(vectors, self._precondition()), (len(tasks),), work)

    def norms(self, sweep: Sweep, work: ResumablePass | None) -> Answer:
        """Return the norm of each row's gradient [n] (GraNd, arXiv 2107.07075)."""
        precondition = self._precondition()

        def score(batch: dict[str, Any]) -> torch.Tensor:
            return self._engine.run(batch, [Norms()], precondition=precondition)["norms"]

        return self._pass(sweep, score, (), work)

    def sketches(self, sweep: Sweep, work: ResumablePass | None, *, dim: int, seed: int, plain: bool) -> Answer:
        """Return each row's sketched gradient, of length one [n, dim]; ``plain`` leaves the preconditioning out.

        Raises:
            ConfigError: ``dim`` is not a positive even number.
        """
        sketch = Sketch(size=dim, seed=seed)
        precondition = None if plain else self._precondition()

        def score(batch: dict[str, Any]) -> torch.Tensor:
            found = self._engine.run(batch, [sketch], precondition=precondition)["sketch"]
            return found / found.norm(dim=1, keepdim=True).clamp_min(1e-30)

        return self._pass(sweep, score, (dim,), work)

    @property
    def rows_at_once(self) -> int:
        """How many single rows others can be compared with in one pass."""
        return rows_at_once(self._engine.shapes)

    def pairs(self, sweep: Sweep, target: Sweep, work: ResumablePass | None) -> Answer:
        """Return the comparison of each row with each row of ``target``, at most ``rows_at_once``, [n, m]."""
        precondition = self._precondition()
        vectors, known = held_rows(self._engine, target)
        dots = Dots(vectors, normalize="both" if self._spec.normalize else "none")

        def score(batch: dict[str, Any]) -> torch.Tensor:
            found = self._engine.run(batch, [dots], precondition=precondition)["dots"]
            return found.masked_fill(~known.to(found.device), torch.nan)

        return self._pass(sweep, score, (len(target.rows),), work)

    def products(self, sweep: Sweep, targets: Sequence[Sweep], work: ResumablePass | None) -> Answer:
        """Return inner products of each row with the targets' mean gradients and with every row [n, targets + n].

        More than ``rows_at_once`` rows take a further pass over the rest for each so many.
        """
        aims = self._target_vectors(targets, False) if targets else None
        out = row_products(self._engine, sweep, aims, self._precondition())
        if work is None:
            return out
        if comm.rank() == 0:
            work.record(np.arange(len(out)), out)
        return work.finish()

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
            return row_pass(sweep, score, tail, work)

    def _target_vectors(self, sweeps: Sequence[Sweep], normalize_rows: bool) -> TargetVectors:
        """Return one mean gradient per target, or mean unit vector, equal on every rank."""
        builder = TargetBuilder(self._engine, num_tasks=len(sweeps), normalize_rows=normalize_rows)
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
            dots = Dots(targets, normalize=how if spec.normalize else "none")
            return lambda batch: engine.run(batch, [dots], precondition=precondition)["dots"]
        sketch = Sketch(size=spec.sketch_size, seed=spec.sketch_seed)
        wanted = sketched(targets, sketch)
        if spec.normalize and not spec.mean_of_cosines:
            wanted = wanted / targets.norms().to(wanted.device).clamp_min(1e-30).unsqueeze(1)

        def score(batch: dict[str, Any]) -> torch.Tensor:
            found = engine.run(batch, [sketch], precondition=precondition)
            scores = found["sketch"] @ wanted.to(found["sketch"].device).t()
            return scores / found["sketch.norms"].clamp_min(1e-30).unsqueeze(1) if spec.normalize else scores

        return score
