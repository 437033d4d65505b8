"""Scorers of rows by their gradients: what is opened once, and then turns a batch into an array for each row.

A batch's per-sample gradients are compared with one mean gradient per target as they come, so that nothing of size
rows x parameters is kept (LESS, arXiv 2402.04333, without its projection).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch

from dataflex.errors import ConfigError
from dataflex.signals.gradients.consumers import Consumer, Dots, Norms, Sketch, TargetVectors
from dataflex.signals.gradients.engine import GradientEngine
from dataflex.signals.gradients.parameters import choose_parameters
from dataflex.signals.gradients.precondition import Moments, Precondition, Preconditioner, moments_of, preconditioner
from dataflex.signals.identity import state_identity
from dataflex.signals.model_access import ModelAccess
from dataflex.signals.specs import GradientSpec

Score = Callable[[dict[str, Any]], torch.Tensor]


class GradientScorers:
    """Opens scorers on the model under training, as one ``GradientSpec`` asks for them.

    A scorer takes a collated batch on the device and gives fp32 [b, ...], NaN for rows without a loss. Many batches
    go inside ``engine.observing()``. Opening one is collective.

    Raises:
        ConfigError: Unknown preset, or no trainable parameter is left; forward mode with cosines, preconditioning or
            sketches.
        UnsupportedError: When one is opened: the optimizer has no moments for each element.
    """

    def __init__(self, access: ModelAccess, spec: GradientSpec) -> None:
        self._access, self._spec = access, spec
        self._kind = replace(Precondition.preset(spec.precondition), include_momentum=spec.include_momentum)
        if spec.forward_mode and (spec.normalize or self._kind.kind != "none" or spec.sketch_size is not None):
            raise ConfigError("gradients: forward mode knows plain inner products only, no cosines or preconditioning")
        device = access.device.type
        self.engine = GradientEngine(
            access.model,
            autocast=(lambda: torch.autocast(device, dtype=torch.bfloat16)) if spec.bf16 else access.autocast,
            parameters=choose_parameters(access.model, pattern=spec.parameters, last_blocks=spec.last_blocks),
            release=access.release,
        )
        self.mean_of_cosines = spec.normalize and spec.mean_of_cosines
        """Whether targets' vectors are means of directions."""

    def of(self, consumer: Consumer) -> Score:
        """Return the scorer that gives a consumer's main result."""
        precondition = self.precondition()
        return lambda batch: self.engine.run(batch, [consumer], precondition=precondition)[consumer.name]

    def towards(self, targets: TargetVectors) -> Score:
        """Return the scorer [b, M] that compares rows with M vectors."""
        spec, engine = self._spec, self.engine
        if spec.forward_mode:
            return lambda batch: torch.stack([engine.jvp(batch, targets.one(i)) for i in range(len(targets))], dim=1)
        if spec.sketch_size is None:
            how: Literal["none", "row", "both"] = "row" if spec.mean_of_cosines else "both"
            return self.of(Dots(targets, normalize=how if spec.normalize else "none"))
        sketch, precondition = Sketch(size=spec.sketch_size, seed=spec.sketch_seed), self.precondition()
        wanted = sketch.of(targets)
        if spec.normalize and not spec.mean_of_cosines:
            wanted = wanted / targets.norms().to(wanted.device).clamp_min(1e-30).unsqueeze(1)

        def score(batch: dict[str, Any]) -> torch.Tensor:
            found = engine.run(batch, [sketch], precondition=precondition)
            scores = found["sketch"] @ wanted.to(found["sketch"].device).t()
            return scores / found["sketch.norms"].clamp_min(1e-30).unsqueeze(1) if spec.normalize else scores

        return score

    def norms(self) -> Score:
        """Return the scorer [b] of gradients' norms."""
        return self.of(Norms())

    def sketches(self, *, dim: int, seed: int) -> Score:
        """Return the scorer [b, dim] of sketches of length one; ``dim`` is even."""
        sketched = self.of(Sketch(size=dim, seed=seed))

        def score(batch: dict[str, Any]) -> torch.Tensor:
            found = sketched(batch)
            return found / found.norm(dim=1, keepdim=True).clamp_min(1e-30)

        return score

    def moments_identity(self) -> str:
        """Name the moments that scores depend on; "" where they depend on none (collective)."""
        if self._kind.kind != "adam":
            return ""
        return state_identity(
            (f"{name} {which}", tensor)
            for name, kept in self._moments().items()
            for which, tensor in (("first", kept.first), ("second", kept.second))
        )

    def precondition(self) -> Preconditioner | None:
        """Return what turns gradients into directions, with the optimizer's moments of now (collective)."""
        return preconditioner(self._kind, self._moments() if self._kind.kind == "adam" else None)

    def _moments(self) -> dict[str, Moments]:
        return moments_of(self._access.optimizer(), self.engine.parameters, self._access.backend)
