"""The files of a data set: their identity, and the rows in them as they stand, byte for byte.

Formats: ``.jsonl`` (or ``.json`` with an object a line), ``.json`` with one array, ``.txt`` (a row a line),
``.csv`` and ``.parquet``. Rows are counted as the data sets library counts them: blank lines of JSON and CSV
files are no rows, those of text files are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.config.data import files_of
from dataflex.errors import DataError, UnsupportedError

_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLOCK = 1 << 26
_BLOCK_BYTES = 1 << 22
_TAKEN = 1024
MOST_READ_BYTES = 2 << 30
"""Bytes of a file up to which a training run reads it through for the lines and the hash of its rows."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Identity of one file: path, size in bytes and hash (blake2b, 32 hex digits; empty for one that is not read)."""

    path: str
    size: int
    blake2b: str

    @classmethod
    def of(cls, path: Path, *, most_bytes: float = np.inf) -> FileRecord:
        """Read a file once, unless it has more than ``most_bytes``."""
        size, digest = path.stat().st_size, ""
        if size <= most_bytes:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return cls(path=str(path), size=size, blake2b=digest)

    def changed(self) -> bool:
        """Whether the file is another by now."""
        return FileRecord.of(Path(self.path), most_bytes=np.inf if self.blake2b else 0) != self


def file_records(path: Path | None) -> list[FileRecord]:
    """Return the identities of a data set's files in the order in which they are read; none for a remote one."""
    if path is None:
        return []
    return [FileRecord.of(file) for file in files_of(path)]


def row_lines(path: Path) -> tuple[int | None, NDArray[np.int64] | None]:
    """Return the number of rows of a file, and the line of each, counted from 1.

    None for the lines of formats whose rows are no lines, and for both where counting would take long.
    """
    ending = path.suffix.lower()
    if ending == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_metadata(path).num_rows, None
    if ending not in (".json", ".jsonl", ".txt") or path.stat().st_size > MOST_READ_BYTES:
        return None, None
    numbers, last, left = [np.zeros(0, dtype=np.int64)], 0, b""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            if not last and not left and ending != ".txt":
                if block.removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"["):
                    return None, None
            content, newline, left = (left + block).rpartition(b"\n")
            if newline:
                numbers.append(last + _filled(content + newline, blank=ending == ".txt"))
                last += content.count(b"\n") + 1
    if left:
        numbers.append(last + _filled(left + b"\n", blank=ending == ".txt"))
    found = np.concatenate(numbers)
    return len(found), found


def _filled(content: bytes, *, blank: bool) -> NDArray[np.int64]:
    """Return which lines hold more than spaces, counted from 1; ``blank``: all of them. It ends with a line end."""
    values = np.frombuffer(content, dtype=np.uint8)
    starts = np.concatenate([[0], np.flatnonzero(values == ord("\n"))[:-1] + 1])
    if blank:
        return np.arange(1, len(starts) + 1)
    return np.flatnonzero(np.logical_or.reduceat(values > ord(" "), starts)) + 1


