"""Methods that weigh the domains in the loss and leave the sampling as it is: DoReMi and Group DRO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from dataflex.errors import ConfigError
from dataflex.method import Card, Context, DomainNormalizer, DomainWeighter, Mix, ReferenceParams, Requires, param
from dataflex.method import Params as BaseParams
from dataflex.mixers._lib import NOTHING, LearningMixer, equal, mix_of
from dataflex.parts import refuse_idle
from dataflex.plan.domains import DomainStats, Floats
from dataflex.plan.proportions import (
    ProportionsFile,
    by_domain,
    check_numbers,
    collapsed,
    exponentiated,
    logs,
    provenance,
    running_mean,
    softmax,
)
from dataflex.signals.other_models import sizes_of


@dataclass(frozen=True, kw_only=True)
class _SamplingParams(BaseParams):
    sampling: tuple[float, ...] | dict[str, float] | None = param(
        None, "proportions in which domains are served; null: equal shares", minimum=0.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampling is not None:
            check_numbers(self.sampling, "sampling")


class _LossWeighter(DomainWeighter, LearningMixer):
    """Moves domain weights alpha in the loss by exponentiated scores after every step, for the steps after it.

    A domain with a share of 0 is never served and has weight 0.
    """

    saved: ClassVar[tuple[str, ...]] = ("names", "sampling", "log_alpha", "rows", "sizes", "steps")
    sampling = log_alpha = NOTHING
    rows = sizes = NOTHING
    """Rows of each domain, and its size in the unit of the run [K]; empty until ``mix`` was called."""
    steps = 0

    @property
    def alpha(self) -> Floats:
        """Weights of the domains [K], summing to 1."""
        return softmax(self.log_alpha)

    def mix(self, ctx: Context) -> Mix:
        self._begin(ctx.domains.names)
        self.rows, self.sizes = ctx.domains.num_rows.astype(np.float64), ctx.domains.sizes(ctx.unit)
        return mix_of(self.names, self.sampling.copy(), "sampling")

    def loss_weights(self) -> Floats:
        return self.alpha

    def observe(self, stats: DomainStats) -> None:
        self._begin(stats.names)
        scores = self._scores(stats)
        self.log_alpha = exponentiated(self.log_alpha, scores, eta=self.params.eta, smoothing=self.params.smoothing)
        self.steps += 1

    def _scores(self, stats: DomainStats) -> Floats:
        raise NotImplementedError

    def _first(self) -> Floats:
        """Return the first weights alpha [K]; the sampling is known."""
        served = self.sampling > 0
        return np.asarray(served / served.sum())

    def _begin(self, names: Sequence[str]) -> bool:
        """Begin the state, unless there is one; return whether it was begun."""
        if not self.meet(names):
            return False
        written = self.params.sampling
        self.sampling = equal(len(names)) if written is None else by_domain(written, names, "dynamic.mixer.sampling")
        self.log_alpha = logs(self._first())
        return True


def vocabulary_size(folder: Path) -> int:
    """Return the vocabulary of the model in a folder; that of its base model for an adapter."""
    try:
        return int(sizes_of(folder)["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"dynamic.mixer.initial_score: a domain was absent before its first score, which is ln(vocabulary), and "
            f"{folder} does not tell the vocabulary ({type(error).__name__}: {error}); give the score"
        ) from error


_MOST_VECTORS = 1024


class DoReMi(_LossWeighter):
    """Weigh the domains in the loss towards those where the reference does better.

    The proxy run of DoReMi (algorithm 1): Group DRO over domains with the excess loss over a reference model. The
    proxy samples in fixed proportions (equal ones in the paper); after each step, with e = loss - reference loss per
    token,

        s_d = mean over the tokens of domain d of max(e, 0)        (clipped token by token)
        alpha_d is multiplied by exp(eta s_d), normalized, and smoothed: (1 - c) alpha + c / K

    and alpha weighs the domains in the loss of the next step. The result is the mean of alpha over the run: the
    proportions in which the main model samples. Alpha itself jumps from one domain to the next, so that a single value
    of it says nothing. A mean that gives one domain more than .8 has collapsed, and is warned about. Three variants
    differ in details:

    - ``repo``: the authors' code. Alpha starts at the sampling proportions. Weighted token mean as the loss, corrected
      for the sampling (alpha / pi); an absent domain keeps its score, ln(vocabulary) before its first; the mean counts
      the first weights.
    - ``paper``: the text. Alpha starts equal. sum_d alpha_d (mean loss of d) as the loss; the mean is over the steps.
    - ``levanter``: as ``paper``, but s_d is the mean over tokens with e > 0 only, an absent domain has score 0.

    ``dataflex mix doremi`` runs reference, proxy and main model.
    """

    name = "doremi"
    saved = (*_LossWeighter.saved, "scores", "mean", "mean_count", "stride", "trajectory")
    card = Card(
        summary="Weighs the domains in the loss towards the largest excess loss over a reference; the mean of the "
        "weights is the result.",
        paper="DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining, NeurIPS 2023, arXiv 2305.10429",
        cost="1 F of the reference over each row served, once (cached), or in every step",
        note="The weights start at the sampling proportions under variant: repo, and equal under the others.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(_SamplingParams, ReferenceParams):
        variant: Literal["repo", "paper", "levanter"] = param(
            "repo", "the authors' code, the paper's text, or Levanter's implementation"
        )
        normalizer: Literal["weight_sum", "domain"] | None = param(
            None, "loss: weighted token mean, or weighted sum of domains' means; null: the variant's"
        )
        eta: float = param(1.0, "step size of the weights", above=0.0)
        smoothing: float = param(1e-3, "share of equal weights mixed in after every step", minimum=0.0, maximum=1.0)
        initial_score: float | None = param(
            None, "score of a domain not yet seen, nats; null: ln(vocabulary)", minimum=0.0
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.variant == "levanter":
                refuse_idle(self, ("initial_score",), "under 'variant: levanter', where it is 0")

    params: Params
    scores = mean = NOTHING  # scores of the domains [K], NaN where not yet seen, and the mean of alpha [K]
    mean_count = 0
    stride = 1  # number of steps between two vectors of the trajectory; doubles when there are more than 1,024

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.trajectory: list[Floats] = []  # alpha at steps 0, stride, 2 stride, ...

    def requires(self) -> Requires:
        return Requires(domains=2, stages=("pt", "sft"), reference=self.params.stated())

    @property
    def loss_normalizer(self) -> DomainNormalizer:
        return self.params.normalizer or ("weight_sum" if self.params.variant == "repo" else "domain")

    @property
    def undoes_sampling(self) -> bool:
        return self.loss_normalizer == "weight_sum"

    def _first(self) -> Floats:
        return self.sampling.copy() if self.params.variant == "repo" else super()._first()

    def _begin(self, names: Sequence[str]) -> bool:
        new = super()._begin(names)
        if new:
            self.scores = np.full(len(self.names), np.nan)
            if self.params.variant == "repo":
                self.mean, self.mean_count = self.alpha, 1
            self.trajectory = [self.alpha]
        return new

    def observe(self, stats: DomainStats) -> None:
        super().observe(stats)
        self.mean = running_mean(self.mean, self.mean_count, self.alpha)
        self.mean_count += 1
        if self.steps % self.stride == 0:
            self.trajectory.append(self.alpha)
        if len(self.trajectory) > _MOST_VECTORS:
            self.trajectory, self.stride = self.trajectory[::2], 2 * self.stride

    def _scores(self, stats: DomainStats) -> Floats:
        if self.params.variant == "levanter":
            zeros = np.zeros(len(self.names))
            self.scores = np.divide(stats.excess_sum, stats.excess_tokens, out=zeros, where=stats.excess_tokens > 0)
            return self.scores
        self.scores = np.where(stats.present, stats.mean_excess(), self.scores)
        unknown = np.isnan(self.scores) & (self.sampling > 0)
        if unknown.any():
            first = self.params.initial_score
            self.scores[unknown] = math.log(vocabulary_size(Path(self.params.reference))) if first is None else first
        return self.scores

    @property
    def mean_alpha(self) -> Floats | None:
        """Mean of the weights [K] over the run so far; None before the first step."""
        return self.mean / self.mean.sum() if self.steps else None

    def outcome(self) -> ProportionsFile | None:
        """Return the mean of alpha so far as proportions for a static mixer, with its trajectory."""
        if self.mean_alpha is None:
            return None
        p = self.params

        def by_name(values: Floats) -> dict[str, Any]:
            return dict(zip(self.names, values.tolist(), strict=False))  # sizes may be unknown, hence empty

        details: dict[str, Any] = {
            "steps": self.steps,
            "vectors_in_mean": self.mean_count,
            "last": by_name(self.alpha),
            "scores": by_name(self.scores),
            "sampling": by_name(self.sampling),
            "sizes": by_name(self.sizes),
            "trajectory": {
                "steps": [self.stride * place for place in range(len(self.trajectory))],
                "weights": by_name(np.stack(self.trajectory, axis=1)),
            },
        }
        found = collapsed(by_name(self.mean_alpha))
        if found is not None:
            details["warning"] = (
                f"the mean of the weights has collapsed: {found[0]} has {found[1]:.1%} of it. Lower eta (now "
                f"{p.eta:g}, try {p.eta / 10:g}), raise smoothing (now {p.smoothing:g}), use batches that hold every "
                "domain, or train the reference longer: where it is far better than the proxy in one domain, that "
                "domain takes all. A final run can hold the others up with min_proportion, or this one down with "
                "max_epochs"
            )
        return ProportionsFile(
            names=self.names,
            proportions=tuple(self.mean_alpha.tolist()),
            method="doremi",
            provenance=provenance("dataflex train", settings=asdict(p)),
            details=details,
        )


class GroupDro(_LossWeighter):
    """Minimize the worst domain's loss: q_g is multiplied by exp(eta (L_g + C / sqrt(n_g))) every step.

    Algorithm 1 with the generalization adjustment of section 3.3. Losses are mean token losses; the loss is the sum
    over domains of q_g times the domain's mean loss. Without a reference the weights follow the domain of the highest
    entropy, so regularize, or use ``doremi``.
    """

    name = "group_dro"
    card = Card(
        summary="Weighs the domains in the loss towards those of the largest loss, every step.",
        paper="Distributionally Robust Neural Networks for Group Shifts, ICLR 2020, arXiv 1911.08731",
        cost="none",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(_SamplingParams):
        eta: float = param(0.01, "step size of the weights", above=0.0)
        adjustment: float = param(0.0, "C of the adjustment C / sqrt(rows of the domain), in nats", minimum=0.0)
        smoothing: float = param(0.0, "share of equal weights mixed in after every step", minimum=0.0, maximum=1.0)

    params: Params

    def requires(self) -> Requires:
        return Requires(domains=2, stages=("pt", "sft"))

    @property
    def loss_normalizer(self) -> DomainNormalizer:
        return "domain"

    def _scores(self, stats: DomainStats) -> Floats:
        scores = np.where(stats.present, stats.mean_loss(), 0.0)  # an absent domain has loss 0, as in the original code
        if self.params.adjustment > 0 and self.rows.size:
            scores = scores + self.params.adjustment / np.sqrt(self.rows)
        return scores
