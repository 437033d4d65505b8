"""Values that were paid for: kept for a decision, for some steps, for the run, or on disk as they come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.plan.domains import Rows
from dataflex.signals.store import ArrayStore, CacheKey, ResumablePass
from dataflex.state import State

_AGELESS = -1  # step of values of models that do not change

SignalValue = NDArray[np.float32]


def rows_digest(rows: Rows) -> str:
    """Return a hash of row ids."""
    return hashlib.blake2b(np.ascontiguousarray(rows).tobytes(), digest_size=16).hexdigest()


@dataclass(kw_only=True)
class SignalCache:
    """Gives values again; those of a model that does not change are kept row by row, for the whole run."""

    max_age_steps: int = 0  # age of the oldest values that are given again, in optimizer steps
    store: ArrayStore | None = None  # where passes write as they go; None keeps values in memory only
    store_bytes: int = 10 * 2**30  # oldest stored arrays are dropped beyond this size
    model_identity: Callable[[], str] = lambda: ""  # asked once a step, only with a store (collective)
    surroundings: Callable[[str], dict[str, Any]] = lambda _: {}  # what else values of a corpus depend on, JSON
    step: int = 0  # optimizer step that values belong to
    _kept: dict[str, tuple[int, SignalValue]] = field(default_factory=dict)
    _identity: tuple[int, str] | None = None

    def begin(self, step: int) -> None:
        """Forget values that are too old for ``step``."""
        self.step = step
        self._kept = {
            key: kept for key, kept in self._kept.items() if kept[0] == _AGELESS or step - kept[0] <= self.max_age_steps
        }

    def get(self, key: dict[str, Any]) -> SignalValue | None:
        """Return the caller's own copy of what is kept under ``key``, JSON values; None for nothing."""
        kept = self._kept.get(json.dumps(key, sort_keys=True))
        return None if kept is None else kept[1].copy()

    def keep(self, key: dict[str, Any], values: SignalValue) -> SignalValue:
        """Keep values for the step, and return the caller's own copy."""
        self._kept[json.dumps(key, sort_keys=True)] = (self.step, values)
        if self.store is not None:
            self.store.evict(self.store_bytes)
        return values.copy()

    def table(self, key: dict[str, Any], num_rows: int) -> SignalValue:
        """Return the numbers of a model that does not change: (number, whether it is known) of every row [N, 2]."""
        empty = (_AGELESS, np.zeros((num_rows, 2), dtype=np.float32))
        return self._kept.setdefault(json.dumps(key, sort_keys=True), empty)[1]

    def work(
        self, method: str, parameters: dict[str, Any], *, model: str, data: str, corpus: str, shape: tuple[int, ...]
    ) -> ResumablePass:
        """Open the stored array of a pass (collective); only with a store.

        ``method`` and ``parameters`` (JSON values) say what is computed, ``model`` names a model that does not change
        ("" for the model under training), ``data`` the rows, and ``corpus`` their target ("" for the training set).
        """
        assert self.store is not None
        if not model:
            if self._identity is None or self._identity[0] != self.step:
                self._identity = (self.step, self.model_identity())
            model = self._identity[1]
        key = CacheKey(model=model, data=data, method=method, parameters={**parameters, **self.surroundings(corpus)})
        return ResumablePass(self.store, key, shape=shape, dtype=np.float32)

    def state_dict(self) -> State:
        """Return values that a later step may be given again, so that a resumed run gives the same ones."""
        kept = {key: kept for key, kept in self._kept.items() if self.max_age_steps or kept[0] == _AGELESS}
        return {"answers": {key: {"step": step, "values": values} for key, (step, values) in kept.items()}}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self._kept = {key: (int(kept["step"]), np.array(kept["values"])) for key, kept in state["answers"].items()}
