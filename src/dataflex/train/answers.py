"""Checks what methods answer, and turns domain quotas over selected rows into a serving order. All pure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dataflex.core.choose import largest_remainder
from dataflex.core.domains import Domains
from dataflex.core.protocols import Mix, Mixer, Rows, Selection, Selector
from dataflex.core.rng import stream
from dataflex.core.schedule import Interval
from dataflex.errors import ComponentError, DataError
from dataflex.mixers.proportions import normalised, refuse_strangers

__all__ = ["caps", "check_mix", "check_selection", "quota_rows"]


def caps(given: float | dict[str, float] | None, names: tuple[str, ...]) -> NDArray[np.float64] | None:
    """Turn ``dynamic.max_epochs`` into epochs by domain [K]; domains that are not named have no cap.

    Raises:
        ConfigError: A name that is no domain.
    """
    if given is None:
        return None
    if not isinstance(given, dict):
        return np.full(len(names), float(given))
    refuse_strangers(given, names, "dynamic.max_epochs")
    return np.array([float(given.get(name, np.inf)) for name in names])


def check_mix(mixer: Mixer, mix: Mix, names: tuple[str, ...]) -> NDArray[np.float64]:
    """Return a mixer's proportions [K], summing to one.

    Raises:
        ComponentError: Not one finite number >= 0 per domain, or all of them zero.
    """
    given = np.asarray(mix.proportions, dtype=np.float64)
    if given.shape != (len(names),) or not np.isfinite(given).all() or (given < 0).any() or given.sum() <= 0:
        raise ComponentError(
            f"mixer {mixer.name!r} returned {given.tolist()} for the domains {', '.join(names)}; "
            "expected one finite number >= 0 each, not all zero"
        )
    return normalised(given)


def check_selection(selector: Selector, selection: Selection, pool: Rows, wanted: int) -> None:
    """Make sure that a selection lies in the pool and within its budget.

    Raises:
        ComponentError: The selector broke its contract.
        DataError: It kept no row at all.
    """
    rows = selection.rows
    what = f"selector {selector.name!r}"
    if rows.dtype != np.int64 or rows.ndim != 1:
        raise ComponentError(f"{what} returned rows of dtype {rows.dtype} and shape {rows.shape}; expected int64 [n]")
    if len(rows) == 0:
        raise DataError(f"{what} kept no row at all ({selection.reason or 'no reason given'})")
    outside = rows[~np.isin(rows, pool)] if len(pool) else rows
    if len(outside):
        raise ComponentError(f"{what} returned {len(outside):,} rows that are not in the pool, such as {outside[0]}")
    if len(rows) > wanted:
        raise ComponentError(f"{what} returned {len(rows):,} rows for a budget of {wanted:,}")
    if selection.scores is not None and len(selection.scores) != len(pool):
        raise ComponentError(f"{what} returned {len(selection.scores):,} scores for a pool of {len(pool):,} rows")


def quota_rows(
    kept: Rows,
    shares: NDArray[np.float64],
    total: int,
    interval: Interval,
    domains: Domains,
    *,
    seed: int,
    repeat: bool,
    earlier: Rows | None = None,
) -> Rows:
    """Serve each domain's quota from the kept rows, without replacement while they last, in random order.

    Args:
        kept: Row ids that the selector left.
        shares: Proportions of sequences by domain [K].
        total: Rows to serve.
        interval: For messages and random streams.
        domains: Domains of the row space.
        seed: Seed of the run.
        repeat: Whether rows may be served again when a quota is larger than what was kept.
        earlier: Rows that were served before, where the end of a shorter run cut the interval: they come last.

    Raises:
        DataError: A domain cannot fill its quota.
    """
    domain_of = domains.domain_of[kept]
    parts = []
    for index, count in enumerate(largest_remainder(total, shares).tolist()):
        if count == 0:
            continue
        name = domains.names[index]
        rows = kept[domain_of == index]
        if not len(rows):
            raise DataError(
                f"interval {interval.index}: the mixer wants {count:,} rows of domain {name!r}, but the selector "
                "kept none of it. Raise dynamic.keep_ratio, or give the domain a proportion of 0."
            )
        if count > len(rows) and not repeat:
            raise DataError(
                f"interval {interval.index} wants {count:,} rows of domain {name!r}; the selector kept "
                f"{len(rows):,} of it. Raise dynamic.keep_ratio, lower interval_steps or set 'repeat: true'."
            )
        order = stream(seed, f"quota/{name}", interval.index)
        copies = [order.permutation(rows) for _ in range(-(-count // len(rows)))]
        if earlier is not None:
            served = np.isin(copies[0], earlier)
            copies[0] = np.concatenate([copies[0][~served], copies[0][served]])
        parts.append(np.concatenate(copies)[:count])
    return stream(seed, "order", interval.index).permutation(np.concatenate(parts))
