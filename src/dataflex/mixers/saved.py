"""Checks that a saved state is a mixer's own."""

from __future__ import annotations

from collections.abc import Sequence

from dataflex.errors import CheckpointError
from dataflex.method import State

__all__ = ["require", "same_domains"]


def require(name: str, state: State, *keys: str) -> None:
    """Make sure that a saved state has ``keys``.

    Raises:
        CheckpointError: Some are missing.
    """
    missing = sorted(set(keys) - state.keys())
    if missing:
        raise CheckpointError(f"{name}: the saved state lacks {', '.join(missing)}")


def same_domains(name: str, saved: Sequence[str], found: Sequence[str]) -> None:
    """Make sure that a state is of the run's domains, in their order.

    Raises:
        CheckpointError: It was saved for others.
    """
    if tuple(saved) != tuple(found):
        raise CheckpointError(
            f"{name}: the saved weights are of the domains {', '.join(saved)}, and the run has {', '.join(found)}"
        )
