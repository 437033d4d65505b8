"""Random rows, equally many of every domain: a baseline against selectors that merely balance sources.

A domain that is too small gives all it has, and the others share the rest equally. The draw is keyed by row id,
so it depends on the seed and the interval only.
"""

from __future__ import annotations

import numpy as np

from dataflex.method import Card, Context, Needs, Rows, Selection, Selector
from dataflex.rng import uniforms

__all__ = ["RandomBalanced"]


class RandomBalanced(Selector):
    """Draw rows uniformly within domains, equally many of each."""

    name = "random_balanced"
    needs = Needs(domains=2)
    card = Card(
        summary="Draws rows at random, equally many of every domain as far as they last.",
        paper="baseline",
        cost="none",
    )

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Draw ``budget`` rows, or the whole pool where that is smaller, without replacement.

        Every domain gives its first row of a random order, then its second, and so on; the rows of the last
        turn that is cut are those of random domains.

        Returns:
            Rows [min(budget, len(pool))], in the order of these turns. There are no scores.
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
