"""Where the rows of a run come from: the data set of each, its place in the files, and the id that the data give it.

LLaMA-Factory drops rows without an answer, draws some (``num_samples``), cuts others (``max_samples``, ``val_size``)
and packs; a packed row has the places of its documents. Names relied upon: ``datasets.Dataset._indices``, the places
that ``select`` leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from dataflex.config.data import files_of, find_entries, find_sources
from dataflex.llamafactory.loading import Loader, split_rows
from dataflex.llamafactory.streaming import joined_documents
from dataflex.record.chosen import Origins, Source

_IDS = ("id", "_id", "uid", "uuid", "idx", "row_id")
"""Columns that are taken for a row's id, the first that a data set has."""


def origins_of(loader: Loader, names: Sequence[str], source_of: NDArray[np.int32], train: Any) -> Origins:
    """Return where the tokenized training rows come from.

    Args:
        loader: It has loaded them.
        names: Data sets of the rows.
        source_of: Index into ``names`` of each row [N].
        train: The rows, before any are left out as leaks.
    """
    size, unknown = len(source_of), np.full(len(source_of), -1, dtype=np.int64)
    nowhere = Origins(sources=[Source(name=name) for name in names], source_of=source_of, position=unknown)
    asked = list(loader.data_args.dataset or ())
    parts = loader.origins[: len(asked)]
    if loader.written.tokenized or len(parts) < len(asked) or (list(names) != asked and not loader.packs):
        return nowhere
    names = asked
    found, _ = find_sources(names, loader.written, "dataset", Path(), skip=loader.skip_bad_shards)
    known, entries = {source.name: source for source in found}, find_entries(names, loader.written)
    sources, places = [], []
    for name, part in zip(names, parts, strict=True):
        path, whole = (known[name].path, known[name].split == "train") if name in known else (None, False)
        files = [] if path is None or not whole else files_of(path.absolute())
        left_out = {Path(shard.path).absolute() for shard in loader.bad_shards.get(name, ())}
        files = [file for file in files if file not in left_out]
        drawn = part.raw._indices
        sources.append(
            Source(
                name=name,
                paths=files,
                rows_read=len(part.raw) if drawn is None else part.raw.data.num_rows,
                limited=loader.data_args.max_samples is not None,
                entry=entries.get(name),
            )
        )
        place = np.arange(len(part.raw), dtype=np.int64) if drawn is None else _numbers(drawn.column(0))
        places.append(place if files else np.full(len(part.raw), -1, dtype=np.int64))
    raw = [part.raw for part in parts]
    every = Origins(
        sources=sources,
        source_of=np.repeat(np.arange(len(raw), dtype=np.int32), [len(part) for part in raw]),
        position=np.concatenate(places),
        ids=_ids(raw),
    )
    if loader.packs:
        documents = _documents(loader, raw, train)
        return nowhere if documents is None else replace(nowhere, documents=(documents, every))
    rows = _raw_rows(loader, parts, train)
    # Rows that were merged in another order than is thought here are of other data sets than they seem.
    if len(rows) != size or (every.source_of[rows] != source_of).any():
        return replace(nowhere, sources=sources)
    return every.taken(rows)


def _documents(loader: Loader, raw: Sequence[Dataset], train: Any) -> pa.ListArray | None:
    """Return which raw rows of all data sets, one after the other, each packed row has tokens of; None: not known."""
    if loader.data_args.streaming:
        found, places = train.documents(), pa.array(loader.raw_rows().rows)
        return pa.ListArray.from_arrays(found.offsets, places.take(found.values))
    if len(loader.documents) == 1:  # numbered over all
        return loader.documents[0].combine_chunks()
    offsets = np.cumsum([0, *map(len, raw)])[:-1].tolist()
    found = joined_documents(loader.documents, offsets) if len(loader.documents) == len(raw) else None
    if found is not None and loader.test_size and loader.data_args.eval_dataset is None:
        found = found.take(pa.array(split_rows(len(found), loader.test_size, loader.training_args.seed)["train"]))
    return found


def _raw_rows(loader: Loader, parts: Sequence[Any], train: Any) -> NDArray[np.int64]:
    """Return the place of each training row among the raw rows of all data sets, one after the other."""
    args = loader.data_args
    if args.streaming:
        return np.asarray(loader.raw_rows().rows[train.raw_rows], dtype=np.int64)
    offsets = np.cumsum([0, *(len(part.raw) for part in parts)])
    kept = np.concatenate([part.kept + at for part, at in zip(parts, offsets[:-1], strict=True)])
    if len(parts) == 1:  # rows are held out first, and dropped then
        rows = loader.raw_rows().rows
        return np.asarray(rows[np.isin(rows, kept)], dtype=np.int64)
    if loader.test_size and args.eval_dataset is None:
        return kept[split_rows(len(kept), loader.test_size, loader.training_args.seed)["train"]]
    return kept


def _numbers(column: Any) -> NDArray[np.int64]:
    return np.asarray(column.to_numpy(), dtype=np.int64)


def _ids(parts: Sequence[Dataset]) -> pa.Array | None:
    """Return the ids of the raw rows of all data sets as text, null where there is none."""
    chunks: list[Any] = []
    for part in parts:
        name = next((name for name in _IDS if name in part.column_names), None)
        column = None if name is None else part.select_columns([name]).with_format("arrow")[:].column(name)
        try:
            chunks += [pa.nulls(len(part), pa.string())] if column is None else column.cast(pa.string()).chunks
        except pa.ArrowException:  # a list, or a mapping
            chunks.append(pa.nulls(len(part), pa.string()))
    found = pa.chunked_array(chunks, type=pa.string())
    return None if found.null_count == len(found) else found.combine_chunks()
