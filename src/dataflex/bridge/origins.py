"""Which rows of a data set's files become training rows, for following a row back to the file.

Upstream names relied upon: ``llamafactory.data.loader.align_dataset`` (wrapped while loading, to see each
data set in LLaMA-Factory's own columns ``_prompt`` and ``_response``), and the rules by which the processors
of ``llamafactory.data.processor`` leave out rows without an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from llamafactory.data import loader as lf_loader
from numpy.typing import NDArray

__all__ = ["Origin", "kept_positions", "watched_origins"]

_CHUNK_ROWS = 20_000
_ANSWERS: dict[str, Callable[[NDArray[np.int64]], NDArray[np.bool_]]] = {
    "sft": lambda answers: answers == 1,
    "rm": lambda answers: answers >= 2,
    "dpo": lambda answers: answers >= 2,
    "kto": lambda answers: answers >= 2,
}
"""Which numbers of answers a stage trains on; pre-training takes every row."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What was read of one data set.

    Attributes:
        num_rows: Rows read from its files, from the first on.
        kept: Positions of those that became training rows, ascending.
    """

    num_rows: int
    kept: NDArray[np.int64]


def kept_positions(aligned: Any, stage: str) -> NDArray[np.int64]:
    """Return the positions of the rows that tokenising keeps, ascending.

    Args:
        aligned: ``datasets.Dataset`` with the columns ``_prompt`` and ``_response``, lists of messages.
        stage: LLaMA-Factory stage.
    """
    if stage not in _ANSWERS:
        return np.arange(len(aligned), dtype=np.int64)
    kept = [np.zeros(0, dtype=np.bool_)]
    for table in aligned.select_columns(["_prompt", "_response"]).with_format("arrow").iter(batch_size=_CHUNK_ROWS):
        turns, answers = (
            pc.fill_null(pc.list_value_length(table.column(name)), 0).to_numpy().astype(np.int64)
            for name in ("_prompt", "_response")
        )
        kept.append((turns % 2 == 1) & _ANSWERS[stage](answers))
    return np.flatnonzero(np.concatenate(kept)).astype(np.int64)


@contextmanager
def watched_origins(stage: str) -> Iterator[list[Origin]]:
    """Give a list that takes the origin of every data set that LLaMA-Factory loads while inside."""
    original = lf_loader.align_dataset
    found: list[Origin] = []

    def watch(dataset: Any, *args: Any, **kwargs: Any) -> Any:
        aligned = original(dataset, *args, **kwargs)
        found.append(Origin(num_rows=len(aligned), kept=kept_positions(aligned, stage)))
        return aligned

    lf_loader.align_dataset = watch
    try:
        yield found
    finally:
        lf_loader.align_dataset = original
