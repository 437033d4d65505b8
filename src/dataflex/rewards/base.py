"""What a reward is given and gives back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataFlexError

_SHOWN = 3


class RewardError(DataFlexError):
    """Answers could not be graded."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An answer to be graded.

    Attributes:
        prompt: The prompt as text, without special tokens.
        answer: What the model wrote.
        reference: The answer in the data.
    """

    prompt: str
    answer: str
    reference: str


@dataclass(frozen=True, kw_only=True)
class Grades:
    """Rewards of candidates.

    Attributes:
        values: float64 [n], NaN where there is none.
        problems: Why there is none, one line each, for as many as there are.
    """

    values: NDArray[np.float64]
    problems: tuple[str, ...] = ()

    def why(self) -> str:
        """Return the most frequent problems in one line."""
        counts = Counter(self.problems).most_common(_SHOWN)
        more = len(set(self.problems)) - len(counts)
        told = "; ".join(f"{problem} ({count} times)" if count > 1 else problem for problem, count in counts)
        return told + (f"; and {more} others" if more > 0 else "")


class Reward(Protocol):
    """Grades candidates; one that cannot be graded is a problem, not an error."""

    def grade(self, candidates: Sequence[Candidate]) -> Grades:
        """Return one reward per candidate, in their order."""
        ...


def graded(found: Sequence[object]) -> Grades:
    """Turn what a reward said of each candidate into grades.

    Args:
        found: A number, or an exception or a text that says why there is none. Numbers that are not finite
            are problems too.
    """
    values, problems = np.full(len(found), np.nan), []
    for place, one in enumerate(found):
        if isinstance(one, Exception):
            problems.append(f"{type(one).__name__}: {_line(one)}")
        elif isinstance(one, str):
            problems.append(_line(one))
        else:
            number = _number(one)
            if number is None:
                problems.append(f"the reward is {_line(repr(one))}, not a number")
            elif not np.isfinite(number):
                problems.append(f"the reward is {number}")
            else:
                values[place] = number
    return Grades(values=values, problems=tuple(problems))


def _number(value: object) -> float | None:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None


def _line(text: object) -> str:
    lines = str(text).strip().splitlines()
    return lines[-1][:200] if lines else ""
