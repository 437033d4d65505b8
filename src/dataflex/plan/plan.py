"""A plan: the rows of one interval in the order in which they are served, and who serves which.

One global array, equal on every rank. A rank's rows are arithmetic on (plan, step, micro-batch, rank,
world), so nothing is communicated, and a resumed run may have another number of ranks. A plan does
not say why its rows were chosen beyond a short trace for the record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import CheckpointError, ConfigError
from dataflex.plan.domains import Rows
from dataflex.plan.schedule import Interval

_FORMAT = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class DataPlan:
    """Rows of one interval in serving order.

    Attributes:
        interval: The optimizer steps that the plan covers.
        rows: Row ids, int64 [steps * global_batch]; -1 ("no row") only at the end of a step, for the
            short last step of an epoch. Every step has at least one row.
        fill: Rows that even out a short step over several ranks, used from the front and cycled; may be
            empty where no step is short.
        global_batch: Sequences of an optimizer step, over all ranks and micro-batches.
        row_space: Fingerprint of the row space that the ids point into.
        trace: JSON values for the record; no part of the digest.

    Raises:
        ValueError: Arrays that do not fit together.
    """

    interval: Interval
    rows: Rows
    fill: Rows = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    global_batch: int
    row_space: str
    trace: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("rows", "fill"):
            view = np.ascontiguousarray(getattr(self, name), dtype=np.int64).view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)
        problem = self._problem()
        if problem is not None:
            raise ValueError(problem)

    def _problem(self) -> str | None:
        """Say what is wrong with the arrays, or None."""
        steps, batch = self.interval.steps, self.global_batch
        if steps < 1 or batch < 1 or self.rows.shape != (steps * batch,):
            return f"{self.rows.size} rows for {steps} steps of {batch} sequences"
        served = self.rows.reshape(steps, batch) >= 0
        if self.rows.min() < -1 or (served[:, 1:] > served[:, :-1]).any():
            return "a row below -1, or a row after 'no row' within a step"
        if not served[:, 0].all():
            return f"step {self.interval.start_step + int(np.argmin(served[:, 0]))} has no rows"
        if self.fill.ndim != 1 or (self.fill < 0).any():
            return "fill must be a list of row ids"
        return None

    def positions(
        self, step: int, rank: int, world: int, micro_batch_size: int, num_micro: int
    ) -> list[NDArray[np.int64]]:
        """Return where the micro-batches of a rank lie in the plan.

        The step's rows are consecutive batches of ``micro_batch_size``; batch j is micro-batch
        j // world of rank j % world. That is the layout of accelerate's ``BatchSamplerShard`` over a
        sequential sampler. A short step has fewer micro-batches: on one rank the last may be short; on
        several, rows of ``fill`` make all micro-batches full and equal in number.

        Args:
            step: Optimizer step of the run, within the interval.
            rank: Data-parallel rank.
            world: Number of ranks.
            micro_batch_size: Sequences per rank and micro-batch.
            num_micro: Micro-batches per optimizer step (gradient accumulation).

        Returns:
            For each micro-batch positions int64 [<= micro_batch_size]: p >= 0 means ``rows[p]``, p < 0
            means ``fill[-1 - p]``.

        Raises:
            ConfigError: The global batch cannot be laid out so.
        """
        assert 0 <= rank < world, f"rank {rank} of {world}"
        assert self.interval.start_step <= step < self.interval.stop_step, f"step {step} is not in {self.interval}"
        if num_micro * world * micro_batch_size != self.global_batch:
            raise ConfigError(
                f"the plan has global batches of {self.global_batch} sequences; {num_micro} accumulation steps x "
                f"{world} ranks x {micro_batch_size} sequences per device are {num_micro * world * micro_batch_size}. "
                "Change gradient_accumulation_steps or per_device_train_batch_size so that the product stays the same."
            )
        start = (step - self.interval.start_step) * self.global_batch
        num = int(np.count_nonzero(self.rows[start : start + self.global_batch] >= 0))
        places = np.arange(start, start + num, dtype=np.int64)
        if world == 1:
            return [places[i : i + micro_batch_size] for i in range(0, num, micro_batch_size)]
        missing = -num % (world * micro_batch_size)
        assert not missing or self.fill.size, f"step {step} is short, but the plan has no rows to fill it up with"
        if missing:
            places = np.concatenate([places, -1 - np.arange(missing, dtype=np.int64) % self.fill.size])
        return list(places.reshape(-1, world, micro_batch_size)[:, rank])

    def shard(self, step: int, rank: int, world: int, micro_batch_size: int, num_micro: int) -> list[Rows]:
        """Return the row ids of this rank's micro-batches of one optimizer step; see ``positions``."""
        batches = []
        for places in self.positions(step, rank, world, micro_batch_size, num_micro):
            rows = self.rows[places]
            filled = places < 0
            rows[filled] = self.fill[-1 - places[filled]]
            batches.append(rows)
        return batches

    def digest(self) -> str:
        """Return a hash (blake2b, 32 hex digits) of everything that ranks must agree on."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps(self._meta()).encode())
        digest.update(self.rows.tobytes())
        digest.update(self.fill.tobytes())
        return digest.hexdigest()

    def _meta(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "interval": asdict(self.interval),
            "global_batch": self.global_batch,
            "row_space": self.row_space,
            "num_rows": self.rows.size,
            "num_fill": self.fill.size,
            "weighted": False,  # plans once held weights; the digest stays what it was
        }

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the plan as arrays for ``numpy.savez``, without objects that would need pickle."""
        text = json.dumps({**self._meta(), "trace": self.trace})
        return {"meta": np.frombuffer(text.encode(), dtype=np.uint8), "rows": self.rows, "fill": self.fill}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> DataPlan:
        """Take back what ``to_arrays`` gave.

        Raises:
            CheckpointError: Something is missing or does not fit together.
        """
        try:
            meta = json.loads(np.asarray(arrays["meta"], dtype=np.uint8).tobytes().decode())
            if meta["format"] != _FORMAT:
                raise CheckpointError(f"plan has format {meta['format']!r}; this version reads {_FORMAT}")
            return cls(
                interval=Interval(**meta["interval"]),
                rows=arrays["rows"],
                fill=arrays["fill"],
                global_batch=meta["global_batch"],
                row_space=meta["row_space"],
                trace=meta["trace"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"plan cannot be read: {type(error).__name__}: {error}") from error
