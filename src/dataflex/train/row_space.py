"""The training row space: the rows, their domains, and a fingerprint of every token and label.

Row ids are positions in the tokenized training set. A saved plan is valid only for the row space that it was made for,
which the fingerprint identifies.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from dataflex.config.mappings import shown
from dataflex.errors import DataError
from dataflex.method import Rows
from dataflex.plan.domains import WANTED_WEIGHTS, Domains, unusable_weight
from dataflex.record.chosen import Origins
from dataflex.signals.model_access import Corpus
from dataflex.state import blake2b

logger = logging.getLogger(__name__)

TOKEN_COLUMNS = ("input_ids", "chosen_input_ids", "chosen_ids", "completion_input_ids", "completion_ids")
_LABEL_COLUMNS = ("labels", "chosen_labels")
_MASKS = ("completion_mask", "assistant_masks")
"""TRL's: 1 for each supervised token; all of them, where there are no labels."""
_HASHED = (
    *(*TOKEN_COLUMNS, *_LABEL_COLUMNS, "rejected_input_ids", "rejected_labels", "kl_input_ids", "kto_tags"),
    *("prompt_input_ids", "prompt_ids", "rejected_ids", *_MASKS),
)
_MEDIA = ("images", "videos", "audios")
_CHUNK_ROWS = 20_000
_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Lengths and supervised tokens of each row [N], and a hash of all tokens and labels (16 hex digits)."""

    lengths: NDArray[np.int64]
    supervised: NDArray[np.int64]
    fingerprint: str


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _flat(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return row offsets [n + 1] and flattened values of a list column."""
    array = column.combine_chunks()
    offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    values = array.values.slice(offsets[0], offsets[-1] - offsets[0]).to_numpy(zero_copy_only=False)
    return offsets - offsets[0], values


def _sums(offsets: NDArray[np.int64], values: NDArray[Any]) -> NDArray[np.int64]:
    """Return the sum of each row's values [n]."""
    running = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return running[offsets[1:]] - running[offsets[:-1]]


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
    for table in _tables(dataset, columns):
        if (media := _media(table)).any():
            digest.update(media.tobytes())
        for name in columns:
            column = table.column(name)
            if not _is_list(column.type):
                digest.update(np.asarray(column.to_pylist(), dtype=np.int64).tobytes())
                continue
            offsets, values = _flat(column)
            digest.update(np.ascontiguousarray(offsets).tobytes())
            digest.update(np.ascontiguousarray(values, dtype=np.int64).tobytes())
            if name == tokens:
                lengths.append(np.diff(offsets))
                if labels is None:
                    masks = [_flat(table.column(mask))[1] for mask in columns if mask in _MASKS]
                    counted = np.prod([np.ones(offsets[-1], dtype=np.int64), *masks], axis=0)
                    supervised.append(_sums(offsets, counted))
            elif name == labels:
                supervised.append(_sums(offsets, values != -100))
    empty = np.zeros(0, dtype=np.int64)
    return Measures(
        lengths=np.concatenate([empty, *lengths]),
        supervised=np.concatenate([empty, *supervised]),
        fingerprint=digest.hexdigest(),
    )


def column_values(dataset: Any, name: str) -> NDArray[Any]:
    """Return a column of a data set [N]; as objects where a value is missing."""
    # By way of arrow: the data sets' own numpy format imports a video reader that newer torchvisions lack.
    found = dataset.select_columns([name]).with_format("arrow")[:].column(name)
    if found.null_count == 0:
        return np.asarray(found.to_numpy())
    values = np.empty(len(found), dtype=object)  # numpy has no null: a missing number must not become a NaN
    values[:] = found.to_pylist()
    return values


