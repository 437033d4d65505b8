"""Rows by their words, without a model: BM25 and DSIR."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError
from dataflex.method import Card, Context, Requires, Rows, param
from dataflex.plan.proportions import carried_counts
from dataflex.select.rules import Rule, choose
from dataflex.select.scoring import RULE, Found, Gives, ScoringParams, ScoringSelector
from dataflex.select.words import Okapi, Remembered, cut_words, no_words, pool_texts, target_words, word_punct
from dataflex.signals.specs import Part

_EPSILON = 1e-8
_BLOCK_ROWS = 8192
_REMEMBERED = 1 << 18  # buckets of n-grams that are kept: text repeats its frequent ones


class Bm25(ScoringSelector):
    """Keep the rows that share rare words with the targets' rows.

    A baseline of "Compute-Constrained Data Selection", ICLR 2025, arXiv 2410.16208, where it is among the best per unit
    of compute. Every target row is a query; a row's score for a target is the mean of its BM25 (Okapi) scores over the
    target's rows, and the largest over targets counts. The prompt is compared, lower-cased, without punctuation, cut at
    white space; each character of a script without spaces (Chinese, Japanese, Thai) is a word. Words say what a row is
    about and nothing about whether its response is right.

    The prompt is what the template made of it, so its role names are words too; they are in every row and weigh next to
    nothing. ``rule: round_robin`` lets the target's rows (with several targets, the targets) take turns instead; with
    one target it holds 4 bytes for each pair of a pool row and a target row.
    """

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
        return Requires(signals=frozenset({"texts"}), targets=True)

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self._scores = Remembered(self._mean_and_turns)

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return mean scores over the rows of each target [T, N]; DataError where it or the pool has no word."""
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


def hasher(buckets: int, ngrams: int) -> Callable[[list[str]], list[int]]:
    """Return a function that gives the bucket of every n-gram of a text's words, by length of n-gram.

    An n-gram is up to ``ngrams`` words joined by single spaces; its bucket is its SHA-256 modulo ``buckets``.
    """

    @lru_cache(maxsize=_REMEMBERED)
    def bucket(gram: str) -> int:
        return int.from_bytes(hashlib.sha256(gram.encode("utf-8")).digest(), "big") % buckets

    def hashed(words: list[str]) -> list[int]:
        runs = (zip(*(words[i:] for i in range(n)), strict=False) for n in range(1, ngrams + 1))
        return [bucket(" ".join(run)) for run in chain.from_iterable(runs)]

    return hashed


