"""Tokenized copies of training data: made once, data set by data set, and read without a pass over the tokens.

A copy is a ``DatasetDict`` as LLaMA-Factory saves and reads it, with a folder ``dataflex`` beside the rows:
``copy.json`` (what it was made of, data sets, sizes of files), ``rows.npz`` (data set, length and supervised tokens of
each row) and Parquet files of the raw columns. It is whole or absent: data sets that are finished wait in
``<path>.parts``, where a start that was interrupted goes on.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_from_disk
from numpy.typing import NDArray

from dataflex import comm
from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.copies import SIDECAR, differences, made_of, told, with_hashes
from dataflex.errors import DataError
from dataflex.signals.identity import tokenizer_identity
from dataflex.state import read_json, refusals, replacing
from dataflex.train.row_space import Measures

logger = logging.getLogger(__name__)

_FORMAT = 1
_TEXT_BYTES = 64
"""Raw text columns that are longer on average are kept only if a method or domain asks for them."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The tokenized rows of one data set."""

    rows: Dataset
    columns: pa.Table | None  # raw columns in their order; None where raw rows did not become one row each
    documents: int  # samples that they are made of


@dataclass(frozen=True, kw_only=True)
class Copied:
    """What a copy holds."""

    names: list[str]  # data sets
    train: Dataset
    source_of: NDArray[np.int32]  # data set of each row [N]
    measures: Measures
    documents_per_row: NDArray[np.float64] | None  # by data set [K]; None where every row is one
    columns: Dataset | None  # raw columns of the rows
    held: Dataset | None  # rows that ``val_size`` held out
    held_source_of: NDArray[np.int32]
    held_columns: Dataset | None


def scalar_columns(raw: Dataset, asked: Sequence[str]) -> pa.Table:
    """Return the raw columns of numbers, truth values and short texts, and those that were asked for."""
    table = raw.with_format("arrow")
    kept = {}
    for name in raw.column_names:
        kind = raw.features[name].dtype if hasattr(raw.features[name], "dtype") else ""
        text = kind in ("string", "large_string")
        if name not in asked and not text and not kind.startswith(("int", "uint", "float", "bool")):
            continue
        column = table.select_columns([name])[:].column(name)
        if name in asked or not text or (pc.mean(pc.binary_length(column)).as_py() or 0) <= _TEXT_BYTES:
            kept[name] = column
    return pa.table(kept)


def joined_columns(parts: Sequence[pa.Table | None]) -> pa.Table | None:
    """Return the columns that all data sets have, with the same type, of all their rows."""
    tables = [part for part in parts if part is not None]
    if len(tables) < len(parts):
        return None
    common = [
        field.name for field in tables[0].schema if all(field.equals(_field(each, field.name)) for each in tables[1:])
    ]
    return pa.concat_tables([each.select(common) for each in tables])


def _field(table: pa.Table, name: str) -> Any:
    return table.schema.field(name) if name in table.column_names else pa.field("", pa.null())