class TokenColumn:
    """Numbers of the tokens of each row, read when they are asked for; indexed by rows as a column is.

    Args:
        dataset: Rows with a column ``name`` of lists of numbers.
        name: That column.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset, self._name = dataset.select_columns([name]).with_format("arrow"), name

    def __getitem__(self, rows: Rows) -> NDArray[np.float32]:
        """Return the numbers of rows [len(rows), most tokens of one], 0 beyond a row's own."""
        lists = [np.asarray(each, dtype=np.float32) for each in self.lists(rows)]
        found = np.zeros((len(rows), max(map(len, lists), default=0)), dtype=np.float32)
        for place, numbers in enumerate(lists):
            found[place, : len(numbers)] = numbers
        return found

    def __len__(self) -> int:
        return len(self._dataset)

    def lists(self, rows: Rows) -> list[list[Any]]:
        """Return the numbers of rows as they are in the data."""
        found: list[list[Any]] = self._dataset[rows.tolist()].column(self._name).to_pylist()
        return found

    def take(self, rows: Rows) -> TokenColumn:
        """Return the column of these rows alone."""
        return TokenColumn(self._dataset.select(rows), self._name)

    def refuse_unusable(self, key: str, lengths: NDArray[np.int64], place: Callable[[int], str]) -> None:
        """Refuse weights that are not finite numbers of 0 or more, one for each token.

        Raises:
            DataError: There are such, with the ``place`` of the first row.
        """
        for first in range(0, len(self), _CHUNK_ROWS):
            rows = np.arange(first, min(first + _CHUNK_ROWS, len(self)), dtype=np.int64)
            for row, numbers in zip(rows.tolist(), self.lists(rows), strict=True):
                if numbers is None or len(numbers) != lengths[row]:
                    told = f"{'no' if numbers is None else len(numbers)} weights for {lengths[row]} tokens"
                    raise DataError(f"{key}: {place(row)} has {told} in {self._name}; give one for each token")
                bad = next((n for n in numbers if unusable_weight(n)), 0.0)
                if bad != 0.0:
                    raise DataError(f"{key}: {place(row)} has {shown(bad)} in {self._name}; {WANTED_WEIGHTS}")


def refuse_values(
    key: str,
    name: str | None,
    values: NDArray[Any],
    refused: tuple[NDArray[np.bool_], str] | None,
    place: Callable[[int], str],
) -> None:
    """Refuse unusable values of a column.

    Args:
        key: Path of the key that asks for the column.
        name: The column.
        values: Its values [N].
        refused: Mask of unusable values [N], and what they must be; None where all can be used.
        place: Tells where a row is from.

    Raises:
        DataError: There are such values, with the place of the first.
    """
    if refused is None or not refused[0].any():
        return
    bad, wanted = refused
    row = int(np.flatnonzero(bad)[0])
    value = values[row].item() if isinstance(values[row], np.generic) else values[row]
    others = f" (and {int(bad.sum()) - 1:,} more rows)" if bad.sum() > 1 else ""
    raise DataError(f"{key}: {place(row)}, has {name} = {shown(value)}{others}; {wanted}")


def fingerprint(sizes: Mapping[str, int], labels: NDArray[np.int32], content: str) -> str:
    """Return a hash of the sizes of the sources, the source of each row [N], and the hash of their tokens."""
    return blake2b(repr(sorted(sizes.items())).encode(), labels.tobytes(), content.encode(), size=8).hex()


def target_corpus(name: str, dataset: Any) -> Corpus:
    """Measure a tokenized target data set, which is never trained on; DataError without a supervised token."""
    measures = measure(dataset)
    if not (measures.supervised > 0).any():
        raise DataError(f"target {name!r}: none of its {len(dataset):,} rows has a supervised token")
    return Corpus(dataset=dataset, lengths=measures.lengths, identity=measures.fingerprint)


@dataclass(frozen=True, kw_only=True)
class Leak:
    """Rows that one target shares with the training pool."""

    target_rows: Rows  # rows of the target that lie in the pool, ascending
    pool_rows: Rows  # training rows that are one of them, ascending
    examples: tuple[tuple[int, int], ...]  # the first pairs of target row and training row
    of: int  # number of rows of the target

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
        """Return it as one line."""
        pairs = ", ".join(f"row {row} = training row {pool_row}" for row, pool_row in self.examples)
        return f"{self.num_rows:,} of its {self.of:,} rows also lie in the training pool ({pairs})"


