"""Mixers that compare each domain's held-out loss with the loss that it should reach: Sheared and Velocitune."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Card, Context, Passes, Requires, State
from dataflex.mixers import simplex
from dataflex.mixers.exponentiated import ExponentiatedMixer, InitialParams
from dataflex.mixers.held_out import check_targets, held_out_losses
from dataflex.mixers.proportions import numbers_by_domain
from dataflex.mixers.saved import require

__all__ = ["Sheared", "Velocity", "velocities"]

Floats = NDArray[np.float64]

_TARGETS = {"help": "held-out loss that each domain should reach, nats per token, as a list or by name"}


def _told(names: tuple[str, ...], values: Floats, what: str) -> str:
    worst = int(np.argmax(values))
    return f"largest {what} {values[worst]:.3g} ({names[worst]})"


class Sheared(ExponentiatedMixer):
    """Serve a domain more, the further its held-out loss is above its target."""

    name = "sheared"
    card = Card(
        summary="Serves domains more, the further their held-out losses are above target losses.",
        paper="Sheared LLaMA (Xia et al.), ICLR 2024, arXiv 2310.06694, dynamic batch loading",
        cost="F over the held-out data",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(InitialParams):
        """Parameters of dynamic batch loading."""

        target_losses: tuple[float, ...] | dict[str, float] = field(metadata={**_TARGETS, "minimum": 0.0})
        eta: float = field(default=1.0, metadata={"help": "step size of the proportions", "above": 0.0})
        smoothing: float = field(
            default=1e-4,
            metadata={"help": "share of equal proportions mixed in each time", "minimum": 0.0, "maximum": 1.0},
        )
        clip: bool = field(
            default=False,
            metadata={"help": "whether a domain below its target counts as at it (the paper; the authors' code: no)"},
        )

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        return Requires(
            signals=frozenset({"losses", "texts"}),
            targets=True,
            domains=2,
            stages=("pt", "sft"),
            needs_interval=True,
            passes=Passes(targets=(1.0, 0.0)),
        )

    def _moved(self, ctx: Context) -> tuple[Floats, str]:
        """Return (1 - c) softmax(log p + eta (loss - target)) + c / K."""
        check_targets(ctx, self.name)
        targets = numbers_by_domain(self.params.target_losses, self.names, "dynamic.mixer.target_losses")
        gaps = held_out_losses(ctx) - targets
        if self.params.clip:
            gaps = np.maximum(gaps, 0.0)
        moved = simplex.exponentiated(self.log_shares, gaps, eta=self.params.eta, smoothing=self.params.smoothing)
        return moved, _told(self.names, gaps, "gap to target")


def velocities(loss: Floats, first: Floats, target: Floats) -> Floats:
    """Return V = clamp((loss - target) / (first - target), 0, 1) of each domain [K]; 0 where first <= target."""
    distance = first - target
    open_ = distance > 0
    return np.clip(np.divide(loss - target, distance, out=np.zeros_like(loss), where=open_), 0.0, 1.0)


class Velocity(ExponentiatedMixer):
    """Serve a domain more, the less of its way from the first to the target loss it has gone."""

    name = "velocity"
    card = Card(
        summary="Serves domains more, the less of the way to their target losses they have gone.",
        paper="Velocitune: A Velocity-based Dynamic Domain Reweighting Method for Continual Pre-training, ACL 2025, "
        "arXiv 2411.14318",
        cost="F over the held-out data",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(InitialParams):
        """Parameters of Velocitune."""

        target_losses: tuple[float, ...] | dict[str, float] = field(metadata={**_TARGETS, "minimum": 0.0})

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        return Requires(
            signals=frozenset({"losses", "texts"}),
            targets=True,
            domains=2,
            stages=("pt", "sft"),
            needs_interval=True,
            passes=Passes(targets=(1.0, 0.0)),
        )

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.first: Floats = np.zeros(0)
        """Held-out losses at the first decision [K]."""

    def _moved(self, ctx: Context) -> tuple[Floats, str]:
        """Return p exp(V), normalized; the first losses are those of the first decision after warm-up."""
        check_targets(ctx, self.name)
        losses = held_out_losses(ctx)
        if not self.first.size:
            self.first = losses
        targets = numbers_by_domain(self.params.target_losses, self.names, "dynamic.mixer.target_losses")
        speeds = velocities(losses, self.first, targets)
        return simplex.exponentiated(self.log_shares, speeds, eta=1.0), _told(self.names, speeds, "way left")

    def state_dict(self) -> State:
        """Add the first losses."""
        state = super().state_dict()
        return {**state, "first": self.first} if state else {}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        super().load_state_dict(state)
        if state:
            require(self.name, state, "first")
            self.first = np.array(state["first"], dtype=np.float64)
