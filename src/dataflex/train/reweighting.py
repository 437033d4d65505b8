"""Applies a weighter to the training losses of one optimizer step after another.

Knows the weighter, the columns and the rows of each micro-batch; the arithmetic is ``train.weighting``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.core.protocols import Rows, Weighter
from dataflex.dist import comm
from dataflex.train import weighting

__all__ = ["Reweighter"]


class Reweighter:
    """Turns token losses of micro-batches into the weighted loss.

    Args:
        weighter: The method.
        columns: Raw columns by name, each [N].
        over_ranks: Whether the Trainer counts tokens over all ranks and multiplies by their number
            (``average_tokens_across_devices``).
        world: Number of ranks.
    """

    def __init__(
        self, weighter: Weighter, columns: Mapping[str, NDArray[Any]], *, over_ranks: bool, world: int
    ) -> None:
        self.weighter = weighter
        self.stats = weighting.WeightStats(weighter.name)
        self._columns, self._over_ranks, self._world = columns, over_ranks, world
        self._scale: torch.Tensor | None = None

    def begin_step(self, batches: list[Any], rows: list[Rows], num_items: Any, device: torch.device) -> None:
        """Find num_items / sum(w * tokens) of the step where weights are known beforehand (collective)."""
        self._scale = None
        if self.weighter.normaliser != "token":
            return
        total = torch.zeros((), dtype=torch.float64)
        for batch, ids in zip(batches, rows, strict=True):
            weights = self.weighter.static_weights(ids, self._columns)
            if weights is None:
                return
            tokens_B = _supervised(batch["labels"])
            total += (torch.from_numpy(weights.astype(np.float64)) * tokens_B).sum()
        if self._over_ranks:
            total = comm.gather_sum(total.to(device))
        items = torch.as_tensor(num_items, dtype=torch.float64, device=total.device)
        self._scale = torch.where(total > 0, items / total, torch.zeros_like(total))

    def loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        rows: Rows,
        *,
        num_items: Any,
        num_micro_batches: int,
        step: int,
        total_steps: int,
    ) -> torch.Tensor:
        """Return the weighted loss of one micro-batch (collective for weights that depend on losses)."""
        losses = weighting.token_losses(logits, labels)
        normaliser, scale = self.weighter.normaliser, self._scale
        if self.weighter.active(step, total_steps):
            known = self.weighter.static_weights(rows, self._columns)
            if known is None:
                view = weighting.view(losses, rows, step=step, total_steps=total_steps)
                weights = weighting.checked(self.weighter.weigh(view), self.weighter, losses)
            else:
                weights = weighting.checked(torch.from_numpy(known), self.weighter, losses)
            self.stats.add(weights)
        else:
            weights, normaliser, scale = losses.loss_BT.new_ones(len(rows), 1), "count", None
        return weighting.weighted_loss(
            losses,
            weights,
            normaliser=normaliser,
            num_items=num_items,
            num_micro_batches=num_micro_batches,
            step_scale=scale,
            replicas=1 if self._over_ranks else self._world,
        )


def _supervised(labels: torch.Tensor) -> torch.Tensor:
    """Return tokens per row [B] as the stock denominator counts them (a label in the first place included)."""
    return labels.ne(weighting.IGNORE_INDEX).sum(dim=1).double()
