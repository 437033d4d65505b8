"""Mixers that learn proportions from gradients of domains: DoGE, DGA and PiKE, once per interval."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Card, Context, Mix, Requires, param
from dataflex.mixers._lib import NOTHING, ONLINE, ExponentiatedMixer, InitialParams, mix_of
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import running_mean, softmax
from dataflex.signals.kinds import GradientProducts
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


def domain_gradients(ctx: Context, signal: GradientProducts, *, rows_per_domain: int) -> DomainGradients:
    """Draw rows of every domain, without replacement, and compare their mean gradients (collective).

    Raises:
        DataError: None of the rows drawn of a domain has a finite gradient.
    """
    names, rng = ctx.domains.names, ctx.rng("domain gradients")
    drawn = [
        np.sort(rng.choice(rows, size=min(rows_per_domain, len(rows)), replace=False))
        for rows in map(ctx.domains.rows, range(len(names)))
    ]
    everything = np.concatenate(drawn)
    scores, gram = signal.split(ctx.signals(signal, everything))
    scores, gram = np.asarray(scores, dtype=np.float64), np.asarray(gram, dtype=np.float64)
    owner = np.repeat(np.arange(len(names)), [len(rows) for rows in drawn])
    known = np.isfinite(gram.diagonal())
    counts = np.bincount(owner[known], minlength=len(names))
    if (counts == 0).any():
        lost = names[int(np.argmin(counts))]
        raise DataError(f"none of the rows drawn of domain {lost!r} has a finite gradient (no supervised tokens?)")
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


class _GradientMixer(ExponentiatedMixer):
    params: _GradientParams

    def requires(self) -> Requires:
        return replace(ONLINE, signals=frozenset({"gradients"}))

    def _gradients(self, ctx: Context) -> DomainGradients:
        options = self.params.options(precondition="none", include_momentum=False, normalize=False)
        signal = GradientProducts(targets=ctx.targets, **options)
        return domain_gradients(ctx, signal, rows_per_domain=self.params.rows_per_domain)


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
