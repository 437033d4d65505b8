"""Keep the rows with the largest influence on the expected reward of responses to the targets' prompts.

"NICE Data Selection for Instruction Tuning in LLMs with Non-differentiable Evaluation Metric", ICML 2025 (OpenReview
2wt8m5HUBs). It is LESS (arXiv 2402.04333) with a policy gradient in the place of the target's loss: responses y_i are
sampled from the model under training for each prompt x, graded by any reward r_i, and the prompt's gradient is

    1 / n  sum_i (r_i - b_i) grad(-log p(y_i | x)),    b_i the mean of the other responses' rewards,

log p summed over the response's tokens, its end included. This is the gradient of -E[r], so that rows of positive
cosine raise the reward. Training gradients go through Adam as in LESS; scores are the mean of the cosines over a
task's prompts, exact, without the random projection.

Other than in the paper, there is a leave-one-out baseline b (``baseline: none`` is as published), without which a
reward that is always positive just makes the model imitate itself; responses are sampled at temperature 1 from all
tokens, since gradients are taken there; and there is one checkpoint, that of the run, instead of four. Prompts whose
responses all have the same reward say nothing and are left out, with a warning for a task without any other; without
any task, rows are drawn uniformly for the interval, with a warning, unless ``without_signal: error``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Card, Context, Problem, Requires, Rows, RunFacts, Selection, param
from dataflex.rewards.base import Candidate, Grades, RewardError
from dataflex.rewards.build import build_reward, reward_problem
from dataflex.rewards.judge import JudgeConfig
from dataflex.rng import uniforms
from dataflex.select.choose import top_k
from dataflex.select.scoring import Found, NoSignal, ScoringParams, ScoringSelector
from dataflex.selectors._lib import GRADIENTS
from dataflex.signals.kinds import ResponseGradientScores
from dataflex.signals.specs import Generation, GenerationSpec, InfluenceOptions, WeightedResponse

logger = logging.getLogger(__name__)


def usable_prompts(target: str, ctx: Context, max_prompts: int | None) -> Rows:
    """Return at most ``max_prompts`` rows of a target that are a prompt and one response; DataError without any."""
    rows = np.arange(ctx.signals.num_rows(target), dtype=np.int64)
    whole, prompts, responses = (
        ctx.signals.tokens(rows, target=target, part=part) for part in ("all", "prompt", "completion")
    )
    usable = [
        row
        for row, (every, prompt, response) in enumerate(zip(whole, prompts, responses, strict=True))
        if len(prompt) and len(response) and np.array_equal(every, np.concatenate([prompt, response]))
    ]
    if not usable:
        raise DataError(
            f"nice: target {target!r} has {len(rows):,} rows, none of which is a prompt with one response after it. "
            "Responses are sampled to prompts: give a data set with both, with 'train_on_prompt: false', and "
            "'mask_history: true' for conversations of several turns."
        )
    if left_out := len(rows) - len(usable):
        told = "nice: %d of %d rows of target %s are no prompt with one response after it and are left out"
        logger.warning(told, left_out, len(rows), target)
    chosen = np.array(usable, dtype=np.int64)
    if max_prompts is not None and max_prompts < len(chosen):
        chosen = np.sort(ctx.rng(f"selector.nice.prompts.{target}").choice(chosen, size=max_prompts, replace=False))
    return chosen


def advantages(
    rewards: NDArray[np.floating], *, baseline: Literal["leave_one_out", "none"], standardize: bool
) -> NDArray[np.float64]:
    """Return r - b of the responses to one prompt [n], NaN where there is no reward, which counts for nothing.

    With ``leave_one_out`` b_i is the mean of the other rewards, and r - b is 0 for a single response. ``standardize``
    divides by the standard deviation of the rewards + 1e-6.
    """
    values = np.asarray(rewards, dtype=np.float64)
    known = np.isfinite(values)
    count = int(known.sum())
    result = np.full(len(values), np.nan)
    if not count:
        return result
    own = values[known]
    if baseline == "leave_one_out":
        # Equal rewards must give exact zeros, which a mean of floats need not.
        equal = count == 1 or own.min() == own.max()
        result[known] = 0.0 if equal else (own - own.mean()) * (count / (count - 1))
    else:
        result[known] = own
    return result / (own.std() + 1e-6) if standardize else result


class Nice(ScoringSelector):
    """Keep the rows with the largest influence on the expected reward of responses to the targets' prompts."""

    name = "nice"
    lacking = "no supervised token"
    card = Card(
        summary="Keeps the rows whose optimizer step raises the reward of the model's responses to the targets.",
        paper="NICE, ICML 2025 (OpenReview 2wt8m5HUBs), after LESS, arXiv 2402.04333",
        cost="1 F + 1 B over the pool; 20 responses to each target prompt: generated, graded, and 1 F + 1 B each",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(InfluenceOptions, ScoringParams):
        reward: str = param(
            help="exact_match, f1, rouge1, rouge2, rougeL, command, judge, module:function or file.py:function"
        )
        command: str | None = param(None, "for reward: command; reads JSON lines, writes one reward per line")
        judge: JudgeConfig | None = param(None, "for reward: judge; an OpenAI-compatible server (url, model, ...)")
        reward_timeout_seconds: float = param(30.0, "longest call of a function, or silence of a command", above=0.0)
        on_reward_error: Literal["drop", "raise"] = param("drop", "leave ungraded responses out, or end the run")
        without_signal: Literal["random", "error"] = param(
            "random", "where all rewards are equal: draw, or end the run"
        )
        samples: int = param(20, "number of responses to each prompt", minimum=1)
        max_new_tokens: int = param(300, "largest number of tokens of a response", minimum=1)
        temperature: float = param(1.0, "of sampling; 1 keeps gradients unbiased", above=0.0)
        top_p: float = param(1.0, "nucleus of sampling; 1 keeps all tokens", above=0.0, maximum=1.0)
        top_k: int = param(0, "likeliest tokens of sampling; 0 keeps all", minimum=0)
        max_prompts: int | None = param(None, "number of prompts of a target in an interval; null: all", minimum=1)
        baseline: Literal["leave_one_out", "none"] = param("leave_one_out", "subtracted: the others' mean reward, or 0")
        standardize: bool = param(False, "divide a prompt's advantages by the deviation of its rewards")
        token_reduction: Literal["sum", "mean"] = param("sum", "of log p over a response's tokens")

        def __post_init__(self) -> None:
            if problem := reward_problem(self.reward, self.command, self.judge):
                raise ValueError(problem)
            if self.baseline == "leave_one_out" and self.samples < 2:
                raise ValueError("samples: the baseline leave_one_out needs at least 2 responses to a prompt, found 1")

    params: Params

    def requires(self) -> Requires:
        preconditions = {"precondition": self.params.precondition}
        signals = frozenset({"generate", "gradients", "texts"})
        return replace(GRADIENTS, signals=signals, stages=("sft",), preconditions=preconditions)

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self._reward = build_reward(params.reward, params.command, params.judge, params.reward_timeout_seconds)

    def check(self, run: RunFacts) -> Iterator[Problem]:
        """Yield why the parts cannot work together, and a judge whose key is not in the environment."""
        yield from super().check(run)
        name = None if self.params.judge is None else self.params.judge.api_key_env
        if name is not None and run.total_steps is not None and not os.environ.get(name, "").strip():
            yield Problem("judge.api_key_env", f"the environment variable {name!r} is not set")

    def examine(self, pool: Rows, ctx: Context) -> Found:
        """As any scoring selector, with the targets that the scores are of.

        NoSignal: all responses to each prompt have the same reward. DataError: a target has no prompt. RewardError: no
        response could be graded, or one could not and ``on_reward_error`` is ``raise``.
        """
        return replace(super().examine(pool, ctx), of=self._of)

    def without_signal(self, error: NoSignal, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Draw rows uniformly, without scores; DataError where ``without_signal`` is ``error``."""
        if self.params.without_signal == "error":
            told = f"nice: {error}, so that no row can be preferred; set without_signal: random to go on"
            raise DataError(told) from error
        logger.warning("nice: %s; rows are drawn uniformly until the next decision", error)
        drawn = pool[top_k(uniforms(ctx.seed, "selector.nice.random", ctx.interval.index, pool), budget)]
        return Selection(rows=drawn, reason=f"{len(drawn)} rows drawn uniformly: {error}")

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.floating]:
        """Return influence on the reward [T, N], of the targets whose responses have several rewards."""
        weighted, means = {}, []
        for number, target in enumerate(ctx.targets):
            prompts, made, rewards = self._graded(target, number, ctx)
            weighted[target] = self._weighted(prompts, made, rewards)
            means.append(f"{target} {float(np.nanmean(rewards)):.4g}")
        told = ", ".join(means)
        tasks = {target: responses for target, responses in weighted.items() if responses}
        if not tasks:
            raise NoSignal(f"all responses to each prompt have the same reward (mean reward: {told})")
        self._of = tuple(place for place, target in enumerate(ctx.targets) if target in tasks)
        silent = ", ".join(target for target in weighted if target not in tasks)
        if silent:
            logger.warning(
                "nice: all responses to each prompt of target %s have the same reward (mean reward: %s), so it is left "
                "out of this decision. More samples, or a reward with finer steps, would help",
                silent,
                told,
            )
        self._told = f"by influence on the reward (mean reward: {told})"
        self._told += f"; without a signal: {silent}" if silent else ""
        signal = ResponseGradientScores(responses=tasks, **self.params.options(sketch_seed=ctx.seed))
        return ctx.signals(signal, pool).T

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return the mean rewards of the decision."""
        return self._told

    def _graded(
        self, target: str, number: int, ctx: Context
    ) -> tuple[list[list[int]], list[Generation], NDArray[np.float64]]:
        """Return a target's prompts, responses sampled to them, and their rewards, NaN where there is none."""
        p = self.params
        rows = usable_prompts(target, ctx, p.max_prompts)
        prompts = [tokens.tolist() for tokens in ctx.signals.tokens(rows, target=target, part="prompt")]
        texts, references = (ctx.signals.texts(rows, target=target, part=part) for part in ("prompt", "completion"))
        spec = GenerationSpec(
            max_new_tokens=p.max_new_tokens,
            temperature=p.temperature,
            top_p=p.top_p,
            top_k=p.top_k,
            num_samples=p.samples,
            seed=int(ctx.rng(f"selector.nice.generate.{number}").integers(2**31)),
        )
        made = ctx.signals.generate(prompts, spec, ids=rows)
        candidates = [
            Candidate(prompt=texts[one.prompt], answer=one.text, reference=references[one.prompt]) for one in made
        ]

        def grade() -> Grades:
            found = self._reward(candidates)
            failed, to = int(np.isnan(found.values).sum()), f"responses to target {target!r}"
            if failed == len(candidates):
                raise RewardError(f"reward: none of {failed:,} {to} could be graded: {found.why()}")
            if failed and p.on_reward_error == "raise":
                raise RewardError(
                    f"reward: {failed:,} of {len(candidates):,} {to} could not be graded: {found.why()}; set "
                    "on_reward_error: drop to leave them out"
                )
            return found

        grades = ctx.signals.on_one_rank("grading responses", grade)
        if failed := int(np.isnan(grades.values).sum()):
            told = "nice: %d of %d responses to target %s could not be graded and are left out: %s"
            logger.warning(told, failed, len(candidates), target, grades.why())
        return prompts, made, grades.values

    def _weighted(
        self, prompts: Sequence[Sequence[int]], made: Sequence[Generation], rewards: NDArray[np.float64]
    ) -> list[WeightedResponse]:
        """Return the responses that count; those of a prompt are one group."""
        p, result = self.params, []
        for group, prompt in enumerate(prompts):
            of_prompt = slice(group * p.samples, (group + 1) * p.samples)
            gains = advantages(rewards[of_prompt], baseline=p.baseline, standardize=p.standardize)
            count = int(np.isfinite(gains).sum())
            for one, gain in zip(made[of_prompt], gains, strict=True):
                if np.isfinite(gain) and gain != 0.0:
                    response = one.token_ids
                    weight = gain / count / (len(response) if p.token_reduction == "mean" else 1)
                    result.append(WeightedResponse(prompt=prompt, response=response, weight=float(weight), group=group))
        return result
