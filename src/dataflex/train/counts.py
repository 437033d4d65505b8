"""What was served: how often each row, and rows and tokens by domain."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Rows, State
from dataflex.plan.domains import Domains
from dataflex.plan.live import Served
from dataflex.plan.plan import DataPlan
from dataflex.train.loader import documents_of

logger = logging.getLogger(__name__)

_SHARE = 0.1  # share of an interval's places from which on repeats are reported


class Repeats:
    """Counts how often every row is served, and warns once when much of an interval goes to rows served very often.

    ``most`` is ``dynamic.max_repeats``, how often a row may be served without a warning; None: always. ``selector`` is
    the name in the message.
    """

    def __init__(self, num_rows: int, most: int | None, selector: str) -> None:
        self._most, self._selector = most, selector
        self._times = np.zeros(num_rows, dtype=np.uint16)
        self._told = False

    def take(self, rows: Rows) -> str:
        """Count the rows of a plan; return a note for the record where a tenth of them repeat more than they may.

        Negative ids are no rows.
        """
        rows = rows[rows >= 0]
        each, added = np.unique(rows, return_counts=True)
        self._times[each] = np.minimum(self._times[each] + added, np.iinfo(np.uint16).max)
        if self._most is None or not len(rows):
            return ""
        times: NDArray[np.uint16] = self._times[rows]
        share = float((times > self._most).mean())
        if share < _SHARE:
            return ""
        told = f"{share:.0%} of the rows were served more than {self._most} times by now, up to {times.max()}"
        if not self._told:
            self._told = True
            logger.warning(
                "%s of an interval (dynamic.max_repeats: %d). The model knows such rows by heart: they teach little, "
                "and the %s selector's scores of them mean little. Keep more rows, train fewer steps, set "
                "exclude_seen where the pool has many rows of the kind, or see its note (dataflex methods selector/%s)",
                told,
                self._most,
                self._selector,
                self._selector,
            )
        return told

    def times(self, rows: Rows) -> NDArray[np.integer]:
        """Return how often each of ``rows`` [n] was served by the plans so far, int [n]."""
        return self._times[rows]

    def state_dict(self) -> State:
        """Return the counts."""
        return {"times": self._times.copy(), "told": self._told}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self._times, self._told = np.array(state["times"]), bool(state["told"])

    def take_over(self, state: State, dropped: Rows, found: NDArray[np.int64]) -> None:
        """Take the counts of another pool without rows that were not served after all.

        ``found`` is the row there of each row of this pool [N], -1 for new ones.
        """
        times = np.array(state["times"])
        np.subtract.at(times, dropped, 1)
        self._times = np.where(found >= 0, times[found], 0).astype(np.uint16)
        self._told = bool(state["told"])


class DomainTotals:
    """Rows and tokens [K] that were trained on, by domain, up to a step; each is told to ``served`` too."""

    def __init__(self, domains: Domains, served: Served) -> None:
        self._domains, self._served = domains, served
        self.rows: NDArray[np.int64] = np.zeros(len(domains.names), dtype=np.int64)
        self.tokens: NDArray[np.int64] = np.zeros(len(domains.names), dtype=np.int64)
        self._step = 0
        self.noted: NDArray[np.int64] = np.zeros((2, len(domains.names)), dtype=np.int64)
        """Rows and tokens [2, K] that this rank trained on beside the plans, not added yet."""

    def count(self, plan: DataPlan, step: int) -> None:
        """Add the rows of ``plan`` before ``step`` that were not counted yet."""
        first = plan.interval.start_step
        start, stop = ((at - first) * plan.global_batch for at in (max(self._step, first), step))
        rows = plan.rows[start : max(stop, start)]
        self._served.count(rows[rows >= 0])
        self._add(self._sums(rows))
        self._step = max(self._step, step)

    def note(self, rows: Rows) -> None:
        """Note rows that this rank trains on, which ``settle`` adds."""
        self.noted = self.noted + self._sums(rows)

    def settle(self, sums: NDArray[np.int64]) -> None:
        """Add the sums over ranks of what each had ``noted``."""
        self._add(sums)
        self.noted = np.zeros_like(self.noted)

    def _sums(self, rows: Rows) -> NDArray[np.int64]:
        """Return by domain rows, of packed ones the documents that begin, and tokens [2, K]; ids as ``loader.ROWS``."""
        if rows.ndim == 2:
            of_tokens = documents_of(rows)
            return np.stack([self._domains.counts(ids) for ids in (rows, of_tokens)])
        rows = rows[rows >= 0]
        assert self._domains.lengths is not None
        weights, labels = self._domains.lengths[rows], self._domains.domain_of[rows]
        tokens = np.bincount(labels, weights=weights, minlength=len(self.rows)).astype(np.int64)
        return np.stack([self._domains.counts(rows), tokens])

    def _add(self, sums: NDArray[np.int64]) -> None:
        self.rows, self.tokens = self.rows + sums[0], self.tokens + sums[1]

    def state_dict(self) -> State:
        """Return the counts and the step up to which they go."""
        return {"rows": self.rows, "tokens": self.tokens, "step": self._step}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self.rows, self.tokens, self._step = state["rows"], state["tokens"], int(state["step"])
