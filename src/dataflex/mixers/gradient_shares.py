"""Mixers that learn proportions from gradients of domains: DoGE, DGA and PiKE, once per interval.

DoGE's proxy updates its weights in every step. Here an interval has one estimate of the gradients and, by default, one
update, which moves a logarithm by at most 5 lr / mu: far less than the paper's over as many steps. With an interval of
one step it is the paper's; ``updates`` lets a decision count for as many of its updates.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Card, Context, Mix, Needs, State
from dataflex.mixers._lib import ExponentiatedMixer, InitialParams, require
from dataflex.plan.proportions import RunningMean, exponentiated, normalized, shares, softmax
from dataflex.signals.specs import GradientSpec

__all__ = ["Dga", "Doge", "DomainGradients", "Pike", "doge_scores", "domain_gradients", "pike_scores"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DomainGradients:
    """Inner products of the mean gradients g_d of the domains.

    Attributes:
        products: <g_d, g_e> [K, K]; the diagonal is the squared norm of the mean over the rows drawn.
        variance: Unbiased variance of a row's gradient within its domain, E ||g_i - g_d||^2 [K]; 0 for a domain of
            one row, which is always the same.
        rows: Rows that each domain's mean is over [K].
        targets: <g_d, g_t> with the mean gradient of each target [K, T].
    """

    products: Floats
    variance: Floats
    rows: NDArray[np.int64]
    targets: Floats

    @property
    def squared_norms(self) -> Floats:
        """Unbiased estimate of ||E g_d||^2 [K], at least 0: the mean's own norm is too large by variance / rows."""
        biased = self.products.diagonal()
        return np.maximum(biased - self.variance / self.rows, 0.0)


def domain_gradients(
    ctx: Context, *, rows_per_domain: int, parameters: str | None = None, last_blocks: int | None = None
) -> DomainGradients:
    """Draw rows of every domain and compare their gradients (collective; F + B over the rows and targets).

    Args:
        ctx: The decision's context; its targets are compared with too.
        rows_per_domain: Rows drawn of each domain, without replacement; all of a smaller one.
        parameters: As in ``GradientSpec``.
        last_blocks: As in ``GradientSpec``.

    Raises:
        DataError: None of the rows drawn of a domain has a finite gradient.
    """
    names, rng = ctx.domains.names, ctx.rng("domain gradients")
    drawn = []
    for k in range(len(names)):
        rows = ctx.domains.rows(k)
        drawn.append(np.sort(rng.choice(rows, size=min(rows_per_domain, len(rows)), replace=False)))
    spec = GradientSpec(
        precondition="none",
        include_momentum=False,
        normalize=False,
        parameters=parameters,
        last_blocks=last_blocks,
    )
    everything = np.concatenate(drawn)
    scores, gram = ctx.signals.gradient_products(everything, spec, targets=ctx.targets)
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
    many = counts > 1
    spread = np.maximum(squares - products.diagonal(), 0.0)
    variance = np.where(many, spread * counts / np.maximum(counts - 1, 1), 0.0)
    return DomainGradients(products=products, variance=variance, rows=counts, targets=mean_KN @ scores)


@dataclass(frozen=True, kw_only=True)
class _GradientParams(InitialParams):
    """Parameters of the family."""

    rows_per_domain: int = field(
        default=8, metadata={"help": "rows drawn of each domain to estimate its gradient", "minimum": 2}
    )
    parameters: str | None = field(
        default=None,
        metadata={"pattern": True, "help": "regular expression of the parameters compared; null: all trainable ones"},
    )
    last_blocks: int | None = field(
        default=None, metadata={"help": "only the last so many blocks of the model; null: all", "minimum": 1}
    )


class _GradientMixer(ExponentiatedMixer):
    params: _GradientParams

    def _gradients(self, ctx: Context) -> DomainGradients:
        return domain_gradients(
            ctx,
            rows_per_domain=self.params.rows_per_domain,
            parameters=self.params.parameters,
            last_blocks=self.params.last_blocks,
        )


def doge_scores(aligned: Floats, norms: Floats, learning_rate: float) -> Floats:
    """Return lr <g_d, G> / (mean norm + 1e-6), within 0 and 5 lr [K].

    Args:
        aligned: <g_d, G> [K]; G is the sum of the domains' gradients, or the target's.
        norms: ||g_d|| [K].
        learning_rate: Learning rate of the optimizer.
    """
    return np.clip(learning_rate * aligned / (norms.mean() + 1e-6), 0.0, 5.0 * learning_rate)


