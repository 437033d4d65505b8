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

from dataflex.errors import DataError, UnsupportedError

_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Identity of one file: path, size in bytes and hash (blake2b, 32 hex digits)."""

    path: str
    size: int
    blake2b: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Read a file once."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return cls(path=str(path), size=path.stat().st_size, blake2b=digest)


def file_records(path: Path | None) -> list[FileRecord]:
    """Return the identities of a data set's files in the order in which they are read; none for a remote one."""
    if path is None:
        return []
    return [FileRecord.of(file) for file in (sorted(path.iterdir()) if path.is_dir() else [path])]


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
