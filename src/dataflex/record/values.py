"""What goes into the record as a value: JSON-safe numbers, summaries of score arrays, whole files."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dataflex.plan.domains import Rows

__all__ = ["scores_of", "summarize_scores"]

_QUANTILES = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}


def summarize_scores(scores: NDArray[np.floating]) -> dict[str, float | int | None]:
    """Summarize scores [n]: count, scored (finite ones), mean, std, min, p05 p25 p50 p75 p95, max.

    NaN and infinities count as not scored. Statistics of no score at all are None.
    """
    values = np.asarray(scores, dtype=np.float64).ravel()
    finite = values[np.isfinite(values)]
    known: dict[str, float | int | None] = {"count": int(values.size), "scored": int(finite.size)}
    names = ("mean", "std", "min", *_QUANTILES, "max")
    if not finite.size:
        return {**known, **dict.fromkeys(names)}
    quantiles = np.quantile(finite, list(_QUANTILES.values()))
    numbers = (finite.mean(), finite.std(), finite.min(), *quantiles, finite.max())
    return {**known, **{name: float(number) for name, number in zip(names, numbers, strict=True)}}


def scores_of(rows: Rows, pool: Rows | None, scores: NDArray[np.floating]) -> NDArray[np.floating]:
    """Scores of ``rows`` [m], given the scores [n] of the rows of ``pool`` [n]; rows outside the pool are left out.

    A pool of None is every row, in order.
    """
    if pool is None:
        return scores[rows]
    order = np.argsort(pool, kind="stable")
    place = np.minimum(np.searchsorted(pool, rows, sorter=order), max(len(pool) - 1, 0))
    found = order[place] if len(pool) else np.zeros(0, dtype=np.int64)
    return scores[found[pool[found] == rows]] if len(pool) else scores[:0]
