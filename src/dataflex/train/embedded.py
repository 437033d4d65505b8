"""Vectors of the sequences in training, pooled from the hidden states of the training forward itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dataflex.sequences import Sequences
from dataflex.signals.embeddings import pool, pool_documents
from dataflex.signals.packing import document_ids
from dataflex.signals.specs import EmbeddingSpec

__all__ = ["embedded"]


def embedded(
    hidden_RTD: torch.Tensor, batch: dict[str, Any], mask_RT: torch.Tensor, sequences: Sequences, spec: EmbeddingSpec
) -> torch.Tensor:
    """Return a vector for each sequence, fp32 [B, D], without gradient; zeros where there is nothing to pool.

    Args:
        hidden_RTD: Hidden states of the micro-batch.
        batch: The collated micro-batch, with ``labels``.
        mask_RT: Positions whose next token is supervised.
        sequences: Rows, or the documents of packed rows that have a supervised token.
        spec: How to pool.
    """
    hidden = hidden_RTD.detach()
    if sequences.index_BT is None:
        return pool(hidden, batch.get("attention_mask"), batch["labels"], spec).nan_to_num()
    documents = document_ids(batch)
    vectors, keys = pool_documents(hidden, documents, batch["labels"], spec)
    # Keep the documents that are sequences, in their order.
    predicted = F.pad(documents[:, 1:], (0, 1), value=0).clamp(min=0)
    row, column = mask_RT.nonzero(as_tuple=True)
    place = torch.full((len(documents), int(documents.max()) + 1), -1, dtype=torch.int64, device=hidden.device)
    place[row, predicted[row, column]] = sequences.index_BT[row, column]
    where = place[keys[:, 0], keys[:, 1]]
    out = vectors.new_zeros(len(sequences.rows_B), vectors.shape[1])
    out[where[where >= 0]] = vectors[where >= 0]
    return out.nan_to_num()
