"""Raw data columns that ride along with the rows, and where in the files a row stands.

Upstream name relied upon: ``llamafactory.data.loader.align_dataset`` (wrapped while loading, to see each source's raw
columns before they are dropped).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from llamafactory.data import loader as lf_loader
from numpy.typing import NDArray

from dataflex.config.data import find_sources
from dataflex.errors import ConfigError, DataError

__all__ = ["RawRows", "column", "raw_columns", "split_rows"]


@contextmanager
def raw_columns(wanted: bool, seen: list[Dataset]) -> Iterator[None]:
    """Keep a reference to every raw data set that LLaMA-Factory aligns while inside, if columns are wanted."""
    if not wanted:
        yield
        return
    original = lf_loader.align_dataset

    def keep(dataset: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(dataset)
        return original(dataset, *args, **kwargs)

    lf_loader.align_dataset = keep
    try:
        yield
    finally:
        lf_loader.align_dataset = original


def split_rows(total: int, size: int | float, seed: int, part: str = "train") -> NDArray[np.int64]:
    """Return the rows of one part of ``Dataset.train_test_split``, in its order, by letting it split positions."""
    positions = Dataset.from_dict({"row": np.arange(total, dtype=np.int64)})
    split = positions.train_test_split(test_size=size, seed=seed)
    return _values(split[part], "row").astype(np.int64)


def _values(dataset: Dataset, name: str) -> NDArray[Any]:
    # By way of arrow: the data sets' own numpy format imports a video reader that newer torchvisions lack.
    found = dataset.select_columns([name]).with_format("arrow")[:].column(name)
    if found.null_count == 0:
        return np.asarray(found.to_numpy())
    values = np.empty(len(found), dtype=object)  # numpy has no null: a missing number must not become a NaN
    values[:] = found.to_pylist()
    return values


@dataclass(frozen=True, kw_only=True)
class RawRows:
    """Rows as they were read from the files of several data sets, and which of them are meant, in order.

    Attributes:
        names: Names of the data sets.
        parts: Their raw rows.
        rows: Positions in the parts, one after the other [N].
        written: LLaMA-Factory's keys as the user wrote them, for telling places.
    """

    names: Sequence[str]
    parts: Sequence[Dataset]
    rows: NDArray[np.int64]
    written: Mapping[str, Any]

    def place(self, row: int) -> str:
        """Say where row ``row`` of those meant stands: data set, and the line of its file where that can be known."""
        ends = np.cumsum([len(part) for part in self.parts])
        raw = int(self.rows[row])
        which = int(np.searchsorted(ends, raw, side="right"))
        position = raw - (int(ends[which - 1]) if which else 0)
        name = self.names[which]
        sources, _ = find_sources([name], self.written, "dataset", Path())
        file = sources[0].path if sources else None
        drawn = bool(sources) and sources[0].num_samples is not None
        line = None if file is None or drawn else _line_of(file, position)
        if line is not None:
            return f"data set {name!r}, line {line:,} of {file}"
        told = " drawn by num_samples" if drawn else ""
        return f"data set {name!r}, row {position + 1:,} of {len(self.parts[which]):,}{told}"

    def check(self, key: str, name: str, values: NDArray[Any], refused: tuple[NDArray[np.bool_], str] | None) -> None:
        """Refuse values that cannot be used, by the place of the first.

        Args:
            key: Path of the key that asks for the column.
            name: The column.
            values: Its values [N].
            refused: Which of them cannot be used [N], and what they must be; None where all can.

        Raises:
            DataError: There are such values.
        """
        if refused is None or not refused[0].any():
            return
        bad, wanted = refused
        row = int(np.flatnonzero(bad)[0])
        others = f" (and {int(bad.sum()) - 1:,} more rows)" if bad.sum() > 1 else ""
        raise DataError(f"{key}: {self.place(row)}, has {name} = {_shown(values[row])}{others}; {wanted}")


def _shown(value: Any) -> str:
    plain = value.item() if isinstance(value, np.generic) else value
    return "null" if plain is None else repr(plain) if not isinstance(plain, bool) else str(plain).lower()


def _line_of(file: Path, position: int) -> int | None:
    """Return the line, counted from 1, of an object of a file that has one object a line; else None."""
    if file.suffix not in (".json", ".jsonl") or not file.is_file():
        return None
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if position:
                position -= 1
                continue
            try:
                return number if isinstance(json.loads(line), Mapping) else None
            except ValueError:
                return None
    return None


def column(name: str, raw: RawRows, num_rows: int) -> NDArray[Any]:
    """Return a raw column in the order of the rows meant [num_rows].

    Raises:
        ConfigError: A source lacks the column.
        DataError: Raw rows and tokenised rows do not match one to one.
    """
    if not raw.parts:
        raise DataError(f"column {name!r} is not at hand: the data was loaded already tokenised (tokenized_path)")
    for source, part in zip(raw.names, raw.parts, strict=False):
        if name not in part.column_names:
            known = ", ".join(part.column_names)
            raise ConfigError(f"column {name!r} is not in the data set {source!r} (columns found: {known})")
    if len(raw.rows) != num_rows:
        raise DataError(
            f"column {name!r}: {len(raw.rows):,} raw rows became {num_rows:,} training rows, so that its values cannot "
            "be matched. Turn packing off, and remove rows that LLaMA-Factory drops as invalid."
        )
    return np.concatenate([_values(part, name) for part in raw.parts])[raw.rows]
