"""How well a fit orders mixtures that it has not seen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dataflex.core.rng import stream

__all__ = ["folds_of", "out_of_fold", "spearman"]

Floats = NDArray[np.float64]
Predictor = Callable[[Floats], Floats]


def spearman(first_R: Floats, second_R: Floats) -> float:
    """Return Spearman's rank correlation, ties at their mean rank; NaN where one side is constant."""
    from scipy.stats import rankdata

    a, b = rankdata(first_R), rankdata(second_R)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else float("nan")


def folds_of(num_runs: int, num_folds: int, seed: int) -> list[NDArray[np.int64]]:
    """Return disjoint sets of runs that make up all of them, of sizes that differ by at most one."""
    order = stream(seed, "mixing.folds").permutation(num_runs)
    return [np.sort(part) for part in np.array_split(order, min(num_folds, num_runs))]


def out_of_fold(
    fit: Callable[[Floats, Floats], Predictor], mixtures_RK: Floats, losses_R: Floats, folds: list[NDArray[np.int64]]
) -> Floats:
    """Return the loss of each run [R] as predicted by a fit to the other folds.

    Args:
        fit: Takes mixtures and losses of the runs to fit, gives a predictor.
        mixtures_RK: Mixtures of all runs [R, K].
        losses_R: Their losses [R].
        folds: Run numbers of each fold.
    """
    predicted = np.empty(len(losses_R))
    for held in folds:
        rest = np.setdiff1d(np.arange(len(losses_R)), held)
        predicted[held] = fit(mixtures_RK[rest], losses_R[rest])(mixtures_RK[held])
    return predicted