@dataclass(frozen=True, kw_only=True)
class RowSpace:
    """The training rows as decisions see them."""

    dataset: Any  # tokenized ``datasets.Dataset``, N rows
    sources: Mapping[str, int]  # rows of each data set, by name, before domains are formed
    domains: Domains  # domain of each row; by data set, or by ``domain_column``
    supervised: NDArray[np.int64]  # supervised tokens of each row [N]
    fingerprint: str  # identity of the whole
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # raw columns that methods asked for, each [N]
    token_weights: TokenColumn | None = None  # weights of tokens that the data gives, where a method asked for them
    targets: Mapping[str, Corpus] = field(default_factory=dict)  # target data sets by name
    leaks: Mapping[str, Leak] = field(default_factory=dict)  # target rows that also lie in the training pool, by target
    bad_shards: Mapping[str, list[str]] = field(default_factory=dict)  # files that were left out, by data set
    origins: Origins | None = None  # where the rows come from; None: their domains are all that is known

    @classmethod
    def of(
        cls,
        dataset: Any,
        *,
        domains: Sequence[str] | None = None,
        columns: Mapping[str, NDArray[Any]] | None = None,
        targets: Mapping[str, Any] | None = None,
    ) -> RowSpace:
        """Return the row space of tokenized rows, for a loop of one's own.

        Args:
            dataset: ``datasets.Dataset`` of N rows with ``input_ids`` and ``labels``.
            domains: Domain of each row [N]; None: all rows are of one.
            columns: Columns that methods ask for, each [N].
            targets: Tokenized target data sets by name. A warning names their rows that also lie in the training set.

        Raises:
            DataError: No row has a supervised token.
        """
        measures = measure(dataset)
        found = Domains.from_labels(["all"] * len(dataset) if domains is None else domains, measures.lengths)
        sources = dict(zip(found.names, found.num_rows.tolist(), strict=True))
        leaks = find_leaks(dataset, targets or {})
        for name, leak in leaks.items():
            if leak.num_rows:
                logger.warning("target %r: %s", name, leak.tell())
        space = cls(
            dataset=dataset,
            sources=sources,
            domains=found,
            supervised=measures.supervised,
            fingerprint=fingerprint(sources, found.domain_of, measures.fingerprint),
            columns=columns or {},
            targets={name: target_corpus(name, rows) for name, rows in (targets or {}).items()},
            leaks=leaks,
        )
        space.check_supervised()
        return space

    def check_supervised(self) -> None:
        """Warn about rows whose labels are fully masked; DataError if all are."""
        masked = int((self.supervised == 0).sum())
        if masked == self.num_rows:
            raise DataError(
                f"all {masked:,} rows have their labels fully masked: nothing can be learned from them. "
                "Is cutoff_len shorter than the prompts?"
            )
        if masked:
            logger.warning(
                "%d of %d rows have no supervised token (labels fully masked, cutoff_len too short?): "
                "methods that score rows never select them",
                masked,
                self.num_rows,
            )

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

    @cached_property
    def keys(self) -> NDArray[np.uint64]:
        """What rows are known by in a pool that changed [N], see ``row_keys``."""
        return row_keys(self.dataset)

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
            **({"leaks": {name: leak.describe() for name, leak in self.leaks.items()}} if self.leaks else {}),
            **({"bad_shards": dict(self.bad_shards)} if self.bad_shards else {}),
        }


def _tables(dataset: Any, columns: Sequence[str]) -> Iterator[Any]:
    """Yield a tokenized data set in chunks, as Arrow tables with some columns and those of media."""
    media = [name for name in _MEDIA if name in dataset.column_names]
    yield from dataset.select_columns([*columns, *media]).with_format("arrow").iter(batch_size=_CHUNK_ROWS)


def _media(table: Any) -> NDArray[np.int64]:
    """Return a hash of each row's images, videos and audios, above 0; 0 where it has none [n].

    A file is told by its name and size, so that it is not read, and may be moved; bytes in the data by their content.
    """
    found = np.zeros(table.num_rows, dtype=np.int64)
    for name in _MEDIA:
        if name not in table.column_names or pa.types.is_null(table.column(name).type):
            continue
        for row, items in enumerate(table.column(name).to_pylist()):
            if items:
                told = [f"{name} {found[row]}".encode(), *map(_medium, items)]
                found[row] = int.from_bytes(blake2b(*told, size=7), "big") + 1
    return found


def _medium(item: Any) -> bytes:
    content, path = (item.get("bytes"), item.get("path")) if isinstance(item, Mapping) else (None, item)
    if isinstance(content, bytes):
        return content
    file = Path(str(path))
    return f"{file.name} {file.stat().st_size if file.is_file() else 0}".encode()