class SourceRows:
    """The rows of a data set's files, one file after the other; the files must have one format.

    Files may be larger than memory: those of lines are mapped, with 16 bytes for the place of each row, and tables are
    read in batches. A JSON array alone is read whole.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        endings = sorted({path.suffix.lower() for path in paths})
        self.ending = endings[0]
        self._contents: list[NDArray[np.uint8]] = []
        self._spans: list[NDArray[np.int64]] = []
        self._table: Any = None
        self._heads: set[bytes] = set()
        self._array = False
        if len(endings) > 1:
            raise UnsupportedError(f"{paths[0].parent}: files of several formats ({', '.join(endings)})")
        if self.ending == ".parquet":
            self._table = _parquet(paths)
            self._ends = np.array([self._table.count_rows()])
            return
        if self.ending not in (".json", ".jsonl", ".txt", ".csv"):
            raise UnsupportedError(f"{paths[0]}: rows of {self.ending or 'such'} files cannot be written back")
        for path in paths:
            content = np.asarray(np.memmap(path, mode="r")) if path.stat().st_size else np.zeros(0, dtype=np.uint8)
            spans = _line_spans(content, self.ending)
            if self.ending == ".csv":
                self._heads.update(_cut(content, span) for span in spans[:1])
                spans = spans[1:]
            elif self.ending != ".txt" and len(spans) and _cut(content, spans[0]).lstrip().startswith(b"["):
                self._array = True
                items = _array_items(content.tobytes().removeprefix(_BYTE_ORDER_MARK), path)
                content = np.frombuffer(b"".join(items), dtype=np.uint8)
                ends = np.cumsum([0, *map(len, items)])
                spans = np.stack([ends[:-1], ends[1:]], axis=1)
            self._contents.append(content)
            self._spans.append(spans)
        self._ends = np.cumsum([len(spans) for spans in self._spans])
        if len(self._heads) > 1:
            raise UnsupportedError(f"{paths[0].parent}: its files have different header lines")

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return int(self._ends[-1])

    def row(self, position: int) -> bytes:
        """Return a row as it stands in its file; one of a table as JSON."""
        if self._table is not None:
            return next(self.each(np.array([position])))
        which = int(np.searchsorted(self._ends, position, side="right"))
        return _cut(self._contents[which], self._spans[which][position - self._ends[which]])  # counted from its end

    def each(self, positions: NDArray[np.int64]) -> Iterator[bytes]:
        """Yield the rows at ``positions`` as ``row`` does, those of tables read together."""
        if self._table is None:
            yield from map(self.row, positions.tolist())
            return
        for start in range(0, len(positions), _TAKEN):
            for found in self._table.take(positions[start : start + _TAKEN]).to_pylist():
                yield json.dumps(found, default=str, ensure_ascii=False).encode()

    def write(self, target: Path, positions: Sequence[int]) -> None:
        """Write the rows at ``positions``, in that order, as one file of the same format.

        Rows of tables that are not in the order of the files are held in memory.
        """
        if self._table is not None:
            _write_parquet(self._table, target, np.asarray(positions, dtype=np.int64))
            return
        before, after = (b"[\n  ", b"\n]\n") if self._array else (b"".join(line + b"\n" for line in self._heads), b"")
        between = b",\n  " if self._array else b"\n"
        with target.open("wb") as out:
            out.write(before)
            for number, position in enumerate(positions):
                out.write((between if number else b"") + self.row(position))
            out.write(after if self._array else b"\n" if len(positions) else b"")


def _cut(content: NDArray[np.uint8], span: NDArray[np.int64]) -> bytes:
    return content[span[0] : span[1]].tobytes().rstrip(b"\r")


def _line_spans(content: NDArray[np.uint8], ending: str) -> NDArray[np.int64]:
    """Return where each row starts and ends in a file of lines [n, 2]; blank lines are rows of text files alone.

    Line ends inside quotes of a CSV file end no row; a quote written twice counts as two.
    """
    start = len(_BYTE_ORDER_MARK) if content[:3].tobytes() == _BYTE_ORDER_MARK else 0
    found, filled, quotes, held = [np.array([start - 1])], [np.zeros(1, dtype=np.int64)], 0, 0
    for first in range(start, len(content), _BLOCK_BYTES):
        part = content[first : first + _BLOCK_BYTES]
        ends = part == ord("\n")
        if ending == ".txt":
            following = content[first + 1 : first + 1 + len(part)]
            ends[: len(following)] |= (part[: len(following)] == ord("\r")) & (following != ord("\n"))
            ends[len(following) :] |= part[len(following) :] == ord("\r")
        places, marks = np.flatnonzero(ends), np.flatnonzero(part == ord('"'))
        if ending == ".csv":
            places = places[(np.searchsorted(marks, places) + quotes) % 2 == 0]
        inside = np.cumsum(part > ord(" "), dtype=np.int64)
        found.append(places + first)
        filled.append(inside[places] + held)
        held, quotes = held + int(inside[-1]), quotes + len(marks)
    stops, count = np.concatenate(found), np.concatenate(filled)
    if stops[-1] < len(content) - 1 and not (ending == ".csv" and quotes % 2):
        stops, count = np.append(stops, len(content)), np.append(count, held)
    spans = np.stack([stops[:-1] + 1, stops[1:]], axis=1)
    return spans if ending == ".txt" else spans[np.diff(count) > 0]


def _parquet(paths: Sequence[Path]) -> Any:
    """Return parquet files as one data set, which is read in parts."""
    import pyarrow.dataset as pd
    import pyarrow.parquet as pq

    try:
        schemas = [pq.read_schema(path) for path in paths]
    except Exception as error:  # arrow has many kinds of its own
        raise DataError(f"{paths[0]}: cannot be read as parquet: {str(error)[:300]}") from error
    for path, schema in zip(paths, schemas, strict=True):
        if schema != schemas[0]:
            raise DataError(f"{path}: cannot be read as parquet: its columns are not those of {paths[0]}")
    return pd.dataset([str(path) for path in paths], schema=schemas[0], format="parquet")


def _write_parquet(table: Any, target: Path, positions: NDArray[np.int64]) -> None:
    import pyarrow.parquet as pq

    if (np.diff(positions) < 0).any():
        rows, places = np.unique(positions, return_inverse=True)
        pq.write_table(table.take(rows).take(places), target)
        return
    first = 0
    with pq.ParquetWriter(target, table.schema) as out:
        for batch in table.to_batches():
            here = positions[np.searchsorted(positions, first) : np.searchsorted(positions, first + len(batch))] - first
            if len(here):
                out.write_batch(batch.take(here))
            first += len(batch)


def _array_items(content: bytes, path: Path) -> list[bytes]:
    """Return the text of each item of a JSON array."""
    decoder, items = json.JSONDecoder(), []
    try:
        text = content.decode("utf-8")
        place = _skip(text, _skip(text, 0) + 1)
        while text[place] != "]":
            start = place
            _, place = decoder.raw_decode(text, start)
            items.append(text[start:place].encode("utf-8"))
            place = _skip(text, place)
            if text[place] == ",":
                place = _skip(text, place + 1)
            elif text[place] != "]":
                raise ValueError(f"expected ',' at character {place}")
    except (ValueError, IndexError, RecursionError) as error:
        raise DataError(f"{path}: malformed JSON array: {error}") from error
    return items


def _skip(text: str, place: int) -> int:
    match = _JSON_SPACE.match(text, place)
    assert match is not None
    return match.end()
