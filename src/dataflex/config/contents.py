"""What a local data file holds: rows, columns, and why it cannot be read. Nothing is tokenized.

Follows the readers of the ``datasets`` library: JSON objects one after the other or in one array, a type for each
column, CSV with a header line, a row for each line of text. Of JSON beyond a moderate size only the lines are counted,
so that its columns are not known; rows of CSV and Arrow files are not counted.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = ["Contents", "contents_of"]

_MOST_READ_BYTES = 32 << 20
_MOST_COUNTED_BYTES = 256 << 20
_SPACE = " \t\n\r"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What was found in a file.

    Attributes:
        rows: Number of rows; None where that is not quick to know.
        columns: Names of the columns; None where they are not known.
        problem: Why it cannot be read, or an empty string.
    """

    rows: int | None = None
    columns: frozenset[str] | None = None
    problem: str = ""


def contents_of(path: Path) -> dict[Path, Contents]:
    """Return what the files of a data set hold, by file, in the order of their names.

    Remembered while size and time of change stay the same. The files are read through only where all of them together
    are of moderate size.
    """
    found: dict[Path, Contents] = {}
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    try:
        states = [file.stat() for file in files]
        through = sum(state.st_size for state in states) <= _MOST_READ_BYTES
        for file, state in zip(files, states, strict=True):
            found[file] = _contents(file, state.st_size, state.st_mtime_ns, through)
    except OSError as error:
        found[Path(str(error.filename or path))] = Contents(problem=f"cannot be read: {error.strerror}")
    return found


@lru_cache(maxsize=256)
def _contents(file: Path, size: int, changed: int, through: bool) -> Contents:
    ending = file.suffix
    if size == 0:
        return Contents(rows=0, columns=frozenset())
    if ending == ".parquet":
        return _parquet(file)
    try:
        if ending == ".csv":
            return _csv(file)
        if ending == ".txt":
            rows = sum(1 for _ in _lines(file)) if size <= _MOST_COUNTED_BYTES else None
            return Contents(rows=rows, columns=frozenset({"text"}))
        if ending not in (".json", ".jsonl"):
            return Contents()
        return _json(file.read_bytes().decode("utf-8-sig")) if through else _large_json(file, size)
    except UnicodeDecodeError as error:
        return Contents(problem=f"is not UTF-8 text (byte {error.start:,})")
    except (RecursionError, ValueError):
        return Contents()  # deeper, or of longer numbers, than Python reads: the loader may do better


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        yield from stream


def _large_json(file: Path, size: int) -> Contents:
    first = next((line for line in _lines(file) if line.strip()), b"")
    if size > _MOST_COUNTED_BYTES or not _is_object(first):
        return Contents()
    return Contents(rows=sum(1 for line in _lines(file) if line.strip()))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _json(text: str) -> Contents:
    """Read an array of objects, or objects one after the other."""
    if text.lstrip(_SPACE).startswith("["):
        try:
            items = json.loads(text, strict=False)
        except json.JSONDecodeError as error:
            return Contents(problem=f"is malformed JSON at line {error.lineno:,}: {error.msg}")
        return _rows([(f"item {i:,}", item) for i, item in enumerate(items, start=1)])
    found: list[tuple[str, Any]] = []
    at, line, spans = 0, 1, False
    decoder = json.JSONDecoder()
    while True:
        while at < len(text) and text[at] in _SPACE:
            line += text[at] == "\n"
            at += 1
        if at == len(text):
            told = _rows(found)  # objects of several lines may be cut where a reader's block ends
            return replace(told, rows=None) if spans else told
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            return Contents(problem=f"is malformed JSON at line {error.lineno:,}: {error.msg}")
        if not isinstance(value, dict):
            return Contents(problem=f"line {line:,} holds {_kind(value)} where an object {{...}} is expected")
        found.append((f"line {line:,}", value))
        lines = text.count("\n", at, end)
        spans, line = spans or lines > 0, line + lines
        at = end


def _rows(items: list[tuple[str, Any]]) -> Contents:
    """Return the columns of rows that are told as ``line 3`` and the like; every column must be of one type."""
    if any(not isinstance(item, dict) for _, item in items):
        return Contents(rows=len(items))
    seen: dict[str, tuple[str, str]] = {}
    columns: set[str] = set()
    for place, row in items:
        columns.update(row)
        for name, value in row.items():
            kind = _kind(value)
            if value is None or seen.setdefault(name, (kind, place))[0] == kind:
                continue
            before, first = seen[name]
            return Contents(problem=f"{name!r} is {before} in {first} and {kind} in {place}; a column has one type")
    return Contents(rows=len(items), columns=frozenset(columns))


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else "a mapping" if isinstance(value, Mapping) else "a list"


def _csv(file: Path) -> Contents:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream)
        try:
            head, second = next(reader, []), next(reader, None)
        except csv.Error as error:
            return Contents(problem=f"is malformed CSV: {error}")
    return Contents(rows=0 if second is None else None, columns=frozenset(head))


def _parquet(file: Path) -> Contents:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(os.fspath(file)) as opened:
            return Contents(rows=opened.metadata.num_rows, columns=frozenset(opened.schema_arrow.names))
    except (pa.ArrowException, OSError) as error:
        return Contents(problem=f"is no readable Parquet: {str(error).splitlines()[0]}")
