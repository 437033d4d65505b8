"""A word for saved states that are not a mixer's own."""

from __future__ import annotations

from dataflex.core.protocols import State
from dataflex.errors import CheckpointError

__all__ = ["require"]


def require(name: str, state: State, *keys: str) -> None:
    """Make sure that a saved state has ``keys``.

    Raises:
        CheckpointError: Some are missing.
    """
    missing = sorted(set(keys) - state.keys())
    if missing:
        raise CheckpointError(f"{name}: the saved state lacks {', '.join(missing)}")
