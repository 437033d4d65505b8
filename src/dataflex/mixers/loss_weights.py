"""Methods that weigh the domains in the loss and leave the sampling as it is: DoReMi and Group DRO."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import CheckpointError, ConfigError
from dataflex.method import Card, Context, DomainNormalizer, Mix, Mixer, ReferenceParams, Requires, State
from dataflex.method import Params as BaseParams
from dataflex.mixers._lib import require, same_domains
from dataflex.plan.domains import DomainStats
from dataflex.plan.proportions import (
    ProportionsFile,
    RunningMean,
    Written,
    by_domain,
    check_numbers,
    collapsed,
    exponentiated,
    logs,
    normalized,
    provenance,
    shares,
    softmax,
)
from dataflex.signals.other_models import base_model

__all__ = ["DoReMi", "GroupDro", "LossWeightMixer", "Trajectory", "corrected", "vocabulary_size"]

Floats = NDArray[np.float64]


class LossWeightMixer(Mixer):
    """Samples in fixed proportions and moves domain weights alpha in the loss after every step.

    Common ground of mixers that weigh the domains in the loss and leave the sampling as it is.

    The weights in force at step t were made from the steps before it: what step t shows acts from step t + 1
    on, on every rank alike.

    A subclass says what is learned from a step in ``_learn``; ``params`` has ``sampling``: proportions as
    written, or None for equal shares. A domain with a share of 0 is never served and has weight 0.
    """

    observes: ClassVar[bool] = True
    weighs_loss: ClassVar[bool] = True

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.names: tuple[str, ...] = ()
        self.sampling: Floats = np.zeros(0)
        self.log_alpha: Floats = np.zeros(0)
        self.rows: Floats = np.zeros(0)
        """Rows of each domain [K]; empty until proportions were asked for."""
        self.sizes: Floats = np.zeros(0)
        """Size of each domain in the unit of the run [K]; empty until proportions were asked for."""
        self.steps = 0

    @property
    def alpha(self) -> Floats:
        """Weights of the domains [K], summing to 1."""
        return softmax(self.log_alpha)

    def mix(self, ctx: Context) -> Mix:
        """Return the sampling proportions, which never change.

        Raises:
            ConfigError: ``sampling`` has the wrong length, or names that are unknown or missing.
        """
        self._meet(ctx.domains.names)
        self.rows, self.sizes = ctx.domains.num_rows.astype(np.float64), ctx.domains.sizes(ctx.unit)
        return Mix(proportions=self.sampling.copy(), reason=f"sampling: {shares(self.names, self.sampling)}")

    def loss_weights(self) -> Floats:
        """Return alpha [K] for the next step."""
        return self.alpha

    def observe(self, stats: DomainStats) -> None:
        """Move the weights by what one step made of the domains."""
        self._meet(stats.names)
        self._learn(stats)
        self.steps += 1

    def _learn(self, stats: DomainStats) -> None:
        raise NotImplementedError

    def _first(self) -> Floats:
        """Return the first weights alpha [K]; the sampling is known."""
        served = self.sampling > 0
        return np.asarray(served / served.sum())

    def _start(self) -> None:
        """Set what a subclass keeps beside alpha; names and first weights are known."""

    def _meet(self, names: Sequence[str]) -> None:
        """Start on the domains of the run, or make sure that they are those of the state.

        Raises:
            CheckpointError: The state was saved for other domains, or another order of them.
        """
        if self.names:
            same_domains(self.name, self.names, names)
            return
        written: Written | None = self.params.sampling
        if written is None:
            sampling = np.full(len(names), 1.0 / len(names))
        else:
            sampling = normalized(by_domain(written, names, "dynamic.mixer.sampling"))
        self.names, self.sampling = tuple(names), sampling
        self.log_alpha = logs(self._first())
        self._start()

    def state_dict(self) -> State:
        """Everything that the next weights depend on; empty before the first decision."""
        if not self.names:
            return {}
        return {
            "names": list(self.names),
            "sampling": self.sampling,
            "log_alpha": self.log_alpha,
            "rows": self.rows,
            "sizes": self.sizes,
            "steps": self.steps,
        }

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        if not state:
            return
        require(self.name, state, "names", "sampling", "log_alpha", "rows", "sizes", "steps")
        self.names = tuple(state["names"])
        self.sampling = np.asarray(state["sampling"], dtype=np.float64)
        self.log_alpha = np.asarray(state["log_alpha"], dtype=np.float64)
        self.rows = np.asarray(state["rows"], dtype=np.float64)
        self.sizes = np.asarray(state["sizes"], dtype=np.float64)
        self.steps = int(state["steps"])


class GroupDro(LossWeightMixer):
    """Minimize the worst domain's loss: q_g is multiplied by exp(eta (L_g + C / sqrt(n_g))) every step.

    Group DRO: weigh the domains in the loss towards those of the largest loss.

    Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", ICLR 2020, arXiv 1911.08731,
    algorithm 1 with the generalization adjustment of section 3.3. Losses are mean token losses. Without a
    reference the weights follow the domain of the highest entropy, so regularize, or use ``doremi``.
    """

    name = "group_dro"
    card = Card(
        summary="Weighs the domains in the loss towards those of the largest loss, every step.",
        paper="Distributionally Robust Neural Networks for Group Shifts, ICLR 2020, arXiv 1911.08731",
        cost="none",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        """Parameters of Group DRO."""

        eta: float = field(default=0.01, metadata={"help": "step size of the weights", "above": 0.0})
        adjustment: float = field(
            default=0.0,
            metadata={"help": "C of the adjustment C / sqrt(rows of the domain), in nats", "minimum": 0.0},
        )
        smoothing: float = field(
            default=0.0,
            metadata={"help": "share of equal weights mixed in after every step", "minimum": 0.0, "maximum": 1.0},
        )
        sampling: tuple[float, ...] | dict[str, float] | None = field(
            default=None,
            metadata={"help": "proportions in which domains are served; null: equal shares", "minimum": 0.0},
        )

        def __post_init__(self) -> None:
            if self.sampling is not None:
                check_numbers(self.sampling, "sampling")

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        return Requires(domains=2, stages=("pt", "sft"))

    @property
    def loss_normalizer(self) -> DomainNormalizer:
        """The loss is the sum over domains of q_g times the domain's mean loss."""
        return "domain"

    def _learn(self, stats: DomainStats) -> None:
        scores = np.where(stats.seen, stats.mean_loss(), 0.0)  # an absent domain has loss 0, as in the original code
        if self.params.adjustment > 0 and self.rows.size:
            scores = scores + self.params.adjustment / np.sqrt(self.rows)
        self.log_alpha = exponentiated(self.log_alpha, scores, eta=self.params.eta, smoothing=self.params.smoothing)


