"""Embeddings of a data set's rows by another model: tokens back to text, shared out over ranks in fixed batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dataflex import comm
from dataflex.console import progress
from dataflex.method import Rows
from dataflex.signals.answers import Answer
from dataflex.signals.encoders import TextEncoder
from dataflex.signals.handle import Corpus
from dataflex.signals.passes import bucketed
from dataflex.signals.texts import row_texts

__all__ = ["encoded_rows"]


def encoded_rows(
    encoder: TextEncoder, corpus: Corpus, rows: Rows, tokenizer: Any, *, token_budget: int, device: torch.device
) -> Answer:
    """Return one vector per row [n, dimension], equal on every rank and for every number of ranks (collective).

    Args:
        encoder: Turns texts into vectors.
        corpus: Where the rows are.
        rows: Row ids [n].
        tokenizer: Decodes the rows.
        token_budget: Padded tokens of a batch at most.
        device: Where ranks exchange tensors.
    """
    batches = bucketed(corpus.lengths[rows], token_budget)[comm.rank() :: comm.world()]
    values = [np.zeros((0, encoder.dimension), dtype=np.float32)]
    places = np.concatenate([np.zeros(0, dtype=np.int64), *batches])
    with progress("embeddings by another model", len(places)) as told:
        done = 0
        for positions in batches:
            values.append(encoder.encode(row_texts(corpus.dataset, rows[positions], tokenizer)))
            done += len(positions)
            told(done)
    whole, _ = comm.gather_rows(torch.from_numpy(np.concatenate(values)).to(device))
    where, _ = comm.gather_rows(torch.from_numpy(places).to(device))
    out = np.full((len(rows), encoder.dimension), np.nan, dtype=np.float32)
    out[where.cpu().numpy()] = whole.cpu().numpy()
    return out
