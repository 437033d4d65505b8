"""Pools hidden states into one vector per row or per document; pure functions, accumulated in fp32."""

from __future__ import annotations

import torch

from dataflex.signals.specs import EmbeddingSpec

__all__ = ["pool", "pool_documents"]

_IGNORE = -100


def pool(
    hidden_BTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    spec: EmbeddingSpec,
) -> torch.Tensor:
    """Return one vector per row.

    RDS+ (arXiv 2503.01807) and ADAPT (arXiv 2605.05227): e = sum_t w_t h_t with w_t = t / sum(t).

    Args:
        hidden_BTD: Hidden states [B, T, D] in any floating dtype.
        attention_mask: [B, T], 0 is padding, on whichever side; None means no padding.
        labels: [B, T]; looked at under ``completion_only`` only.
        spec: How to pool.

    Returns:
        fp32 [B, D]; NaN where a row has nothing to pool.
    """
    kept_BT = _kept(hidden_BTD, attention_mask, labels, spec)
    weights_BT = _weights(kept_BT, spec)
    # Padding may hold anything, NaN included, and 0 x NaN is NaN.
    clean_BTD = hidden_BTD.float().masked_fill(~kept_BT[:, :, None], 0.0)
    return _finish(torch.bmm(weights_BT[:, None, :], clean_BTD)[:, 0], spec)


def pool_documents(
    hidden_BTD: torch.Tensor, documents_BT: torch.Tensor, labels: torch.Tensor | None, spec: EmbeddingSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one vector per packed document.

    Args:
        hidden_BTD: Hidden states [B, T, D].
        documents_BT: Document of each token in its row, -1 for padding; see ``packing.document_ids``.
        labels: [B, T]; looked at under ``completion_only`` only.
        spec: How to pool.

    Returns:
        Vectors fp32 [m, D] (NaN where a document has nothing to pool) and (row, document) int64 [m, 2].
    """
    inside = documents_BT.ge(0)
    row, column = inside.nonzero(as_tuple=True)
    pairs = torch.stack([row, documents_BT[row, column]], dim=1)
    keys, which = torch.unique(pairs, dim=0, return_inverse=True)
    # Each document becomes a row of its own, so that there is one definition of pooling.
    starts = torch.zeros(len(keys), dtype=torch.int64, device=row.device)
    sizes = torch.bincount(which, minlength=len(keys))
    starts[1:] = sizes.cumsum(0)[:-1]
    order = torch.argsort(which, stable=True)
    offset = torch.arange(len(which), device=row.device) - starts[which[order]]
    width = int(sizes.max()) if len(sizes) else 0
    mask = torch.zeros(len(keys), width, dtype=torch.bool, device=row.device)
    mask[which[order], offset] = True
    spread = hidden_BTD.new_zeros(len(keys), width, hidden_BTD.shape[-1])
    spread[which[order], offset] = hidden_BTD[row[order], column[order]]
    spread_labels = None
    if labels is not None:
        spread_labels = labels.new_full((len(keys), width), _IGNORE)
        spread_labels[which[order], offset] = labels[row[order], column[order]]
    return pool(spread, mask, spread_labels, spec), keys


def _kept(
    hidden_BTD: torch.Tensor, mask: torch.Tensor | None, labels: torch.Tensor | None, spec: EmbeddingSpec
) -> torch.Tensor:
    batch, width = hidden_BTD.shape[:2]
    kept = torch.ones(batch, width, dtype=torch.bool, device=hidden_BTD.device) if mask is None else mask.ne(0)
    if spec.completion_only:
        if labels is None:
            raise ValueError("completion_only needs labels")
        kept = kept & labels.ne(_IGNORE)
    return kept


def _weights(kept_BT: torch.Tensor, spec: EmbeddingSpec) -> torch.Tensor:
    """Weights fp32 [B, T] that sum to 1 over the kept tokens of a row; NaN in rows without any."""
    place_BT = kept_BT.long().cumsum(dim=1) * kept_BT  # 1, 2, ... over the kept tokens, 0 elsewhere
    count_B1 = kept_BT.sum(dim=1, keepdim=True)
    if spec.pooling == "weighted_mean":
        raw_BT = place_BT
    elif spec.pooling == "mean":
        raw_BT = kept_BT.long()
    else:
        wanted = count_B1 if spec.pooling == "last" else torch.ones_like(count_B1)
        raw_BT = (kept_BT & place_BT.eq(wanted)).long()
    return raw_BT.float() / raw_BT.sum(dim=1, keepdim=True).float()


def _finish(vectors_BD: torch.Tensor, spec: EmbeddingSpec) -> torch.Tensor:
    if not spec.normalize:
        return vectors_BD
    norms = vectors_BD.norm(dim=1, keepdim=True)
    return torch.where(norms.eq(0), vectors_BD, vectors_BD / norms)
