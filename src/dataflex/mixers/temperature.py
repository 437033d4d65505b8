"""Shares by tempered size: between concatenation and equal shares."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Card, Context, Mix, Mixer
from dataflex.method import Params as BaseParams
from dataflex.mixers.sizes import sizes
from dataflex.plan.proportions import normalized, shares

__all__ = ["Temperature", "tempered"]


def tempered(sizes_K: NDArray[np.float64], tau: float) -> NDArray[np.float64]:
    """Return proportions [K] ~ size ** (1 / tau); empty domains get 0, an infinite tau equal shares."""
    filled = sizes_K > 0
    log_sizes = np.log(sizes_K, where=filled, out=np.zeros_like(sizes_K)) / tau
    return normalized(np.where(filled, np.exp(log_sizes - log_sizes[filled].max()), 0.0))


class Temperature(Mixer):
    """Serve each domain in proportion to its size to the power 1 / tau."""

    name = "temperature"
    card = Card(
        summary="Serves each domain in proportion to its size to the power 1 / tau.",
        paper="Cross-lingual Language Model Pretraining (XLM), NeurIPS 2019, arXiv 1901.07291",
        cost="none",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        """Parameters of the temperature mixer."""

        tau: float = field(
            default=2.0,
            metadata={"help": "1 is by size, .inf equal shares; mBERT 1.43, XLM 2, XLM-R and mT5 3.33", "above": 0.0},
        )

    params: Params

    def mix(self, ctx: Context) -> Mix:
        """Return the tempered shares of the sizes in ``ctx.unit``."""
        proportions = tempered(sizes(ctx, self.name), self.params.tau)
        reason = f"tau {self.params.tau:g} by {ctx.unit}: {shares(ctx.domains.names, proportions)}"
        return Mix(proportions=proportions, reason=reason)