_MOST = 1024


class Trajectory:
    """Vectors at multiples of a stride of steps; the stride doubles when there are too many."""

    def __init__(self) -> None:
        self.stride = 1
        self.steps: list[int] = []
        self.vectors: list[NDArray[np.float64]] = []

    def add(self, step: int, vector: NDArray[np.float64]) -> None:
        """Keep the vector in force from ``step`` on, if the stride asks for that step."""
        if step % self.stride:
            return
        self.steps.append(step)
        self.vectors.append(np.array(vector, dtype=np.float64))
        if len(self.steps) > _MOST:
            self.stride *= 2
            kept = [i for i, at in enumerate(self.steps) if at % self.stride == 0]
            self.steps = [self.steps[i] for i in kept]
            self.vectors = [self.vectors[i] for i in kept]

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """Return ``{"steps": [...], "weights": {name: [...]}}``."""
        columns = np.stack(self.vectors, axis=1).tolist() if self.vectors else [[] for _ in names]
        return {"steps": list(self.steps), "weights": dict(zip(names, columns, strict=True))}

    def state_dict(self) -> State:
        """Return all that is kept."""
        vectors = np.stack(self.vectors) if self.vectors else np.zeros((0, 0))
        return {"stride": self.stride, "steps": np.array(self.steps, dtype=np.int64), "vectors": vectors}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self.stride = int(state["stride"])
        self.steps = [int(step) for step in state["steps"]]
        self.vectors = [np.asarray(vector, dtype=np.float64) for vector in state["vectors"]]


