"""Losses under a model that is moved for the length of a pass: along a random direction, or by a probe."""

from __future__ import annotations

import logging
from typing import Any

import torch

from dataflex.method import Rows
from dataflex.signals.cache import Answer
from dataflex.signals.losses import row_losses
from dataflex.signals.moved import LowRankProbe, perturbed_row_losses
from dataflex.signals.row_signals import token_means
from dataflex.signals.service_base import ServiceBase
from dataflex.signals.store import ResumablePass
from dataflex.signals.sweep import Sweep, bucketed, preserve_state

__all__ = ["MovedAnswers"]

logger = logging.getLogger(__name__)


class MovedAnswers(ServiceBase):
    """The part of ``SignalService`` that moves the model, scores rows and moves it back."""

    def perturbed_losses(
        self,
        rows: Rows,
        *,
        seed: int,
        direction: int,
        epsilon: float,
        parameters: str | None = None,
        target: str | None = None,
    ) -> Answer:
        """Return losses [len(rows)] with ``epsilon`` times a random direction added to the parameters; not kept.

        Args:
            rows: Row ids.
            seed: Seed of the directions.
            direction: Number of the direction; the same for training and target rows.
            epsilon: Step, of either sign.
            parameters: Regular expression of the names of trainable parameters that move; None: all.
            target: Name of a target data set; None means the training set.

        Raises:
            UnsupportedError: Parameters that move are not float32, or are partitioned over ranks.
        """
        with self._timed():
            sweep = self._sweep(rows, target, "perturbed losses")
            return perturbed_row_losses(
                self.handle.model, sweep, seed=seed, direction=direction, epsilon=epsilon, pattern=parameters
            )

    def adapted_losses(
        self, rows: Rows, *, towards: str, depth_steps: int, learning_rate: float, rank: int, alpha: float
    ) -> Answer:
        """Return losses of training rows under a low-rank probe trained on target ``towards``."""

        def compute(sweep: Sweep, work: ResumablePass | None) -> Answer:
            model = self.handle.model
            with preserve_state(model):
                model.eval()
                probe = LowRankProbe(model, rank=rank, alpha=alpha, seed=self.seed)
                history = probe.train(
                    self._batches(towards), self._row_losses, steps=depth_steps, learning_rate=learning_rate
                )
                logger.info("probe on target %s: losses before each step %s", towards, [round(x, 4) for x in history])
                with probe.attached():
                    return token_means(model, sweep, "loss", around=self.handle.autocast, work=work)

        parameters = {
            "towards": self._corpus(towards).identity or towards,
            "depth_steps": depth_steps,
            "learning_rate": learning_rate,
            "rank": rank,
            "alpha": alpha,
            "seed": self.seed,
        }
        return self._answer("adapted losses", parameters, rows, None, compute)

    def _row_losses(self, batch: dict[str, Any]) -> torch.Tensor:
        with self.handle.autocast():
            return row_losses(self.handle.model, batch)

    def _batches(self, target: str) -> list[dict[str, Any]]:
        """Return the whole target in batches on the device, the same on every rank."""
        corpus, device = self._corpus(target), self.handle.device
        batches = []
        for positions in bucketed(corpus.lengths, self.handle.token_budget):
            batch = self.handle.collate(list(corpus.dataset.__getitems__(positions.tolist())))
            batches.append({key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()})
        return batches
