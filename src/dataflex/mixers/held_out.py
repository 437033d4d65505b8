"""Mixers that look at held-out data of each domain: Sheared and Velocitune at losses, dynamic MoE at expert loads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dataflex.errors import DataError
from dataflex.method import Card, Context, Requires, param
from dataflex.mixers._lib import (
    HELD_OUT_LOSSES,
    NOTHING,
    ExponentiatedMixer,
    InitialParams,
    check_targets,
    held_out_losses,
)
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import numbers_by_domain
from dataflex.signals.kinds import GateLoads


@dataclass(frozen=True, kw_only=True)
class _TargetLossParams(InitialParams):
    target_losses: tuple[float, ...] | dict[str, float] = param(
        help="held-out loss that each domain should reach, nats per token, as a list or by name", minimum=0.0
    )


class _TargetLossMixer(ExponentiatedMixer):
    def requires(self) -> Requires:
        return HELD_OUT_LOSSES

    def _losses(self, ctx: Context) -> tuple[Floats, Floats]:
        """Return the held-out losses and those that they should reach [K]."""
        check_targets(ctx, self.name)
        targets = numbers_by_domain(self.params.target_losses, self.names, "dynamic.mixer.target_losses")
        return held_out_losses(ctx), targets


class Sheared(_TargetLossMixer):
    """Serve a domain more, the further its held-out loss is above its target.

    Dynamic batch loading: p <- (1 - c) softmax(log p + eta (loss - target)) + c / K.
    """

    name = "sheared"
    card = Card(
        summary="Serves domains more, the further their held-out losses are above target losses.",
        paper="Sheared LLaMA (Xia et al.), ICLR 2024, arXiv 2310.06694, dynamic batch loading",
        cost="F over the held-out data",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(_TargetLossParams):
        eta: float = param(1.0, "step size of the proportions", above=0.0)
        smoothing: float = param(1e-4, "share of equal proportions mixed in each time", minimum=0.0, maximum=1.0)
        clip: bool = param(
            False, "whether a domain below its target counts as at it (the paper; the authors' code: no)"
        )

    params: Params

    def _scores(self, ctx: Context) -> tuple[Floats, str]:
        losses, targets = self._losses(ctx)
        gaps = np.maximum(losses - targets, 0.0) if self.params.clip else losses - targets
        return gaps, self._largest(gaps, "gap to target")


def velocities(loss: Floats, first: Floats, target: Floats) -> Floats:
    """Return V = clamp((loss - target) / (first - target), 0, 1) of each domain [K]; 0 where first <= target."""
    distance = first - target
    return np.clip(np.divide(loss - target, distance, out=np.zeros_like(loss), where=distance > 0), 0.0, 1.0)


class Velocity(_TargetLossMixer):
    """Serve a domain more, the less of the way from its first loss to its target loss it has gone.

    Velocitune: p ~ p exp(V); the first losses are those of the first decision after warm-up.
    """

    name = "velocity"
    saved = (*ExponentiatedMixer.saved, "first")
    card = Card(
        summary="Serves domains more, the less of the way to their target losses they have gone.",
        paper="Velocitune: A Velocity-based Dynamic Domain Reweighting Method for Continual Pre-training, ACL 2025, "
        "arXiv 2411.14318",
        cost="F over the held-out data",
    )
    Params = _TargetLossParams
    first = NOTHING
    """Held-out losses at the first decision [K]."""

    def _scores(self, ctx: Context) -> tuple[Floats, str]:
        losses, targets = self._losses(ctx)
        if not self.first.size:
            self.first = losses
        speeds = velocities(losses, self.first, targets)
        return speeds, self._largest(speeds, "way left")


def distances(loads_KE: Floats, measure: str) -> Floats:
    """Return the mean distance of each domain's shares of gate loads to those of all domains, itself included [K]."""
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

    For mixture-of-experts models: p <- (1 - c) softmax(log p + eta D) + c / K with the mean distances D.
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
        initial: tuple[float, ...] | dict[str, float] | str = param(
            "uniform", "proportions at first: size, uniform, or numbers as a list or by name"
        )
        eta: float = param(10.0, "step size of the proportions", above=0.0)
        smoothing: float = param(0.05, "share of equal proportions mixed in each time", minimum=0.0, maximum=1.0)
        distance: Literal["l2", "cosine"] = param("l2", "how the loads of two domains are compared")
        layers: Literal["last", "all"] = param(
            "last", "the last MoE layer, as in the paper, or the mean over all of them"
        )

    params: Params

    def requires(self) -> Requires:
        return replace(HELD_OUT_LOSSES, signals=frozenset({"gates"}))

    def _scores(self, ctx: Context) -> tuple[Floats, str]:
        check_targets(ctx, self.name)
        loads = []
        for name in ctx.targets:
            rows = np.arange(ctx.signals.num_rows(name), dtype=np.int64)
            summed = np.asarray(ctx.signals(GateLoads(), rows, target=name), dtype=np.float64).sum(axis=0)
            if not (summed.sum(axis=1) > 0).all():
                raise DataError(f"dynamic.mixer.targets: {name!r} has no tokens that experts could be chosen for")
            loads.append(summed)
        loads_KLE = np.stack(loads)
        layers = [loads_KLE.shape[1] - 1] if self.params.layers == "last" else range(loads_KLE.shape[1])
        scores = np.mean([distances(loads_KLE[:, layer], self.params.distance) for layer in layers], axis=0)
        return scores, self._largest(scores, "distance")
