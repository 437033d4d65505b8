"""The weighter that does not weigh: the stock loss is left alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dataflex.method import BatchView, Card, Rows, Weighter
from dataflex.method import Params as BaseParams

if TYPE_CHECKING:
    import torch

__all__ = ["NoWeights"]


class NoWeights(Weighter):
    """Every token counts the same, as without DataFlex."""

    name = "none"
    neutral: ClassVar[bool] = True
    Params: ClassVar[type[BaseParams]] = BaseParams
    card = Card(summary="Leaves the stock loss alone.", paper="baseline", cost="none")

    def static_weights(self, rows: Rows, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return ones [len(rows)]."""
        return np.ones(len(rows), dtype=np.float32)

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return ones [B]."""
        return batch.loss_B.new_ones(batch.loss_B.shape)
