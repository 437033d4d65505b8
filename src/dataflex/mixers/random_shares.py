"""Random proportions: the baseline that any mixer should beat."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dataflex.method import Card, Context, Mix, Mixer, Requires
from dataflex.method import Params as BaseParams
from dataflex.mixers.proportions import normalized, shares
from dataflex.mixers.sizes import sizes

__all__ = ["RandomShares"]


class RandomShares(Mixer):
    """Serve domains in proportions drawn anew for every interval."""

    name = "random"
    card = Card(
        summary="Serves domains in proportions that are drawn anew for every interval.",
        paper="baseline (Dirichlet draws)",
        cost="none",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        """Parameters of random proportions."""

        concentration: float = field(
            default=1.0,
            metadata={
                "help": "mean of the Dirichlet parameters: 1 draws widely, large stays near the centre",
                "above": 0.0,
            },
        )
        around: str = field(default="uniform", metadata={"help": "centre of the draws", "choices": ("uniform", "size")})

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        return Requires(needs_interval=True)

    def mix(self, ctx: Context) -> Mix:
        """Return a draw from Dirichlet(K x concentration x centre), the same on every rank."""
        names = ctx.domains.names
        centre = np.full(len(names), 1.0 / len(names))
        if self.params.around == "size":
            centre = normalized(sizes(ctx, self.name))
        alpha = np.maximum(len(names) * self.params.concentration * centre, 1e-12)
        drawn = ctx.rng("random mixer").gamma(alpha)
        proportions = normalized(drawn) if drawn.any() else centre
        return Mix(proportions=proportions, reason=shares(names, proportions))
