"""Mixers that look at held-out data of each domain: at losses, or dynamic MoE at expert loads.

Sheared and Velocitune compare the losses with targets; Skill-it and Aioli weigh them by how much training on one domain
helps another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError, DataError
from dataflex.method import Card, Context, Mix, Passes, Requires, param
from dataflex.method import Params as BaseParams
from dataflex.mixers._lib import (
    HELD_OUT_LOSSES,
    NOTHING,
    ExponentiatedMixer,
    InitialParams,
    LearningMixer,
    check_targets,
    held_out_losses,
    mix_of,
)
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import exponentiated, numbers_by_domain, softmax
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
    told = "gap to target"
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
            False, "whether a domain below its target counts as at the target (paper: yes; authors' code: no)"
        )

    params: Params

    def _scores(self, ctx: Context) -> Floats:
        losses, targets = self._losses(ctx)
        return np.maximum(losses - targets, 0.0) if self.params.clip else losses - targets


def velocities(loss: Floats, first: Floats, target: Floats) -> Floats:
    """Return V = clamp((loss - target) / (first - target), 0, 1) of each domain [K]; 0 where first <= target."""
    distance = first - target
    return np.clip(np.divide(loss - target, distance, out=np.zeros_like(loss), where=distance > 0), 0.0, 1.0)


class Velocity(_TargetLossMixer):
    """Serve a domain more, the less of the way from its first loss to its target loss it has gone.

    Velocitune: p ~ p exp(V); the first losses are those of the first decision after warm-up.
    """

    name = "velocity"
    told = "way left"
    saved = (*ExponentiatedMixer.saved, "first")
    card = Card(
        summary="Serves domains more, the less of the way to their target losses they have gone.",
        paper="Velocitune: A Velocity-based Dynamic Domain Reweighting Method for Continual Pre-training, ACL 2025, "
        "arXiv 2411.14318",
        cost="F over the held-out data",
    )
    Params = _TargetLossParams
    first = NOTHING  # held-out losses at the first decision [K]

    def _scores(self, ctx: Context) -> Floats:
        losses, targets = self._losses(ctx)
        if not self.first.size:
            self.first = losses
        return velocities(losses, self.first, targets)


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
    told = "distance"
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

    def _scores(self, ctx: Context) -> Floats:
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
        return np.asarray(np.mean([distances(loads_KLE[:, k], self.params.distance) for k in layers], axis=0))


class SkillIt(LearningMixer):
    """Serve the domains that help those whose held-out losses are high.

    The graph says in row i, column j how much training on domain i helps domain j.
    """

    name = "skill_it"
    saved = ("losses", "names")
    card = Card(
        summary="Serves domains more, the more they help those of high held-out loss, by a graph that is given.",
        paper="Skill-it! A Data-Driven Skills Framework for Understanding and Training Language Models (Chen et al.), "
        "NeurIPS 2023, arXiv 2307.14430",
        cost="F over the held-out data",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        graph: tuple[tuple[float, ...], ...] = param(
            help="K rows of K numbers: in row i, column j, how much training on i helps j"
        )
        eta: float = param(0.2, "step size of the proportions", above=0.0)
        window: int = param(3, "number of decisions whose losses are added up", minimum=1)

        def __post_init__(self) -> None:
            if {len(row) for row in self.graph} != {len(self.graph)}:
                raise ValueError("graph: must be K rows of K numbers, K the number of domains")
            if not np.isfinite(np.array(self.graph)).all():
                raise ValueError("graph: every number must be finite")

    params: Params

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.losses: list[Floats] = []

    def requires(self) -> Requires:
        return HELD_OUT_LOSSES

    def mix(self, ctx: Context) -> Mix:
        """Return p ~ exp(eta sum over the window of A L); before losses are known, p ~ exp(eta A 1).

        The proportions are made from equal ones each time: only the window remembers the past.
        """
        graph, names = np.array(self.params.graph, dtype=np.float64), ctx.domains.names
        if len(graph) != len(names):
            raise ConfigError(f"dynamic.mixer.graph: {len(graph)} rows for {len(names)} domains ({', '.join(names)})")
        self.meet(names)
        check_targets(ctx, self.name)
        benefit, told = graph.sum(axis=1), "start"
        if ctx.interval.kind != "warmup":
            self.losses = [*self.losses, held_out_losses(ctx)][-self.params.window :]
            benefit = graph @ np.sum(self.losses, axis=0)
            told = f"losses of {len(self.losses)} decisions"
        return mix_of(self.names, softmax(self.params.eta * benefit), told)


def near_one_hot(num_domains: int, focus: float) -> Floats:
    """Return K mixes [K, K]: mix k has ``focus`` on domain k, the others share the rest."""
    mixes = np.full((num_domains, num_domains), (1.0 - focus) / (num_domains - 1))
    np.fill_diagonal(mixes, focus)
    return mixes


def interactions(mixes_MK: Floats, drops_MK: Floats) -> Floats:
    """Return A [K, K] with drop_i = sum_j A[i, j] p_j, by least squares over M probes, made positive, summing to 1."""
    solved, *_ = np.linalg.lstsq(mixes_MK, drops_MK, rcond=None)
    matrix = solved.T
    if matrix.min() < 0:
        matrix = matrix - matrix.min()
    total = matrix.sum()
    return matrix / total if total > 0 else np.full_like(matrix, 1.0 / matrix.size)


class Aioli(LearningMixer):
    """Probe one domain after another, learn what helps whom, and serve accordingly.

    What is learned is a matrix A: A[i, j] is what the held-out loss of domain i gains from training on domain j. (The
    graph of ``skill_it`` is its transpose.) A probe takes one interval.
    """

    name = "aioli"
    saved = ("names", "turn", "before", "drops", "log_shares", "matrix", "order")
    card = Card(
        summary="Probes domains one after another for what they gain each other, then serves what helps most.",
        paper="Aioli: A Unified Optimization Framework for Language Model Data Mixing (Chen et al.), ICLR 2025, "
        "arXiv 2411.05735",
        cost="F over the held-out data",
        note="As in the authors' code each sweep probes in a new random order, and ema is the weight of the past.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        focus: float = param(0.75, "share of the domain that is probed", above=0.0, maximum=1.0)
        sweeps: int = param(1, "number of times that every domain is probed in a round", minimum=1)
        hold: int = param(8, "number of intervals in a round that serve the learned proportions", minimum=1)
        eta: float = param(0.2, "step size of the proportions", above=0.0)
        ema: float | None = param(
            None,
            "weight of the past in the average of A, which moves equal proportions; null: it moves the last ones",
            minimum=0.0,
            maximum=1.0,
        )

    params: Params
    turn = 0
    order: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    """Domains in the order in which this round probes them: a permutation for each sweep."""
    before = log_shares = matrix = NOTHING
    """Held-out losses at the last decision [K], logarithms of the proportions [K], and the learned A [K, K]."""

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.drops: list[Floats] = []

    def requires(self) -> Requires:
        return replace(HELD_OUT_LOSSES, passes=Passes())

    def mix(self, ctx: Context) -> Mix:
        """Return the next probe's mix, or p ~ p exp(eta sum_i A[i, j]) once a sweep is through."""
        self.meet(ctx.domains.names)
        check_targets(ctx, self.name)
        num_domains = len(self.names)
        if not self.log_shares.size:
            self.log_shares = np.full(num_domains, -np.log(num_domains))
        if ctx.interval.kind == "warmup":
            return mix_of(self.names, softmax(self.log_shares), "warm-up")
        probes = num_domains * self.params.sweeps
        turn = self.turn % (probes + self.params.hold)
        self.turn += 1
        mixes = near_one_hot(num_domains, self.params.focus)
        if turn == 0:
            rng = ctx.rng("aioli order")
            self.order = np.concatenate([rng.permutation(num_domains) for _ in range(self.params.sweeps)])
        if turn <= probes:
            losses = held_out_losses(ctx)
            if turn > 0:
                self.drops.append(self.before - losses)
            self.before = losses
        if turn < probes:
            probed = int(self.order[turn])
            return Mix(proportions=mixes[probed], reason=f"probe of {self.names[probed]}")
        if turn == probes:
            self._learn(mixes[self.order], np.stack(self.drops))
            self.drops = []
        return mix_of(self.names, softmax(self.log_shares))

    def _learn(self, mixes_MK: Floats, drops_MK: Floats) -> None:
        new, ema = interactions(mixes_MK, drops_MK), self.params.ema
        self.matrix = new if ema is None or not self.matrix.size else (1.0 - ema) * new + ema * self.matrix
        start = self.log_shares if ema is None else np.zeros(len(new))
        self.log_shares = exponentiated(start, self.matrix.sum(axis=0), eta=self.params.eta)
