"""The way that weights took, thinned out so that a run of any length keeps at most about a thousand points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.method import State

__all__ = ["Trajectory"]

_MOST = 1024


class Trajectory:
    """Vectors at multiples of a stride of steps; the stride doubles when there are too many."""

    def __init__(self) -> None:
        self.stride = 1
        self.steps: list[int] = []
        self.vectors: list[NDArray[np.float64]] = []

    def add(self, step: int, vector: NDArray[np.float64]) -> None:
        """Keep the vector in force from ``step`` on, if the stride asks for that step."""
        if step % self.stride:
            return
        self.steps.append(step)
        self.vectors.append(np.array(vector, dtype=np.float64))
        if len(self.steps) > _MOST:
            self.stride *= 2
            kept = [i for i, at in enumerate(self.steps) if at % self.stride == 0]
            self.steps = [self.steps[i] for i in kept]
            self.vectors = [self.vectors[i] for i in kept]

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """Return ``{"steps": [...], "weights": {name: [...]}}``."""
        columns = np.stack(self.vectors, axis=1).tolist() if self.vectors else [[] for _ in names]
        return {"steps": list(self.steps), "weights": dict(zip(names, columns, strict=True))}

    def state_dict(self) -> State:
        """Return all that is kept."""
        vectors = np.stack(self.vectors) if self.vectors else np.zeros((0, 0))
        return {"stride": self.stride, "steps": np.array(self.steps, dtype=np.int64), "vectors": vectors}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self.stride = int(state["stride"])
        self.steps = [int(step) for step in state["steps"]]
        self.vectors = [np.asarray(vector, dtype=np.float64) for vector in state["vectors"]]
