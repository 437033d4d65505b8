"""Mixers that learn proportions from gradients of domains, once per interval: DoGE and others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError, without_loss
from dataflex.method import Card, Context, Mix, Requires, param
from dataflex.mixers._lib import (
    NOTHING,
    ONLINE,
    ExponentiatedMixer,
    InitialParams,
    LearningMixer,
    equal,
    even,
    first_proportions,
    mix_of,
)
from dataflex.plan.domains import Floats, Rows
from dataflex.plan.proportions import check_numbers, exponentiated, logs, running_mean, softmax
from dataflex.signals.kinds import GradientProducts, TokenLoss
from dataflex.signals.specs import GradientOptions


@dataclass(frozen=True, kw_only=True)
class DomainGradients:
    """Inner products of the mean gradients g_d of the domains."""

    products: Floats  # <g_d, g_e> [K, K]; the diagonal is the squared norm of the mean over the rows drawn
    variance: Floats  # unbiased variance of a row's gradient in its domain, E ||g_i - g_d||^2 [K]; 0 for a single row
    rows: NDArray[np.int64]  # number of rows that each domain's mean is over [K]
    targets: Floats  # <g_d, g_t> with the mean gradient of each target [K, T]

    @property
    def squared_norms(self) -> Floats:
        """Unbiased estimate of ||E g_d||^2 [K], at least 0: the mean's own norm is too large by variance / rows."""
        return np.maximum(self.products.diagonal() - self.variance / self.rows, 0.0)


def drawn_rows(ctx: Context, rows_per_domain: int) -> list[Rows]:
    """Draw rows of every domain, without replacement: the same whenever it is asked in an interval."""
    rng = ctx.rng("domain gradients")
    return [
        np.sort(rng.choice(rows, size=min(rows_per_domain, len(rows)), replace=False))
        for rows in map(ctx.domains.rows, range(len(ctx.domains.names)))
    ]


def domain_gradients(ctx: Context, signal: GradientProducts, *, rows_per_domain: int) -> DomainGradients:
    """Draw rows of every domain, without replacement, and compare their mean gradients (collective).

    Raises:
        DataError: None of the rows drawn of a domain has a finite loss.
    """
    names, drawn = ctx.domains.names, drawn_rows(ctx, rows_per_domain)
    everything = np.concatenate(drawn)
    scores, gram = signal.split(ctx.signals(signal, everything))
    scores, gram = np.asarray(scores, dtype=np.float64), np.asarray(gram, dtype=np.float64)
    owner = np.repeat(np.arange(len(names)), [len(rows) for rows in drawn])
    known = np.isfinite(gram.diagonal())
    counts = np.bincount(owner[known], minlength=len(names))
    if (counts == 0).any():
        lost = int(np.argmin(counts))
        labelled = any(len(part) for part in ctx.signals.tokens(drawn[lost], part="completion"))
        raise without_loss(f"domain {names[lost]!r} that was drawn", labelled=labelled)
    mean_KN = np.zeros((len(names), len(everything)))
    mean_KN[owner[known], np.flatnonzero(known)] = 1.0 / counts[owner[known]]
    gram, scores = np.where(np.isfinite(gram), gram, 0.0), np.where(np.isfinite(scores), scores, 0.0)
    products = mean_KN @ gram @ mean_KN.T
    squares = mean_KN @ gram.diagonal()
    spread = np.maximum(squares - products.diagonal(), 0.0)
    variance = np.where(counts > 1, spread * counts / np.maximum(counts - 1, 1), 0.0)
    return DomainGradients(products=products, variance=variance, rows=counts, targets=mean_KN @ scores)


@dataclass(frozen=True, kw_only=True)
class _GradientParams(GradientOptions, InitialParams):
    rows_per_domain: int = param(8, "rows drawn of each domain to estimate its gradient", minimum=2)


class _ByGradients(LearningMixer):
    params: _GradientParams

    def requires(self) -> Requires:
        return replace(ONLINE, signals=frozenset({"gradients"}))

    def _gradients(self, ctx: Context) -> DomainGradients:
        options = self.params.options(precondition="none", include_momentum=False, normalize=False)
        signal = GradientProducts(targets=ctx.targets, **options)
        return domain_gradients(ctx, signal, rows_per_domain=self.params.rows_per_domain)


class _GradientMixer(_ByGradients, ExponentiatedMixer):
    params: _GradientParams


def doge_scores(aligned: Floats, norms: Floats, learning_rate: float) -> Floats:
    """Return lr <g_d, G> / (mean ||g_d|| + 1e-6), within 0 and 5 lr [K]; G is the sum of the domains' gradients."""
    return np.clip(learning_rate * aligned / (norms.mean() + 1e-6), 0.0, 5.0 * learning_rate)


