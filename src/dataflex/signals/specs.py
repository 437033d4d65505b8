"""What signals and generations are asked for: plain settings without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from dataflex.errors import ConfigError, did_you_mean
from dataflex.parts import param

Pooling = Literal["last", "mean", "weighted_mean", "first"]
Precision = Literal["int8", "fp16"]
"""How an index keeps the numbers of a row."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Part = Literal["all", "prompt", "completion"]
"""Of a row's tokens: all, those without a label, or the supervised ones (the response)."""

SKETCH = 16
"""Numbers per side of the sketch of a matrix's gradient, which a row leaves in its own training step."""
LEAST_ROWS = 8
"""Rows that a level is taken from, that predictions are made from, and of each target that a decision looks at."""
HELD_ROWS = 4096
"""Rows of a rank of which the device holds what they left in their steps, until the next decision."""


@dataclass(frozen=True, kw_only=True)
class GradientOptions:
    """Which gradients rows are compared by: the options that methods include among their parameters."""

    parameters: str | None = param(
        None, "regular expression of parameter names; null: all trainable ones", pattern=True
    )
    last_blocks: int | None = param(None, "use only this number of the model's last blocks; null: all", minimum=1)
    bf16: bool = param(False, "run the gradient passes in bfloat16")

    def options(self, **more: Any) -> dict[str, Any]:
        """Return fields of a gradient signal: those of ``GradientSpec`` that are known here, and ``more``."""
        known = {one.name for one in fields(GradientSpec)}
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name in known} | more


@dataclass(frozen=True, kw_only=True)
class InfluenceOptions(GradientOptions):
    """How rows' gradients are compared with those of targets, as in LESS."""

    precondition: Literal["true_adam", "paper_repo", "sign", "none"] = param(
        "true_adam", "what turns training gradients into directions"
    )
    include_momentum: bool = param(True, "keep Adam's momentum term")
    target_gradient: Literal["mean_of_cosines", "cosine_of_mean"] = param(
        "mean_of_cosines", "every target row counts alike, or by the length of its gradient (in one pass less)"
    )
    sketch_size: int | None = param(None, "compare sparse sketches of this size; null: exact", minimum=2)

    def target_passes(self, normalize: bool = True) -> tuple[float, float]:
        """Return the passes (F, B) over a target: unit gradients take one for the norms and one for the sum."""
        times = 2.0 if normalize and self.target_gradient == "mean_of_cosines" else 1.0
        return times, times

    def options(self, **more: Any) -> dict[str, Any]:  # noqa: D102
        return super().options(**{"mean_of_cosines": self.target_gradient == "mean_of_cosines", **more})


@dataclass(frozen=True, kw_only=True)
class GradientSpec(GradientOptions):
    """Which gradients of rows are computed, and how they are compared.

    ``precondition`` is a preset of training rows' directions: ``true_adam``, ``paper_repo`` (LESS's code: eps inside
    the root, no bias correction), ``adam_scale`` (second moment as it is, OPUS), ``sign`` or ``none``. Target rows stay
    plain. ``ekfac`` (of signals that compare with targets): targets' vectors go through the damped inverse curvature,
    which is the same as if rows' did; lengths are those of rows' plain gradients.
    """

    precondition: str = "true_adam"
    include_momentum: bool = True  # keep Adam's momentum term, which all rows share
    normalize: bool = True  # scores are cosines rather than inner products
    mean_of_cosines: bool = True  # with a target's rows (LESS's code); else the cosine with their mean gradient (paper)
    sketch_size: int | None = None  # compare sketches of this size; None: exact gradients
    sketch_seed: int = 0
    ekfac_rows: int = 256  # training rows that the curvature is measured on
    ekfac_damping: float = 0.1  # added to it, in mean eigenvalues of each parameter
    forward_mode: bool = False  # GradientScores as derivatives along mean gradients: plain inner products only


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """The loss of a pair under stage dpo, or why gradients of pairs cannot be had of it."""

    kind: Literal["sigmoid", "hinge", "ipo", "orpo", "simpo"] = "sigmoid"
    beta: float = 0.1  # factor of the margin
    label_smoothing: float = 0.0  # probability that a pair is the wrong way round, under ``sigmoid``
    gamma: float = 0.0  # target margin of ``simpo``
    sft: float = 0.0  # factor of the chosen answer's token-mean loss, which is added
    unknown: str = ""  # why its gradient by pair is not known

    @property
    def compares(self) -> bool:
        """Whether it compares with a reference model."""
        return self.kind not in ("orpo", "simpo")


_PAIR_LOSSES = {"pref_loss": ("sigmoid", "orpo", "simpo"), "loss_type": ("sigmoid", "hinge", "ipo")}
"""By the key of LLaMA-Factory and of TRL. With TRL 0.24 LLaMA-Factory trains sigmoid where hinge or ipo is written."""
_COUPLED = {
    "pref_bco_weight": "the loss has a running mean over the batches, so that a pair's own gradient is not told apart",
    "ld_alpha": "long answers are weighed by position, which gradients by pair do not follow",
    "f_divergence_type": "only the reverse KL divergence is known",
    "use_weighting": "pairs are weighed by the policy",
    "loss_weights": "several losses are added up",
    "reference_free": "the loss is not compared with the reference",
}


