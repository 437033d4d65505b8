"""Mixers that look at held-out data of each domain: Sheared and Velocitune at losses, dynamic MoE at expert loads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Card, Context, Passes, Requires, State
from dataflex.mixers._lib import ExponentiatedMixer, InitialParams, check_targets, held_out_losses, require
from dataflex.plan.proportions import exponentiated, numbers_by_domain

__all__ = ["DynamicMoe", "Sheared", "Velocity", "distances", "velocities"]

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
        moved = exponentiated(self.log_shares, gaps, eta=self.params.eta, smoothing=self.params.smoothing)
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
        return exponentiated(self.log_shares, speeds, eta=1.0), _told(self.names, speeds, "way left")

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


def distances(loads_KE: Floats, measure: str) -> Floats:
    """Return the mean distance of each domain's loads to those of all domains, itself included [K].

    Args:
        loads_KE: Gate loads by domain and expert; each row is divided by its sum.
        measure: ``l2`` or ``cosine`` (1 - cosine).
    """
    shares = loads_KE / loads_KE.sum(axis=1, keepdims=True)
    if measure == "cosine":
        unit = shares / np.linalg.norm(shares, axis=1, keepdims=True)
        pairs = np.maximum(1.0 - unit @ unit.T, 0.0)
        np.fill_diagonal(pairs, 0.0)
    else:
        pairs = np.linalg.norm(shares[:, None, :] - shares[None, :, :], axis=2)
    return pairs.mean(axis=1)


class DynamicMoe(ExponentiatedMixer):
    """Serve domains more, the further their expert loads are from those of the other domains.

    Dynamic mixing for mixture-of-experts models: domains that are routed unlike the others are served more.
    """

    name = "dynamic_moe"
    card = Card(
        summary="Serves domains more, the less their expert loads are like those of the other domains (MoE only).",
        paper="Dynamic Data Mixing Maximizes Instruction Tuning for Mixture-of-Experts (Zhu et al.), NAACL 2025, "
        "arXiv 2406.11256",
        cost="F over the held-out data",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(InitialParams):
        """Parameters of dynamic mixing for mixture-of-experts models."""

        initial: tuple[float, ...] | dict[str, float] | str = field(
            default="uniform", metadata={"help": "proportions at first: size, uniform, or numbers as a list or by name"}
        )
        eta: float = field(default=10.0, metadata={"help": "step size of the proportions", "above": 0.0})
        smoothing: float = field(
            default=0.05,
            metadata={"help": "share of equal proportions mixed in each time", "minimum": 0.0, "maximum": 1.0},
        )
        distance: Literal["l2", "cosine"] = field(
            default="l2", metadata={"help": "how the loads of two domains are compared"}
        )
        layers: Literal["last", "all"] = field(
            default="last", metadata={"help": "the last MoE layer, as in the paper, or the mean over all of them"}
        )

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        return Requires(
            signals=frozenset({"gates"}),
            targets=True,
            domains=2,
            stages=("pt", "sft"),
            needs_interval=True,
            passes=Passes(targets=(1.0, 0.0)),
        )

    def _moved(self, ctx: Context) -> tuple[Floats, str]:
        """Return (1 - c) softmax(log p + eta D) + c / K with the mean distances D.

        Raises:
            UnsupportedError: The model is no mixture of experts.
            DataError: A held-out data set has no tokens.
        """
        check_targets(ctx, self.name)
        loads = []
        for name in ctx.targets:
            rows = np.arange(ctx.signals.num_rows(name), dtype=np.int64)
            summed = np.asarray(ctx.signals.gate_loads(rows, target=name), dtype=np.float64).sum(axis=0)
            if not (summed.sum(axis=1) > 0).all():
                raise DataError(f"dynamic.mixer.targets: {name!r} has no tokens that experts could be chosen for")
            loads.append(summed)
        loads_KLE = np.stack(loads)
        layers = [loads_KLE.shape[1] - 1] if self.params.layers == "last" else range(loads_KLE.shape[1])
        scores = np.mean([distances(loads_KLE[:, layer], self.params.distance) for layer in layers], axis=0)
        moved = exponentiated(self.log_shares, scores, eta=self.params.eta, smoothing=self.params.smoothing)
        worst = int(np.argmax(scores))
        return moved, f"largest distance {scores[worst]:.3g} ({self.names[worst]})"
