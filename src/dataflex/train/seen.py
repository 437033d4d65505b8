"""Which rows were served already, for ``exclude_seen``: they leave the pool until too few are left."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Rows, State

__all__ = ["SeenRows"]

logger = logging.getLogger(__name__)


class SeenRows:
    """Notes the rows of every plan, warm-up included.

    Args:
        usable_N: Whether a row can be chosen at all: it has a supervised token.
    """

    def __init__(self, usable_N: NDArray[np.bool_]) -> None:
        self._usable = usable_N
        self._seen = np.zeros(len(usable_N), dtype=np.bool_)
        self.note = ""
        """What happened at the last decision, for the record."""

    def unseen(self, wanted: int) -> Rows:
        """Return the rows that were not served yet, ascending; all of them again where fewer than ``wanted`` are left.

        Args:
            wanted: Rows that the interval asks the selector for.
        """
        left = int((self._usable & ~self._seen).sum())
        self.note = ""
        if left < wanted and self._seen.any():
            self.note = f"{left:,} rows are unseen and {wanted:,} are wanted: every row is in the pool again"
            logger.info("exclude_seen: %s", self.note)
            self._seen[:] = False
        return np.flatnonzero(~self._seen).astype(np.int64)

    def mark(self, rows: Rows) -> None:
        """Note the rows of a plan; negative ids are none."""
        self._seen[rows[rows >= 0]] = True

    def state_dict(self) -> State:
        """Return one bit a row."""
        return {"seen": np.packbits(self._seen)}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self._seen = np.unpackbits(state["seen"], count=len(self._usable)).astype(np.bool_)
