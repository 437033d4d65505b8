"""Answers of the model to a target's prompts, and what they are worth."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Context, Rows
from dataflex.rewards.base import Candidate, Grades, Reward, RewardError
from dataflex.signals.kinds import GenerationSpec

__all__ = ["Answered", "ask_and_grade", "usable_prompts"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Graded answers, prompt by prompt.

    Attributes:
        prompts: Token ids of each prompt.
        answers: Token ids of the answers to each prompt.
        rewards: float64 [answers] for each prompt, NaN where an answer could not be graded.
    """

    prompts: tuple[Sequence[int], ...]
    answers: tuple[tuple[Sequence[int], ...], ...]
    rewards: tuple[NDArray[np.float64], ...]

    @property
    def mean(self) -> float:
        """Mean of all rewards."""
        return float(np.nanmean(np.concatenate(self.rewards)))


def usable_prompts(target: str, ctx: Context, max_prompts: int | None) -> Rows:
    """Return the rows of a target that are a prompt and one answer after it, at most ``max_prompts`` drawn from them.

    Raises:
        DataError: There is none.
    """
    rows = np.arange(ctx.signals.num_rows(target), dtype=np.int64)
    whole, prompts, completions = (
        ctx.signals.tokens(rows, target=target, part=part) for part in ("all", "prompt", "completion")
    )
    usable = [
        row
        for row, (every, prompt, completion) in enumerate(zip(whole, prompts, completions, strict=True))
        if len(prompt) and len(completion) and np.array_equal(every, np.concatenate([prompt, completion]))
    ]
    if not usable:
        raise DataError(
            f"nice: target {target!r} has {len(rows):,} rows, none of which is a prompt with one answer after it. "
            "Answers are sampled to prompts: give a data set with both, with 'train_on_prompt: false', and "
            "'mask_history: true' for conversations of several turns."
        )
    if len(usable) < len(rows):
        logger.warning(
            "nice: %d of %d rows of target %s are no prompt with one answer after it and are left out",
            len(rows) - len(usable),
            len(rows),
            target,
        )
    chosen = np.array(usable, dtype=np.int64)
    if max_prompts is not None and max_prompts < len(chosen):
        chosen = np.sort(ctx.rng(f"selector.nice.prompts.{target}").choice(chosen, size=max_prompts, replace=False))
    return chosen


def ask_and_grade(
    reward: Reward,
    target: str,
    ctx: Context,
    spec: GenerationSpec,
    *,
    max_prompts: int | None = None,
    keep_going: bool = True,
) -> Answered:
    """Sample answers to a target's prompts and grade them, on one rank for all.

    Args:
        reward: What grades.
        target: Name of the target.
        ctx: Context of the decision.
        spec: How answers are sampled.
        max_prompts: Prompts at most; None: all.
        keep_going: Leave answers out that cannot be graded, with a warning.

    Raises:
        DataError: The target has no prompt.
        RewardError: No answer could be graded; or some could not, without ``keep_going``.
    """
    rows = usable_prompts(target, ctx, max_prompts)
    prompts = [tokens.tolist() for tokens in ctx.signals.tokens(rows, target=target, part="prompt")]
    texts = ctx.signals.texts(rows, target=target, part="prompt")
    references = ctx.signals.texts(rows, target=target, part="completion")
    made = ctx.signals.generate(prompts, spec, ids=rows)
    candidates = [
        Candidate(prompt=texts[one.prompt], answer=one.text, reference=references[one.prompt]) for one in made
    ]

    def grade() -> Grades:
        found = reward.grade(candidates)
        if len(found.values) != len(candidates):
            raise RewardError(f"reward: graded {len(found.values):,} of {len(candidates):,} answers")
        failed = int(np.isnan(found.values).sum())
        if failed == len(candidates):
            raise RewardError(f"reward: none of {failed:,} answers to target {target!r} could be graded: {found.why()}")
        if failed and not keep_going:
            raise RewardError(
                f"reward: {failed:,} of {len(candidates):,} answers to target {target!r} could not be graded: "
                f"{found.why()}; set on_reward_error: drop to leave them out"
            )
        return found

    grades = ctx.signals.on_one_rank("grading answers", grade)
    failed = int(np.isnan(grades.values).sum())
    if failed:
        logger.warning(
            "nice: %d of %d answers to target %s could not be graded and are left out: %s",
            failed,
            len(candidates),
            target,
            grades.why(),
        )
    size = spec.num_samples
    return Answered(
        prompts=tuple(prompts),
        answers=tuple(tuple(one.token_ids for one in made[i * size : (i + 1) * size]) for i in range(len(prompts))),
        rewards=tuple(grades.values[i * size : (i + 1) * size] for i in range(len(prompts))),
    )
