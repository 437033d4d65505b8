"""What signals and generations are asked for: plain settings without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from dataflex.errors import ConfigError

Pooling = Literal["last", "mean", "weighted_mean", "first"]
Part = Literal["all", "prompt", "completion"]
"""Of a row's tokens: all, those without a label, or the supervised ones (the response)."""


@dataclass(frozen=True, kw_only=True)
class GradientOptions:
    """Which gradients rows are compared by: the options that methods include among their parameters.

    Attributes:
        parameters: Regular expression searched for in parameter names; None: all trainable ones.
        last_blocks: Number of blocks of the model, counted from its end; None: all of them.
        bf16: Run the passes in bfloat16 autocast.
    """

    parameters: str | None = field(
        default=None,
        metadata={"help": "regular expression of parameter names; null: all trainable ones", "pattern": True},
    )
    last_blocks: int | None = field(
        default=None, metadata={"help": "use only the last so many blocks of the model", "minimum": 1}
    )
    bf16: bool = field(default=False, metadata={"help": "run the gradient passes in bfloat16"})

    def options(self, **more: Any) -> dict[str, Any]:
        """Return fields of a gradient signal: what is said here by the names of ``GradientSpec``, and ``more``."""
        known = {one.name for one in fields(GradientSpec)}
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name in known} | more


@dataclass(frozen=True, kw_only=True)
class InfluenceOptions(GradientOptions):
    """How rows' gradients are compared with those of targets, as in LESS.

    Attributes:
        precondition: As in ``GradientSpec``.
        include_momentum: As in ``GradientSpec``.
        target_gradient: Whether a score is the mean of the cosines with a target's rows, or the cosine with their
            mean gradient.
        sketch_size: As in ``GradientSpec``.
    """

    precondition: Literal["true_adam", "paper_repo", "sign", "none"] = field(
        default="true_adam", metadata={"help": "what turns training gradients into directions"}
    )
    include_momentum: bool = field(default=True, metadata={"help": "keep Adam's momentum term"})
    target_gradient: Literal["mean_of_cosines", "cosine_of_mean"] = field(
        default="mean_of_cosines",
        metadata={"help": "every target row counts alike, or by the length of its gradient (in one pass less)"},
    )
    sketch_size: int | None = field(
        default=None, metadata={"help": "compare sparse sketches of this size; null: exact", "minimum": 2}
    )

    def target_passes(self, normalize: bool = True) -> tuple[float, float]:
        """Return the passes (F, B) over a target: unit gradients take one for the norms and one for the sum."""
        times = 2.0 if normalize and self.target_gradient == "mean_of_cosines" else 1.0
        return times, times

    def options(self, **more: Any) -> dict[str, Any]:  # noqa: D102
        return super().options(**{"mean_of_cosines": self.target_gradient == "mean_of_cosines", **more})


@dataclass(frozen=True, kw_only=True)
class GradientSpec(GradientOptions):
    """Which gradients of rows are looked at, and how they are compared.

    Attributes:
        precondition: Preset of ``signals.gradients.PRESETS`` for training rows: ``true_adam``, ``paper_repo``
            (LESS's code: eps inside the root, no bias correction), ``adam_scale`` (second moment as it is, OPUS),
            ``sign`` or ``none``. Target rows stay plain.
        include_momentum: Keep Adam's momentum term, which all rows share.
        normalize: Whether scores are cosines rather than inner products.
        mean_of_cosines: Whether a target's score is the mean over its rows of the cosines (LESS's code),
            or the cosine with its mean gradient (the paper's text).
        sketch_size: Compare sketches of this size instead of exact gradients; None: exact.
        sketch_seed: Seed of the sketch.
        forward_mode: Take ``GradientScores`` by forward-mode differentiation along the targets' mean gradients:
            plain inner products only (``precondition: none``, no ``normalize``), without per-row gradients.
    """

    precondition: str = "true_adam"
    include_momentum: bool = True
    normalize: bool = True
    mean_of_cosines: bool = True
    sketch_size: int | None = None
    sketch_seed: int = 0
    forward_mode: bool = False


@dataclass(frozen=True, kw_only=True)
class WeightedResponse:
    """A response whose gradient counts, as in a policy gradient.

    Attributes:
        prompt: Token ids before the response, at least one.
        response: Token ids of the response, at least one; all are supervised.
        weight: Factor of the gradient of -log p(response | prompt), which is summed over the response's tokens.
        group: Responses of equal group are added up to one vector.
    """

    prompt: Sequence[int]
    response: Sequence[int]
    weight: float
    group: int


@dataclass(frozen=True, kw_only=True)
class GenerationSpec:
    """How the model under training is sampled from.

    Attributes:
        max_new_tokens: Number of tokens generated at most per sample.
        temperature: Logits are divided by it; 0 takes the likeliest token.
        top_p: Smallest set of tokens whose probabilities reach this sum; 1 keeps all.
        top_k: Likeliest tokens kept; 0 keeps all.
        num_samples: Samples per prompt.
        seed: Seed of the draws. A draw depends on (seed, prompt id, sample, position) only: neither the
            batch nor the number of ranks changes it.

    Raises:
        ConfigError: A value out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_samples: int = 1
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
    """One sample.

    Attributes:
        prompt: Position of its prompt in the list asked for.
        sample: 0 .. num_samples - 1.
        token_ids: Generated tokens, the end-of-sequence token included where it was reached.
        text: The tokens as text, special tokens left out.
        finished: True when it ended by itself, False when it was cut off at ``max_new_tokens``.
    """

    prompt: int
    sample: int
    token_ids: tuple[int, ...]
    text: str
    finished: bool
