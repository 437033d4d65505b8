"""Equal shares for all domains; on average no learned mixture beats it clearly."""

from __future__ import annotations

import numpy as np

from dataflex.method import Card, Context, Mix, Mixer

__all__ = ["Uniform"]


class Uniform(Mixer):
    """Serve every domain equally often."""

    name = "uniform"
    card = Card(summary="Serves every domain equally often.", paper="baseline (stratified sampling)", cost="none")

    def mix(self, ctx: Context) -> Mix:
        """Return 1/K for each of the K domains."""
        num = len(ctx.domains.names)
        return Mix(proportions=np.full(num, 1.0 / num), reason=f"equal shares of {num} domains")
