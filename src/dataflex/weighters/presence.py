"""PRESENCE: groups of rows weighed by their self-influence, hard ones first and then the easy ones.

Thakkar et al., "Self-Influence Guided Data Reweighting for Language Model Pre-training", EMNLP 2023, arXiv 2311.00913.
The self-influence of a group of n rows is s = ||grad of its loss||^2 with respect to the first block; over the
groups of a step z = (s - mean) / sqrt(variance + eps) and w = softmax(tau z), with tau for the first part of
the run and -tau for the rest. The step's gradient is the weighted sum of the groups' gradients.

The paper's groups are its micro-batches. Here they are ``group_rows`` consecutive rows of the step in the plan's
order, so that neither accumulation nor the number of ranks changes anything, and the loss of a group is the mean of
its rows' token-mean losses. The gradients of the step's rows are taken before it, of the first block only, in eval
mode, in a forward and a backward pass of their own (two-pass); their Gram matrix holds the groups' norms.
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

__all__ = ["Presence", "group_weights", "self_influence"]

Floats = NDArray[np.float64]

_EPS = 1e-12


def self_influence(gram: NDArray[np.floating], groups: NDArray[np.int64]) -> Floats:
    """Return the squared norm of each group's mean gradient [G]; NaN for groups without a known row.

    Args:
        gram: Inner products of the rows' gradients [n, n]; NaN for rows without supervised tokens.
        groups: Group of each row [n], 0 .. G - 1.
    """
    known = np.isfinite(np.diagonal(gram))
    clean = np.where(known[:, None] & known[None, :], gram, 0.0).astype(np.float64)
    members = (groups[None, :] == np.arange(groups.max() + 1)[:, None]) & known[None, :]
    counts = members.sum(axis=1).astype(np.float64)
    sums = np.einsum("gi,ij,gj->g", members.astype(np.float64), clean, members.astype(np.float64))
    return np.divide(sums, counts**2, out=np.full(len(counts), np.nan), where=counts > 0)


def group_weights(influence: Floats, tau: float, eps: float = _EPS) -> Floats:
    """Return softmax(tau z) [G] over the groups that are not NaN, z the standardized self-influence; 0 elsewhere."""
    known = np.isfinite(influence)
    weights = np.zeros(len(influence))
    if known.any():
        s = influence[known]
        # The variance is relative to the mean square: norms of a large model may be tiny.
        scale = max(float(np.square(s).mean()), 1e-300)
        z = (s - s.mean()) / np.sqrt(s.var() + eps * scale)
        raised = np.exp(tau * z - (tau * z).max())
        weights[known] = raised / raised.sum()
    return weights


class Presence(Weighter):
    """Weigh groups of rows by self-influence."""

    name = "presence"
    card = Card(
        summary="Weighs groups of rows of each step by their self-influence: large ones first, later small ones.",
        paper="Self-Influence Guided Data Reweighting for Language Model Pre-training, EMNLP 2023, arXiv 2311.00913",
        cost="F + B over the rows of each step, gradients of the first block only",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(WeighterParams):
        """Parameters of PRESENCE; the defaults are the paper's."""

        tau: float = field(default=1.0, metadata={"help": "temperature; 0 is uniform", "minimum": 0.0})
        group_rows: int = field(
            default=8, metadata={"help": "rows of a group, the paper's micro-batch; 1: row by row", "minimum": 1}
        )
        direct_share: float = field(
            default=0.1,
            metadata={"help": "share of the run in which large ones count more", "minimum": 0.0, "maximum": 1.0},
        )
        parameters: str = field(
            default=r"\.(layers|h|blocks|block|layer)\.0\.",
            metadata={"help": "regular expression of the parameter names of the first block"},
        )

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        return Requires(signals=frozenset({"gradients"}), stages=("pt", "sft"), passes=Passes(served=(1.0, 1.0)))

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self._rows: Rows | None = None
        self._shares = np.zeros(0)
        self._groups = np.zeros(0, dtype=np.int64)
        self._influence = np.zeros(0)

    @property
    def normalizer(self) -> Normalizer:
        """Weights multiply token-mean losses; they sum to one over the step."""
        return "sample"

    def due(self, step: int) -> bool:
        """Every step has weights of its own."""
        return True

    def tau_at(self, step: int, total_steps: int) -> float:
        """Return tau in the first ``direct_share`` of the run, -tau afterwards."""
        return self.params.tau if step < self.params.direct_share * total_steps else -self.params.tau

    def prepare(self, ctx: Context, rows: Rows) -> None:
        """Find the self-influence of the step's groups."""
        spec = GradientSpec(precondition="none", normalize=False, parameters=self.params.parameters)
        _, gram = ctx.signals.gradient_products(rows, spec, targets=())
        self._rows, self._groups = rows, np.arange(len(rows), dtype=np.int64) // self.params.group_rows
        self._influence = self_influence(gram, self._groups)
        # Each row its part of the group's mean, which is over the rows that have supervised tokens.
        known = np.isfinite(np.diagonal(gram))
        self._shares = known / np.maximum(np.bincount(self._groups, weights=known), 1.0)[self._groups]

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return weights [B]; over the step's rows they sum to the number of its micro-batches.

        Raises:
            ComponentError: ``prepare`` was not called.
        """
        if self._rows is None:
            raise ComponentError(f"{self.name}: the weights of the step were not prepared")
        weights = group_weights(self._influence, self.tau_at(batch.step, batch.total_steps))
        return StepWeights(self._rows, weights[self._groups] * self._shares).weights(batch)
