"""Every error that DataFlex raises on purpose.

A ``DataFlexError`` is a mistake of the user or of the surroundings: the command line prints its
text without a stack trace and exits with 2. Anything else that escapes is a defect of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence


class DataFlexError(Exception):
    """Base of all errors that are told to the user as plain text."""


class ConfigError(DataFlexError):
    """One or more problems of a configuration, told together.

    Args:
        problems: One line per problem, each beginning with the path of the key.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ComponentError(DataFlexError):
    """A method broke its contract (rows out of the pool, negative weights, NaN scores, ...)."""


class DataError(DataFlexError):
    """The data cannot serve the run: missing, empty, fully masked, or not what was planned for."""


class UnsupportedError(DataFlexError):
    """A combination that cannot work, with the reason."""


class CheckpointError(DataFlexError):
    """A checkpoint is broken, foreign, or belongs to another run."""


class AgreementError(DataFlexError):
    """Ranks that must agree do not."""


def without_loss(what: str, *, labelled: bool) -> DataError:
    """Return what is told where no row of ``what`` has a finite loss; ``labelled``: some have supervised tokens."""
    why = (
        "the model has diverged, lower the learning_rate"
        if labelled
        else "none of them has a supervised token; check that rows hold text, and that cutoff_len leaves room for the "
        "response"
    )
    return DataError(f"no row of {what} has a finite loss: {why}")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known spelling, or an empty string."""
    match = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, and those that it was raised from, or during."""
    seen: set[int] = set()
    left = [error]
    while left:
        one = left.pop(0)
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            left += [one.__cause__, one.__context__]
