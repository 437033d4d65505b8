"""Learning to reweight in one step: rows count as far as a step on them goes along the targets' gradient.

Ren et al., "Learning to Reweight Examples for Robust Deep Learning", ICML 2018, arXiv 1803.09050: with weights that
start at zero, one step of gradient descent on the validation loss with respect to the weights gives

    w_i = max(0, <g_i, g_val>),   divided by their sum over the step's rows,

g_i the gradient of row i's token-mean loss and g_val that of the targets' rows. The product is the derivative
of row i's loss along g_val: one forward pass in forward mode over the step's rows, before the step, in
eval mode; no per-row gradients are kept. g_val takes a forward and a backward pass over the targets in every step:
keep them small. If no row goes along, the step trains on nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ComponentError
from dataflex.method import BatchView, Card, Context, Normalizer, Passes, Requires, Rows, Weighter, WeighterParams
from dataflex.signals.specs import GradientSpec
from dataflex.weighters.step_weights import StepWeights

if TYPE_CHECKING:
    import torch

__all__ = ["Meta", "clipped_shares"]


def clipped_shares(products: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return max(0, products) divided by their sum [n]; zeros where none is positive. NaN counts as 0."""
    gains = np.maximum(np.nan_to_num(np.asarray(products, dtype=np.float64), nan=0.0), 0.0)
    total = gains.sum()
    return gains / total if total > 0 else gains


class Meta(Weighter):
    """Weigh rows by one step of learning to reweight."""

    name = "meta"
    card = Card(
        summary="Weighs the rows of each step by how far a step on each goes along the targets' gradient.",
        paper="Learning to Reweight Examples for Robust Deep Learning, ICML 2018, arXiv 1803.09050",
        cost="1 forward-mode F over the rows of each step, and F + B over the targets in each step",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(WeighterParams):
        """Parameters of one-step reweighting."""

        parameters: str | None = field(
            default=None,
            metadata={"help": "regular expression of parameter names that gradients are taken of; null: all trainable"},
        )
        forward_mode: bool = field(
            default=True,
            metadata={"help": "one pass in forward mode; false: gradients by row (F + B), partitioned parameters too"},
        )

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        by_row = not self.params.forward_mode
        return Requires(
            signals=frozenset({"gradients"}),
            targets=True,
            stages=("pt", "sft"),
            whole_parameters=not by_row,
            passes=Passes(served=(1.0, 1.0), told="F + B over the rows of each step and over the targets")
            if by_row
            else Passes(served=(2.0, 0.0)),  # in forward mode a pass carries values and derivatives
        )

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self._step: StepWeights | None = None

    @property
    def normalizer(self) -> Normalizer:
        """Weights multiply token-mean losses; they sum to one over the step."""
        return "sample"

    def due(self, step: int) -> bool:
        """Every step has weights of its own."""
        return True

    def prepare(self, ctx: Context, rows: Rows) -> None:
        """Work out the weights of the step's rows; several targets count alike."""
        spec = GradientSpec(
            precondition="none",
            normalize=False,
            parameters=self.params.parameters,
            forward_mode=self.params.forward_mode,
        )
        products = ctx.signals.gradient_scores(rows, spec, targets=ctx.targets).mean(axis=1)
        self._step = StepWeights(rows, clipped_shares(products))

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return weights [B]; over the step's rows they sum to the number of its micro-batches.

        Raises:
            ComponentError: ``prepare`` was not called.
        """
        if self._step is None:
            raise ComponentError(f"{self.name}: the weights of the step were not prepared")
        return self._step.weights(batch)
