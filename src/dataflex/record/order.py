"""Orders of the rows of a table of chosen rows: most and never served, near the cut, heaviest and lightest."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa

from dataflex.errors import DataError
from dataflex.plan.domains import Rows
from dataflex.record.chosen import chosen_notes

By = Literal["most", "never", "near-cut", "heaviest", "lightest"]


def floats(found: pa.Table, name: str) -> Any:
    """Return a column of numbers as float64, NaN where there is none."""
    return found.column(name).cast(pa.float64()).to_numpy()


def order(found: pa.Table, known: Rows, by: By, *, every: bool) -> Rows:
    """Return the rows of ``known`` that an order asks for, in that order; ``every``: also those it has no place for.

    Raises:
        DataError: The record has nothing to order by.
    """
    times = floats(found, "times_served")[known]
    if by == "never":
        if np.isnan(times).all() and len(times):
            raise DataError("--never: the record does not say which rows were served")
        return known[times == 0]
    if by == "most":
        known, times = (known, np.nan_to_num(times)) if every else (known[times > 0], times[times > 0])
        last = np.nan_to_num(floats(found, "last_served")[known], nan=-1.0)
        return known[np.lexsort((known, -last, -times))]
    if by == "near-cut":
        decisions = {one["interval"]: one for one in chosen_notes(found)["decisions"] if one["cut"] is not None}
        decision, rank = floats(found, "decision")[known], floats(found, "rank")[known]
        away = np.full(len(known), np.nan)
        for interval, one in decisions.items():
            mine = decision == interval
            edge = one["kept"] if one["prefers"] == "high" else one["scored"] - one["kept"]
            away[mine] = np.abs(rank[mine] - edge - 0.5)
        there = np.flatnonzero(np.isfinite(away))
        if not len(there) and len(known):
            raise DataError(
                "--near-cut: no decision of this run has a cut: its selector gives no scores, keeps every row, or does "
                "not choose by them"
            )
        return known[there[np.lexsort((known[there], away[there]))]]
    weights = floats(found, "weight")[known]
    there = np.flatnonzero(np.isfinite(weights))
    if not len(there) and len(known):
        raise DataError(f"--{by}: no row has a weight; the run has no weighter, or none of its checkpoints is written")
    sign = -1.0 if by == "heaviest" else 1.0
    return known[there[np.lexsort((known[there], sign * weights[there]))]]
