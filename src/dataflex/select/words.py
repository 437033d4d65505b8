"""Search by words: texts cut into words, and BM25 (Okapi) scores of documents for bags of query words."""

from __future__ import annotations

import re
import string
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from functools import cache
from itertools import pairwise
from typing import Generic, TypeVar
from unicodedata import category

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Context, Rows
from dataflex.signals.specs import Part
from dataflex.state import blake2b

T = TypeVar("T")

_CHUNK_ROWS = 8192
# Signs of scripts without spaces, and full-width ones, part words.
_SIGNS = [one for one in map(chr, (*range(0x3000, 0x3040), 0x30FB, *range(0xFF00, 0xFFF0))) if category(one)[0] in "PS"]
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, "") | dict.fromkeys(_SIGNS, " "))
# Han and kana; Thai, Lao, Burmese and Khmer; and the marks on a letter, which are no letters.
_EAST = (
    "\u3005\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_SOUTH = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_UNSPACED = re.compile(rf"[{_EAST}{_SOUTH}](?<=\w)(?:[\u3099\u309a{_SOUTH}](?<!\w))*")
_NAMED: dict[Part, str] = {"all": "text", "prompt": "prompt", "completion": "response"}
_INSTEAD = {part: "" if part == "all" else ", or set 'part: all'" for part in _NAMED}


def spaced(text: str) -> str:
    """Return a text in which each character of a script without spaces (Han, kana, Thai) is a word; others stay."""
    return text if text.isascii() else _UNSPACED.sub(r" \g<0> ", text)


@cache
def signs_within_words() -> str:
    """Return what goes on with a word and is no letter, for a class of ``re``: vowel signs, accents, joiners."""
    signs = [code for code in range(0x300, 0x1F000) if category(chr(code))[0] == "M"]
    breaks = [0, *(i for i in range(1, len(signs)) if signs[i] != signs[i - 1] + 1), len(signs)]
    spans = ((signs[start], signs[stop - 1]) for start, stop in pairwise(breaks))
    return "\u200c\u200d" + "".join(f"{chr(first)}-{chr(last)}" for first, last in spans)


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return what matches words, and words and runs of punctuation."""
    word = rf"\w[\w{signs_within_words()}]*"
    return re.compile(word), re.compile(rf"{word}|[^\w\s]+")


def cut_words(text: str) -> list[str]:
    """Return the words of a text: lower-cased, ``spaced``, punctuation removed, cut at white space."""
    return spaced(text.lower()).translate(_PUNCTUATION).split()


def letter_runs(text: str) -> list[str]:
    """Return runs of letters and digits with the signs on them, lower-cased and ``spaced``."""
    return _patterns()[0].findall(spaced(text.lower()))


def word_punct(text: str) -> list[str]:
    """Return the same and runs of punctuation."""
    return _patterns()[1].findall(spaced(text.lower()))


def pool_texts(pool: Rows, ctx: Context, part: Part) -> Iterator[str]:
    """Yield the text of each pool row; only a part of the pool is held as text."""
    for start in range(0, len(pool), _CHUNK_ROWS):
        yield from ctx.signals.texts(np.asarray(pool[start : start + _CHUNK_ROWS]), part=part)


def target_words(method: str, ctx: Context, part: Part, cut: Callable[[str], list[str]]) -> list[list[list[str]]]:
    """Return the words of each row of each target, rows without any left out; DataError where none is left."""
    found = []
    for target in ctx.targets:
        rows = np.arange(ctx.signals.num_rows(target), dtype=np.int64)
        texts = ctx.signals.texts(rows, target=target, part=part) if len(rows) else []
        words = [row for row in map(cut, texts) if row]
        if not words:
            raise DataError(
                f"{method}: target {target!r} has {len(rows):,} rows, none of which has a word in its {_NAMED[part]} "
                f"to compare with. Give a target data set with text in it{_INSTEAD[part]}."
            )
        found.append(words)
    return found


def no_words(method: str, num_rows: int, part: Part) -> DataError:
    """Return the error of a pool in which no row has a word."""
    return DataError(f"{method}: none of {num_rows:,} rows has a word in its {_NAMED[part]}{_INSTEAD[part]}.")


class Remembered(Generic[T]):
    """A function of the pool and the targets that keeps its last answer: words do not change during training."""

    def __init__(self, compute: Callable[[Rows, Context], T]) -> None:
        self._compute = compute
        self._last: tuple[bytes, T] | None = None

    def __call__(self, pool: Rows, ctx: Context) -> T:
        """Return the answer for these rows and targets."""
        key = blake2b(pool.tobytes(), repr(ctx.targets).encode())
        if self._last is None or self._last[0] != key:
            self._last = (key, self._compute(pool, ctx))
        return self._last[1]


class Okapi:
    """An index of documents by the words that will be asked for; BM25 scores, exact.

    For a word w in a document of length L: idf(w) tf (k1 + 1) / (tf + k1 (1 - b + b L / mean L)), with
    idf(w) = ln(N - df + 0.5) - ln(df + 0.5), summed over the words of the query. A negative idf (a word in more than
    half of the documents) becomes ``epsilon`` times the mean idf of all words, as the rank-bm25 library has it.
    Scores are linear in the query's counts, so the mean over many queries costs as much as one.

    ``documents`` are the words of each, read once; ``asked`` the words that queries may hold, others are counted but
    not indexed. ``lengths`` are the numbers of words [N], ``idf`` that of every asked word that occurs.
    """

    def __init__(
        self,
        documents: Iterable[list[str]],
        asked: Set[str],
        *,
        k1: float = 1.5,
        b: float = 0.75,
        epsilon: float = 0.25,
    ) -> None:
        frequencies: Counter[str] = Counter()
        met: defaultdict[str, tuple[array[int], array[int]]] = defaultdict(lambda: (array("i"), array("i")))
        lengths = array("q")
        for place, document in enumerate(documents):
            found = Counter(document)
            frequencies.update(found.keys())
            lengths.append(len(document))
            for word in found.keys() & asked:
                places, counts = met[word]
                places.append(place)
                counts.append(found[word])
        self.lengths = np.array(lengths, dtype=np.int64)
        odds = {word: (len(lengths) - df + 0.5, df + 0.5) for word, df in frequencies.items()}
        values = {word: float(np.log(without) - np.log(with_it)) for word, (without, with_it) in odds.items()}
        floor = epsilon * sum(values.values()) / len(values) if values else 0.0
        self.idf = {word: values[word] if values[word] >= 0 else floor for word in met}
        mean = self.lengths.mean() if len(lengths) and self.lengths.any() else 1.0
        self._values: dict[str, tuple[NDArray[np.int32], NDArray[np.float64]]] = {}
        while met:
            word, (places, counts) = met.popitem()
            at, tf = np.array(places, dtype=np.int32), np.array(counts, dtype=np.float64)
            norm = k1 * (1 - b + b * self.lengths[at] / mean)
            self._values[word] = at, self.idf[word] * tf * (k1 + 1) / (tf + norm)

    def scores(self, query: Mapping[str, float]) -> NDArray[np.float64]:
        """Return the score of each document [N] for a bag of words: how often each occurs, fractions allowed."""
        total = np.zeros(len(self.lengths), dtype=np.float64)
        for word, count in query.items():
            if word in self._values:
                places, values = self._values[word]
                total[places] += count * values  # a word meets a document once
        return total
