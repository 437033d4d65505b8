"""The files of a data set: their identity, and the rows in them as they stand, byte for byte.

Formats: ``.jsonl`` (or ``.json`` with an object a line), ``.json`` with one array, ``.txt`` (a row a line),
``.csv`` and ``.parquet``. Rows are counted as the data sets library counts them: blank lines of JSON and CSV
files are no rows, those of text files are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
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
    """The rows of a data set's files, one file after the other; the files must have one format."""

    def __init__(self, paths: Sequence[Path]) -> None:
        endings = sorted({path.suffix.lower() for path in paths})
        self.ending = endings[0]
        self._rows: list[bytes] = []
        self._table: Any = None
        self._heads: set[bytes] = set()
        self._array = False
        if len(endings) > 1:
            raise UnsupportedError(f"{paths[0].parent}: files of several formats ({', '.join(endings)})")
        if self.ending == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                self._table = pa.concat_tables([pq.read_table(path) for path in paths])
            except Exception as error:  # arrow has many kinds of its own
                raise DataError(f"{paths[0]}: cannot be read as parquet: {str(error)[:300]}") from error
            return
        for path in paths:
            content = path.read_bytes().removeprefix(_BYTE_ORDER_MARK)
            if self.ending == ".txt":
                self._rows += content.splitlines()
            elif self.ending == ".csv":
                records = _csv_records(content)
                self._heads.update(records[:1])
                self._rows += records[1:]
            elif self.ending not in (".json", ".jsonl"):
                raise UnsupportedError(f"{path}: rows of {self.ending or 'such'} files cannot be written back")
            elif content.lstrip().startswith(b"["):
                self._array = True
                self._rows += _array_items(content, path)
            else:
                self._rows += [line.rstrip(b"\r") for line in content.split(b"\n") if line.strip()]
        if len(self._heads) > 1:
            raise UnsupportedError(f"{paths[0].parent}: its files have different header lines")

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self._rows) if self._table is None else self._table.num_rows

    def row(self, position: int) -> bytes:
        """Return a row as it stands in its file; one of a table as JSON."""
        if self._table is None:
            return self._rows[position]
        return json.dumps(self._table.slice(position, 1).to_pylist()[0], default=str, ensure_ascii=False).encode()

    def write(self, target: Path, positions: Sequence[int]) -> None:
        """Write the rows at ``positions``, in that order, as one file of the same format."""
        if self._table is not None:
            import pyarrow.parquet as pq

            pq.write_table(self._table.take(list(positions)), target)
            return
        chosen = [self._rows[position] for position in positions]
        if self._array:
            target.write_bytes(b"[\n  " + b",\n  ".join(chosen) + b"\n]\n")
        else:
            target.write_bytes(b"".join(line + b"\n" for line in [*self._heads, *chosen]))


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


def _csv_records(content: bytes) -> list[bytes]:
    """Split at line ends that are not inside quotes; a quote written twice counts as two."""
    records: list[bytes] = []
    pending: list[bytes] = []
    quotes = 0
    for line in content.split(b"\n"):
        pending.append(line)
        quotes += line.count(b'"')
        if quotes % 2 == 0:
            records.append(b"\n".join(pending).rstrip(b"\r"))
            pending, quotes = [], 0
    return [record for record in records if record.strip()]
