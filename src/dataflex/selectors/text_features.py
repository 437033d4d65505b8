"""What selectors by words share: texts of the pool and of the targets, and how text is cut into words."""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from dataflex.errors import DataError
from dataflex.method import Context, Rows
from dataflex.signals.specs import Part

__all__ = ["Remembered", "cut_words", "no_words", "pool_texts", "target_words", "word_punct"]

T = TypeVar("T")

_CHUNK_ROWS = 8192
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORD_PUNCT = re.compile(r"\w+|[^\w\s]+")


def cut_words(text: str) -> list[str]:
    """Return the words of a text: lower-cased, punctuation removed, cut at white space."""
    return text.lower().translate(_PUNCTUATION).split()


def word_punct(text: str) -> list[str]:
    """Return runs of letters and digits and runs of punctuation, lower-cased."""
    return _WORD_PUNCT.findall(text.lower())


def pool_texts(pool: Rows, ctx: Context, part: Part) -> Iterator[str]:
    """Yield the text of each pool row; only a part of the pool is held as text."""
    for start in range(0, len(pool), _CHUNK_ROWS):
        yield from ctx.signals.texts(np.asarray(pool[start : start + _CHUNK_ROWS]), part=part)


def target_words(method: str, ctx: Context, part: Part, cut: Callable[[str], list[str]]) -> list[list[list[str]]]:
    """Return the words of each row of each target, rows without any left out.

    Raises:
        DataError: A target has no row with a word in this part.
    """
    found = []
    for target in ctx.targets:
        rows = np.arange(ctx.signals.num_rows(target), dtype=np.int64)
        texts = ctx.signals.texts(rows, target=target, part=part) if len(rows) else []
        words = [row for row in map(cut, texts) if row]
        if not words:
            raise DataError(
                f"{method}: target {target!r} has {len(rows):,} rows, none of which has a word in its {_named(part)} "
                f"to compare with. Give a target data set with text in it{_instead(part)}."
            )
        found.append(words)
    return found


def no_words(method: str, num_rows: int, part: Part) -> DataError:
    """Return the error of a pool in which no row has a word."""
    return DataError(f"{method}: none of {num_rows:,} rows has a word in its {_named(part)}{_instead(part)}.")


def _named(part: Part) -> str:
    return "text" if part == "all" else part


def _instead(part: Part) -> str:
    return "" if part == "all" else ", or set 'part: all'"


class Remembered:
    """The last answer to a question about a pool; words do not change while a model is trained."""

    def __init__(self) -> None:
        self._last: tuple[str, Any] | None = None

    def get(self, pool: Rows, targets: tuple[str, ...], compute: Callable[[], T]) -> T:
        """Return the answer for these rows and targets, computing it unless it is the last one."""
        key = hashlib.blake2b(pool.tobytes() + repr(targets).encode(), digest_size=16).hexdigest()
        if self._last is None or self._last[0] != key:
            self._last = (key, compute())
        answer: T = self._last[1]
        return answer
