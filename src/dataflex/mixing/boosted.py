"""Boosted trees from mixture to held-out loss (RegMix, Liu et al., ICLR 2025, arXiv 2407.01492).

One LightGBM model per task: gradient-boosted regression trees, at most 1000 rounds at learning rate
0.01. The number of rounds is where the error of a cross-validation inside the training runs has
not fallen for 3 rounds; runs that quality is measured on never take part in that choice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError, DataError

__all__ = ["LEAST_RUNS", "fit_trees", "lightgbm", "load_trees"]

Floats = NDArray[np.float64]

LEAST_RUNS = 50
"""A leaf holds at least 20 runs, and four fifths of the runs must be able to fill two of them."""

_ROUNDS = 1000
_PATIENCE = 3
_FOLDS = 5


def lightgbm() -> Any:
    """Return the package.

    Raises:
        ConfigError: It is not installed, with how to install it.
    """
    try:
        import lightgbm as package
    except ImportError as error:
        raise ConfigError(
            f"--method lightgbm: the package cannot be imported ({error}); pip install 'dataflex[lightgbm]'"
        ) from error
    return package


def fit_trees(mixtures_RK: Floats, losses_R: Floats, *, seed: int = 0) -> Any:
    """Fit the trees of one task and return LightGBM's booster; ``predict`` takes mixtures [R, K].

    Args:
        mixtures_RK: Mixtures of the runs [R, K].
        losses_R: Held-out losses of the runs [R], finite.
        seed: Seed of folds and trees.

    Raises:
        ConfigError: LightGBM is missing.
        DataError: Fewer than ``LEAST_RUNS`` runs.
    """
    package = lightgbm()
    if len(mixtures_RK) < LEAST_RUNS:
        raise DataError(
            f"--method lightgbm: {len(mixtures_RK)} runs are too few for trees with 20 runs in a leaf, which need at "
            f"least {LEAST_RUNS} (and want some hundreds); use --method log_linear"
        )
    settings = {
        "objective": "regression",
        "boosting": "gbdt",
        "metric": "l2",
        "learning_rate": 0.01,
        "seed": seed,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": 1,
        "verbosity": -1,
    }
    data = package.Dataset(np.asarray(mixtures_RK), label=np.asarray(losses_R), free_raw_data=False)
    errors = package.cv(
        settings,
        data,
        num_boost_round=_ROUNDS,
        nfold=_FOLDS,
        stratified=False,
        seed=seed,
        callbacks=[package.early_stopping(_PATIENCE, verbose=False)],
    )
    rounds = len(errors["valid l2-mean"])
    whole = package.Dataset(np.asarray(mixtures_RK), label=np.asarray(losses_R))
    return package.train(settings, whole, num_boost_round=rounds)


def load_trees(text: str) -> Any:
    """Return the booster that ``model_to_string`` wrote."""
    return lightgbm().Booster(model_str=text)
