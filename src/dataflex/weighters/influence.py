"""Weights from gradients of the step's rows, taken before it: one-step reweighting and PRESENCE."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ComponentError
from dataflex.method import (
    BatchView,
    Card,
    Context,
    Normalizer,
    Passes,
    Requires,
    Rows,
    Weighter,
    WeighterParams,
    param,
)
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import softmax
from dataflex.signals.kinds import GradientProducts, GradientScores
from dataflex.signals.specs import GradientOptions

if TYPE_CHECKING:
    import torch


class StepWeights:
    """Numbers by row id.

    Args:
        rows: Row ids of the step [n]; where one occurs twice, its first number counts.
        values: Their numbers [n].
    """

    def __init__(self, rows: Rows, values: NDArray[np.floating]) -> None:
        self._rows, first = np.unique(rows, return_index=True)
        self._values = np.asarray(values)[first]

    def of(self, rows: Rows) -> NDArray[np.float64]:
        """Return the numbers of ``rows``; 0 for rows that are not of the step (copies that even out a short one)."""
        if not len(self._rows):
            return np.zeros(len(rows))
        place = np.searchsorted(self._rows, rows).clip(max=len(self._rows) - 1)
        return np.where(self._rows[place] == rows, self._values[place], 0.0)

    def weights(self, batch: BatchView) -> torch.Tensor:
        """Return the numbers of the micro-batch's sequences, fp32 [B], times the micro-batches of the step.

        Numbers that sum to one over the step then make the mean over its micro-batches a sum over the step.
        A packed row's number is shared by its documents in equal parts.
        """
        values = self.of(batch.rows_B)
        if batch.sequence_BT is not None:
            _, inverse, counts = np.unique(batch.rows_B, return_inverse=True, return_counts=True)
            values = values / counts[inverse]
        found: torch.Tensor = batch.loss_B.new_tensor(values * batch.num_micro_batches)
        return found.masked_fill(batch.tokens_B == 0, 0.0)


def clipped_shares(products: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return max(0, products) divided by their sum [n]; zeros where none is positive. NaN counts as 0."""
    gains = np.maximum(np.nan_to_num(np.asarray(products, dtype=np.float64), nan=0.0), 0.0)
    total = gains.sum()
    return gains / total if total > 0 else gains


class Meta(Weighter):
    """Weigh rows by one step of learning to reweight.

    Learning to reweight in one step: rows count as far as a step on them goes along the targets' gradient.

    Ren et al., "Learning to Reweight Examples for Robust Deep Learning", ICML 2018, arXiv 1803.09050: with weights that
    start at zero, one step of gradient descent on the validation loss with respect to the weights gives

        w_i = max(0, <g_i, g_val>),   divided by their sum over the step's rows,

    g_i the gradient of row i's token-mean loss and g_val that of the targets' rows. The product is the derivative
    of row i's loss along g_val: one forward pass in forward mode over the step's rows, before the step, in
    eval mode; no per-row gradients are kept. g_val takes a forward and a backward pass over the targets in every step:
    keep them small. If no row goes along, the step trains on nothing.
    """

    name = "meta"
    normalizer: Normalizer = "num_sequences"  # weights sum to one over the step
    card = Card(
        summary="Weighs the rows of each step by how far a step on each goes along the targets' gradient.",
        paper="Learning to Reweight Examples for Robust Deep Learning, ICML 2018, arXiv 1803.09050",
        cost="1 forward-mode F over the rows of each step, and F + B over the targets in each step",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(GradientOptions, WeighterParams):
        """Parameters of one-step reweighting."""

        forward_mode: bool = param(
            True, "one pass in forward mode; false: gradients by row (F + B), partitioned parameters too"
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

    def due(self, step: int) -> bool:
        """Every step has weights of its own."""
        return True

    def prepare(self, ctx: Context, rows: Rows) -> None:
        """Work out the weights of the step's rows; several targets count alike."""
        options = self.params.options(precondition="none", normalize=False)
        products = ctx.signals(GradientScores(targets=ctx.targets, **options), rows).mean(axis=1)
        self._step = StepWeights(rows, clipped_shares(products))

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return weights [B]; over the step's rows they sum to the number of its micro-batches.

        Raises:
            ComponentError: ``prepare`` was not called.
        """
        if self._step is None:
            raise ComponentError(f"{self.name}: the weights of the step were not prepared")
        return self._step.weights(batch)


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
        weights[known] = softmax(tau * z)
    return weights


class Presence(Weighter):
    """Weigh groups of rows by self-influence.

    PRESENCE: groups of rows weighed by their self-influence, hard ones first and then the easy ones.

    Thakkar et al., "Self-Influence Guided Data Reweighting for Language Model Pre-training", EMNLP 2023, arXiv
    2311.00913. The self-influence of a group of n rows is s = ||grad of its loss||^2 with respect to the first block;
    over the groups of a step z = (s - mean) / sqrt(variance + eps) and w = softmax(tau z), with tau for the first part
    of the run and -tau for the rest. The step's gradient is the weighted sum of the groups' gradients.

    The paper's groups are its micro-batches. Here they are ``group_rows`` consecutive rows of the step in the plan's
    order, so that neither accumulation nor the number of ranks changes anything, and the loss of a group is the mean of
    its rows' token-mean losses. The gradients of the step's rows are taken before it, of the first block only, in eval
    mode, in a forward and a backward pass of their own (two-pass); their Gram matrix holds the groups' norms.
    """

    name = "presence"
    normalizer: Normalizer = "num_sequences"  # weights sum to one over the step
    card = Card(
        summary="Weighs groups of rows of each step by their self-influence: large ones first, later small ones.",
        paper="Self-Influence Guided Data Reweighting for Language Model Pre-training, EMNLP 2023, arXiv 2311.00913",
        cost="F + B over the rows of each step, gradients of the first block only",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(WeighterParams):
        """Parameters of PRESENCE; the defaults are the paper's."""

        tau: float = param(1.0, "temperature; 0 is uniform", minimum=0.0)
        group_rows: int = param(8, "rows of a group, the paper's micro-batch; 1: row by row", minimum=1)
        direct_share: float = param(0.1, "share of the run in which large ones count more", minimum=0.0, maximum=1.0)
        parameters: str = field(
            default=r"\.(layers|h|blocks|block|layer)\.0\.",
            metadata={"pattern": True, "help": "regular expression of the parameter names of the first block"},
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

    def due(self, step: int) -> bool:
        """Every step has weights of its own."""
        return True

    def tau_at(self, step: int, total_steps: int) -> float:
        """Return tau in the first ``direct_share`` of the run, -tau afterwards."""
        return self.params.tau if step < self.params.direct_share * total_steps else -self.params.tau

    def prepare(self, ctx: Context, rows: Rows) -> None:
        """Find the self-influence of the step's groups."""
        signal = GradientProducts(precondition="none", normalize=False, parameters=self.params.parameters)
        gram = ctx.signals(signal, rows)
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
