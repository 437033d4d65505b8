"""The training row space: which rows there are, which domain each belongs to, and a fingerprint of all that.

Row ids are positions in the tokenized training set. A saved plan is only meaningful together with the
row space that it was made for, hence the fingerprint: a hash of every token and label, by source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Rows
from dataflex.plan.domains import Domains

__all__ = ["TOKEN_COLUMNS", "RowSpace", "TargetSpace", "flat", "measure"]

TOKEN_COLUMNS = ("input_ids", "chosen_input_ids")
_LABEL_COLUMNS = ("labels", "chosen_labels")
_HASHED = (
    "input_ids",
    "labels",
    "chosen_input_ids",
    "chosen_labels",
    "rejected_input_ids",
    "rejected_labels",
    "kl_input_ids",
    "kto_tags",
)
_CHUNK_ROWS = 20_000


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What one pass over a tokenized data set tells.

    Attributes:
        lengths: Tokens of each row [N].
        supervised: Supervised tokens of each row [N].
        fingerprint: Hash of all tokens and labels, 16 hex digits.
    """

    lengths: NDArray[np.int64]
    supervised: NDArray[np.int64]
    fingerprint: str


def flat(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return row offsets [n + 1] and flattened values of a list column."""
    array = column.combine_chunks()
    offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    values = array.values.slice(offsets[0], offsets[-1] - offsets[0]).to_numpy(zero_copy_only=False)
    return offsets - offsets[0], values


def measure(dataset: Any) -> Measures:
    """Read a tokenized data set once (``datasets.Dataset``), in chunks, without a Python object per row."""
    names = dataset.column_names
    tokens = next((name for name in TOKEN_COLUMNS if name in names), None)
    labels = next((name for name in _LABEL_COLUMNS if name in names), None)
    if tokens is None:
        raise DataError(f"the tokenized data set has no token column (found: {', '.join(names)})")
    digest = hashlib.blake2b(digest_size=8)
    lengths: list[NDArray[np.int64]] = []
    supervised: list[NDArray[np.int64]] = []
    columns = [name for name in _HASHED if name in names]
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=_CHUNK_ROWS):
        for name in columns:
            column = table.column(name)
            if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
                digest.update(np.asarray(column.to_pylist(), dtype=np.int64).tobytes())
                continue
            offsets, values = flat(column)
            digest.update(np.ascontiguousarray(offsets).tobytes())
            digest.update(np.ascontiguousarray(values, dtype=np.int64).tobytes())
            if name == tokens:
                lengths.append(np.diff(offsets))
                if labels is None:
                    supervised.append(np.diff(offsets))
            elif name == labels:
                running = np.concatenate([[0], np.cumsum(values != -100)])
                supervised.append(running[offsets[1:]] - running[offsets[:-1]])
    empty = np.zeros(0, dtype=np.int64)
    return Measures(
        lengths=np.concatenate([empty, *lengths]),
        supervised=np.concatenate([empty, *supervised]),
        fingerprint=digest.hexdigest(),
    )


@dataclass(frozen=True, kw_only=True)
class TargetSpace:
    """A tokenized target data set (rows that selection aims at), never trained on.

    Attributes:
        name: Data set name.
        dataset: ``datasets.Dataset``.
        lengths: Tokens of each row.
        fingerprint: Hash of all tokens and labels.
    """

    name: str
    dataset: Any
    lengths: NDArray[np.int64]
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class RowSpace:
    """The training rows as decisions see them.

    Attributes:
        dataset: Tokenized ``datasets.Dataset``, N rows.
        sources: Rows of each data set, by name, before domains are formed.
        domains: Domain of each row; by data set, or by ``domain_column``.
        supervised: Supervised tokens of each row [N].
        fingerprint: Identity of the whole.
        columns: Raw columns that methods asked for, each [N].
        targets: Target data sets by name.
        leaks: Target rows that also lie in the training pool, by target, as ``Leak.describe`` gives them.
    """

    dataset: Any
    sources: Mapping[str, int]
    domains: Domains
    supervised: NDArray[np.int64]
    fingerprint: str
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    targets: Mapping[str, TargetSpace] = field(default_factory=dict)
    leaks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Number of training rows."""
        return len(self.supervised)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row [N]."""
        lengths = self.domains.lengths
        assert lengths is not None
        return lengths

    def all_rows(self) -> Rows:
        """Every row id, ascending."""
        return np.arange(self.num_rows, dtype=np.int64)

    def describe(self) -> dict[str, Any]:
        """Return the JSON form that goes into the record and the checkpoint."""
        return {
            "fingerprint": self.fingerprint,
            "sources": dict(self.sources),
            "domains": dict(zip(self.domains.names, self.domains.num_rows.tolist(), strict=True)),
            "tokens": int(self.lengths.sum()),
            "rows_without_labels": int((self.supervised == 0).sum()),
            **({"leaks": {name: dict(leak) for name, leak in self.leaks.items()}} if self.leaks else {}),
        }
