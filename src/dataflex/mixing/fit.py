"""Fits held-out losses to mixtures, says how well that orders unseen mixtures, and keeps the result as ``fit.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError, DataError
from dataflex.mixing.swarm import Table
from dataflex.printable import plain, redacted
from dataflex.rng import stream
from dataflex.state import replacing, write_json

Floats = NDArray[np.float64]
Law = Literal["log_linear", "mixing_law"]

LAWS: tuple[Law, ...] = ("log_linear", "mixing_law")
RESTARTS = 30

_DELTA = 0.02
_OFFSETS = np.linspace(-2.0, 1.5, 10)
_SEARCH = {"maxiter": 300, "maxfun": 600, "ftol": 1e-9, "gtol": 1e-6}
_POLISH = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-15, "gtol": 1e-10}  # of the best start only
_MOST_EXPONENT = 30.0


def predict(theta: Floats, mixtures_RK: Floats) -> Floats:
    """Return the losses [R] of a law.

    Args:
        theta: c, b, A_1 .. A_K [K + 2].
        mixtures_RK: Mixtures [R, K].
    """
    exponents = theta[1] + np.asarray(mixtures_RK, dtype=np.float64) @ theta[2:]
    return np.exp(theta[0]) + np.exp(np.minimum(exponents, _MOST_EXPONENT))  # bounded as in the fit


def huber(residuals: Floats, delta: float = _DELTA) -> Floats:
    """Return r^2 / 2 up to ``delta``, and delta (|r| - delta / 2) beyond, elementwise."""
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def fit_law(law: Law, mixtures_RK: Floats, losses_R: Floats, *, seed: int = 0, restarts: int = RESTARTS) -> Floats:
    """Fit the law of one task.

    Args:
        law: Which one; ``log_linear`` keeps b at 0.
        mixtures_RK: Mixtures of the runs [R, K].
        losses_R: Held-out losses of the runs [R], finite.
        seed: Seed of the random starts.
        restarts: Random starts per value of c.

    Returns:
        float64 [K + 2]: c, b, A_1 .. A_K. Depends on the arguments only.

    Raises:
        DataError: No start led to a finite law.
    """
    from scipy.optimize import minimize

    design = np.concatenate([np.ones((len(mixtures_RK), 1)), mixtures_RK], axis=1)  # of b and A
    free = np.ones(design.shape[1] + 1, dtype=bool)
    free[1] = law == "mixing_law"
    rng = stream(seed, f"mixing.fit.{law}")
    taken = design[:, free[1:]]

    def descend(start: Floats, options: dict[str, float]) -> Any:
        return minimize(_objective, start, args=(taken, losses_R), jac=True, method="L-BFGS-B", options=options)

    best, best_value = None, np.inf
    for offset in _OFFSETS:
        for slopes in rng.standard_normal((restarts, design.shape[1])):
            start = np.concatenate([[offset], slopes])
            start[~free] = 0.0
            found = descend(start[free], _SEARCH)
            if np.isfinite(found.fun) and np.isfinite(found.x).all() and found.fun < best_value:
                best, best_value = found.x, found.fun
    if best is None:
        raise DataError("the law could not be fitted: no start led to finite numbers; are the losses in nats?")
    theta = np.zeros(len(free))
    theta[free] = descend(best, _POLISH).x
    return theta


def _objective(free_theta: Floats, design: Floats, losses_R: Floats) -> tuple[float, Floats]:
    """Return the mean Huber loss in units of delta^2, and its gradient; exponents are bounded."""
    floor_exponent = min(free_theta[0], _MOST_EXPONENT)
    exponents = design @ free_theta[1:]
    inside = exponents < _MOST_EXPONENT
    floor, rest = np.exp(floor_exponent), np.exp(np.minimum(exponents, _MOST_EXPONENT))
    residuals = floor + rest - losses_R
    slopes = np.clip(residuals, -_DELTA, _DELTA) / (len(losses_R) * _DELTA**2)
    gradient = np.empty_like(free_theta)
    gradient[0] = slopes.sum() * floor * (free_theta[0] < _MOST_EXPONENT)
    gradient[1:] = (slopes * rest * inside) @ design
    return float(huber(residuals).mean() / _DELTA**2), gradient


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


LEAST_TREE_RUNS = 50
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
        DataError: Fewer than ``LEAST_TREE_RUNS`` runs.
    """
    package = lightgbm()
    if len(mixtures_RK) < LEAST_TREE_RUNS:
        raise DataError(
            f"--method lightgbm: {len(mixtures_RK)} runs are too few for trees with 20 runs in a leaf, which need at "
            f"least {LEAST_TREE_RUNS} (and want some hundreds); use --method log_linear"
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


Method = Literal["log_linear", "mixing_law", "lightgbm"]

FIT = "fit.json"
METHODS: tuple[Method, ...] = get_args(Method)
LEAST_RUNS = 3

_WORST = 5.0  # spreads: an error of about one spread is what the mean of the runs makes
_NOISE = 0.01  # nats, where the runs hardly differ
_FOLD_RESTARTS = 3  # of 30: folds only measure quality
_TREES_ENOUGH = 118
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well runs are predicted by fits that have not seen them.

    Attributes:
        spearman: Rank correlation of predicted and measured losses; NaN when one of them is constant.
        error: Mean absolute difference in nats.
        spread: Standard deviation of the measured losses, to compare the error with.
    """

    spearman: float
    error: float
    spread: float

    @property
    def usable(self) -> bool:
        """Whether unseen runs are predicted at all: not much worse than all of them by their mean."""
        return bool(self.error <= max(_WORST * self.spread, _NOISE))


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One model per task.

    Attributes:
        method: "log_linear", "mixing_law" or "lightgbm".
        names: Domains [K].
        tasks: What losses are of [T].
        theta: Parameters of the laws [T, K + 2]; None for trees.
        trees: Text of each task's trees; empty for laws.
        quality: Task -> quality out of fold.
        runs: Runs that were fitted.
        provenance: Where it is from.
    """

    method: Method
    names: tuple[str, ...]
    tasks: tuple[str, ...]
    theta: Floats | None = None
    trees: tuple[str, ...] = ()
    quality: Mapping[str, Quality] = field(default_factory=dict)
    runs: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def predict(self, mixtures_RK: Floats, tasks: Sequence[str] = ()) -> Floats:
        """Return predicted losses [R, T] of mixtures [R, K], of all tasks or of those named."""
        places = [self.tasks.index(task) for task in tasks or self.tasks]
        if self.theta is not None:
            columns = [predict(self.theta[place], mixtures_RK) for place in places]
        else:
            columns = [load_trees(self.trees[place]).predict(np.asarray(mixtures_RK)) for place in places]
        return np.stack(columns, axis=1)


def warnings_of(method: Method, num_runs: int, num_domains: int) -> list[str]:
    """Return what makes a fit doubtful, one line each."""
    lines = []
    wanted = 3 * (num_domains + 1)
    if num_runs < wanted:
        lines.append(
            f"{num_runs} runs for {num_domains} domains; Olmix advises at least 3 (domains + 1) = {wanted}, so "
            "trust the held-out correlation before the proposal"
        )
    if method == "lightgbm" and num_runs <= _TREES_ENOUGH:
        lines.append(
            f"{num_runs} runs: trees were found to need more than {_TREES_ENOUGH} runs to match the log-linear law"
        )
    return lines


def quality_notes(fit: Fit) -> list[str]:
    """Return what is wrong with the fits of single tasks, one line each."""
    lines = []
    for task, quality in fit.quality.items():
        if not quality.usable:
            lines.append(
                f"{task}: the fit says nothing about runs that it has not seen: it is off by {quality.error:.3g} nats, "
                f"and the runs themselves spread by {quality.spread:.3g}; 'mix propose' leaves {task} out. More runs "
                "help, mixtures that hold every domain (a lower --strengths spreads them), or --method lightgbm"
            )
        elif quality.error > quality.spread > 0:
            lines.append(f"{task}: runs that the fit has not seen are predicted no better than by the mean of all runs")
    return lines


def fit_losses(
    method: Method, mixtures: Table, losses: Table, *, folds: int, seed: int = 0, provenance: Mapping[str, Any]
) -> Fit:
    """Fit one model per task to the runs of a swarm.

    Args:
        method: Which model.
        mixtures: Mixtures of the runs [R, K].
        losses: Their held-out losses [R, T].
        folds: Folds that quality is measured with; at least R means leave-one-out.
        seed: Seed of starts, trees and folds.
        provenance: Where the numbers are from, to be kept.

    Raises:
        DataError: Too few runs.
        ConfigError: LightGBM is missing.
    """
    num_runs = len(mixtures.runs)
    if num_runs < LEAST_RUNS:
        raise DataError(
            f"{num_runs} finished runs with held-out losses; a fit needs at least {LEAST_RUNS}, and Olmix advises "
            f"3 (domains + 1) = {3 * (len(mixtures.columns) + 1)}"
        )
    parts = folds_of(num_runs, folds, seed)
    theta, trees, quality = [], [], {}
    for task, losses_R in zip(losses.columns, losses.values.T, strict=True):
        if method == "lightgbm":
            trees.append(fit_trees(mixtures.values, losses_R, seed=seed).model_to_string())
        else:
            theta.append(fit_law(method, mixtures.values, losses_R, seed=seed, restarts=RESTARTS))
        quality[task] = _quality(method, mixtures.values, losses_R, parts, seed)
    return Fit(
        method=method,
        names=mixtures.columns,
        tasks=losses.columns,
        theta=np.stack(theta) if theta else None,
        trees=tuple(trees),
        quality=quality,
        runs=mixtures.runs,
        provenance=provenance,
    )


def _quality(
    method: Method, mixtures_RK: Floats, losses_R: Floats, parts: list[NDArray[np.int64]], seed: int
) -> Quality:
    def fit(fitted_RK: Floats, fitted_R: Floats) -> Predictor:
        if method == "lightgbm":
            booster = fit_trees(fitted_RK, fitted_R, seed=seed)
            return lambda unseen: np.asarray(booster.predict(unseen))
        theta = fit_law(method, fitted_RK, fitted_R, seed=seed, restarts=min(_FOLD_RESTARTS, RESTARTS))
        return lambda unseen: predict(theta, unseen)

    predicted = out_of_fold(fit, mixtures_RK, losses_R, parts)
    return Quality(
        spearman=spearman(predicted, losses_R),
        error=float(np.abs(predicted - losses_R).mean()),
        spread=float(losses_R.std()),
    )


def write_fit(folder: Path, fit: Fit) -> Path:
    """Write ``fit.json`` and, for trees, ``trees/task-000.txt`` and so on; return the path of the former."""
    for number, text in enumerate(fit.trees):
        path = _tree_file(folder, number)
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as file:
            file.write(text.encode())
    body = {
        "format": _FORMAT,
        "method": fit.method,
        "names": list(fit.names),
        "tasks": list(fit.tasks),
        "theta": None if fit.theta is None else fit.theta.tolist(),
        "quality": {task: vars(quality) for task, quality in fit.quality.items()},
        "runs": list(fit.runs),
        "provenance": fit.provenance,
    }
    write_json(folder / FIT, redacted(plain(body)))
    return folder / FIT


def read_fit(folder: Path) -> Fit:
    """Read what ``write_fit`` wrote.

    Raises:
        DataError: There is no fit yet, or its files are damaged.
    """
    path = folder / FIT
    if not path.is_file():
        raise DataError(f"{folder} holds no {FIT}; run 'dataflex mix fit {folder}' first")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        method = body["method"]
        theta = None if body["theta"] is None else np.asarray(body["theta"], dtype=np.float64)
        if method not in METHODS or (method in LAWS) != (theta is not None):
            raise ValueError(f"method {method!r} and its parameters do not fit together")
        if theta is not None and theta.shape != (len(body["tasks"]), len(body["names"]) + 2):
            raise ValueError(f"parameters of shape {theta.shape}")
        num_trees = len(body["tasks"]) if theta is None else 0
        trees = [_tree_file(folder, number).read_text() for number in range(num_trees)]
        return Fit(
            method=method,
            names=tuple(body["names"]),
            tasks=tuple(body["tasks"]),
            theta=theta,
            trees=tuple(trees),
            quality={task: Quality(**_numbers(values)) for task, values in body["quality"].items()},
            runs=tuple(body["runs"]),
            provenance=body["provenance"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error}; run 'dataflex mix fit {folder}' again") from error


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {key: float("nan") if value is None else float(value) for key, value in values.items()}


def _tree_file(folder: Path, number: int) -> Path:
    return folder / "trees" / f"task-{number:03d}.txt"
