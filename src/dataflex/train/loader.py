"""Turns a plan into this rank's collated micro-batches, without reading past the plan.

Worker processes may fetch ahead inside a plan, where every row is already decided; at the end of a
plan the loader stops, so that the next decision is made on the newest model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dataflex.ending import heed_parent_only
from dataflex.errors import DataError
from dataflex.method import Rows
from dataflex.plan.plan import BatchShape, DataPlan
from dataflex.sequences import Joined

ROWS = "dataflex_rows"
"""Where a collated micro-batch holds the ids of its rows, int64 [R]; taken out before the model sees it.

Of packed rows that have ``PIECES`` they are those of their documents, int64 [R, T]: the id where one begins, ``~id``
where what an earlier row has begun goes on, ``SAME`` in the places of all other tokens, ``PADDING`` after the last one.
Of rows that the collator joins into one sequence they are those of the rows in the same form, int64 [1, L].
"""
PIECES = "dataflex_pieces"
"""Feature of a packed row: of each document in it a hash, ``~hash`` if it goes on there, and its tokens."""
SAME, PADDING = np.iinfo(np.int64).min, np.iinfo(np.int64).min + 1


class _Shards(Sampler[list[int]]):
    """The rows of this rank's micro-batches from ``first_step`` to the end of ``plan``; both are set anew."""

    plan: DataPlan
    first_step = 0

    def __init__(self, shape: BatchShape) -> None:
        self._shape = shape

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.plan.interval.stop_step):
            yield from (rows.tolist() for rows in self.plan.shard(step, self._shape))


class NumberedBatches(Dataset[Any]):
    """Collated micro-batches that hold the ids of their rows, for a loader whose own collation is ``unchanged``.

    ``joined`` says that rows are collated into one sequence, one after the other.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], *, joined: bool = False) -> None:
        self._dataset, self._collate, self._joined = dataset, collate, joined

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> Any:
        return self._dataset[row]

    def __getitems__(self, rows: list[int]) -> Any:
        several = getattr(self._dataset, "__getitems__", None)
        features = several(rows) if several is not None else [self._dataset[row] for row in rows]
        lengths = [len(feature["input_ids"]) for feature in features] if self._joined else []
        batch = self._collate(features)
        ids = np.array(rows, dtype=np.int64)
        batch[ROWS] = ids_of_tokens(ids, lengths, batch["input_ids"].shape[1]) if self._joined else ids
        return batch


class NumberedStream:
    """Collates rows of a stream, or packed ones, and adds their ids as ``rows_of`` tells them."""

    def __init__(self, rows_of: Callable[[list[Any]], Rows], collate: Callable[[list[Any]], Any]) -> None:
        self._rows_of, self._collate = rows_of, collate

    def __call__(self, features: list[Any]) -> Any:
        """Return the batch; ids are a tensor, which a loader that reads for several ranks can cut."""
        rows = torch.from_numpy(self._rows_of(features))
        plain = [{key: value for key, value in feature.items() if key != PIECES} for feature in features]
        return {**self._collate(plain), ROWS: rows}


def documents_of(rows_RT: Rows) -> Rows:
    """Return the document of each token, -1 where there is none [R, T], of ids as ``ROWS`` has them of packed rows."""
    begins = np.where(rows_RT == SAME, 0, np.arange(rows_RT.shape[1]))
    found = np.take_along_axis(rows_RT, np.maximum.accumulate(begins, axis=1), axis=1)
    return np.where(found == PADDING, -1, np.where(found < 0, ~found, found))


def ids_of_tokens(rows: Rows, lengths: list[int], width: int) -> Rows:
    """Return ids as ``ROWS`` has them of rows of these lengths that are joined into one sequence [1, width].

    Raises:
        DataError: A row has no tokens, so that no token tells it.
    """
    ends = np.cumsum(lengths)
    if 0 in lengths:
        raise DataError(f"row {rows[lengths.index(0)]} of the training set has no tokens; remove it")
    ids = np.full((1, width), SAME, dtype=np.int64)
    ids[0, ends - lengths] = rows
    ids[0, ends[-1] :] = PADDING
    return ids


def by_rows(batch: dict[str, Any], device: torch.device | None = None) -> tuple[dict[str, Any], Joined | None]:
    """Return a micro-batch with its rows apart, padded on the right, and where they lay in one sequence.

    The batch itself and None where rows were not joined. Of a joined one tokens, labels and positions are kept, on the
    device, which is that of the labels unless it is given.
    """
    ids = batch[ROWS]
    if ids.ndim == 1:
        return batch, None
    device = batch["labels"].device if device is None else device
    starts = np.flatnonzero((ids[0] != SAME) & (ids[0] != PADDING))
    lengths = np.diff([*starts, int((ids[0] != PADDING).sum())])
    places = np.arange(lengths.max())
    there = places < lengths[:, None]
    joined = Joined(
        rows_R=ids[0, starts],
        index_RT=torch.from_numpy(np.where(there, starts[:, None] + places, 0)).to(device),
        there_RT=torch.from_numpy(there).to(device),
    )
    fills = {"input_ids": 0, "labels": -100, "position_ids": 0}
    apart = {name: joined.split(batch[name].to(device), fill) for name, fill in fills.items() if name in batch}
    return {**apart, "attention_mask": joined.there_RT.long(), ROWS: joined.rows_R}, joined


def unchanged(batch: Any) -> Any:
    """Return what was collated already."""
    return batch


class PlanFeed:
    """Collated micro-batches of a plan, optimizer step by optimizer step; each holds its row ids under ``ROWS``.

    Worker processes live as long as the run, however short its plans are.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[dict[str, Any]]], Any],
        shape: BatchShape,
        *,
        num_workers: int,
        pin_memory: bool,
        prefetch_factor: int | None,
        joined: bool = False,
    ) -> None:
        self._shape, self._shards = shape, _Shards(shape)
        options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
        if num_workers:
            options |= {"prefetch_factor": prefetch_factor, "persistent_workers": True}
            options["worker_init_fn"] = heed_parent_only
        # Its own generator: opening a DataLoader without one draws from the global random stream.
        self._loader: DataLoader[Any] = DataLoader(
            NumberedBatches(dataset, collate, joined=joined),
            batch_sampler=self._shards,
            collate_fn=unchanged,
            generator=torch.Generator().manual_seed(0),
            **options,
        )
        self._plan: DataPlan | None = None
        self._iterator: Iterator[Any] | None = None
        self._next_step = -1

    def step(self, plan: DataPlan, step: int) -> list[Any]:
        """Return the collated micro-batches of ``step``."""
        if plan is not self._plan or step != self._next_step or self._iterator is None:
            self._shards.plan, self._shards.first_step = plan, step
            self._iterator = iter(self._loader)
            self._plan = plan
        batches = [next(self._iterator) for _ in plan.shard(step, self._shape)]
        self._next_step = step + 1
        if self._next_step == plan.interval.stop_step:
            self._iterator = None
        return batches

    def close(self) -> None:
        """End the workers, each of which the garbage collector would wait for in vain for five seconds."""
        self._iterator = None
        self._loader._iterator = None  # that of persistent workers
