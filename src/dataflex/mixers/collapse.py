"""Whether proportions that were found leave next to nothing but one domain."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["MOST", "collapsed"]

MOST = 0.8
"""Share of one domain above which proportions have collapsed."""


def collapsed(shares: Mapping[str, float]) -> tuple[str, float] | None:
    """Return the domain that holds more than ``MOST`` of the proportions, and its share; None where none does."""
    if len(shares) < 2:
        return None
    name, share = max(shares.items(), key=lambda item: item[1])
    return (name, share) if share > MOST else None
