"""What weighters by excess loss over a reference model share: which of all ranks' values are among the largest."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["largest"]


def largest(values: torch.Tensor, valid: torch.Tensor, share: float) -> torch.Tensor:
    """Return which valid values are among the largest ceil(share x number of valid ones), one at least, bool [n].

    Ties go to the first. Nothing is read from the device.

    Args:
        values: [n].
        valid: bool [n].
        share: Share to be kept, above 0 and at most 1.
    """
    order = values.masked_fill(~valid, -math.inf).argsort(descending=True, stable=True)
    # A hair less before rounding up: 0.6 x 5 is 3, whatever the last bit of the product says.
    kept = (valid.sum().double() * share - 1e-9).ceil().clamp(min=1)
    place = order.new_empty(len(order))
    place[order] = order.new_ones(len(order)).cumsum(0) - 1
    return (place < kept) & valid
