"""How many rows a selector is given and asked for: arithmetic that a run and its forecast share."""

from __future__ import annotations

from dataflex.core.schedule import Interval

__all__ = ["pilot_rows", "pool_sizes", "wanted_rows"]

_PILOT_SHARE = 0.05
_FEWEST_PILOTS, _MOST_PILOTS = 32, 4096


def pool_sizes(num_rows: int, pool_fraction: float, screen_fraction: float) -> tuple[int, int]:
    """Return the rows drawn for a pool, and those left once they are screened; shares are of all rows."""
    drawn = max(1, round(pool_fraction * num_rows))
    return drawn, max(1, round(screen_fraction * drawn))


def wanted_rows(interval: Interval, global_batch: int, pool_rows: int, keep_ratio: float | None, mixes: bool) -> int:
    """Return how many rows a selector is asked for: those of the interval, or ``keep_ratio`` of its pool.

    Args:
        interval: What is decided for.
        global_batch: Sequences of an optimizer step.
        pool_rows: Rows of the pool, drawn and screened.
        keep_ratio: Share of them, or None.
        mixes: Whether a mixer sets quotas over what is kept, which may then be more than the interval serves.
    """
    sequences = interval.steps * global_batch
    if keep_ratio is None:
        assert not mixes
        return sequences
    share = max(1, round(keep_ratio * pool_rows))
    return share if mixes else min(sequences, share)


def pilot_rows(num_rows: int) -> int:
    """Return how many of ``num_rows`` rows screening by a pilot scores exactly."""
    return min(num_rows, max(_FEWEST_PILOTS, min(_MOST_PILOTS, round(_PILOT_SHARE * num_rows))))