def losses_unknown(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield ``key: reason`` for settings of a trainer for preferences under which a pair has no known gradient."""
    for key, known in _PAIR_LOSSES.items():
        if key in settings and settings[key] not in known:
            listed = ", ".join(known)
            yield f"{key}: the gradient of a pair by itself is not known under {settings[key]} (known: {listed})"
    for key, reason in _COUPLED.items():
        if settings.get(key) not in (None, False, 0.0, "reverse_kl"):
            yield f"{key}: {reason}"


@dataclass(frozen=True, kw_only=True)
class WeightedResponse:
    """A response whose gradient counts, as in a policy gradient."""

    prompt: Sequence[int]  # token ids before the response, at least one
    response: Sequence[int]  # token ids of the response, at least one; all are supervised
    weight: float  # factor of the gradient of -log p(response | prompt), summed over the response's tokens
    group: int  # responses of equal group are added up to one vector


@dataclass(frozen=True, kw_only=True)
class GenerationSpec:
    """How the model under training is sampled from; ConfigError for a value out of its range.

    A draw depends on (seed, prompt id, sample, position) only: neither the batch nor the number of ranks changes it.
    """

    max_new_tokens: int = 256  # largest number of tokens of a sample
    temperature: float = 1.0  # logits are divided by it; 0 takes the likeliest token
    top_p: float = 1.0  # keep the smallest set of tokens whose probabilities reach this sum; 1 keeps all
    top_k: int = 0  # keep this number of likeliest tokens; 0 keeps all
    num_samples: int = 1  # per prompt
    seed: int = 0

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("num_samples", 1 <= self.num_samples < 2**20, "between 1 and 1,048,575"),
        )
        problems = [
            f"{name}: must be {wanted}, found {getattr(self, name)!r}" for name, holds, wanted in rules if not holds
        ]
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One sample."""

    prompt: int  # position of its prompt in the list asked for
    sample: int  # 0 .. num_samples - 1
    token_ids: tuple[int, ...]  # generated tokens, the end-of-sequence token included where it was reached
    text: str  # the tokens as text, without special tokens
    finished: bool  # whether it ended by itself, and was not cut off at max_new_tokens


@dataclass(frozen=True, kw_only=True)
class EmbeddingSpec:
    """How hidden states become one vector.

    ``layer`` is the index into the hidden states: 0 is the output of the token embedding, k the output of layer k, -1
    the last one after the final norm, as in ``output_hidden_states``. ``pooling`` takes the ``last`` token, the
    ``first`` (as [CLS] of BERT-like encoders), the ``mean`` over tokens, or the ``weighted_mean`` with
    w_t = t / sum(t), t = 1, 2, ... over the pooled tokens (RDS+, arXiv 2503.01807; ADAPT, arXiv 2605.05227).

    Raises:
        ConfigError: Unknown pooling, or a layer that is not an integer.
    """

    layer: int = -1
    pooling: Pooling = "weighted_mean"
    completion_only: bool = False  # pool the supervised tokens only (label not -100); t then counts those tokens
    normalize: bool = True  # divide by the L2 norm; a zero vector stays zero
    encoder: str | None = None  # folder or hub id of another model, which reads the rows' text

    def __post_init__(self) -> None:
        known = get_args(Pooling)
        problems = []
        if self.pooling not in known:
            problems.append(f"pooling: unknown {self.pooling!r}{did_you_mean(self.pooling, known)} (known: {known})")
        if not isinstance(self.layer, int) or isinstance(self.layer, bool):
            problems.append(f"layer: expected an integer (-1 is the last layer), found {self.layer!r}")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class LogitSpec:
    """Which logits are summed up, and in how many numbers."""

    tokens: Literal["completion", "all"] = "completion"  # positions that predict a supervised token, or all but padding
    per_length: bool = False  # divide logits, and so norm and sketch, by the square root of the number of positions
    rows: int = 8  # size of the sketch over positions
    columns: int = 128  # size of the sketch over the vocabulary
    seed: int = 0  # of the sketch


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """A random direction that parameters move along."""

    seed: int  # of the directions
    direction: int  # its number; the same for training and target rows
    epsilon: float  # step, of either sign
    parameters: str | None = None  # regular expression of the names of trainable parameters that move; None: all


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A low-rank probe and how it is trained."""

    towards: str  # name of the target
    depth_steps: int  # number of optimizer steps of the probe, each over the whole target
    learning_rate: float  # of the probe's AdamW
    rank: int  # of the probe's matrices
    alpha: float  # the probe's output is multiplied by alpha / rank
