"""Target rows that also lie in the training pool: the same token ids after the pipeline.

Rows are compared by length and sum of their token ids first, for the whole pool in arrays; only rows that
agree in both with a target row are compared token by token, so that nothing is found by chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Rows
from dataflex.train.row_space import TOKEN_COLUMNS, flat

__all__ = ["Leak", "find_leaks"]

_CHUNK_ROWS = 20_000
_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Leak:
    """What one target shares with the training pool.

    Attributes:
        target_rows: Rows of the target that lie in the pool, ascending.
        pool_rows: Training rows that are one of them, ascending.
        examples: The first pairs of target row and training row.
        of: Rows of the target.
    """

    target_rows: Rows
    pool_rows: Rows
    examples: tuple[tuple[int, int], ...]
    of: int

    @property
    def num_rows(self) -> int:
        """Rows of the target that lie in the pool."""
        return len(self.target_rows)

    def describe(self) -> dict[str, Any]:
        """Return the JSON form that goes into the record."""
        return {
            "target_rows": self.num_rows,
            "of": self.of,
            "training_rows": len(self.pool_rows),
            "examples": [{"target_row": row, "training_row": pool_row} for row, pool_row in self.examples],
        }

    def tell(self) -> str:
        """Say it in one line."""
        pairs = ", ".join(f"row {row} = training row {pool_row}" for row, pool_row in self.examples)
        return f"{self.num_rows:,} of its {self.of:,} rows also lie in the training pool ({pairs})"


def _chunks(dataset: Any) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """Yield row offsets [n + 1] and token ids of a tokenized data set, in order."""
    name = next(name for name in TOKEN_COLUMNS if name in dataset.column_names)
    for table in dataset.select_columns([name]).with_format("arrow").iter(batch_size=_CHUNK_ROWS):
        yield flat(table.column(name))


def _keys(offsets: NDArray[np.int64], tokens: NDArray[Any]) -> NDArray[np.uint64]:
    """Return a number for each row that equal rows share: of its length and the sum of its token ids."""
    running = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])
    sums = (running[offsets[1:]] - running[offsets[:-1]]).astype(np.uint64)
    return (np.diff(offsets).astype(np.uint64) << np.uint64(40)) ^ sums


def find_leaks(train: Any, targets: Mapping[str, Any]) -> dict[str, Leak]:
    """Return, for every target, which of its rows are training rows too.

    Args:
        train: Tokenized training set (``datasets.Dataset``).
        targets: Tokenized targets by name.
    """
    if not targets:
        return {}
    held: dict[bytes, list[tuple[str, int]]] = {}
    keys: list[NDArray[np.uint64]] = []
    sizes = dict.fromkeys(targets, 0)
    for name, dataset in targets.items():
        for offsets, tokens in _chunks(dataset):
            keys.append(_keys(offsets, tokens))
            for row in range(len(offsets) - 1):
                content = _content(offsets, tokens, row)
                held.setdefault(content, []).append((name, sizes[name] + row))
            sizes[name] += len(offsets) - 1
    wanted = np.unique(np.concatenate(keys)) if keys else np.zeros(0, dtype=np.uint64)
    pairs: dict[str, list[tuple[int, int]]] = {name: [] for name in targets}
    start = 0
    for offsets, tokens in _chunks(train):
        for row in np.flatnonzero(np.isin(_keys(offsets, tokens), wanted)).tolist():
            for name, target_row in held.get(_content(offsets, tokens, row), ()):
                pairs[name].append((target_row, start + row))
        start += len(offsets) - 1
    return {name: _leak(found, sizes[name]) for name, found in pairs.items()}


def _content(offsets: NDArray[np.int64], tokens: NDArray[Any], row: int) -> bytes:
    return np.ascontiguousarray(tokens[offsets[row] : offsets[row + 1]], dtype=np.int64).tobytes()


def _leak(pairs: list[tuple[int, int]], of: int) -> Leak:
    rows = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return Leak(
        target_rows=np.unique(rows[:, 0]),
        pool_rows=np.unique(rows[:, 1]),
        examples=tuple(pairs[:_EXAMPLES]),
        of=of,
    )
