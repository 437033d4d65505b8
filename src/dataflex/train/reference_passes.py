"""Which rows a reference model has scored in which pass, and where their token losses lie.

A row is scored once: when the first plan that serves it is decided, in one pass over all such rows of the plan, or
with the whole pool where that is served more than once anyway. Which rows shared a pass is part of the
checkpoint, and every pass is an array of its own in the store, named by its rows. So a row's numbers follow from
the run alone: what else lies in the store, a kill in the middle of a pass, the number of ranks, or a store that was
lost change nothing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import CheckpointError
from dataflex.method import Rows, State
from dataflex.rng import stream
from dataflex.signals.logits import TokenScorer
from dataflex.signals.other_models import KEY
from dataflex.signals.store import ArrayStore, CacheKey, ResumablePass
from dataflex.signals.sweep import Sweep
from dataflex.signals.token_store import (
    KEPT_DTYPE,
    TOLERANCE,
    largest_difference,
    row_offsets,
    some_rows,
    stored_token_pass,
)

__all__ = ["ReferencePasses"]

logger = logging.getLogger(__name__)

_COMPARED_ROWS = 64


@dataclass(kw_only=True)
class ReferencePasses:
    """The passes of one run.

    Attributes:
        lengths: Tokens of each row [N].
        key: What the losses of all rows are computed from.
        store: Folder of the arrays.
        sweep: Makes a sweep over rows.
        scorer: Gives the model, ready to score.
        autocast: The trainer's mixed-precision context.
        whole: Whether the first pass is over all rows, and not only those asked for.
    """

    lengths: NDArray[np.int64]
    key: CacheKey
    store: Path
    sweep: Callable[[Rows], Sweep]
    scorer: Callable[[], TokenScorer]
    autocast: Callable[[], AbstractContextManager[Any]]
    whole: bool
    _arrays: dict[int, NDArray[Any]] = field(default_factory=dict, repr=False)
    _to_compare: int = _COMPARED_ROWS
    _trusted: set[int] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        self.pass_of: NDArray[np.int32] = np.full(len(self.lengths), -1, dtype=np.int32)
        """The pass that scored each row [N]; -1 for none."""
        self._start = np.zeros(len(self.lengths), dtype=np.int64)

    @property
    def complete(self) -> bool:
        """Whether every row was scored."""
        return bool((self.pass_of >= 0).all())

    def cover(self, rows: Rows) -> None:
        """Score those of ``rows`` that were not, in one pass, and have the losses of all at hand (collective).

        Args:
            rows: Row ids; may repeat, negative ones are none.

        Raises:
            CheckpointError: Stored losses are not those that the model gives now.
        """
        wanted = np.unique(rows[rows >= 0])
        everything = self.whole and len(wanted) and not (self.pass_of >= 0).any()
        scored = np.arange(len(self.lengths), dtype=np.int64) if everything else wanted
        new = scored[self.pass_of[scored] < 0]
        if len(new):
            self.pass_of[new] = self.pass_of.max() + 1
        self._arrays = {
            number: self._arrays[number] if number in self._arrays else self._array(number)
            for number in np.unique(self.pass_of[wanted]).tolist()
        }

    def kept(self, row: int) -> NDArray[Any]:
        """Return the losses of a row that ``cover`` was last asked for; empty for any other."""
        values = self._arrays.get(int(self.pass_of[row]), np.zeros(0, dtype=KEPT_DTYPE))
        return self._part(values, row)

    def state_dict(self) -> State:
        """Return which rows shared a pass, from which their losses follow."""
        return {"pass_of": self.pass_of.copy()} if (self.pass_of >= 0).any() else {}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        if state:
            self.pass_of, self._arrays = np.array(state["pass_of"], dtype=np.int32), {}

    def _part(self, values: NDArray[Any], row: int) -> NDArray[Any]:
        return values[self._start[row] : self._start[row] + self.lengths[row]]

    def _array(self, number: int) -> NDArray[Any]:
        """Return the losses of the rows of a pass, one after the other; it is run unless it is stored (collective)."""
        rows, key = np.flatnonzero(self.pass_of == number), self.key
        if len(rows) < len(self.lengths):
            digest = hashlib.blake2b(rows.astype("<i8").tobytes(), digest_size=16).hexdigest()
            key = replace(key, parameters={**key.parameters, "rows": digest})
        offsets, sweep = row_offsets(self.lengths[rows]), self.sweep(rows)
        self._start[rows] = offsets[:-1]
        work = ResumablePass(
            ArrayStore(self.store),
            key,
            shape=(int(offsets[-1]),),
            dtype=KEPT_DTYPE,
            offsets=offsets,
            device=sweep.device,
        )
        known = number in self._trusted  # a pass of this very process, which the plan before did not need
        if not known:
            logger.info("%s: losses of %d of %d rows, %s", KEY, len(rows), len(self.lengths), _progress_words(work))
        compared = min(self._to_compare, len(rows)) if work.done_at_start.any() and not known else 0
        self._trusted.add(number)
        if work.complete and not compared:
            return work.finish()
        scorer = self.scorer()
        losses = stored_token_pass(sweep, scorer, work, self.autocast)
        if compared:
            self._to_compare -= compared
            some = some_rows(sweep, compared, stream(0, key.name))
            worst, row = largest_difference(some, scorer, lambda row: self._part(losses, row), self.autocast)
            if worst > TOLERANCE:
                raise CheckpointError(
                    f"{KEY}: the stored losses in {self.store} are not those of the model: row {row} differs by "
                    f"{worst:.3g} nats per token ({TOLERANCE} are allowed). Remove the folder {self.store / key.name}"
                )
        return losses


def _progress_words(work: ResumablePass) -> str:
    done = int(work.done_at_start.sum())
    if work.complete:
        return "stored before"
    return f"{done} of them from an earlier try" if done else "computed once"
