"""How often a selector has had each row served: rows that are learnt by heart tell less and less about the rest."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Rows, State

__all__ = ["Repeats"]

logger = logging.getLogger(__name__)

_SHARE = 0.1
"""Share of an interval's places from which on repeats are worth a word."""


class Repeats:
    """Counts how often every row is served, and warns once when much of an interval goes to rows served very often.

    Args:
        num_rows: Rows of the training set.
        most: ``dynamic.max_repeats``, how often a row may be served without a word; None: always.
        selector: Name of the selector, for the message.
    """

    def __init__(self, num_rows: int, most: int | None, selector: str) -> None:
        self._most, self._selector = most, selector
        self._served = np.zeros(num_rows, dtype=np.uint16)
        self._told = False

    def take(self, rows: Rows) -> str:
        """Count the rows of a plan; return a word for the record where a tenth of them repeat more than they may.

        Args:
            rows: Rows of an interval in serving order; negative ids are none.
        """
        rows = rows[rows >= 0]
        each, added = np.unique(rows, return_counts=True)
        self._served[each] = np.minimum(self._served[each] + added, np.iinfo(np.uint16).max)
        if self._most is None or not len(rows):
            return ""
        times: NDArray[np.uint16] = self._served[rows]
        share = float((times > self._most).mean())
        if share < _SHARE:
            return ""
        told = f"{share:.0%} of the rows were served more than {self._most} times by now, up to {times.max()}"
        if not self._told:
            self._told = True
            logger.warning(
                "%s of an interval (dynamic.max_repeats: %d). What the %s selector says of rows that are known by "
                "heart wears out, and so does what they teach: keep more rows, train fewer steps, set exclude_seen "
                "where the pool has many rows of the kind, or see its note (dataflex methods selector/%s)",
                told,
                self._most,
                self._selector,
                self._selector,
            )
        return told

    def state_dict(self) -> State:
        """Return the counts."""
        return {"served": self._served.copy(), "told": self._told}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self._served = np.array(state["served"], dtype=np.uint16)
        self._told = bool(state["told"])
