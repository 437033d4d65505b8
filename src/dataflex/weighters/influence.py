"""Weights from gradients of the step's rows, taken before it: one-step reweighting and PRESENCE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dataflex.method import BatchView, Card, Context, Passes, Requires, Rows, Weighter, WeighterParams, param
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import softmax
from dataflex.signals.kinds import GradientProducts, GradientScores
from dataflex.signals.specs import GradientOptions

if TYPE_CHECKING:
    import torch


class _StepWeighter(Weighter):
    """Weighs the rows of each step by weights that ``_weights`` finds before it, and that sum to one over the step."""

    normalizer = "num_sequences"
    _weight_of: dict[int, float] | None = None

    def due(self, step: int) -> bool:
        return True

    def prepare(self, ctx: Context, rows: Rows) -> None:
        weights = self._weights(ctx, rows)
        # Where a row occurs twice, its first weight counts.
        self._weight_of = dict(zip(rows[::-1].tolist(), weights[::-1].tolist(), strict=True))

    def _weights(self, ctx: Context, rows: Rows) -> Floats:
        """Return the weights of the step's ``rows`` [n] (collective)."""
        raise NotImplementedError

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return weights [B], fp32, times the micro-batches of the step: the mean over those becomes a sum over it.

        Rows that are not of the step (copies that even out a short one) get 0. A packed row's weight is shared by its
        documents in equal parts.
        """
        assert self._weight_of is not None, "the weights of the step were not prepared"
        values = np.array([self._weight_of.get(row, 0.0) for row in batch.rows_B.tolist()])
        if batch.sequence_BT is not None:
            _, inverse, counts = np.unique(batch.rows_B, return_inverse=True, return_counts=True)
            values = values / counts[inverse]
        return batch.loss_B.new_tensor(values * batch.num_micro_batches).masked_fill(batch.tokens_B == 0, 0.0)


def clipped_shares(products: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return max(0, products) divided by their sum [n]; zeros where none is positive. NaN counts as 0."""
    gains = np.maximum(np.nan_to_num(np.asarray(products, dtype=np.float64), nan=0.0), 0.0)
    total = gains.sum()
    return gains / total if total > 0 else gains


class Meta(_StepWeighter):
    """Weigh rows by how far a step on them goes along the targets' gradient: learning to reweight in one step.

    With weights that start at zero, one step of gradient descent on the validation loss with respect to the weights
    gives

        w_i = max(0, <g_i, g_val>),   divided by their sum over the step's rows,

    g_i the gradient of row i's token-mean loss and g_val that of the targets' rows; several targets count alike. The
    product is the derivative of row i's loss along g_val: one forward pass in forward mode over the step's rows, before
    the step, in eval mode; no per-row gradients are kept. g_val takes a forward and a backward pass over the targets in
    every step: keep them small. If no product is positive, the step trains on nothing.
    """

    name = "meta"
    card = Card(
        summary="Weighs the rows of each step by how far a step on each goes along the targets' gradient.",
        paper="Learning to Reweight Examples for Robust Deep Learning, ICML 2018, arXiv 1803.09050",
        cost="1 forward-mode F over the rows of each step, and F + B over the targets in each step",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(GradientOptions, WeighterParams):
        forward_mode: bool = param(
            True, "one pass in forward mode; false: gradients by row (F + B), partitioned parameters too"
        )

    params: Params

    def requires(self) -> Requires:
        if self.params.forward_mode:
            passes = Passes(served=(2.0, 0.0))  # in forward mode a pass carries values and derivatives
        else:
            passes = Passes(served=(1.0, 1.0), told="F + B over the rows of each step and over the targets")
        return Requires(
            signals=frozenset({"gradients"}),
            targets=True,
            stages=("pt", "sft"),
            whole_parameters=self.params.forward_mode,
            passes=passes,
        )

    def _weights(self, ctx: Context, rows: Rows) -> Floats:
        options = self.params.options(precondition="none", normalize=False)
        return clipped_shares(ctx.signals(GradientScores(targets=ctx.targets, **options), rows).mean(axis=1))


def self_influence(gram: NDArray[np.floating], groups: NDArray[np.int64]) -> Floats:
    """Return the squared norm of each group's mean gradient [G]; NaN for groups without a known row.

    ``gram`` holds the inner products of the rows' gradients [n, n], NaN for rows without supervised tokens.
    """
    known = np.isfinite(np.diagonal(gram))
    clean = np.where(known[:, None] & known[None, :], gram, 0.0).astype(np.float64)
    members = (groups[None, :] == np.arange(groups.max() + 1)[:, None]) & known[None, :]
    counts = members.sum(axis=1).astype(np.float64)
    sums = np.einsum("gi,ij,gj->g", members.astype(np.float64), clean, members.astype(np.float64))
    return np.divide(sums, counts**2, out=np.full(len(counts), np.nan), where=counts > 0)


def group_weights(influence: Floats, tau: float, eps: float = 1e-12) -> Floats:
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


class Presence(_StepWeighter):
    """Weigh groups of rows by their self-influence, hard ones first and then the easy ones.

    The self-influence of a group of n rows is s = ||grad of its loss||^2 with respect to the first block; over the
    groups of a step z = (s - mean) / sqrt(variance + eps) and w = softmax(tau z), with tau for the first part of the
    run and -tau for the rest. The step's gradient is the weighted sum of the groups' gradients.

    The paper's groups are its micro-batches. Here they are ``group_rows`` consecutive rows of the step in the plan's
    order, so that neither accumulation nor the number of ranks changes anything, and the loss of a group is the mean of
    its rows' token-mean losses. The gradients of the step's rows are taken before it, of the first block only, in eval
    mode, in a pass of their own; their Gram matrix holds the groups' norms. The defaults are the paper's.
    """

    name = "presence"
    card = Card(
        summary="Weighs groups of rows of each step by their self-influence: large ones first, later small ones.",
        paper="Self-Influence Guided Data Reweighting for Language Model Pre-training, EMNLP 2023, arXiv 2311.00913",
        cost="F + B over the rows of each step, gradients of the first block only",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(WeighterParams):
        tau: float = param(1.0, "temperature; 0 is uniform", minimum=0.0)
        group_rows: int = param(8, "rows of a group, the paper's micro-batch; 1: row by row", minimum=1)
        direct_share: float = param(0.1, "share of the run in which large ones count more", minimum=0.0, maximum=1.0)
        parameters: str = param(
            r"\.(layers|h|blocks|block|layer)\.0\.",
            "regular expression of the parameter names of the first block",
            pattern=True,
        )

    params: Params

    def requires(self) -> Requires:
        return Requires(signals=frozenset({"gradients"}), stages=("pt", "sft"), passes=Passes(served=(1.0, 1.0)))

    def tau_at(self, step: int, total_steps: int) -> float:
        """Return tau in the first ``direct_share`` of the run, -tau afterwards."""
        return self.params.tau if step < self.params.direct_share * total_steps else -self.params.tau

    def _weights(self, ctx: Context, rows: Rows) -> Floats:
        signal = GradientProducts(precondition="none", normalize=False, parameters=self.params.parameters)
        gram = ctx.signals(signal, rows)
        groups = np.arange(len(rows), dtype=np.int64) // self.params.group_rows
        tau = self.tau_at(ctx.interval.start_step, ctx.total_sequences // ctx.global_batch)
        weights = group_weights(self_influence(gram, groups), tau)
        # Each row its part of the group's mean, which is over the rows that have supervised tokens.
        known = np.isfinite(np.diagonal(gram))
        return weights[groups] * (known / np.maximum(np.bincount(groups, weights=known), 1.0)[groups])
