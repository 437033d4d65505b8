"""The log of mixture decisions: from which sequence on which proportions hold. Entries are never edited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataflex.core.protocols import State

__all__ = ["Segment", "log_from_state", "log_state"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """One entry of the log.

    Attributes:
        start: Sequence index from which the proportions hold.
        proportions: Proportions of sequences, float64 [K].
        decided_at_step: Optimizer step of the decision.
        reason: One line for the record.
    """

    start: int
    proportions: NDArray[np.float64]
    decided_at_step: int
    reason: str = ""

    def __post_init__(self) -> None:
        proportions = self.proportions.copy()
        proportions.flags.writeable = False
        object.__setattr__(self, "proportions", proportions)


def log_state(segments: Sequence[Segment], num_domains: int) -> State:
    """Return a log as JSON values and one array [segments, K]."""
    return {
        "start": [segment.start for segment in segments],
        "proportions": np.array([segment.proportions for segment in segments]).reshape(-1, num_domains),
        "decided_at_step": [segment.decided_at_step for segment in segments],
        "reason": [segment.reason for segment in segments],
    }


def log_from_state(state: State) -> list[Segment]:
    """Take back what ``log_state`` gave; ``KeyError``, ``TypeError`` or ``ValueError`` if it is malformed."""
    columns = (state["start"], state["proportions"], state["decided_at_step"], state["reason"])
    return [
        Segment(
            start=int(start),
            proportions=np.array(shares, dtype=np.float64),
            decided_at_step=int(step),
            reason=str(reason),
        )
        for start, shares, step, reason in zip(*columns, strict=True)
    ]
