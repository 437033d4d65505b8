"""Keep the rows that are hardest for the model: by gradient norm (GraNd) or error of the prediction (EL2N).

Paul et al., "Deep Learning on a Data Diet", NeurIPS 2021, arXiv 2107.07075: GraNd is the norm of a sample's
gradient, EL2N the norm of softmax(z) - onehot(y); the largest are kept. For language models EL2N is averaged
over a row's supervised tokens. Where few rows are kept, the hardest are often noise; ``keep: smallest`` keeps the
others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Card, Context, Requires, Rows, param
from dataflex.select.scoring import Found, ScoringParams, ScoringSelector
from dataflex.selectors._lib import GRADIENTS, ROW_LOSSES
from dataflex.signals.kinds import EL2N, GradientNorms
from dataflex.signals.specs import GradientOptions


@dataclass(frozen=True, kw_only=True)
class _Keep(ScoringParams):
    """Which end is kept."""

    keep: Literal["largest", "smallest"] = param("largest", "which rows are kept")


class _Extreme(ScoringSelector):
    """Prefers one end; scores are recorded as they are."""

    lacking = "no supervised token"
    Params = _Keep
    params: _Keep

    def preference(self, found: Found, ctx: Context) -> NDArray[np.floating]:
        """Return the scores, negative where the smallest are kept."""
        return found.scores if self.params.keep == "largest" else -found.scores

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return which end was kept."""
        return f"with the {self.params.keep} {self.name}"


class GradNorm(_Extreme):
    """Keep the rows with the largest gradients; scores are their norms."""

    name = "grad_norm"
    card = Card(
        summary="Keeps the rows whose loss has the largest gradient.",
        paper="Deep Learning on a Data Diet, NeurIPS 2021, arXiv 2107.07075",
        cost="1 F + 1 B over the pool per interval",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(GradientOptions, _Keep):
        """Parameters of GraNd."""

        precondition: Literal["none", "true_adam", "sign"] = param(
            "none", "measure the optimizer's direction instead of the plain gradient"
        )

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        return replace(GRADIENTS, targets=False, preconditions={"precondition": self.params.precondition})

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float32]:
        """Return gradient norms [N]."""
        return ctx.signals(GradientNorms(**self.params.options()), pool)


class El2n(_Extreme):
    """Keep the rows whose tokens the model predicts worst; scores are EL2N."""

    name = "el2n"
    card = Card(
        summary="Keeps the rows whose predicted distributions are furthest from the tokens that follow.",
        paper="Deep Learning on a Data Diet, NeurIPS 2021, arXiv 2107.07075",
        cost="1 F over the pool per interval",
    )

    def requires(self) -> Requires:
        """State what the run must have."""
        return ROW_LOSSES

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float32]:
        """Return EL2N [N]."""
        return ctx.signals(EL2N(), pool)
