"""Rows of LLaMA-Factory v1 beforehand: rendered once, cut, and measured.

v1 renders messages when it collates, every epoch anew. Upstream names relied upon, each asserted by ``tests/upstream``:
``DataEngine`` with ``datasets``, ``data_index`` and ``_convert_data_sample``, the renderer's ``process_samples``,
``pad_and_truncate``.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from llamafactory.v1.core.data_engine import DataEngine
from llamafactory.v1.utils.helper import pad_and_truncate
from pyarrow.compute import list_value_length
from torch.utils.data import default_collate

from dataflex import comm
from dataflex.config.data import target_data_sets
from dataflex.config.schema import DynamicConfig
from dataflex.errors import DataError, UnsupportedError
from dataflex.huggingface.wrap import told_of_rows
from dataflex.train.row_space import RowSpace

_NOT_TOKENS = ("_dataset_name", "extra_info")


class RenderedRows:
    """The rows of v1's data engine as tokens; row r is sample r of the engine.

    Args:
        engine: It has loaded the data.
        renderer: Turns messages into tokens.
        cutoff_len: Tokens of a row at most.
        pairs: Whether a row is a pair of answers, kept as v0 keeps it: each with its prompt.
    """

    def __init__(self, engine: DataEngine, renderer: Any, cutoff_len: int, *, pairs: bool = False) -> None:
        self._engine, self._renderer, self._cutoff, self._pairs = engine, renderer, cutoff_len, pairs

    def of(self, name: str) -> Dataset:
        """Return the rows of one source, which rank 0 renders first and the ``datasets`` cache keeps (collective)."""
        engine, raw = copy.copy(self._engine), self._engine.datasets[name]
        engine.datasets, engine.data_index = {}, []  # the cache knows its work by all that makes it
        render = partial(_render, engine, self._renderer, self._cutoff, self._pairs, name)
        if comm.rank() > 0:
            comm.barrier()
        made = raw.map(render, remove_columns=raw.column_names)
        if comm.rank() == 0:
            comm.barrier()
        return made

    def space(self, config: DynamicConfig, held: RenderedRows) -> RowSpace:
        """Return the row space of all rows (collective); targets are sources of ``held``, or of these rows.

        Raises:
            DataError: A column that methods ask for is not there, or has a value that they cannot use.
        """
        engine = self._engine
        columns: dict[str, Any] = {}
        wanted = [*dict.fromkeys(name for name in (config.domain_column, *config.columns) if name)]
        for name, part in engine.datasets.items():
            for lacking in (each for each in wanted if each not in part.column_names):
                found = ", ".join(part.column_names)
                raise DataError(f"train_dataset: {name!r} has no column {lacking!r} (found: {found})")
        domains = [name for name, _ in engine.data_index]
        if wanted:
            parts = [part.select_columns(wanted) for part in engine.datasets.values()]
            labels, columns = told_of_rows(self._indexed(parts), config, config.domain_column)
            domains = labels or domains
        targets = {
            target: concatenate_datasets(
                [(held if each in held._engine.datasets else self).of(each) for each in target_data_sets(target)]
            )
            for target in config.targets
        }
        rows = self._indexed([self.of(name) for name in engine.datasets])
        if self._pairs and not config.stock and (lone := _without_rejected(rows)):
            told = f"leaves {lone:,} of {len(rows):,} pairs no token of the rejected answer, on which v1 ends"
            raise DataError(f"cutoff_len: {self._cutoff} {told}; raise it, or remove those pairs")
        return RowSpace.of(rows, domains=domains, columns=columns, targets=targets)

    def _indexed(self, parts: list[Dataset]) -> Dataset:
        """Return the rows of all sources in the order and number of the engine's samples (``size``, ``weight``)."""
        ends = np.cumsum([0, *map(len, parts)]).tolist()
        start = dict(zip(self._engine.datasets, ends, strict=False))
        rows = [start[name] + place for name, place in self._engine.data_index]
        joined = concatenate_datasets(parts)
        return joined if rows == [*range(len(joined))] else joined.select(rows)


def _render(
    engine: DataEngine, renderer: Any, cutoff_len: int, pairs: bool, name: str, raw: dict[str, Any]
) -> dict[str, Any]:
    made = renderer.process_samples([engine._convert_data_sample(raw, name)])[0]
    types = [*made.pop("token_type_ids", ())][:cutoff_len]
    if bool(types) != pairs:
        what = "pairs of answers, which stage rm takes" if types else "rows that are no pairs of answers"
        raise UnsupportedError(f"train_dataset: {name!r} has {what}")
    if np.ndim(made.get("position_ids", ())) > 1:
        raise UnsupportedError(f"train_dataset: {name!r} has a position of several numbers for each token: not planned")
    row = {key: list(value[:cutoff_len]) for key, value in made.items() if key not in _NOT_TOKENS}
    if not pairs:
        return row
    ends = {"chosen": slice(types.count(1)), "rejected": slice(types.count(1), None)}
    return {f"{side}_{key}": row[key][part] for side, part in ends.items() for key in ("input_ids", "labels")}


def _without_rejected(pairs: Dataset) -> int:
    """Return how many pairs have no token of the rejected answer."""
    column = pairs.select_columns(["rejected_input_ids"]).with_format("arrow")[:].column(0)
    return int((list_value_length(column).to_numpy() == 0).sum())


def _joined(row: dict[str, Any]) -> dict[str, Any]:
    """Return a pair as v1's trainer of reward models wants it: one sequence, each token with its answer."""
    chosen, rejected = row["chosen_input_ids"], row["rejected_input_ids"]
    return {
        "input_ids": [*chosen, *rejected],
        "attention_mask": [1] * (len(chosen) + len(rejected)),
        "labels": [*row["chosen_labels"], *row["rejected_labels"]],
        "token_type_ids": [1] * len(chosen) + [2] * len(rejected),
    }


def collate(cutoff_len: int, left_out: tuple[str, ...], features: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch as v1 makes it, without the columns ``left_out``."""
    rows = [_joined(row) if "rejected_input_ids" in row else row for row in features]
    kept = [{key: value for key, value in row.items() if key not in left_out} for row in rows]
    return dict(default_collate(pad_and_truncate(kept, cutoff_len)))


def loss_weights(space: RowSpace) -> list[float]:
    """Return the weights that messages give their tokens, each once."""
    column = space.dataset.select_columns(["loss_weights"]).with_format("arrow")[:].column(0)
    found: list[float] = column.combine_chunks().flatten().unique().to_pylist()
    return found


class NumberedRows:
    """The engine's samples, each with its row in the place of its source's name, which v1 hands through."""

    def __init__(self, engine: DataEngine) -> None:
        self._engine = engine

    def __len__(self) -> int:
        return len(self._engine)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self._engine[row], "_dataset_name": str(row)}
