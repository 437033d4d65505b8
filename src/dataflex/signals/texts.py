"""Tokens and texts of rows as they were tokenized: no model is asked, and every rank reads for itself.

Preference rows are read by their chosen answer. Without labels (stage pt) all of a row is its completion.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Rows
from dataflex.signals.specs import Part

__all__ = ["IGNORE", "TokenRow", "row_texts", "row_tokens", "token_rows"]

IGNORE = -100
_TOKENS, _LABELS, _MASK = "input_ids", "labels", "attention_mask"
_CHUNK_ROWS = 1000

TokenRow = tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]
"""Tokens, whether each is supervised, and the number of its document, without padding."""


def token_rows(dataset: Any, rows: Rows) -> Iterator[TokenRow]:
    """Yield what is known of the tokens of each row, in the order asked for.

    Args:
        dataset: Tokenized rows (``datasets.Dataset``, or anything with ``__getitems__``).
        rows: Row ids [n]; may repeat.
    """
    names = getattr(dataset, "column_names", None)
    if names is not None:  # images and the like are left where they are
        wanted = [name for name in names if name.removeprefix("chosen_") in (_TOKENS, _LABELS, _MASK)]
        dataset = dataset.select_columns(wanted)
    for start in range(0, len(rows), _CHUNK_ROWS):
        for feature in dataset.__getitems__(rows[start : start + _CHUNK_ROWS].tolist()):
            yield _token_row(feature)


def _token_row(feature: dict[str, Any]) -> TokenRow:
    prefix = "" if _TOKENS in feature else "chosen_"
    ids = np.asarray(feature[prefix + _TOKENS], dtype=np.int64)
    labels, mask = feature.get(prefix + _LABELS), feature.get(prefix + _MASK)
    supervised = np.ones(len(ids), dtype=np.bool_) if labels is None else np.asarray(labels, dtype=np.int64) != IGNORE
    if mask is None or len(mask) != len(ids):
        return ids, supervised, np.zeros(len(ids), dtype=np.int64)
    documents = np.asarray(mask, dtype=np.int64)  # neat_packing numbers documents from 1; 0 is padding
    real = documents != 0
    return ids[real], supervised[real], documents[real]


def row_tokens(dataset: Any, rows: Rows, part: Part = "all") -> list[NDArray[np.int64]]:
    """Return the tokens of each row: all, those of the prompt, or the supervised ones; int64, may be empty."""
    found = []
    for ids, supervised, _ in token_rows(dataset, rows):
        found.append(ids if part == "all" else ids[supervised if part == "completion" else ~supervised])
    return found


def row_texts(dataset: Any, rows: Rows, tokenizer: Any, part: Part = "all") -> list[str]:
    """Return the text of each row or of a part of it: its tokens decoded, special ones left out."""
    texts: list[str] = []
    for start in range(0, len(rows), _CHUNK_ROWS):
        tokens = row_tokens(dataset, rows[start : start + _CHUNK_ROWS], part)
        texts += tokenizer.batch_decode([ids.tolist() for ids in tokens], skip_special_tokens=True)
    return texts
