"""Rewards by comparison with the reference: exact match and F1 over words as in SQuAD, ROUGE by rouge-score."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dataflex.errors import ConfigError
from dataflex.rewards.base import Candidate, Grades, graded

__all__ = ["METRICS", "Metric", "exact_match", "f1", "metric", "normalised"]

METRICS: tuple[str, ...] = ("exact_match", "f1", "rouge1", "rouge2", "rougeL")
"""Names of metrics; all are between 0 and 1."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return a text as SQuAD compares them: lower case, no punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, reference: str) -> float:
    """Return 1 if the normalised texts are equal, else 0."""
    return float(normalised(answer) == normalised(reference))


def f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over normalised words; two empty texts agree."""
    ours, theirs = normalised(answer).split(), normalised(reference).split()
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
