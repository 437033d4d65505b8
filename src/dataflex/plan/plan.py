"""A plan: the rows of one interval in serving order, and how ranks share them.

A plan is one global array, equal on every rank. The rows of a rank follow from (plan, step, batch shape), so that ranks
communicate nothing, and a resumed run may have another number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import CheckpointError, DataError
from dataflex.plan.domains import Rows
from dataflex.plan.schedule import Interval
from dataflex.state import blake2b

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """How an optimizer step is divided into micro-batches over ranks, and an epoch into steps.

    Epochs are those of transformers' Trainer with accelerate's even batches.
    """

    micro_batch_size: int  # sequences per rank and micro-batch
    accumulation: int  # micro-batches per optimizer step
    world: int  # number of data-parallel ranks
    rank: int  # this rank
    drop_last: bool  # ``dataloader_drop_last``: micro-batches that would not be full on every rank are dropped
    shuffle: bool  # rows of whole epochs, of a mixture's domains, and of a selection (``disable_shuffling: false``)

    @property
    def global_batch(self) -> int:
        """Sequences of one optimizer step."""
        return self.micro_batch_size * self.accumulation * self.world

    def micro_batches_per_epoch(self, num_rows: int) -> int:
        """Return the micro-batches of each rank in an epoch: the length of its data loader.

        Raises:
            DataError: An epoch would be empty.
        """
        if num_rows < 1:
            raise DataError("the training set has no rows")
        size = self.world * self.micro_batch_size
        if not self.drop_last:
            return -(-num_rows // size)
        if num_rows < size:
            raise DataError(
                f"dataloader_drop_last leaves nothing of {num_rows:,} rows: {self.world} ranks x "
                f"{self.micro_batch_size} sequences need {size:,}. Use smaller batches."
            )
        return num_rows // size

    def steps_per_epoch(self, num_rows: int) -> int:
        """Return the optimizer steps of an epoch; the last one may be short."""
        return -(-self.micro_batches_per_epoch(num_rows) // self.accumulation)

    def rows_per_epoch(self, num_rows: int) -> int:
        """Return the rows served in an epoch, without those that only even out the ranks."""
        return min(num_rows, self.micro_batches_per_epoch(num_rows) * self.world * self.micro_batch_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class DataPlan:
    """Rows of one interval in serving order.

    A short last step of an epoch ends in -1 ("no row"), but every step has at least one row. ``fill`` are row ids that
    even out a short step over several ranks, used from the front and cycled; it may be empty where no step is short.

    Raises:
        ValueError: Arrays that do not fit together.
    """

    interval: Interval  # the optimizer steps that the plan covers
    rows: Rows  # ids, int64 [steps * global_batch]
    fill: Rows = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    global_batch: int  # sequences of an optimizer step, over all ranks and micro-batches
    row_space: str  # fingerprint of the row space that the ids point into
    trace: dict[str, Any] = field(default_factory=dict)  # JSON values for the record; not part of the digest

    def __post_init__(self) -> None:
        for name in ("rows", "fill"):
            view = np.ascontiguousarray(getattr(self, name), dtype=np.int64).view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)
        problem = self._problem()
        if problem is not None:
            raise ValueError(problem)

    def _problem(self) -> str | None:
        """Return what is wrong with the arrays, or None."""
        steps, batch = self.interval.steps, self.global_batch
        if steps < 1 or batch < 1 or self.rows.shape != (steps * batch,):
            return f"{self.rows.size} rows for {steps} steps of {batch} sequences"
        is_row = self.rows.reshape(steps, batch) >= 0
        if self.rows.min() < -1 or (is_row[:, 1:] > is_row[:, :-1]).any():
            return "a row below -1, or a row after 'no row' within a step"
        if not is_row[:, 0].all():
            return f"step {self.interval.start_step + int(np.argmin(is_row[:, 0]))} has no rows"
        if self.fill.ndim != 1 or (self.fill < 0).any():
            return "fill must be a list of row ids"
        return None

    def shard(self, step: int, shape: BatchShape) -> list[Rows]:
        """Return the row ids of each micro-batch of ``shape.rank`` in optimizer step ``step`` of the run.

        The step's rows are consecutive batches of ``micro_batch_size``; batch j is micro-batch
        j // world of rank j % world. That is the layout of accelerate's ``BatchSamplerShard`` over a
        sequential sampler. A short step has fewer micro-batches: on one rank the last may be short; on
        several, rows of ``fill`` make all micro-batches full and equal in number.
        """
        size, world = shape.micro_batch_size, shape.world
        assert 0 <= shape.rank < world, f"rank {shape.rank} of {world}"
        assert self.interval.start_step <= step < self.interval.stop_step, f"step {step} is not in {self.interval}"
        assert shape.global_batch == self.global_batch, f"{shape} for global batches of {self.global_batch} sequences"
        start = (step - self.interval.start_step) * self.global_batch
        rows = self.rows[start : start + self.global_batch]
        rows = rows[rows >= 0]
        if world == 1:
            return [rows[i : i + size] for i in range(0, len(rows), size)]
        missing = -len(rows) % (world * size)
        assert not missing or self.fill.size, f"step {step} is short, but the plan has no rows to fill it up with"
        if missing:
            rows = np.concatenate([rows, np.resize(self.fill, missing)])
        return list(rows.reshape(-1, world, size)[:, shape.rank])

    def digest(self) -> str:
        """Return a hash (blake2b, 32 hex digits) of everything that ranks must agree on."""
        return blake2b(json.dumps(self._meta()).encode(), self.rows.tobytes(), self.fill.tobytes()).hex()

    def _meta(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "interval": asdict(self.interval),
            "global_batch": self.global_batch,
            "row_space": self.row_space,
            "num_rows": self.rows.size,
            "num_fill": self.fill.size,
            "weighted": False,  # keeps digests as they were
        }

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the plan as arrays for ``numpy.savez``, without objects that would need pickle."""
        text = json.dumps({**self._meta(), "trace": self.trace})
        return {"meta": np.frombuffer(text.encode(), dtype=np.uint8), "rows": self.rows, "fill": self.fill}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> DataPlan:
        """Return the plan that ``to_arrays`` was called on; CheckpointError if something is missing or does not fit."""
        try:
            meta = json.loads(np.asarray(arrays["meta"], dtype=np.uint8).tobytes().decode())
            if meta["format"] != _FORMAT:
                raise CheckpointError(f"plan has format {meta['format']!r}; this version reads {_FORMAT}")
            return cls(
                interval=Interval(**meta["interval"]),
                rows=arrays["rows"],
                fill=arrays["fill"],
                **{key: meta[key] for key in ("global_batch", "row_space", "trace")},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"plan cannot be read: {type(error).__name__}: {error}") from error
