"""The sequences of a micro-batch, and rows joined into one: sums, and values by position. No torch at import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Where the R rows of a micro-batch lie whose collator joined them into one sequence of L tokens."""

    rows_R: NDArray[np.int64]  # row ids, in their order in the sequence
    index_RT: torch.Tensor  # place of each row's tokens in the sequence, int64 [R, T], 0 beyond a row's end
    there_RT: torch.Tensor  # bool: where a row has a token

    def split(self, values_1L: torch.Tensor, fill: float = 0) -> torch.Tensor:
        """Return values of the sequence [1, L, ...] by row [R, T, ...], with gradient; ``fill`` beyond a row's end."""
        there = self.there_RT.reshape(*self.there_RT.shape, *[1] * (values_1L.dim() - 2))
        return values_1L[0][self.index_RT].masked_fill(~there, fill)


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """The sequences of one micro-batch: its rows, or the documents that its packed rows hold."""

    rows_B: NDArray[np.int64]  # row id of each sequence
    index_BT: torch.Tensor | None = None  # of each supervised position, int64 [R, T], 0 elsewhere; None: its row

    def sums(self, values_BT: torch.Tensor) -> torch.Tensor:
        """Add up ``values_BT`` (0 where nothing is supervised) by sequence [B]."""
        if self.index_BT is None:
            return values_BT.sum(dim=1)
        count = len(self.rows_B)  # without a supervised token there is no sequence, and every index is still 0
        sums = values_BT.new_zeros(max(count, 1)).index_add(0, self.index_BT.flatten(), values_BT.flatten())
        return sums[:count]

    def spread(self, values_B: torch.Tensor) -> torch.Tensor:
        """Give each position its sequence's value: [R, 1], or [R, T] under packing."""
        if self.index_BT is None:
            return values_B[:, None]
        return values_B[self.index_BT] if len(values_B) else values_B.new_zeros(self.index_BT.shape)