class Doge(_GradientMixer):
    """Serve the domains whose gradients go along with those of all."""

    name = "doge"
    saved = (*ExponentiatedMixer.saved, "mean", "mean_count")
    card = Card(
        summary="Serves domains more, the more their gradients go along with those of all domains.",
        paper="DoGE: Domain Reweighting with Generalization Estimation (Fan et al.), ICML 2024, arXiv 2310.15393",
        cost="F + B over rows_per_domain rows of each domain",
        note="The authors update in every step, here a decision is one update and moves a logarithm by at most "
        "5 lr / mu: an interval has one estimate of the gradients. updates makes it count for more of theirs; with an "
        "interval of one step it is the paper's.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(_GradientParams):
        initial: tuple[float, ...] | dict[str, float] | str = param(
            "uniform", "proportions at first: uniform as published, size, or numbers as a list or by name"
        )
        updates: int = param(
            1, "number of the paper's updates (one in every step) that a decision counts for", minimum=1
        )
        mu: float = param(0.05, "softness of the update: small is nearly one-hot after few steps", above=0.0)
        smoothing: float = param(0.0, "share of equal proportions mixed in each time", minimum=0.0, maximum=1.0)
        average: bool = param(True, "whether to serve the mean of all proportions so far instead of the last")

    params: Params
    mean = NOTHING
    mean_count = 0

    @property
    def _eta(self) -> float:
        return self.params.updates / self.params.mu

    def _scores(self, ctx: Context) -> Floats:
        found = self._gradients(ctx)
        norms = np.sqrt(np.maximum(found.products.diagonal(), 0.0))
        return doge_scores(found.products.sum(axis=1), norms, ctx.learning_rate)

    def mix(self, ctx: Context) -> Mix:
        mix = super().mix(ctx)
        if ctx.interval.kind != "warmup":
            self.mean = running_mean(self.mean, self.mean_count, softmax(self.log_shares))
            self.mean_count += 1
        if not self.params.average or self.mean_count == 0:
            return mix
        return mix_of(self.names, self.mean, f"mean of {self.mean_count}")


class Dga(_GradientMixer):
    """Serve the domains whose gradients go along with the targets'."""

    name = "dga"
    saved = (*ExponentiatedMixer.saved, "served")
    card = Card(
        summary="Serves domains more, the more their gradients go along with those of target data.",
        paper="Dynamic Gradient Alignment for Online Data Mixing (Fan et al.), 2024, arXiv 2410.02498",
        cost="F + B over rows_per_domain rows of each domain and over the targets",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(_GradientParams):
        eta: float = param(1.0, "step size of the proportions", above=0.0)
        memory: float = param(0.9, "weight of the past in the proportions served", minimum=0.0, maximum=1.0)

    params: Params
    served = NOTHING  # moving average of the weights [K]

    def requires(self) -> Requires:
        return replace(super().requires(), targets=True)

    def _scores(self, ctx: Context) -> Floats:
        scores: Floats = self._gradients(ctx).targets.mean(axis=1)  # several targets count alike
        return scores

    def mix(self, ctx: Context) -> Mix:
        mix = super().mix(ctx)
        if not self.served.size:
            self.served = self._initial(ctx)
        if ctx.interval.kind != "warmup":
            self.served = self.params.memory * self.served + (1.0 - self.params.memory) * mix.proportions
        served = mix_of(self.names, self.served)
        return replace(served, reason=f"{served.reason}; last {mix.reason}")


def pike_scores(squared_norms: Floats, variance: Floats, zeta1: float, zeta2: float, batch: float) -> Floats:
    """Return zeta1 ||g_d||^2 - zeta2 variance_d / (2 b) [K]; b is the batch of an optimizer step."""
    return zeta1 * squared_norms - zeta2 * variance / (2.0 * batch)


class Pike(_GradientMixer):
    """Serve domains of strong gradients more and those of noisy ones less."""

    name = "pike"
    card = Card(
        summary="Serves domains more, the larger their gradients are against the noise in them.",
        paper="PiKE: Adaptive Data Mixing for Large-Scale Multi-Task Learning Under Low Gradient Conflicts (Li et al.),"
        " NeurIPS 2025, arXiv 2502.06244",
        cost="F + B over rows_per_domain rows of each domain",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(_GradientParams):
        zeta1: float = param(0.1, "weight of the squared gradient norm", minimum=0.0)
        zeta2: float = param(0.2, "weight of the gradient variance", minimum=0.0)

    params: Params

    def _scores(self, ctx: Context) -> Floats:
        found, p = self._gradients(ctx), self.params
        return pike_scores(found.squared_norms, found.variance, p.zeta1, p.zeta2, ctx.global_batch)


def between(values: Floats) -> Floats:
    """Return values scaled to 0 to 1 [K]; 0 where all are equal."""
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else np.zeros_like(values)


def tilted(prior: Floats, value: Floats, beta: float, explore: float) -> Floats:
    """Return (1 - e) p0 exp(beta Q) / sum + e / K [K], K the number of domains of p0 above 0; the others have 0."""
    return (1.0 - explore) * softmax(logs(prior) + beta * value) + explore * even(prior)


class DynamixSft(_ByGradients):
    """Serve the data sets whose loss a step on themselves lowers most, relatively, without leaving the prior far.

    At each decision r_d = lr ||g_d||^2 / L_d, the relative fall of a data set's loss by a small step along its own
    gradient, to first order; scaled to 0 to 1 over the data sets (so that lr falls out); Q = a Q + (1 - a) r. The
    proportions are (1 - explore) p0 exp(beta Q) / sum + explore / K. Losses are training losses: a small data set that
    is being memorized has the largest r, so cap it with ``dynamic.max_epochs``.
    """

    name = "dynamix_sft"
    saved = ("names", "value")
    card = Card(
        summary="Serves data sets more, the more a step on themselves lowers their own loss, near the prior.",
        paper="DynamixSFT, arXiv 2508.12116",
        cost="2 F + B over rows_per_domain rows of each domain",
        note="From notes on the second version of the paper: there the fall is measured by a virtual step on one "
        "mini-batch of each data set every 50 steps, here it is taken to first order.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(_GradientParams):
        beta: float = param(4.0, "how far values tilt the prior (4 for 1B, 5 for 8B parameters)", minimum=0.0)
        explore: float = param(0.3, "share of equal proportions mixed in", minimum=0.0, maximum=1.0)
        memory: float = param(0.95, "weight of the past in the values", minimum=0.0, maximum=1.0)

    params: Params
    value = NOTHING  # Q [K]

    def requires(self) -> Requires:
        return replace(ONLINE, signals=frozenset({"gradients", "losses"}))

    def mix(self, ctx: Context) -> Mix:
        """Return the tilted prior after one more update; the prior itself during warm-up."""
        names, p = ctx.domains.names, self.params
        if self.meet(names):
            self.value = np.zeros(len(names))
        prior = first_proportions(p.initial, ctx, self.name)
        if ctx.interval.kind == "warmup":
            return mix_of(names, prior, "the prior")
        losses = [float(np.nanmean(ctx.signals(TokenLoss(), rows))) for rows in drawn_rows(ctx, p.rows_per_domain)]
        falls = self._gradients(ctx).squared_norms / np.maximum(losses, 1e-8)
        self.value = p.memory * self.value + (1.0 - p.memory) * between(falls)
        most = int(np.argmax(falls))
        return mix_of(names, tilted(prior, self.value, p.beta, p.explore), f"largest relative fall {names[most]}")


def balanced(products: Floats, evaluation: Floats, sharpness: float) -> Floats | None:
    """Return softmax(lambda G p / ||G p||) [K]; None where G p is 0."""
    aligned = products @ evaluation
    length = float(np.linalg.norm(aligned))
    return softmax(sharpness * aligned / length) if 0 < length < np.inf else None


class RegroupBalance(_ByGradients):
    """Serve the domains whose gradients go along with those of the evaluation's mixture of them (R&B, balance).

    With inner products G of the domains' mean gradients and the evaluation's proportions p of the same domains, the
    proportions are softmax(lambda G p / ||G p||), made anew at each decision. The entries of a unit vector are about
    1 / sqrt(K), so lambda must grow with sqrt(K) to tell many domains apart. The paper first regroups the data by
    embeddings: ``dynamic.domain_clusters``.
    """

    name = "rnb"
    saved = ("names",)
    card = Card(
        summary="Serves domains more, the more their gradients go along with the evaluation's mixture of domains.",
        paper="R&B: domain regrouping and data mixture balancing, arXiv 2505.00358",
        cost="F + B over rows_per_domain rows of each domain",
        note="Gradients are of rows drawn at each decision instead of those added up in training steps. The paper "
        "tracks the last layer (last_blocks: 1 is ours) and states lambda = 3 for one data set only.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(_GradientParams):
        initial: tuple[float, ...] | dict[str, float] | str = param(
            "uniform", "proportions during warm-up: uniform as published, size, or numbers as a list or by name"
        )
        last_blocks: int | None = param(1, "use only this number of the model's last blocks; null: all", minimum=1)
        evaluation: tuple[float, ...] | dict[str, float] | str = param(
            "size", "p, proportions of the domains in the evaluation: size, uniform, or numbers"
        )
        sharpness: float = param(3.0, "lambda of the softmax", above=0.0)

        def __post_init__(self) -> None:
            super().__post_init__()
            if not isinstance(self.evaluation, str):
                check_numbers(self.evaluation, "evaluation")
            elif self.evaluation not in ("size", "uniform"):
                raise ValueError(
                    f"evaluation: {self.evaluation!r} is neither 'size' nor 'uniform' nor numbers by domain"
                )

    params: Params

    def mix(self, ctx: Context) -> Mix:
        """Return the proportions of this decision; the first ones during warm-up; DataError where G p is 0."""
        names, p = ctx.domains.names, self.params
        self.meet(names)
        if ctx.interval.kind == "warmup":
            return mix_of(names, first_proportions(p.initial, ctx, self.name), "before gradients are known")
        wanted = first_proportions(p.evaluation, ctx, self.name, "evaluation")
        found = balanced(self._gradients(ctx).products, wanted, p.sharpness)
        if found is None:
            raise DataError("rnb: the gradients of the domains in the evaluation sum to 0; give other proportions")
        return mix_of(names, np.where(first_proportions(p.initial, ctx, self.name) > 0, found, 0.0))


class Grape(_ByGradients):
    """Serve the domains that help the targets that improve least (group robust multi-target mixing).

    Targets have weights z and domains proportions alpha, both equal at first. With A_dn = <g_d, grad ln l_n>, g_d the
    mean gradient of domain d and l_n the loss of target n, a decision moves z by exp(-s sum_d alpha_d A_dn), then alpha
    by exp(s sum_n z_n A_dn), each divided by its sum. Inner products grow with the square of the gradients, so A is
    divided by its largest entry (``normalize``).
    """

    name = "grape"
    saved = ("names", "log_shares", "log_tasks")
    card = Card(
        summary="Serves domains more, the more they help the targets that improve least.",
        paper="GRAPE: group robust multi-target adaptive pretraining, arXiv 2505.20380",
        cost="F + B over rows_per_domain rows of each domain, 2 F + B over the targets",
        note="Update equations from the paper's pseudocode. Its step sizes were not told in what we read: eta is ours, "
        "and so is dividing by the largest entry.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(_GradientParams):
        initial: tuple[float, ...] | dict[str, float] | str = param(
            "uniform", "proportions at first: uniform as published, size, or numbers as a list or by name"
        )
        eta: float = param(0.2, "s of the domains' proportions", above=0.0)
        eta_targets: float = param(0.2, "s of the targets' weights; 0 keeps them equal", minimum=0.0)
        normalize: bool = param(True, "whether products are divided by the largest of them")

    params: Params
    log_shares = log_tasks = NOTHING  # logarithms of alpha [K] and z [T]

    def requires(self) -> Requires:
        return replace(ONLINE, signals=frozenset({"gradients", "losses"}), targets=True)

    def mix(self, ctx: Context) -> Mix:
        """Return alpha after one more update; as it is during warm-up."""
        names, p = ctx.domains.names, self.params
        if self.meet(names):
            self.log_shares = logs(first_proportions(p.initial, ctx, self.name))
            self.log_tasks = logs(equal(len(ctx.targets)))
        if ctx.interval.kind == "warmup":
            return mix_of(names, softmax(self.log_shares), "before gradients are known")
        losses = [
            float(np.nanmean(ctx.signals(TokenLoss(), np.arange(ctx.signals.num_rows(name)), target=name)))
            for name in ctx.targets
        ]
        products = self._gradients(ctx).targets / np.maximum(losses, 1e-8)
        if p.normalize:
            products = products / max(float(np.abs(products).max()), 1e-30)
        self.log_tasks, self.log_shares = grape_update(
            self.log_tasks, self.log_shares, products, eta=p.eta, eta_targets=p.eta_targets
        )
        tasks = softmax(self.log_tasks)
        worst = int(np.argmax(tasks))
        return mix_of(names, softmax(self.log_shares), f"largest weight {tasks[worst]:.3g} ({ctx.targets[worst]})")


def grape_update(
    log_tasks: Floats, log_shares: Floats, products: Floats, *, eta: float, eta_targets: float
) -> tuple[Floats, Floats]:
    """Return the logarithms of z [T] and alpha [K] after an update by A = ``products`` [K, T]."""
    log_tasks = exponentiated(log_tasks, -(softmax(log_shares) @ products), eta=eta_targets)
    return log_tasks, exponentiated(log_shares, products @ softmax(log_tasks), eta=eta)
