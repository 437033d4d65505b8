"""Keep the rows that share rare words with the targets' rows.

A baseline of "Compute-Constrained Data Selection", ICLR 2025, arXiv 2410.16208, where it is among the best per unit
of compute. Every target row is a query; a row's score for a target is the mean of its BM25 (Okapi) scores over the
target's rows, and the largest over targets counts. The prompt is compared, lower-cased, without punctuation, cut at
white space. Words say what a row is about and nothing about whether its response is right.

The prompt is what the template made of it, so its role names are words too; they are in every row and weigh next to
nothing. ``rule: round_robin`` lets the target's rows (with several targets, the targets) take turns instead; with one
target it holds 4 bytes for each pair of a pool row and a target row.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Card, Context, Requires, Rows, param
from dataflex.select.scoring import Found, ScoringParams, ScoringSelector
from dataflex.select.words import Okapi, Remembered, cut_words, no_words, pool_texts, target_words
from dataflex.signals.kinds import Part


class Bm25(ScoringSelector):
    """Keep the rows that share rare words with the targets' rows."""

    name = "bm25"
    lacking = "no words"
    targets_take_turns = True
    card = Card(
        summary="Keeps the rows whose prompts share rare words with those of the targets' rows (BM25).",
        paper="Compute-Constrained Data Selection, ICLR 2025, arXiv 2410.16208",
        cost="none on the device: words are counted once",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ScoringParams):
        """Parameters of BM25; the defaults are the paper's."""

        part: Part = param("prompt", "what of a row is compared")
        k1: float = param(1.5, "how slowly repeats of a word saturate; 0: only its presence", minimum=0.0)
        b: float = param(0.75, "how much long rows are held back, 0 to 1", minimum=0.0, maximum=1.0)
        epsilon: float = param(0.25, "share of the mean idf for words in more than half of the rows", minimum=0.0)

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        return Requires(signals=frozenset({"texts"}), targets=True)

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self._scores = Remembered(self._mean_and_turns)

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return mean scores over the rows of each target [T, N].

        Raises:
            DataError: The pool, or a target, has no row with a word.
        """
        return self._scores(pool, ctx)[0]

    def examine(self, pool: Rows, ctx: Context) -> Found:
        """Return the scores by target; with one target its rows take turns, each with scores of its own."""
        found = super().examine(pool, ctx)
        return replace(found, turns=self._scores(pool, ctx)[1][:, found.places])

    def _mean_and_turns(self, pool: Rows, ctx: Context) -> tuple[NDArray[np.float64], NDArray[np.floating]]:
        """Return mean scores by target [T, N] and scores of those that take turns [Q, N]."""
        p = self.params
        targets = target_words(self.name, ctx, p.part, cut_words)
        asked = {word for rows in targets for row in rows for word in row}
        texts = map(cut_words, pool_texts(pool, ctx, p.part))
        index = Okapi(texts, asked, k1=p.k1, b=p.b, epsilon=p.epsilon)
        empty = index.lengths == 0
        if empty.all():
            raise no_words(self.name, len(pool), p.part)
        means = np.stack([index.scores(_mean(rows)) for rows in targets])
        means[:, empty] = np.nan
        if p.rule.name != "round_robin" or len(targets) > 1:
            return means, means
        turns = np.empty((len(targets[0]), len(pool)), dtype=np.float32)
        for j, row in enumerate(targets[0]):
            turns[j] = index.scores(Counter(row))
        turns[:, empty] = np.nan
        return means, turns


def _mean(queries: list[list[str]]) -> dict[str, float]:
    """Return how often each word occurs in a query, on average."""
    counts = Counter(word for query in queries for word in query)
    return {word: count / len(queries) for word, count in counts.items()}
