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

from dataflex.errors import DataError
from dataflex.state import replacing

_DEPTH = 32


def provenance_problem(provenance: Mapping[str, Any], datasets: Sequence[str]) -> str:
    """Return what is wrong with it, or an empty text.

    Args:
        provenance: The JSON object in the file.
        datasets: Data sets that rows are of.
    """
    if _deep(provenance):
        return "what it says of the scores is nested without end"
    methods, config = provenance.get("methods"), provenance.get("config")
    if not _list_of(methods, name=str) or not methods:
        return "it does not name the methods that gave the scores"
    if not isinstance(config, Mapping):
        return "it does not hold the configuration that was scored with"
    data = provenance.get("data")
    sources = data.get("sources") if isinstance(data, Mapping) else None
    if not _list_of(sources, name=str, rows_read=int):
        return "it does not say which data sets the rows are of"
    assert isinstance(sources, list)
    names = [source["name"] for source in sources]
    if len(set(names)) < len(names) or not set(datasets) <= set(names):
        return "rows are of data sets that it does not describe, or describes twice"
    for source in sources:
        entry = source.get("entry")
        if not (entry is None or isinstance(entry, Mapping)):
            return "the entry of a data set is no mapping"
        if not _list_of(source.get("files"), path=str, size=int, blake2b=str):
            return "it does not say which files the rows are from"
    return ""


def _list_of(value: Any, **keys: type) -> bool:
    """Whether a value is a list of objects with such keys."""
    return isinstance(value, list) and all(
        isinstance(item, Mapping) and all(type(item.get(key)) is kind for key, kind in keys.items()) for item in value
    )


def _deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, Mapping | list)
            for inner in (item.values() if isinstance(item, Mapping) else item)
        ]
    return bool(level)


FIXED_COLUMNS = ("row", "dataset", "domain", "position", "tokens", "supervised_tokens")
_KEY = b"dataflex"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """Scores of N rows.

    Attributes:
        datasets: Names of the data sets.
        dataset_of: Index into ``datasets`` of each row [N].
        domains: Names of the domains.
        domain_of: Index into ``domains`` of each row [N].
        position: Place of each row in its data set's files [N].
        tokens: Tokens of each row [N].
        supervised_tokens: Those that a loss is taken of [N].
        columns: The methods' columns by name, each [N]; NaN where there is no value.
        provenance: What the scores were computed from; JSON values.
    """

    datasets: tuple[str, ...]
    dataset_of: NDArray[np.int64]
    domains: tuple[str, ...]
    domain_of: NDArray[np.int64]
    position: NDArray[np.int64]
    tokens: NDArray[np.int64]
    supervised_tokens: NDArray[np.int64]
    columns: Mapping[str, NDArray[Any]]
    provenance: Mapping[str, Any]

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
    """Write the file aside and rename it, so that it is whole or absent.

    Raises:
        DataError: The operating system refused, with its reason.
    """
    arrays: dict[str, Any] = {
        "row": np.arange(table.num_rows, dtype=np.int64),
        "dataset": _named(table.datasets, table.dataset_of),
        "domain": _named(table.domains, table.domain_of),
        "position": table.position,
        "tokens": table.tokens,
        "supervised_tokens": table.supervised_tokens,
        **{name: _nullable(values) for name, values in table.columns.items()},
    }
    content = pa.table(arrays).replace_schema_metadata(
        {_KEY: json.dumps({"format": _FORMAT, **table.provenance}, sort_keys=True)}
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, None) as file:
            pq.write_table(content, file)
    except OSError as error:
        raise DataError(f"--out: cannot write {path}: {error.strerror or error}") from error


def _named(names: tuple[str, ...], index: NDArray[np.int64]) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array(index.astype(np.int32)), pa.array(list(names)))


def _names(column: Any) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the names in a text column and the index of each row's."""
    if column.null_count:
        raise ValueError("a row without a data set or a domain")
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    encoded = encoded.unify_dictionaries().combine_chunks()
    array = encoded.chunk(0) if isinstance(encoded, pa.ChunkedArray) else encoded
    names = tuple(array.dictionary.to_pylist())
    if not all(isinstance(name, str) for name in names):
        raise TypeError("names of data sets and domains must be text")
    return names, array.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def _nullable(values: NDArray[Any]) -> Any:
    """Return an arrow array in which ranks of -1 (not chosen) are null."""
    if np.issubdtype(values.dtype, np.integer):
        return pa.array(values, mask=values < 0)
    return pa.array(values)


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
    missing = [name for name in FIXED_COLUMNS if name not in content.column_names]
    if told is None or missing:
        raise DataError(f"{path}: is not a file of scores that 'dataflex score' wrote")
    try:
        provenance = json.loads(told)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is damaged: what it says of the scores cannot be read: {error}") from error
    if not isinstance(provenance, dict) or provenance.get("format") != _FORMAT:
        found = provenance.get("format") if isinstance(provenance, dict) else type(provenance).__name__
        raise DataError(f"{path}: has format {found!r}; this version reads {_FORMAT}")
    try:
        table = _table(content, provenance)
        problem = provenance_problem(provenance, table.datasets)
    except Exception as error:  # a column of another type, in one of the many ways in which arrow says so
        raise DataError(f"{path}: is damaged: {type(error).__name__}: {str(error)[:300]}") from error
    if problem:
        raise DataError(f"{path}: is damaged: {problem}")
    return table


def _table(content: Any, provenance: Mapping[str, Any]) -> ScoreTable:
    datasets, dataset_of = _names(content.column("dataset"))
    domains, domain_of = _names(content.column("domain"))

    def whole(name: str) -> NDArray[np.int64]:
        column = content.column(name)
        if not pa.types.is_integer(column.type) or column.null_count:
            raise ValueError(f"column {name} is not of whole numbers")
        values: NDArray[np.int64] = column.to_numpy().astype(np.int64)
        if len(values) and values.min() < 0:
            raise ValueError(f"column {name} holds {values.min()}")
        return values

    return ScoreTable(
        datasets=datasets,
        dataset_of=dataset_of,
        domains=domains,
        domain_of=domain_of,
        position=whole("position"),
        tokens=whole("tokens"),
        supervised_tokens=whole("supervised_tokens"),
        columns={name: _floats(content.column(name)) for name in content.column_names if name not in FIXED_COLUMNS},
        provenance=provenance,
    )


def _floats(column: Any) -> NDArray[Any]:
    values = column.to_numpy()
    return values if np.issubdtype(values.dtype, np.floating) else values.astype(np.float64)
