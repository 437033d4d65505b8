"""Turns a plan into this rank's collated micro-batches, never reading past the plan.

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
from dataflex.method import Rows
from dataflex.plan.plan import DataPlan
from dataflex.train.controller import BatchShape

ROWS = "dataflex_rows"
"""Where a collated micro-batch holds the ids of its rows, int64 [R]; taken out before the model sees it."""


class _Shards(Sampler[list[int]]):
    """The row lists of this rank's micro-batches from ``first_step`` to the end of ``plan``, which change."""

    def __init__(self, shape: BatchShape) -> None:
        self._shape = shape
        self.plan: DataPlan | None = None
        self.first_step = 0
        self.num_micro: dict[int, int] = {}
        """Number of micro-batches of the steps read so far."""

    def __iter__(self) -> Iterator[list[int]]:
        plan = self.plan
        assert plan is not None
        for step in range(self.first_step, plan.interval.stop_step):
            shards = micro_batches(plan, self._shape, step)
            self.num_micro[step] = len(shards)
            for rows in shards:
                yield rows.tolist()


def micro_batches(plan: DataPlan, shape: BatchShape, step: int) -> list[Rows]:
    """Return the rows of this rank's micro-batches of an optimizer step."""
    return plan.shard(
        step, rank=shape.rank, world=shape.world, micro_batch_size=shape.micro_batch_size, num_micro=shape.accumulation
    )


class _Numbered(Dataset[Any]):
    """Features with the ids of their rows."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitems__(self, rows: list[int]) -> tuple[list[int], list[Any]]:
        several = getattr(self._dataset, "__getitems__", None)
        return rows, several(rows) if several is not None else [self._dataset[row] for row in rows]

    def __getitem__(self, row: int) -> Any:
        raise AssertionError("rows are read by micro-batch")


class _Collate:
    """Collates features and puts the ids of their rows into the batch."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, numbered: tuple[list[int], list[Any]]) -> Any:
        rows, features = numbered
        batch = self._collate(features)
        batch[ROWS] = np.array(rows, dtype=np.int64)
        return batch


class PlanFeed:
    """Collated micro-batches of a plan, optimizer step by optimizer step; each holds its row ids under ``ROWS``.

    Args:
        dataset: Features by row id.
        collate: The loop's collator; gives a mapping.
        shape: How a step is cut up.
        num_workers: Worker processes.
        pin_memory: Passed to the DataLoader.
        prefetch_factor: Passed to the DataLoader when there are workers.
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
    ) -> None:
        self._shards = _Shards(shape)
        options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
        if num_workers:  # workers live as long as the run, however short its plans are
            options |= {"prefetch_factor": prefetch_factor, "persistent_workers": True}
            options["worker_init_fn"] = heed_parent_only
        # Its own generator: opening a DataLoader without one draws from the global random stream.
        self._loader: DataLoader[Any] = DataLoader(
            _Numbered(dataset),
            batch_sampler=self._shards,
            collate_fn=_Collate(collate),
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
            self._shards.num_micro.clear()
            self._iterator = iter(self._loader)
            self._plan = plan
        batches = [next(self._iterator)]
        batches += [next(self._iterator) for _ in range(self._shards.num_micro.pop(step) - 1)]
        self._next_step = step + 1
        if self._next_step == plan.interval.stop_step:
            self._iterator = None
        return batches

    def close(self) -> None:
        """End the workers; nothing is served afterwards.

        Left to the garbage collector they are not told, and each is waited for in vain for five seconds.
        """
        self._iterator = None
        self._loader._iterator = None  # that of persistent workers


class _Nothing(Dataset[int]):
    """As long as the training set, holding nothing."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        raise AssertionError("the epoch shell is never read: batches come from the plan")


class _Counted(Sampler[list[int]]):
    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        return iter([])


class EpochShell(DataLoader[int]):
    """What the Trainer takes for its training loader: right lengths, no batches.

    The Trainer counts epochs, steps and examples by it and opens it once per epoch, which draws one
    number from the global random stream, as its own loader would.

    Args:
        num_rows: Rows of the training set.
        num_micro_batches: Micro-batches of this rank per epoch.
    """

    def __init__(self, num_rows: int, num_micro_batches: int) -> None:
        super().__init__(_Nothing(num_rows), batch_sampler=_Counted(num_micro_batches))
