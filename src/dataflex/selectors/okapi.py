"""BM25 (Okapi) scores of documents for bags of query words, exact, by numpy.

For a word w in a document of length L: idf(w) tf (k1 + 1) / (tf + k1 (1 - b + b L / mean L)), with
idf(w) = ln(N - df + 0.5) - ln(df + 0.5), summed over the words of the query. A negative idf (a word in more than
half of the documents) becomes ``epsilon`` times the mean idf of all words, as the rank-bm25 library has it.
Scores are linear in the query's counts, so the mean over many queries costs as much as one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set

import numpy as np
from numpy.typing import NDArray

__all__ = ["Okapi"]


class Okapi:
    """An index of documents by the words that will be asked for.

    Args:
        documents: Words of each document, read once.
        asked: Words that queries may hold; others are counted but not indexed.
        k1: How slowly repeats of a word saturate.
        b: How much long documents are held back.
        epsilon: Share of the mean idf that replaces negative ones.

    Attributes:
        lengths: Words of each document [N].
        idf: Of every asked word that occurs.
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
        numbers: dict[str, int] = {}
        words, places, counts, lengths = [], [], [], []
        for place, document in enumerate(documents):
            found = Counter(document)
            frequencies.update(found.keys())
            lengths.append(len(document))
            for word in found.keys() & asked:
                words.append(numbers.setdefault(word, len(numbers)))
                places.append(place)
                counts.append(found[word])
        self.lengths = np.array(lengths, dtype=np.int64)
        self._numbers = numbers
        values = {word: _idf(len(lengths), df) for word, df in frequencies.items()}
        floor = epsilon * sum(values.values()) / len(values) if values else 0.0
        self.idf = {word: values[word] if values[word] >= 0 else floor for word in numbers}

        order = np.argsort(np.array(words, dtype=np.int64), kind="stable")
        self._places = np.array(places, dtype=np.int32)[order]
        tf = np.array(counts, dtype=np.float64)[order]
        number = np.array(words, dtype=np.int64)[order]
        idf = np.array([self.idf[word] for word in numbers], dtype=np.float64)
        mean = self.lengths.mean() if len(lengths) and self.lengths.any() else 1.0
        norm = k1 * (1 - b + b * self.lengths[self._places] / mean)
        self._values = idf[number] * tf * (k1 + 1) / (tf + norm) if len(tf) else tf
        self._bounds = np.searchsorted(number, np.arange(len(numbers) + 1))

    def scores(self, query: Mapping[str, float]) -> NDArray[np.float64]:
        """Return the score of each document [N] for a bag of words: how often each occurs, fractions allowed."""
        total = np.zeros(len(self.lengths), dtype=np.float64)
        for word, count in query.items():
            if word in self._numbers:
                number = self._numbers[word]
                part = slice(self._bounds[number], self._bounds[number + 1])
                total[self._places[part]] += count * self._values[part]  # a word meets a document once
        return total


def _idf(num_documents: int, frequency: int) -> float:
    return float(np.log(num_documents - frequency + 0.5) - np.log(frequency + 0.5))
