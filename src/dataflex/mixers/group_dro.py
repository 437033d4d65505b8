"""Group DRO: weigh the domains in the loss towards those of the largest loss.

Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", ICLR 2020, arXiv 1911.08731,
algorithm 1 with the generalization adjustment of section 3.3. Losses are mean token losses. Without a
reference the weights follow the domain of the highest entropy, so regularize, or use ``doremi``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dataflex.method import Card, DomainNormalizer, Requires
from dataflex.method import Params as BaseParams
from dataflex.mixers import simplex
from dataflex.mixers.loss_weights import LossWeightMixer
from dataflex.mixers.proportions import check_numbers
from dataflex.plan.domains import DomainStats

__all__ = ["GroupDro"]


class GroupDro(LossWeightMixer):
    """Minimize the worst domain's loss: q_g is multiplied by exp(eta (L_g + C / sqrt(n_g))) every step."""

    name = "group_dro"
    card = Card(
        summary="Weighs the domains in the loss towards those of the largest loss, every step.",
        paper="Distributionally Robust Neural Networks for Group Shifts, ICLR 2020, arXiv 1911.08731",
        cost="none",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        """Parameters of Group DRO."""

        eta: float = field(default=0.01, metadata={"help": "step size of the weights", "above": 0.0})
        adjustment: float = field(
            default=0.0,
            metadata={"help": "C of the adjustment C / sqrt(rows of the domain), in nats", "minimum": 0.0},
        )
        smoothing: float = field(
            default=0.0,
            metadata={"help": "share of equal weights mixed in after every step", "minimum": 0.0, "maximum": 1.0},
        )
        sampling: tuple[float, ...] | dict[str, float] | None = field(
            default=None,
            metadata={"help": "proportions in which domains are served; null: equal shares", "minimum": 0.0},
        )

        def __post_init__(self) -> None:
            if self.sampling is not None:
                check_numbers(self.sampling, "sampling")

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        return Requires(domains=2, stages=("pt", "sft"))

    @property
    def loss_normalizer(self) -> DomainNormalizer:
        """The loss is the sum over domains of q_g times the domain's mean loss."""
        return "domain"

    def _learn(self, stats: DomainStats) -> None:
        scores = np.where(stats.seen, stats.mean_loss(), 0.0)  # an absent domain has loss 0, as in the original code
        if self.params.adjustment > 0 and self.rows.size:
            scores = scores + self.params.adjustment / np.sqrt(self.rows)
        self.log_alpha = simplex.exponentiated(
            self.log_alpha, scores, eta=self.params.eta, smoothing=self.params.smoothing
        )
