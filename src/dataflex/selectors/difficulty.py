"""Rows by how hard they are for the model: gradient norm (GraNd) and error of the predicted distribution (EL2N).

Paul et al., "Deep Learning on a Data Diet", NeurIPS 2021, arXiv 2107.07075: GraNd is the norm of a sample's
gradient, EL2N the norm of softmax(z) - onehot(y); the largest are kept. For language models EL2N is averaged
over a row's supervised tokens. At strong pruning the hardest rows are often noise: ``keep: smallest`` is at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Card, Context, Needs, Rows, Selection, Selector
from dataflex.method import Params as BaseParams
from dataflex.select.choose import top_k
from dataflex.selectors.finite import finite_rows
from dataflex.signals.specs import GradientSpec

__all__ = ["El2n", "GradNorm"]


@dataclass(frozen=True, kw_only=True)
class _Keep(BaseParams):
    """Which end is kept."""

    keep: Literal["largest", "smallest"] = field(default="largest", metadata={"help": "which rows are kept"})


def _extreme(name: str, pool: Rows, scores: NDArray[np.float32], budget: int, keep: str) -> Selection:
    finite = finite_rows(name, scores, len(pool))
    candidates = np.flatnonzero(finite)
    signed = scores[candidates] if keep == "largest" else -scores[candidates]
    kept = candidates[top_k(signed, min(budget, len(candidates)))]
    reason = f"{len(kept)} of {len(pool)} rows with the {keep} {name}"
    return Selection(rows=pool[kept], scores=scores, reason=reason)


class GradNorm(Selector):
    """Keep the rows with the largest gradients."""

    name = "grad_norm"
    adaptive: ClassVar[bool] = True
    needs = Needs(signals=frozenset({"gradients"}), stages=("pt", "sft"))
    card = Card(
        summary="Keeps the rows whose loss has the largest gradient.",
        paper="Deep Learning on a Data Diet, NeurIPS 2021, arXiv 2107.07075",
        cost="1 F + 1 B over the pool per interval",
        forward_per_pool_row=1.0,
        backward_per_pool_row=1.0,
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(_Keep):
        """Parameters of GraNd."""

        precondition: Literal["none", "true_adam", "sign"] = field(
            default="none", metadata={"help": "measure the optimizer's direction instead of the plain gradient"}
        )
        last_blocks: int | None = field(
            default=None, metadata={"help": "use only the last so many blocks of the model", "minimum": 1}
        )

    params: Params

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Keep the ``budget`` rows at the chosen end; scores are the norms, NaN without supervised tokens."""
        if len(pool) == 0:
            return Selection(rows=pool, scores=np.empty(0), reason="empty pool")
        spec = GradientSpec(precondition=self.params.precondition, last_blocks=self.params.last_blocks)
        norms = ctx.signals.gradient_norms(pool, spec)
        return _extreme(self.name, pool, norms, budget, self.params.keep)


class El2n(Selector):
    """Keep the rows whose tokens the model predicts worst."""

    name = "el2n"
    adaptive: ClassVar[bool] = True
    needs = Needs(signals=frozenset({"losses"}), stages=("pt", "sft", "dpo", "kto"))
    card = Card(
        summary="Keeps the rows whose predicted distributions are furthest from the tokens that follow.",
        paper="Deep Learning on a Data Diet, NeurIPS 2021, arXiv 2107.07075",
        cost="1 F over the pool per interval",
        forward_per_pool_row=1.0,
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(_Keep):
        """Parameters of EL2N."""

    params: Params

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Keep the ``budget`` rows at the chosen end; scores are EL2N, NaN without supervised tokens."""
        if len(pool) == 0:
            return Selection(rows=pool, scores=np.empty(0), reason="empty pool")
        return _extreme(self.name, pool, ctx.signals.el2n(pool), budget, self.params.keep)
