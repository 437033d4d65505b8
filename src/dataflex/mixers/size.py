"""Shares by size: what concatenating the data sets would give."""

from __future__ import annotations

from dataflex.method import Card, Context, Mix, Mixer
from dataflex.mixers.sizes import sizes
from dataflex.plan.proportions import normalized, shares

__all__ = ["Size"]


class Size(Mixer):
    """Serve each domain in proportion to its size, in the unit of the run."""

    name = "size"
    card = Card(summary="Serves each domain in proportion to its size.", paper="baseline", cost="none")

    def mix(self, ctx: Context) -> Mix:
        """Return size_d / sum of sizes, in tokens, sequences or documents as ``ctx.unit`` says."""
        proportions = normalized(sizes(ctx, self.name))
        return Mix(proportions=proportions, reason=f"by {ctx.unit}: {shares(ctx.domains.names, proportions)}")
