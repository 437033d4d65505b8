"""A weighter with a memory: sequences whose loss is far above the running mean count less (Huber's weights)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from dataflex import BatchView, Card, Weighter, WeighterParams


class HuberWeighter(Weighter):
    """Weigh by min(1, limit / z), z the loss in standard deviations above its running mean."""

    name = "huber"
    card = Card(summary="Plays down sequences of outlying loss.", paper="baseline (Huber, 1964)", cost="none")

    @dataclass(frozen=True, kw_only=True)
    class Params(WeighterParams):  # brings warmup_steps
        """Parameters, checked and converted before anything is loaded."""

        limit: float = field(default=2.0, metadata={"help": "standard deviations that count in full", "above": 0.0})
        decay: float = field(default=0.99, metadata={"help": "memory of the moments", "minimum": 0.0, "maximum": 1.0})

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self._moments = torch.zeros(3, dtype=torch.float64)  # number, sum and sum of squares of losses, fading

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return weights [B]; ``_M`` holds the sequences of all ranks, so every rank has the same moments."""
        known, loss = (batch.tokens_M > 0).double(), batch.loss_M.double()
        new = torch.stack([known.sum(), (known * loss).sum(), (known * loss.square()).sum()])
        self._moments = self.params.decay * self._moments.to(new.device) + new
        _, mean, square = self._moments / self._moments[0].clamp(min=1e-12)
        z = (batch.loss_B - mean) / (square - mean.square()).clamp(min=1e-12).sqrt()
        return (self.params.limit / z.clamp(min=self.params.limit)).float()

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the moments, so that a resumed run weighs as one that was never stopped."""
        return {"moments": self._moments.cpu().numpy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Take back what ``state_dict`` gave."""
        self._moments = torch.from_numpy(np.array(state["moments"])) if state else torch.zeros(3, dtype=torch.float64)
