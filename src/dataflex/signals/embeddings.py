"""Embeddings from the model under training: hidden states of one forward, pooled; the head is left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dataflex.errors import UnsupportedError
from dataflex.signals.anatomy import anatomy, capture_hidden, narrow_head
from dataflex.signals.losses import model_inputs
from dataflex.signals.packing import document_ids, real_tokens
from dataflex.signals.pooling import pool, pool_documents
from dataflex.signals.specs import EmbeddingSpec

__all__ = ["embed_batch", "embed_documents", "embedding_size", "hidden_states"]


def embedding_size(model: nn.Module) -> int:
    """Return D, the width of the model's hidden states."""
    return int(anatomy(model).text_config.hidden_size)


@torch.no_grad()
def hidden_states(model: nn.Module, batch: dict[str, Any], layer: int) -> torch.Tensor:
    """Return the hidden states [B, T, D] of one layer; call it in eval mode and in the trainer's autocast.

    The outermost module runs, as partitioned parameters need it; its head sees one position per row.

    Args:
        model: The outermost module to call, not the DDP or DeepSpeed engine.
        batch: A collated batch on the device.
        layer: See ``EmbeddingSpec.layer``.

    Raises:
        UnsupportedError: No such layer, or the model changes the sequence (prompt tuning).
    """
    parts = anatomy(model)
    with narrow_head(parts), capture_hidden(parts, layer) as seen:
        parts.root(**model_inputs(batch), use_cache=False)
    if len(seen) != 1 or seen[0].shape[:2] != batch["input_ids"].shape:
        shapes = [tuple(tensor.shape) for tensor in seen]
        raise UnsupportedError(
            f"embeddings: {type(parts.lm).__name__} gave hidden states {shapes} for input_ids of shape "
            f"{tuple(batch['input_ids'].shape)}; expected one [B, T, D]"
        )
    return seen[0]


def embed_batch(model: nn.Module, batch: dict[str, Any], spec: EmbeddingSpec) -> torch.Tensor:
    """Return one vector per row of a collated batch, fp32 [B, D]; NaN where there is nothing to pool.

    Packed rows are pooled as a whole; ``embed_documents`` keeps their documents apart.
    """
    return pool(hidden_states(model, batch, spec.layer), real_tokens(batch), batch.get("labels"), spec)


def embed_documents(model: nn.Module, batch: dict[str, Any], spec: EmbeddingSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return vectors fp32 [m, D] of the documents of packed rows and their (row, document) int64 [m, 2]."""
    return pool_documents(hidden_states(model, batch, spec.layer), document_ids(batch), batch.get("labels"), spec)