class TokenizedCopy:
    """The copy that ``tokenized_path`` names. All methods are collective: rank 0 writes, and all read."""

    def __init__(self, path: Path, written: LlamaFactoryArgs, tokenizer: Any) -> None:
        self.path = path
        self._parts = path.with_name(f"{path.name}.parts")
        self._made_of = {**made_of(written, Path()), "tokenizer": tokenizer_identity(tokenizer)}

    @property
    def is_there(self) -> bool:
        """Whether it was written to its end."""
        return bool(comm.broadcast_object((self.path / SIDECAR).is_file()))

    def begin(self) -> None:
        """Keep the data sets that an interrupted start finished, unless they were made of something else."""
        if comm.rank() == 0:
            note = self._parts / "made_of.json"
            with refusals(self._parts, DataError, key="tokenized_path"):
                if note.is_file():
                    lines = list(_changes(read_json(note), self._made_of))
                    if lines:
                        logger.warning("tokenized_path: what lies in %s is not used: %s", self._parts, "; ".join(lines))
                        shutil.rmtree(self._parts)
                if not note.is_file():
                    shutil.rmtree(self._parts, ignore_errors=True)
                    self._parts.mkdir(parents=True)
                    with_hashes(self._made_of)
                    note.write_text(json.dumps(self._made_of))
        comm.barrier()

    def part(self, number: int, make: Callable[[], Part]) -> Part:
        """Return a data set that was finished before, or make and keep it."""
        folder = self._parts / f"{number:04d}"
        if not comm.broadcast_object(folder.is_dir()):
            made = make()
            if comm.rank() == 0:
                with refusals(folder, DataError, key="tokenized_path"), _whole(folder) as aside:
                    made.rows.save_to_disk(aside / "rows")
                    _write_table(aside / "columns.parquet", made.columns)
                    (aside / "part.json").write_text(json.dumps({"documents": made.documents}))
            comm.barrier()
        else:
            logger.info("tokenized_path: data set %d was tokenized before", number + 1)
        return Part(
            rows=load_from_disk(folder / "rows"),
            columns=_read_table(folder / "columns.parquet"),
            documents=read_json(folder / "part.json")["documents"],
        )

    def write(self, copied: Copied, evaluation: dict[str, Dataset]) -> None:
        """Write the whole; ``evaluation`` are named data sets, for LLaMA-Factory alone."""
        comm.barrier()  # every rank has opened the parts, which are removed
        if comm.rank() == 0:
            held = {} if copied.held is None else {"validation": copied.held}
            with refusals(self.path, DataError, key="tokenized_path"):
                aside = self._parts / "whole"
                shutil.rmtree(aside, ignore_errors=True)
                DatasetDict({"train": copied.train, **held, **evaluation}).save_to_disk(aside)
                self._describe(aside, copied)
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if self.path.is_dir():
                    self.path.rmdir()  # it is empty
                os.replace(aside, self.path)
                shutil.rmtree(self._parts)
        comm.barrier()

    def annotate(self, copied: Copied) -> None:
        """Describe rows that LLaMA-Factory has written itself."""
        if comm.rank() == 0:
            with refusals(self.path, DataError, key="tokenized_path"):
                with_hashes(self._made_of)
                self._describe(self.path, copied)
        comm.barrier()

    def _describe(self, rows: Path, copied: Copied) -> None:
        """Write what is known of the rows in a folder beside them."""
        folder = (rows / SIDECAR).parent
        folder.mkdir(exist_ok=True)
        np.savez(
            folder / "rows.npz",
            source_of=copied.source_of,
            held_source_of=copied.held_source_of,
            lengths=copied.measures.lengths,
            supervised=copied.measures.supervised,
        )
        tables = {"columns": copied.columns, "held_columns": copied.held_columns}
        for name, dataset in tables.items():
            table = None if dataset is None else dataset.data.table
            _write_table(folder / f"{name}.parquet", table)
        documents = copied.documents_per_row
        about = {
            "format": _FORMAT,
            "made_of": self._made_of,
            "names": copied.names,
            "rows": len(copied.train),
            "holds_out": copied.held is not None,
            "fingerprint": copied.measures.fingerprint,
            "documents_per_row": None if documents is None else documents.tolist(),
            "columns": [] if copied.columns is None else copied.columns.column_names,
            "files": _sizes(rows),
        }
        with replacing(rows / SIDECAR) as file:
            file.write((json.dumps(about, indent=1) + "\n").encode())

    def read(self) -> Copied:
        """Return the whole, rows mapped into memory.

        Raises:
            DataError: It was made of other data, with other settings or another tokenizer, or its files were changed.
        """
        about = read_json(self.path / SIDECAR)
        if about.get("format") != _FORMAT:
            raise DataError(f"tokenized_path: {self.path} has format {about.get('format')!r}; this reads {_FORMAT}")
        lines = list(_changes(about["made_of"], self._made_of))
        if lines:
            raise DataError(told(str(self.path), lines))
        sizes = _sizes(self.path)
        changed = [name for name, size in about["files"].items() if sizes.get(name) != size]
        if changed:
            raise DataError(f"tokenized_path: {self.path / changed[0]} is not as it was written; remove the copy")
        rows = load_from_disk(self.path)
        folder = (self.path / SIDECAR).parent
        with np.load(folder / "rows.npz", allow_pickle=False) as arrays:
            found = dict(arrays)
        documents = about["documents_per_row"]
        columns, held_columns = (_read_table(folder / f"{name}.parquet") for name in ("columns", "held_columns"))
        return Copied(
            names=about["names"],
            train=rows["train"],
            source_of=found["source_of"],
            measures=Measures(
                lengths=found["lengths"], supervised=found["supervised"], fingerprint=about["fingerprint"]
            ),
            documents_per_row=None if documents is None else np.array(documents),
            columns=None if columns is None else Dataset(columns),
            held=rows["validation"] if about["holds_out"] else None,
            held_source_of=found["held_source_of"],
            held_columns=None if held_columns is None else Dataset(held_columns),
        )


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    tokenizer = [] if before["tokenizer"] == now["tokenizer"] else ["the tokenizer is another one"]
    return [*differences(before, now), *tokenizer]


def _sizes(folder: Path) -> dict[str, int]:
    """Return the size of each file of the rows."""
    return {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*.arrow"))}


class _whole:
    """A folder that appears under its name when it is finished."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._aside = folder, folder.with_name(f"{folder.name}.tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self._aside, ignore_errors=True)
        self._aside.mkdir(parents=True)
        return self._aside

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            os.replace(self._aside, self._folder)


def _write_table(path: Path, table: pa.Table | None) -> None:
    if table is not None:
        pq.write_table(table.replace_schema_metadata(None), path)


def _read_table(path: Path) -> pa.Table | None:
    return pq.read_table(path, memory_map=True) if path.is_file() else None