def _chunks(dataset: Any) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """Yield row offsets [n + 1] and token ids of a tokenized data set, in order; media are one more number of a row."""
    name = next(name for name in TOKEN_COLUMNS if name in dataset.column_names)
    for table in _tables(dataset, [name]):
        offsets, tokens = _flat(table.column(name))
        media = _media(table)
        rows = np.flatnonzero(media)
        if len(rows):
            tokens = np.insert(np.asarray(tokens, dtype=np.int64), offsets[rows + 1], media[rows])
            offsets = offsets + np.concatenate([[0], np.cumsum(media > 0)])
        yield offsets, tokens


def _keys(offsets: NDArray[np.int64], tokens: NDArray[Any]) -> NDArray[np.uint64]:
    """Return a number for each row that equal rows share: of its length and the sum of its token ids."""
    return (np.diff(offsets).astype(np.uint64) << np.uint64(40)) ^ _sums(offsets, tokens).astype(np.uint64)


def _content(offsets: NDArray[np.int64], tokens: NDArray[Any], row: int) -> bytes:
    return np.ascontiguousarray(tokens[offsets[row] : offsets[row + 1]], dtype=np.int64).tobytes()


def row_keys(dataset: Any) -> NDArray[np.uint64]:
    """Return a hash of each row's tokens and labels, of both answers of a preference [N]."""
    if hasattr(dataset, "row_keys"):
        found: NDArray[np.uint64] = dataset.row_keys()
        return found
    columns = [name for name in _HASHED if name in dataset.column_names]
    keys = [np.zeros(0, dtype=np.uint64)]
    for table in _tables(dataset, columns):
        states = [xxhash.xxh3_64(f"media {media} ".encode() if media else b"") for media in _media(table).tolist()]
        for name in columns:
            column = table.column(name)
            if _is_list(column.type):
                offsets, values = _flat(column)
            else:
                offsets, values = np.arange(table.num_rows + 1), np.asarray(column.to_pylist(), dtype=np.int64)
            content = memoryview(np.asarray(values, dtype=np.int64).tobytes())
            for state, first, last in zip(states, (8 * offsets[:-1]).tolist(), (8 * offsets[1:]).tolist(), strict=True):
                state.update(f"{name} {last - first} ".encode())
                state.update(content[first:last])
        keys.append(np.array([state.intdigest() for state in states], dtype=np.uint64))
    return np.concatenate(keys)


def row_fingerprints(dataset: Any) -> NDArray[np.uint64]:
    """Return a hash of each row's tokens [N]; the data set is tokenized."""
    found = [
        blake2b(_content(offsets, tokens, row), size=8)
        for offsets, tokens in _chunks(dataset)
        for row in range(len(offsets) - 1)
    ]
    return np.frombuffer(b"".join(found), dtype="<u8")


def find_leaks(train: Any, targets: Mapping[str, Any]) -> dict[str, Leak]:
    """Return, for every target, which of its rows are training rows too; all data sets are tokenized."""
    if not targets:
        return {}
    held: dict[bytes, list[tuple[str, int]]] = {}
    keys = [np.zeros(0, dtype=np.uint64)]
    sizes = dict.fromkeys(targets, 0)
    for name, dataset in targets.items():
        for offsets, tokens in _chunks(dataset):
            keys.append(_keys(offsets, tokens))
            for row in range(len(offsets) - 1):
                held.setdefault(_content(offsets, tokens, row), []).append((name, sizes[name] + row))
            sizes[name] += len(offsets) - 1
    wanted = np.unique(np.concatenate(keys))
    pairs: dict[str, list[tuple[int, int]]] = {name: [] for name in targets}
    start = 0
    for offsets, tokens in _chunks(train):
        for row in np.flatnonzero(np.isin(_keys(offsets, tokens), wanted)).tolist():
            for name, target_row in held.get(_content(offsets, tokens, row), ()):
                pairs[name].append((target_row, start + row))
        start += len(offsets) - 1
    leaks = {}
    for name, found in pairs.items():
        rows = np.array(found, dtype=np.int64).reshape(-1, 2)
        leaks[name] = Leak(
            target_rows=np.unique(rows[:, 0]),
            pool_rows=np.unique(rows[:, 1]),
            examples=tuple(found[:_EXAMPLES]),
            of=sizes[name],
        )
    return leaks
