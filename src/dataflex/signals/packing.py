"""Which tokens of a batch are real, and which document of its row each belongs to.

LLaMA-Factory packs in several forms. ``neat_packing`` numbers the documents 1, 2, ... in the attention
mask (0 is padding); its collator turns that into a block-diagonal [B, 1, T, T] mask, or drops it for
FlashAttention and leaves only ``position_ids``, which restart at each document. Plain ``packing``
restarts ``position_ids`` and has a mask of ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["document_ids", "real_tokens"]


def real_tokens(batch: dict[str, Any]) -> torch.Tensor:
    """Return bool [B, T]: True where there is a token and not padding."""
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones_like(batch["input_ids"], dtype=torch.bool)
    if mask.dim() == 4:  # a real token may look at itself; additive masks hold 0 there, boolean ones True
        diagonal = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        return diagonal if diagonal.dtype == torch.bool else diagonal.eq(0)
    return mask.ne(0)


def document_ids(batch: dict[str, Any]) -> torch.Tensor:
    """Return int64 [B, T]: the document of each token, counted from 0 in its row; -1 for padding.

    A row that is not packed is one document. Padding that plain packing marks as real (position 0
    again and again at the end of a row) comes out as documents of one token each.
    """
    real = real_tokens(batch)
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 4:
        before = mask[:, 0].diagonal(offset=-1, dim1=-2, dim2=-1)
        linked = before if before.dtype == torch.bool else before.eq(0)
        starts = real & ~F.pad(linked, (1, 0), value=False)
    elif mask is not None and bool((mask > 1).any()):
        starts = real & F.pad(mask[:, 1:].ne(mask[:, :-1]), (1, 0), value=True)
    else:
        starts = real & ~F.pad(real[:, :-1], (1, 0), value=False)
        positions = batch.get("position_ids")
        if positions is not None:
            at_zero = positions.eq(0)
            starts = starts | (real & (at_zero.all(dim=0) if at_zero.dim() == 3 else at_zero))
    return torch.where(real, starts.long().cumsum(dim=1) - 1, -1)