class Doge(_GradientMixer):
    """Serve the domains whose gradients go along with those of all, or of the targets."""

    name = "doge"
    needs = Needs(signals=frozenset({"gradients"}), domains=2, stages=("pt", "sft"))
    card = Card(
        summary="Serves domains more, the more their gradients go along with those of all domains.",
        paper="DoGE: Domain Reweighting with Generalization Estimation (Fan et al.), ICML 2024, arXiv 2310.15393",
        cost="F + B over rows_per_domain rows of each domain",
        note="The authors update in every step, here a decision is one update and moves a logarithm by at most "
        "5 lr / mu: an interval has one estimate of the gradients. updates makes it count for more of theirs.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(_GradientParams):
        """Parameters of DoGE."""

        initial: tuple[float, ...] | dict[str, float] | str = field(
            default="uniform",
            metadata={
                "help": "proportions at first: uniform as published, size, or numbers as a list or by name",
            },
        )
        updates: int = field(
            default=1,
            metadata={
                "help": "updates of the paper, which makes one in every step, that a decision counts for",
                "minimum": 1,
            },
        )
        mu: float = field(
            default=0.05,
            metadata={"help": "softness of the update: small is nearly one-hot after few steps", "above": 0.0},
        )
        smoothing: float = field(
            default=0.0,
            metadata={"help": "share of equal proportions mixed in each time", "minimum": 0.0, "maximum": 1.0},
        )
        average: bool = field(
            default=True, metadata={"help": "whether to serve the mean of all proportions so far instead of the last"}
        )

    params: Params

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.mean = RunningMean()

    def _moved(self, ctx: Context) -> tuple[Floats, str]:
        found = self._gradients(ctx)
        norms = np.sqrt(np.maximum(found.products.diagonal(), 0.0))
        scores = doge_scores(found.products.sum(axis=1), norms, ctx.learning_rate)
        moved = exponentiated(
            self.log_shares, scores, eta=self.params.updates / self.params.mu, smoothing=self.params.smoothing
        )
        self.mean.add(softmax(moved))
        return moved, f"last {shares(self.names, softmax(moved))}; served"

    def mix(self, ctx: Context) -> Mix:
        """Return the mean of the proportions so far, or the last ones."""
        mix = super().mix(ctx)
        if not self.params.average or self.mean.count == 0:
            return mix
        proportions = normalized(self.mean.value)
        return Mix(proportions=proportions, reason=f"mean of {self.mean.count}: {shares(self.names, proportions)}")

    def state_dict(self) -> State:
        """Add the mean."""
        state = super().state_dict()
        return {**state, "mean": self.mean.value, "mean_count": self.mean.count} if state else {}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        super().load_state_dict(state)
        if state:
            require(self.name, state, "mean", "mean_count")
            self.mean.value = np.array(state["mean"], dtype=np.float64)
            self.mean.count = int(state["mean_count"])


class Dga(_GradientMixer):
    """Serve the domains whose gradients go along with the targets'."""

    name = "dga"
    needs = Needs(signals=frozenset({"gradients"}), targets=True, domains=2, stages=("pt", "sft"))
    card = Card(
        summary="Serves domains more, the more their gradients go along with those of target data.",
        paper="Dynamic Gradient Alignment for Online Data Mixing (Fan et al.), 2024, arXiv 2410.02498",
        cost="F + B over rows_per_domain rows of each domain and over the targets",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(_GradientParams):
        """Parameters of DGA."""

        eta: float = field(default=1.0, metadata={"help": "step size of the proportions", "above": 0.0})
        memory: float = field(
            default=0.9,
            metadata={"help": "weight of the past in the proportions served", "minimum": 0.0, "maximum": 1.0},
        )

    params: Params

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.served: Floats = np.zeros(0)

    def _moved(self, ctx: Context) -> tuple[Floats, str]:
        """Return w exp(eta <g_d, g_target>), normalized; several targets count alike."""
        scores = self._gradients(ctx).targets.mean(axis=1)
        return exponentiated(self.log_shares, scores, eta=self.params.eta), ""

    def mix(self, ctx: Context) -> Mix:
        """Return the moving average of the weights."""
        mix = super().mix(ctx)
        before = self.served if self.served.size else self._initial(ctx, self.params.initial)
        self.served = before
        if ctx.interval.kind != "warmup":
            self.served = self.params.memory * before + (1.0 - self.params.memory) * mix.proportions
        proportions = normalized(self.served)
        return Mix(proportions=proportions, reason=f"{shares(self.names, proportions)}; last {mix.reason}")

    def state_dict(self) -> State:
        """Add the moving average."""
        state = super().state_dict()
        return {**state, "served": self.served} if state else {}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        super().load_state_dict(state)
        if state:
            require(self.name, state, "served")
            self.served = np.array(state["served"], dtype=np.float64)


def pike_scores(squared_norms: Floats, variance: Floats, zeta1: float, zeta2: float, batch: float) -> Floats:
    """Return zeta1 ||g_d||^2 - zeta2 variance_d / (2 b) [K]."""
    return zeta1 * squared_norms - zeta2 * variance / (2.0 * batch)


class Pike(_GradientMixer):
    """Serve domains of strong gradients more and those of noisy ones less."""

    name = "pike"
    needs = Needs(signals=frozenset({"gradients"}), domains=2, stages=("pt", "sft"))
    card = Card(
        summary="Serves domains more, the larger their gradients are against the noise in them.",
        paper="PiKE: Adaptive Data Mixing for Large-Scale Multi-Task Learning Under Low Gradient Conflicts (Li et al.),"
        " NeurIPS 2025, arXiv 2502.06244",
        cost="F + B over rows_per_domain rows of each domain",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(_GradientParams):
        """Parameters of PiKE."""

        zeta1: float = field(default=0.1, metadata={"help": "weight of the squared gradient norm", "minimum": 0.0})
        zeta2: float = field(default=0.2, metadata={"help": "weight of the gradient variance", "minimum": 0.0})

    params: Params

    def _moved(self, ctx: Context) -> tuple[Floats, str]:
        """Return w exp(zeta1 ||g||^2 - zeta2 variance / (2 b)), normalized; b is the batch of an optimizer step."""
        found = self._gradients(ctx)
        batch = ctx.global_batch
        scores = pike_scores(found.squared_norms, found.variance, self.params.zeta1, self.params.zeta2, batch)
        return exponentiated(self.log_shares, scores, eta=1.0), ""