@dataclass(frozen=True, kw_only=True)
class Grams:
    """The n-grams of consecutive rows, in two arrays and no object a row."""

    buckets: NDArray[np.unsignedinteger]  # bucket of each n-gram, row after row
    lengths: NDArray[np.int64]  # number of n-grams of each row

    @classmethod
    def blocks(cls, rows: Iterable[list[int]], buckets: int) -> Iterator[Grams]:
        """Yield the n-grams of blocks of rows; ``buckets`` is their number."""
        smallest, rest = np.min_scalar_type(buckets - 1), iter(rows)
        while block := list(islice(rest, _BLOCK_ROWS)):
            lengths = np.array([len(row) for row in block], dtype=np.int64)
            yield cls(buckets=np.fromiter(chain.from_iterable(block), smallest, int(lengths.sum())), lengths=lengths)

    def sums(self, values_TB: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum of values of the buckets over each row's n-grams [T, rows]; rows of one length together."""
        total, starts = np.zeros((len(values_TB), len(self.lengths))), np.cumsum(self.lengths) - self.lengths
        for length in np.unique(self.lengths):
            rows = np.flatnonzero(self.lengths == length)
            total[:, rows] = values_TB[:, self.buckets[starts[rows, None] + np.arange(length)]].sum(axis=2)
        return total


def drawn_ratios(counts: NDArray[np.int64], p_pool: NDArray[np.float64], smoothing: float) -> NDArray[np.float64]:
    """Return log (c + smoothing) / (n p_r + smoothing) of each bucket; without smoothing as published.

    ``counts`` are c, n-grams of the target by bucket, n in all; ``p_pool`` the shares of the buckets in the pool.
    """
    if smoothing == 0:
        return np.asarray(np.log(counts / counts.sum() + _EPSILON) - np.log(p_pool + _EPSILON))
    return np.asarray(np.log((counts + smoothing) / (counts.sum() * p_pool + smoothing)))


def effective_size(log_weights: NDArray[np.float64]) -> float:
    """Return (sum w)^2 / sum w^2 of weights given by finite logarithms."""
    weights = np.exp(log_weights - log_weights.max())
    return float(weights.sum() ** 2 / (weights**2).sum())


class Dsir(ScoringSelector):
    """Draw rows whose words are distributed like the targets', by importance weights of hashed n-grams.

    "Data Selection for Language Models via Importance Resampling", NeurIPS 2023, arXiv 2302.03169. Texts are
    lower-cased and cut into words and punctuation; every word and pair of words falls into a bucket by its hash. With
    the shares of the buckets in the target p_t and in the pool p_r, a row's weight is

        log w = sum over buckets of count x [log(p_t + 1e-8) - log(p_r + 1e-8)],

    and rows are drawn without replacement in proportion to w (Gumbel top-k, keyed by row).

    The sum is not divided by length, as published: long rows get extreme weights, so that the draw comes near to a
    plain top-k. ``per_ngram`` divides by the number of n-grams, which is not the paper's. The reason tells the
    effective sample size (sum w)^2 / sum w^2 of the pool: near 1 it says that one row outweighs all others.

    The paper's targets are whole corpora. With a few target rows most buckets are empty, each n-gram that falls into
    one costs up to 18 nats, and the shortest rows win whatever they say. ``smoothing`` draws the target's shares
    towards the pool's: the prior of every n-gram is its share in the pool, with a strength of ``smoothing``
    occurrences. With c of the target's n n-grams in a bucket its term is then

        log (c + smoothing) / (n p_r + smoothing).

    An n-gram that the target lacks counts for nothing where it could not be expected there either, and against a row
    where it could. 0 is as published.
    """

    name = "dsir"
    saved = ("carried",)
    lacking = "too few n-grams"
    card = Card(
        summary="Draws rows whose words and pairs of words are distributed like those of the targets.",
        paper="Data Selection for Language Models via Importance Resampling, NeurIPS 2023, arXiv 2302.03169",
        cost="none on the device: n-grams are counted once",
        note="smoothing is not in the paper, whose targets are whole corpora; with a small one its weights "
        "(smoothing: 0) let the shortest rows win.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ScoringParams):
        """Parameters of DSIR; the paper's defaults, but for ``smoothing`` and for short rows, which are kept."""

        rule: Rule = param(Rule.of("gumbel_top_k"), RULE)
        part: Part = param("all", "what of a row is looked at")
        ngrams: int = param(2, "longest n-gram, in words", minimum=1, maximum=5)
        buckets: int = param(10_000, "hash buckets", minimum=2, maximum=10_000_000)
        smoothing: float = param(
            3.0,
            "strength of the prior towards the pool's shares, in occurrences of each n-gram; 0 as published",
            minimum=0.0,
        )
        min_ngrams: int = param(1, "rows of fewer n-grams are never drawn (the paper: 100 words)", minimum=1)
        per_ngram: bool = param(False, "divide log weights by the number of n-grams")
        target_proportions: dict[str, float] | None = param(
            None, "draw for each target by itself, in these proportions; null: pool the targets"
        )

        def __post_init__(self) -> None:
            given = self.target_proportions
            if given is not None and (
                not given or any(not 0 <= share < np.inf for share in given.values()) or not any(given.values())
            ):
                raise ValueError("target_proportions: must be finite, at least 0 and not all 0")

    params: Params

    def requires(self) -> Requires:
        return Requires(
            signals=frozenset({"texts"}), targets=True, by_target={"target_proportions": self.params.target_proportions}
        )

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self._by_task = Remembered(self._log_weights)
        self.carried: NDArray[np.float64] | None = None  # what the targets' counts were rounded off so far [T]

    @property
    def gives(self) -> Gives:
        """Scores, since targets count together, unless each has its own proportion."""
        return "scores" if self.params.target_proportions is None else "tasks"

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return log weights [N], or [T, N] with ``target_proportions``; NaN for rows with too few n-grams.

        DataError: a target, or the pool, has no words. ConfigError: no row has ``min_ngrams``.
        """
        by_task = self._by_task(pool, ctx)
        return by_task[0] if self.params.target_proportions is None else by_task

    def kept(self, found: Found, rows: Rows, budget: int, ctx: Context) -> NDArray[np.int64]:
        """Return the positions kept, targets one after another, none twice."""
        given = self.params.target_proportions
        if given is None or found.tasks is None:
            return super().kept(found, rows, budget, ctx)
        left, kept = np.arange(len(rows)), [np.empty(0, dtype=np.int64)]
        shares = np.array([given[target] for target in ctx.targets]) / sum(given[target] for target in ctx.targets)
        before = np.zeros(len(shares)) if self.carried is None else np.asarray(self.carried)
        quotas, self.carried = carried_counts(min(budget, len(rows)), shares, before)
        for task, (target, quota) in enumerate(zip(ctx.targets, quotas.tolist(), strict=True)):
            own = replace(found.at(left), scores=found.tasks[task, left], tasks=None)
            name = None if len(ctx.targets) == 1 else target
            part = replace(self.candidates(own, own.scores, rows[left], ctx), uniforms=self.uniforms(ctx, name))
            kept.append(left[choose(self.rule, part, quota)])
            left = np.setdiff1d(left, kept[-1])
        return np.concatenate(kept)

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return the effective sample size of the pool, of each target where they draw by themselves."""
        tasks = [found.scores] if found.tasks is None else found.tasks
        size = ", ".join(f"{effective_size(np.asarray(one)):.3g}" for one in tasks)
        return f"by n-grams of {', '.join(ctx.targets)} ({self.rule.name}); effective sample size {size}"

    def _log_weights(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return log weights of rows by group of targets [T, N], NaN for rows with too few n-grams."""
        p, hashed = self.params, hasher(self.params.buckets, self.params.ngrams)
        targets = target_words(self.name, ctx, p.part, word_punct)
        if p.target_proportions is None:
            targets = [[row for rows in targets for row in rows]]
        wanted = [_counts(Grams.blocks(map(hashed, rows), p.buckets), p.buckets) for rows in targets]
        words = map(word_punct, pool_texts(pool, ctx, p.part))
        blocks = list(Grams.blocks(map(hashed, words), p.buckets))
        lengths = np.concatenate([block.lengths for block in blocks])
        usable = lengths >= p.min_ngrams
        if not usable.any():
            if not lengths.any():
                raise no_words(self.name, len(pool), p.part)
            raise ConfigError(
                f"dynamic.selector.min_ngrams: {p.min_ngrams:,} is more than any row has (at most {lengths.max():,})"
            )
        of_pool = _counts(blocks, p.buckets)
        ratios = np.stack([drawn_ratios(counts, of_pool / of_pool.sum(), p.smoothing) for counts in wanted])
        found = np.concatenate([block.sums(ratios) for block in blocks], axis=1)
        found[:, ~usable] = np.nan
        return found / np.maximum(lengths, 1) if p.per_ngram else found


def _counts(blocks: Iterable[Grams], buckets: int) -> NDArray[np.int64]:
    total = np.zeros(buckets, dtype=np.int64)
    for block in blocks:
        np.add.at(total, block.buckets, 1)
    return total
