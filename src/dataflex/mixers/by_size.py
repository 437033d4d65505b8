"""Proportions from sizes: by size itself, tempered, and as equal as epochs allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dataflex.errors import DataError
from dataflex.method import Card, Context, Mix, Mixer, param
from dataflex.method import Params as BaseParams
from dataflex.mixers._lib import mix_of, sizes
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import normalized


def allocate(sizes_K: Floats, budget: float, max_epochs: float) -> Floats:
    """Return how much of ``budget`` each domain gets [K], at most ``max_epochs`` times its size.

    Domains are visited from small to large; each takes an equal share of what is left, or its cap
    (Chung et al., ICLR 2023, arXiv 2304.09151, algorithm 1). When all caps together are below
    ``budget`` every domain gets its cap.
    """
    left = budget
    amounts = np.zeros(len(sizes_K), dtype=np.float64)
    for visited, k in enumerate(np.argsort(sizes_K, kind="stable")):
        amounts[k] = min(left / (len(sizes_K) - visited), max_epochs * sizes_K[k])
        left -= amounts[k]
    return amounts


class UniMax(Mixer):
    """Serve domains equally, but none for more than ``max_epochs`` epochs.

    The best of the size heuristics in independent comparisons. It refuses to spend a budget that the
    data cannot fill within the cap, unless told to repeat.
    """

    name = "unimax"
    card = Card(
        summary="Serves domains equally, but small ones for at most max_epochs epochs.",
        paper="UniMax: Fairer and More Effective Language Sampling for Large-Scale Multilingual Pretraining "
        "(Chung et al.), ICLR 2023, arXiv 2304.09151",
        cost="none",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        max_epochs: float = param(4.0, "most epochs of any domain over the whole run", above=0.0)
        overflow: Literal["error", "repeat"] = param(
            "error", "when the run is longer than max_epochs of all data: refuse, or repeat all alike"
        )

    params: Params

    def mix(self, ctx: Context) -> Mix:
        """Return amounts / sum of amounts for the budget of the whole run.

        The budget is ``ctx.total_sequences``; with another unit it is that times the mean tokens
        (or documents) per row of the whole data set, which is what the run serves only when lengths are alike
        across domains.

        Raises:
            DataError: The budget exceeds ``max_epochs`` times all data and ``overflow`` is ``error``.
        """
        sizes_K, epochs = sizes(ctx, self.name), self.params.max_epochs
        everything, rows = float(sizes_K.sum()), float(ctx.domains.num_rows.sum())
        budget = ctx.total_sequences * (1.0 if ctx.unit == "sequences" else everything / rows)
        most = epochs * everything
        mix = mix_of(ctx.domains.names, allocate(sizes_K, budget, epochs), f"budget {budget:,.0f} {ctx.unit}")
        if budget <= most * (1 + 1e-9):
            return mix
        told = (
            f"the run serves {budget:,.0f} {ctx.unit}, but {epochs:g} epochs of all {everything:,.0f} are {most:,.0f}, "
            f"short by {budget - most:,.0f}"
        )
        if self.params.overflow == "error":
            enough = float(np.ceil(100 * budget / everything) / 100)
            raise DataError(
                f"unimax: {told}. Set max_epochs: {enough:.2f} or more, train fewer steps, or set overflow: repeat"
            )
        return Mix(proportions=mix.proportions, reason=f"{mix.reason}; {told}: all domains repeat alike")


class Size(Mixer):
    """Serve each domain in proportion to its size, in the unit of the run.

    What concatenating the data sets would give.
    """

    name = "size"
    card = Card(summary="Serves each domain in proportion to its size.", paper="baseline", cost="none")

    def mix(self, ctx: Context) -> Mix:
        """Return size_d / sum of sizes, in tokens, sequences or documents as ``ctx.unit`` says."""
        return mix_of(ctx.domains.names, sizes(ctx, self.name), f"by {ctx.unit}")


def tempered(sizes_K: Floats, tau: float) -> Floats:
    """Return proportions [K] ~ size ** (1 / tau); empty domains get 0, an infinite tau equal shares."""
    filled = sizes_K > 0
    log_sizes = np.log(sizes_K, where=filled, out=np.zeros_like(sizes_K)) / tau
    return normalized(np.where(filled, np.exp(log_sizes - log_sizes[filled].max()), 0.0))


class Temperature(Mixer):
    """Serve each domain in proportion to its size to the power 1 / tau.

    Between concatenation and equal shares.
    """

    name = "temperature"
    card = Card(
        summary="Serves each domain in proportion to its size to the power 1 / tau.",
        paper="Cross-lingual Language Model Pretraining (XLM), NeurIPS 2019, arXiv 1901.07291",
        cost="none",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        tau: float = param(2.0, "1 is by size, .inf equal shares; mBERT 1.43, XLM 2, XLM-R and mT5 3.33", above=0.0)

    params: Params

    def mix(self, ctx: Context) -> Mix:
        """Return the tempered shares of the sizes in ``ctx.unit``."""
        tau = self.params.tau
        return mix_of(ctx.domains.names, tempered(sizes(ctx, self.name), tau), f"tau {tau:g} by {ctx.unit}")
