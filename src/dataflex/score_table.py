"""The scores on disk: one parquet file, whole or absent, with its provenance in the file's metadata.

Columns: ``row`` (int64, place among the rows scored), ``dataset`` and ``domain`` (text), ``position`` (int64,
place in the data set's files, counted from 0), ``tokens`` and ``supervised_tokens`` (int64), then the methods' columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dataflex.errors import DataError, did_you_mean
from dataflex.method import ScoreFile
from dataflex.state import refusals, replacing

_FIXED = ("row", "dataset", "domain", "position", "tokens", "supervised_tokens")
_KEY = b"dataflex"
_FORMAT = 1
_DEPTH = 32


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """Scores of N rows."""

    datasets: tuple[str, ...]  # names of the data sets
    dataset_of: NDArray[np.int64]  # index into datasets of each row [N]
    domains: tuple[str, ...]  # names of the domains
    domain_of: NDArray[np.int64]  # index into domains of each row [N]
    position: NDArray[np.int64]  # place of each row in its data set's files [N]
    tokens: NDArray[np.int64]  # number of tokens of each row [N]
    supervised_tokens: NDArray[np.int64]  # number of tokens with a loss [N]
    columns: Mapping[str, NDArray[Any]]  # the methods' columns by name, each [N]; NaN where there is no value
    provenance: Mapping[str, Any]  # what the scores were computed from; JSON values

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.position)


def is_scores(path: Path) -> bool:
    """Whether a file is one that ``write_scores`` wrote."""
    try:
        return _KEY in (pq.read_schema(path).metadata or {})
    except Exception:  # noqa: BLE001 - whatever it is, it is none
        return False


def write_scores(path: Path, table: ScoreTable) -> None:
    """Write the file, whole or not at all; ranks of -1 (not chosen) become null.

    Raises:
        DataError: The operating system refused, with its reason.
    """

    def named(names: Sequence[str], index: NDArray[np.int64]) -> Any:
        return pa.DictionaryArray.from_arrays(pa.array(index.astype(np.int32)), pa.array(list(names)))

    arrays: dict[str, Any] = {
        "row": np.arange(table.num_rows, dtype=np.int64),
        "dataset": named(table.datasets, table.dataset_of),
        "domain": named(table.domains, table.domain_of),
        "position": table.position,
        "tokens": table.tokens,
        "supervised_tokens": table.supervised_tokens,
    }
    for name, values in table.columns.items():
        arrays[name] = pa.array(values, mask=values < 0 if np.issubdtype(values.dtype, np.integer) else None)
    content = pa.table(arrays).replace_schema_metadata(
        {_KEY: json.dumps({"format": _FORMAT, **table.provenance}, sort_keys=True)}
    )
    with refusals(path, DataError, key="--out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, None) as file:
            pq.write_table(content, file)


def read_scores(path: Path) -> ScoreTable:
    """Read what ``write_scores`` wrote; null ranks become NaN.

    Raises:
        DataError: No such file, or not one of ours.
    """
    try:
        content = pq.read_table(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; scores are written by 'dataflex score'") from error
    except Exception as error:  # arrow has many kinds of its own
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path}: cannot be read as parquet: {first[:300]}") from error
    told = (content.schema.metadata or {}).get(_KEY)
    if told is None or not set(_FIXED) <= set(content.column_names):
        raise DataError(f"{path}: is not a file of scores that 'dataflex score' wrote")
    try:
        provenance = json.loads(told)
        datasets, dataset_of = _names(content.column("dataset"))
        _check(provenance, datasets)
        domains, domain_of = _names(content.column("domain"))
        return ScoreTable(
            datasets=datasets,
            dataset_of=dataset_of,
            domains=domains,
            domain_of=domain_of,
            position=_whole(content, "position"),
            tokens=_whole(content, "tokens"),
            supervised_tokens=_whole(content, "supervised_tokens"),
            columns={name: _floats(content.column(name)) for name in content.column_names if name not in _FIXED},
            provenance=provenance,
        )
    except Exception as error:  # a column of another type, in one of the many ways in which arrow says so
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise DataError(f"{path}: is damaged, or of another version: {kind}{str(error)[:300]}") from error


def score_column(table: ScoreTable, wanted: ScoreFile, fingerprint: str | None = None) -> NDArray[np.float64]:
    """Return a column of scores [N], NaN where there is none.

    Raises:
        DataError: No such column, or none of its scores is finite; or the scores are of other rows than those that
            ``fingerprint`` names.
    """
    told = f"scores in {wanted.file}"
    if wanted.column not in table.columns:
        known = sorted(table.columns)
        raise DataError(
            f"{told}: no column {wanted.column!r}{did_you_mean(wanted.column, known)} (columns: {', '.join(known)})"
        )
    values = np.asarray(table.columns[wanted.column], dtype=np.float64)
    if not np.isfinite(values).any():
        raise DataError(f"{told}: no row has a finite number in column {wanted.column!r}")
    of = table.provenance["data"].get("fingerprint")
    if fingerprint is not None and of != fingerprint:
        raise DataError(
            f"{told}: they are of {table.num_rows:,} rows of {', '.join(table.datasets)} (fingerprint {of}), not of "
            f"those that are trained on ({fingerprint}). Score the data again as it is trained on: the same data sets, "
            "tokenizer, template, cutoff_len and max_samples, without val_size"
        )
    return values


def _check(provenance: Any, datasets: Sequence[str]) -> None:
    """Raise ``ValueError`` unless the JSON object in the file holds what 'dataflex select' reads of it."""
    if not isinstance(provenance, dict) or provenance.get("format") != _FORMAT:
        raise ValueError(f"its metadata have not format {_FORMAT}, which this version reads")
    level: list[Any] = [provenance]
    for _ in range(_DEPTH):
        inner = [item.values() if isinstance(item, Mapping) else item for item in level]
        level = [item for items in inner for item in items if isinstance(item, Mapping | list)]
    data = provenance.get("data")
    sources: Any = data.get("sources") if isinstance(data, Mapping) else None
    if level:
        raise ValueError("its metadata are nested without end")
    if not _is_list(provenance.get("methods"), name=str) or not provenance["methods"]:
        raise ValueError("it does not name the methods that gave the scores")
    if not isinstance(provenance.get("config"), Mapping):
        raise ValueError("it does not hold the configuration that was scored with")
    if not _is_list(sources, name=str, rows_read=int):
        raise ValueError("it does not say which data sets the rows are of")
    names = [source["name"] for source in sources]
    if len(set(names)) < len(names) or not set(datasets) <= set(names):
        raise ValueError("rows are of data sets that it does not describe, or describes twice")
    if not all(isinstance(source.get("entry"), Mapping | None) for source in sources):
        raise ValueError("the entry of a data set is no mapping")
    if not all(_is_list(source.get("files"), path=str, size=int, blake2b=str) for source in sources):
        raise ValueError("it does not say which files the rows are from")


def _is_list(value: Any, **keys: type) -> bool:
    """Whether a value is a list of objects with such keys."""
    return isinstance(value, list) and all(
        isinstance(item, Mapping) and all(type(item.get(key)) is kind for key, kind in keys.items()) for item in value
    )


def _names(column: Any) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the names in a text column and the index of each row's."""
    if column.null_count:
        raise ValueError("a row without a data set or a domain")
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    encoded = encoded.unify_dictionaries().combine_chunks()
    array = encoded.chunk(0) if isinstance(encoded, pa.ChunkedArray) else encoded
    names = tuple(array.dictionary.to_pylist())
    if not all(isinstance(name, str) for name in names):
        raise ValueError("names of data sets and domains must be text")
    return names, array.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def _whole(content: Any, name: str) -> NDArray[np.int64]:
    column = content.column(name)
    if not pa.types.is_integer(column.type) or column.null_count:
        raise ValueError(f"column {name} is not of whole numbers")
    values: NDArray[np.int64] = column.to_numpy().astype(np.int64)
    if len(values) and values.min() < 0:
        raise ValueError(f"column {name} holds {values.min()}")
    return values


def _floats(column: Any) -> NDArray[Any]:
    values = column.to_numpy()
    return values if np.issubdtype(values.dtype, np.floating) else values.astype(np.float64)
