"""Baselines: every row, random rows, random rows of every domain alike, the longest rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Card, Context, Requires, Rows, Selection, Selector, param
from dataflex.method import Params as BaseParams
from dataflex.rng import uniforms
from dataflex.select.choose import top_k
from dataflex.select.rules import REPLACEMENT
from dataflex.select.scoring import Found, ScoringSelector


class _Unscored(Selector):
    """Draws rows, or takes all, without a score."""

    @property
    def gives_scores(self) -> bool:
        """No."""
        return False


class RandomRows(_Unscored):
    """Draw rows uniformly, anew in every interval.

    Uniform random rows are the baseline that every other selector has to beat. The draw is keyed by row id, so it
    depends on the seed and the interval only, never on the number of ranks or on the order of the pool.
    """

    name = "random"
    card = Card(summary="Draws rows uniformly at random in every interval.", paper="baseline", cost="none")

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        replacement: bool = param(False, REPLACEMENT)

    params: Params

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Draw ``budget`` rows of ``pool``, in random order; without replacement at most the whole pool once."""
        if self.params.replacement:
            draws = np.arange(budget if len(pool) else 0, dtype=np.int64)
            u = uniforms(ctx.seed, "selector.random", ctx.interval.index, draws)
            rows = pool[np.minimum((u * len(pool)).astype(np.int64), len(pool) - 1)]
            return Selection(rows=rows, reason=f"{len(rows)} draws from {len(pool)} rows, with replacement")
        u = uniforms(ctx.seed, "selector.random", ctx.interval.index, pool)
        rows = pool[top_k(u, budget)]
        return Selection(rows=rows, reason=f"{len(rows)} of {len(pool)} rows at random")


class AllRows(_Unscored):
    """Keep the whole pool as it is; epochs and order stay those of the run.

    The selector that leaves the data alone: every row, in the order given.
    """

    name = "all"
    selects_subset: ClassVar[bool] = False
    card = Card(summary="Keeps every row of the pool in its order.", paper="baseline", cost="none")

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Return ``pool`` unchanged; ``budget`` is not looked at."""
        return Selection(rows=pool, reason=f"all {len(pool)} rows of the pool")


class RandomBalanced(_Unscored):
    """Draw rows uniformly within domains, the same number of each.

    A baseline against selectors that merely balance sources. A domain that is too small gives all it has, and the
    others share the rest equally. The draw is keyed by row id, so it depends on the seed and the interval only.
    """

    name = "random_balanced"
    card = Card(
        summary="Draws rows at random, equally many of every domain as far as they last.", paper="baseline", cost="none"
    )

    def requires(self) -> Requires:
        return Requires(domains=2)

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Draw at most ``budget`` rows without replacement, in turns: each domain gives the next row of a random order.

        The rows of the last turn, which the budget cuts, are those of random domains.
        """
        u = uniforms(ctx.seed, "selector.random_balanced", ctx.interval.index, pool)
        domain = ctx.domains.domain_of[pool]
        order = np.lexsort((u, domain))
        counts = np.bincount(domain, minlength=len(ctx.domains.names))
        starts = np.cumsum(counts) - counts
        turn = np.empty(len(pool), dtype=np.int64)
        turn[order] = np.arange(len(pool)) - starts[domain[order]]
        # Within a turn the numbers that ordered the domains' rows would favour large domains: draw others.
        fair = uniforms(ctx.seed, "selector.random_balanced.turn", ctx.interval.index, pool)
        kept = np.lexsort((fair, turn))[:budget]
        given = np.bincount(domain[kept], minlength=len(counts))[counts > 0]
        reason = f"{len(kept)} of {len(pool)} rows at random"
        if given.size:
            reason += f", {given.min()} to {given.max()} from each of {given.size} domains"
        return Selection(rows=pool[kept], reason=reason)


class Longest(ScoringSelector):
    """Keep the rows of most tokens.

    A baseline that needs no model and that many selectors fail to beat. Length is in tokens of the whole row as it is
    trained on, prompt included, after ``cutoff_len``.
    """

    name = "longest"
    card = Card(summary="Keeps the rows of most tokens.", paper="baseline", cost="none")

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return lengths in tokens [N]; DataError where the data set does not give them."""
        if ctx.domains.lengths is None:
            raise DataError("longest: it needs the token count of every row, which this data set does not give")
        return ctx.domains.lengths[pool].astype(np.float64)

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return the length of the shortest row kept."""
        return f"of at least {int(found.scores[kept].min())} tokens" if len(kept) else "by length"
