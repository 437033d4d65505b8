"""What signals and generations are asked for: plain settings without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from dataflex.errors import ConfigError
from dataflex.method import param

Pooling = Literal["last", "mean", "weighted_mean", "first"]
Part = Literal["all", "prompt", "completion"]
"""Of a row's tokens: all, those without a label, or the supervised ones (the response)."""


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
    plain.
    """

    precondition: str = "true_adam"
    include_momentum: bool = True  # keep Adam's momentum term, which all rows share
    normalize: bool = True  # scores are cosines rather than inner products
    mean_of_cosines: bool = True  # with a target's rows (LESS's code); else the cosine with their mean gradient (paper)
    sketch_size: int | None = None  # compare sketches of this size; None: exact gradients
    sketch_seed: int = 0
    forward_mode: bool = False  # GradientScores as derivatives along mean gradients: plain inner products only


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
