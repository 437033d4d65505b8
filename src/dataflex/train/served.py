"""How many rows and tokens of each domain a run has served, counted as its steps go by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dataflex.method import State
from dataflex.plan.domains import Domains
from dataflex.plan.plan import DataPlan

__all__ = ["ServedCounts"]


class ServedCounts:
    """Counts by domain, up to a step.

    Args:
        domains: Domains of the training rows, with their lengths.
    """

    def __init__(self, domains: Domains) -> None:
        self._domains = domains
        self.rows: NDArray[np.int64] = np.zeros(len(domains.names), dtype=np.int64)
        self.tokens: NDArray[np.int64] = np.zeros(len(domains.names), dtype=np.int64)
        self._step = 0

    def count(self, plan: DataPlan, step: int) -> None:
        """Take in what ``plan`` served before ``step`` and was not counted yet."""
        first = plan.interval.start_step
        start, stop = ((at - first) * plan.global_batch for at in (max(self._step, first), step))
        rows = plan.rows[start : max(stop, start)]
        rows = rows[rows >= 0]
        assert self._domains.lengths is not None
        weights, labels = self._domains.lengths[rows], self._domains.domain_of[rows]
        self.rows = self.rows + self._domains.counts(rows)
        self.tokens = self.tokens + np.bincount(labels, weights=weights, minlength=len(self.rows)).astype(np.int64)
        self._step = max(self._step, step)

    def state_dict(self) -> State:
        """Return the counts and the step up to which they go."""
        return {"rows": self.rows, "tokens": self.tokens, "step": self._step}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self.rows = np.asarray(state["rows"], dtype=np.int64)
        self.tokens = np.asarray(state["tokens"], dtype=np.int64)
        self._step = int(state["step"])
