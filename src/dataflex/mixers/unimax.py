"""UniMax: as equal as possible without repeating any domain more than a few times.

The best of the size heuristics in independent comparisons. It refuses to spend a budget that the
data cannot fill within the cap, unless told to repeat.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Card, Context, Mix, Mixer
from dataflex.method import Params as BaseParams
from dataflex.mixers.sizes import sizes
from dataflex.plan.proportions import normalized, shares

__all__ = ["UniMax", "allocate"]


def allocate(sizes_K: NDArray[np.float64], budget: float, max_epochs: float) -> NDArray[np.float64]:
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
    """Serve domains equally, but none for more than ``max_epochs`` epochs."""

    name = "unimax"
    card = Card(
        summary="Serves domains equally, but small ones for at most max_epochs epochs.",
        paper="UniMax: Fairer and More Effective Language Sampling for Large-Scale Multilingual Pretraining "
        "(Chung et al.), ICLR 2023, arXiv 2304.09151",
        cost="none",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        """Parameters of UniMax."""

        max_epochs: float = field(
            default=4.0, metadata={"help": "most epochs of any domain over the whole run", "above": 0.0}
        )
        overflow: Literal["error", "repeat"] = field(
            default="error",
            metadata={"help": "when the run is longer than max_epochs of all data: refuse, or repeat all alike"},
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
        assert ctx.total_sequences > 0
        sizes_K = sizes(ctx, self.name)
        rows = float(ctx.domains.num_rows.sum())
        budget = ctx.total_sequences * (1.0 if ctx.unit == "sequences" else float(sizes_K.sum()) / rows)
        most = self.params.max_epochs * float(sizes_K.sum())
        proportions = normalized(allocate(sizes_K, budget, self.params.max_epochs))
        reason = f"budget {budget:,.0f} {ctx.unit}: {shares(ctx.domains.names, proportions)}"
        if budget > most * (1 + 1e-9):
            told = (
                f"the run serves {budget:,.0f} {ctx.unit}, but {self.params.max_epochs:g} epochs of all "
                f"{sizes_K.sum():,.0f} are {most:,.0f}, short by {budget - most:,.0f}"
            )
            if self.params.overflow == "error":
                enough = float(np.ceil(100 * budget / sizes_K.sum()) / 100)
                raise DataError(
                    f"unimax: {told}. Set max_epochs: {enough:.2f} or more, train fewer steps, or set overflow: repeat"
                )
            reason += f"; {told}: all domains repeat alike"
        return Mix(proportions=proportions, reason=reason)