def corrected(alpha: Floats, sampling: Floats) -> Floats:
    """Return alpha_d / pi_d divided by its sum [K]: token weights that undo the sampling; 0 where pi_d is 0."""
    ratio = np.divide(alpha, sampling, out=np.zeros_like(alpha), where=sampling > 0)
    return ratio / ratio.sum()


def vocabulary_size(folder: Path) -> int:
    """Return the vocabulary of the model in a folder; that of its base model for an adapter.

    Raises:
        ConfigError: The folder does not say.
    """
    try:
        folder = Path(base_model(folder) or folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return int(config["vocab_size"] if "vocab_size" in config else config["text_config"]["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"dynamic.mixer.initial_score: a domain was absent before its first score, which is ln(vocabulary), and "
            f"{folder} does not tell the vocabulary ({type(error).__name__}: {error}); give the score"
        ) from error


class DoReMi(LossWeightMixer):
    """Weigh the domains in the loss towards those where the reference does better.

    DoReMi's proxy run: Group DRO over domains with the excess loss over a reference model.

    Xie et al., "DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining", NeurIPS 2023,
    arXiv 2305.10429, algorithm 1. The proxy samples in fixed proportions (equal ones in the paper); after each
    step, with e = loss - reference loss per token,

        s_d = mean over the tokens of domain d of max(e, 0)        (clipped token by token)
        alpha_d is multiplied by exp(eta s_d), normalized, and smoothed: (1 - c) alpha + c / K

    and alpha weighs the domains in the loss of the next step. The result is the mean of alpha over the run, in
    which the main model samples; alpha itself jumps from one domain to the next (bang-bang), so that a single value of
    it says nothing. A mean that gives one domain more than .8 has collapsed, and is warned about. Three variants differ
    in details:

    - ``repo``: the authors' code. Alpha starts at the sampling proportions. Weighted token mean as the loss, corrected
      for the sampling (alpha / pi); an absent domain keeps its score, ln(vocabulary) before its first; the mean counts
      the first weights.
    - ``paper``: the text. Alpha starts equal. sum_d alpha_d (mean loss of d) as the loss; the mean is over the steps.
    - ``levanter``: as ``paper``, but s_d is the mean over tokens with e > 0 only, an absent domain has score 0.

    ``dataflex mix doremi`` runs reference, proxy and main model.
    """

    name = "doremi"
    card = Card(
        summary="Weighs the domains in the loss towards the largest excess loss over a reference; the mean of the "
        "weights is the result.",
        paper="DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining, NeurIPS 2023, arXiv 2305.10429",
        cost="1 F of the reference over each row served, once (cached), or in every step",
        note="Under variant: repo, the authors' code, the weights start at the sampling proportions; under the "
        "others they start equal.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ReferenceParams):
        """Parameters of the proxy run."""

        variant: Literal["repo", "paper", "levanter"] = field(
            default="repo", metadata={"help": "the authors' code, the paper's text, or Levanter's implementation"}
        )
        normalizer: Literal["token", "domain"] | None = field(
            default=None,
            metadata={"help": "loss: weighted token mean, or weighted sum of domains' means; null: the variant's"},
        )
        eta: float = field(default=1.0, metadata={"help": "step size of the weights", "above": 0.0})
        smoothing: float = field(
            default=1e-3,
            metadata={"help": "c, share of equal weights mixed in after every step", "minimum": 0.0, "maximum": 1.0},
        )
        sampling: tuple[float, ...] | dict[str, float] | None = field(
            default=None,
            metadata={"help": "proportions in which domains are served; null: equal shares", "minimum": 0.0},
        )
        initial_score: float | None = field(
            default=None,
            metadata={"help": "score of a domain not yet seen, nats; null: ln(vocabulary)", "minimum": 0.0},
        )

        def __post_init__(self) -> None:
            if not self.reference.strip():
                raise ValueError(
                    "reference: is empty; without a reference model this is not DoReMi but the hardest domains first"
                )
            if self.sampling is not None:
                check_numbers(self.sampling, "sampling")

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        return Requires(domains=2, stages=("pt", "sft"), reference=self.params.stated())

    @property
    def loss_normalizer(self) -> DomainNormalizer:
        """``token`` for the authors' code, ``domain`` for the others, unless chosen."""
        return self.params.normalizer or ("token" if self.params.variant == "repo" else "domain")

    def loss_weights(self) -> Floats:
        """Return the weights [K] of the next step: alpha, divided by the sampling under ``token``."""
        return corrected(self.alpha, self.sampling) if self.loss_normalizer == "token" else self.alpha

    def _first(self) -> Floats:
        return self.sampling.copy() if self.params.variant == "repo" else super()._first()

    def _start(self) -> None:
        self.scores: Floats = np.full(len(self.names), np.nan)  # not yet seen
        self.mean = RunningMean(self.alpha if self.params.variant == "repo" else None)
        self.trajectory = Trajectory()
        self.trajectory.add(0, self.alpha)

    def _learn(self, stats: DomainStats) -> None:
        self.scores = self._scored(stats)
        self.log_alpha = exponentiated(
            self.log_alpha, self.scores, eta=self.params.eta, smoothing=self.params.smoothing
        )
        self.mean.add(self.alpha)
        self.trajectory.add(self.steps + 1, self.alpha)

    def _scored(self, stats: DomainStats) -> Floats:
        if self.params.variant == "levanter":
            seen = stats.excess_tokens > 0
            return np.divide(stats.excess_sum, stats.excess_tokens, out=np.zeros(len(self.names)), where=seen)
        scores = np.where(stats.seen, stats.mean_excess(), self.scores)
        unknown = np.isnan(scores) & (self.sampling > 0)
        if unknown.any():
            first = self.params.initial_score
            scores[unknown] = math.log(vocabulary_size(Path(self.params.reference))) if first is None else first
        return scores

    def outcome(self) -> ProportionsFile | None:
        """Return the mean of alpha so far as proportions for a static mixer, with its trajectory."""
        if self.mean_alpha is None:
            return None
        return ProportionsFile(
            names=self.names,
            proportions=tuple(self.mean_alpha.tolist()),
            method="doremi",
            provenance=provenance("dataflex train", settings=asdict(self.params)),
            details={
                "steps": self.steps,
                "vectors_in_mean": self.mean.count,
                "last": dict(zip(self.names, self.alpha.tolist(), strict=True)),
                "scores": dict(zip(self.names, self.scores.tolist(), strict=True)),
                "sampling": dict(zip(self.names, self.sampling.tolist(), strict=True)),
                "sizes": dict(zip(self.names, self.sizes.tolist(), strict=bool(self.sizes.size))),
                "trajectory": self.trajectory.to_json(self.names),
                **self._warning(),
            },
        )

    def _warning(self) -> dict[str, str]:
        """Return under ``warning`` that the mean has collapsed onto one domain, and what helps; else nothing."""
        assert self.mean_alpha is not None
        found = collapsed(dict(zip(self.names, self.mean_alpha.tolist(), strict=True)))
        if found is None:
            return {}
        name, share = found
        p = self.params
        return {
            "warning": f"the mean of the weights has collapsed: {name} has {share:.1%} of it. Lower eta (now "
            f"{p.eta:g}, try {p.eta / 10:g}), raise smoothing (now {p.smoothing:g}), use batches that hold every "
            "domain, or train the reference longer: where it is far better than the proxy in one domain, that domain "
            "takes all. A final run can hold the others up with min_proportion, or this one down with max_epochs"
        }

    @property
    def mean_alpha(self) -> Floats | None:
        """Mean of the weights [K] over the run so far, None before the first step."""
        return self.mean.value / self.mean.value.sum() if self.steps else None

    def state_dict(self) -> State:
        """Weights, scores, mean with its counter, and the trajectory."""
        state = super().state_dict()
        if state:
            state |= {
                "scores": self.scores,
                "mean": self.mean.value,
                "mean_count": self.mean.count,
                "trajectory": self.trajectory.state_dict(),
            }
        return state

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        super().load_state_dict(state)
        if not state:
            return
        try:
            self.scores = np.asarray(state["scores"], dtype=np.float64)
            self.mean = RunningMean()
            self.mean.value, self.mean.count = np.asarray(state["mean"], dtype=np.float64), int(state["mean_count"])
            self.trajectory = Trajectory()
            self.trajectory.load_state_dict(state["trajectory"])
        except KeyError as error:
            raise CheckpointError(f"doremi: the saved state lacks {error}") from error
