"""Focal weights: the less likely a token is to the model, the more it counts.

Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002: the cross-entropy of each token is
multiplied by (1 - p) ^ gamma and divided by the number of tokens. It is the opposite of DFT (``token``); tokens
that are wrong in the data are unlikely, and gain.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from dataflex.method import BatchView, Card, Normalizer, Weighter, WeighterParams
from dataflex.weighters.token_functions import focal

if TYPE_CHECKING:
    import torch

__all__ = ["Focal"]


class Focal(Weighter):
    """Weigh tokens by (1 - p) ^ gamma."""

    name = "focal"
    by_token: ClassVar[bool] = True
    card = Card(
        summary="Weighs each token by how unlikely it is to the model.",
        paper="Focal Loss for Dense Object Detection, ICCV 2017, arXiv 1708.02002",
        cost="none",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(WeighterParams):
        """Parameters of the focal loss; the defaults are the paper's."""

        gamma: float = field(default=2.0, metadata={"help": "exponent; 0 is the plain loss", "minimum": 0.0})
        normalizer: Literal["count", "token"] = field(
            default="count",
            metadata={"help": "count: divided by the tokens, as the paper's; token: weighted mean"},
        )

    params: Params

    @property
    def normalizer(self) -> Normalizer:
        """The denominator asked for."""
        return self.params.normalizer

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return weights [R, T], 0 where nothing is supervised."""
        return focal(-batch.loss_BT, gamma=self.params.gamma).masked_fill(~batch.mask_BT, 0.0)
