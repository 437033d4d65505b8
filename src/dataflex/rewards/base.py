"""What a reward is given and what it returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataFlexError

_SHOWN = 3


class RewardError(DataFlexError):
    """Answers could not be graded."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An answer to be graded."""

    prompt: str  # the prompt as text, without special tokens
    answer: str  # what the model wrote
    reference: str  # the answer in the data


@dataclass(frozen=True, kw_only=True)
class Grades:
    """Rewards of candidates."""

    values: NDArray[np.float64]  # float64 [n], NaN for a candidate without a reward
    problems: tuple[str, ...] = ()  # the reason for each NaN, one line each

    def why(self) -> str:
        """Return the most frequent problems in one line."""
        counts = Counter(self.problems).most_common(_SHOWN)
        more = len(set(self.problems)) - len(counts)
        told = "; ".join(f"{problem} ({count} times)" if count > 1 else problem for problem, count in counts)
        return told + (f"; and {more} others" if more > 0 else "")


Reward = Callable[[Sequence[Candidate]], Grades]
"""Grades candidates, in their order. A candidate that cannot be graded is a problem of its grades, not an error."""


def graded(found: Sequence[object]) -> Grades:
    """Turn the result of each candidate into grades.

    Args:
        found: For each candidate a number, or an exception or a text with the reason why there is none. A number
            that is not finite is a problem too.
    """
    values, problems = np.full(len(found), np.nan), []
    for place, one in enumerate(found):
        if isinstance(one, Exception):
            problems.append(f"{type(one).__name__}: {_last_line(one)}")
            continue
        if isinstance(one, str):
            problems.append(_last_line(one))
            continue
        try:
            number = float(one)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            problems.append(f"the reward is {_last_line(repr(one))}, not a number")
            continue
        if np.isfinite(number):
            values[place] = number
        else:
            problems.append(f"the reward is {number}")
    return Grades(values=values, problems=tuple(problems))


def _last_line(text: object) -> str:
    return (str(text).strip().splitlines() or [""])[-1][:200]
