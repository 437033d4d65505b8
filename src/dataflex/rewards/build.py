"""From what a configuration says to a reward."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dataflex.errors import ConfigError, did_you_mean
from dataflex.rewards.base import Candidate, Grades, Reward, graded
from dataflex.rewards.command import CommandReward
from dataflex.rewards.function import FunctionReward, load_function, missing_source
from dataflex.rewards.judge import Judge, JudgeConfig

__all__ = ["METRICS", "Metric", "build_reward", "exact_match", "f1", "metric", "normalized", "reward_problem"]

METRICS: tuple[str, ...] = ("exact_match", "f1", "rouge1", "rouge2", "rougeL")
"""Names of metrics; all are between 0 and 1."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Return a text as SQuAD compares them: lower case, no punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, reference: str) -> float:
    """Return 1 if the normalized texts are equal, else 0."""
    return float(normalized(answer) == normalized(reference))


def f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over normalized words; two empty texts agree."""
    ours, theirs = normalized(answer).split(), normalized(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2.0 * common / (len(ours) + len(theirs))


def metric(name: str) -> Metric:
    """Return a metric by name.

    Raises:
        ConfigError: ROUGE, and rouge-score is not installed.
    """
    if name == "exact_match":
        return Metric(compare=exact_match)
    if name == "f1":
        return Metric(compare=f1)
    assert name in METRICS, name
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError(
            f"dynamic.selector.reward: {name} needs rouge-score, which is not installed; install the extra: "
            "pip install 'dataflex[rewards]'"
        ) from error
    scorer = RougeScorer([name], use_stemmer=True)
    return Metric(compare=lambda answer, reference: float(scorer.score(reference, answer)[name].fmeasure))


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A reward that compares an answer with its reference.

    Attributes:
        compare: Answer and reference to a number.
    """

    compare: Callable[[str, str], float]

    def grade(self, candidates: Sequence[Candidate]) -> Grades:
        """Return one number per candidate."""
        return graded([self.compare(one.answer, one.reference) for one in candidates])


_OTHERS = ("command", "judge")


def reward_problem(reward: str, command: str | None, judge: JudgeConfig | None) -> str:
    """Return what is wrong with a reward's configuration, beginning with the key, or ""; nothing is imported."""
    for name, given in (("command", command), ("judge", judge)):
        if reward == name and given is None:
            return f"{name}: missing; 'reward: {name}' needs it"
        if reward != name and given is not None:
            return f"{name}: has no effect with 'reward: {reward}'; write 'reward: {name}' or remove it"
    if reward in METRICS or reward in _OTHERS:
        return ""
    if ":" in reward:
        problem = missing_source(reward)
        return f"reward: {problem}" if problem else ""
    known = [*METRICS, *_OTHERS]
    return (
        f"reward: unknown {reward!r}{did_you_mean(reward, known)} (known: {', '.join(known)}, or a function as "
        "module:function or file.py:function)"
    )


def build_reward(reward: str, command: str | None, judge: JudgeConfig | None, timeout_seconds: float) -> Reward:
    """Return the reward.

    Args:
        reward: Name of a metric, ``command``, ``judge``, or ``module:function`` or ``file.py:function``.
        command: For ``command``.
        judge: For ``judge``.
        timeout_seconds: Of a function's call, or a command's silence.

    Raises:
        ConfigError: A function or command cannot be had, a library or the judge's key is missing.
    """
    if reward in METRICS:
        return metric(reward)
    if reward == "command":
        assert command is not None
        return CommandReward(command=command, timeout_seconds=timeout_seconds)
    if reward == "judge":
        assert judge is not None
        return Judge(judge)
    return FunctionReward(function=load_function(reward), timeout_seconds=timeout_seconds)
