"""``dataflex mix fit``: fits held-out losses to mixtures and measures how well the fit orders unseen mixtures."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from dataflex.config.args import data_set_names
from dataflex.errors import ConfigError, DataError, did_you_mean
from dataflex.mixing.options import given
from dataflex.mixing.runs import RATIOS, Table, losses_of_run, read_table
from dataflex.mixing.swarm import SWARM, Swarm, few_runs_note, read_swarm
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import provenance
from dataflex.printable import Answer, plain, redacted
from dataflex.record.text import columns
from dataflex.rng import stream
from dataflex.state import read_json, replacing, write_json
from dataflex.version import install

Law = Literal["log_linear", "mixing_law"]
Method = Literal["log_linear", "mixing_law", "lightgbm"]
Predictor = Callable[[Floats], Floats]
"""Takes mixtures [R, K], gives losses [R]."""

LAWS: tuple[Law, ...] = get_args(Law)
METHODS: tuple[Method, ...] = get_args(Method)
FIT = "fit.json"
RESTARTS = 30
LEAST_RUNS = 3
LEAST_TREE_RUNS = 50
"""A leaf holds at least 20 runs, and four fifths of the runs must be able to fill two of them."""

_FORMAT = 1
_DELTA = 0.02
_OFFSETS = np.linspace(-2.0, 1.5, 10)
_SEARCH = {"maxiter": 300, "maxfun": 600, "ftol": 1e-9, "gtol": 1e-6}
_POLISH = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-15, "gtol": 1e-10}  # of the best start only
_MOST_EXPONENT = 30.0
_WORST = 5.0  # spreads: an error of about one spread is what the mean of the runs makes
_NOISE = 0.01  # nats, where the runs hardly differ
_FOLD_RESTARTS = 3  # of 30: folds only measure quality
_TREES_ENOUGH = 118


def predict(theta: Floats, mixtures_RK: Floats) -> Floats:
    """Return the losses [R] of a law with theta = c, b, A_1 .. A_K: exp(c) + exp(b + A . p)."""
    exponents = theta[1] + np.asarray(mixtures_RK, dtype=np.float64) @ theta[2:]
    return np.exp(theta[0]) + np.exp(np.minimum(exponents, _MOST_EXPONENT))  # bounded as in the fit


def huber(residuals: Floats, delta: float = _DELTA) -> Floats:
    """Return r^2 / 2 up to ``delta``, and delta (|r| - delta / 2) beyond, elementwise."""
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def fit_law(law: Law, mixtures_RK: Floats, losses_R: Floats, *, seed: int = 0, restarts: int = RESTARTS) -> Floats:
    """Fit the law of one task by the Huber loss, with L-BFGS from ``restarts`` random slopes per start value of c.

    Args:
        law: Which one; ``log_linear`` (Olmix, arXiv 2602.12237) keeps b at 0, ``mixing_law`` (Data Mixing Laws,
            arXiv 2403.16952) does not.
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
    with threadpool_limits(limits=1, user_api="blas"):  # scipy's: waking threads takes longer than steps this small
        for offset in _OFFSETS:
            for slopes in rng.standard_normal((restarts, design.shape[1])):
                found = descend(np.concatenate([[offset], slopes])[free], _SEARCH)
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


def lightgbm() -> Any:
    """Return the package; ``ConfigError`` if it is not installed."""
    try:
        import lightgbm as package
    except ImportError as error:
        raise ConfigError(
            f"--method lightgbm: the package cannot be imported ({error}); {install('lightgbm')}"
        ) from error
    return package


def fit_trees(mixtures_RK: Floats, losses_R: Floats, *, seed: int = 0) -> Any:
    """Fit boosted trees to the losses [R] of one task and return LightGBM's booster (RegMix, arXiv 2407.01492).

    The number of rounds comes from a cross-validation within the fitted runs.
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
    stopping = package.early_stopping(3, verbose=False)
    errors = package.cv(
        settings, data, num_boost_round=1000, nfold=5, stratified=False, seed=seed, callbacks=[stopping]
    )
    whole = package.Dataset(np.asarray(mixtures_RK), label=np.asarray(losses_R))
    return package.train(settings, whole, num_boost_round=len(errors["valid l2-mean"]))


# ---- quality: how well runs are predicted by fits that have not seen them


def spearman(first_R: Floats, second_R: Floats) -> float:
    """Return Spearman's rank correlation, ties at their mean rank; NaN where one side is constant."""
    from scipy.stats import rankdata

    a, b = rankdata(first_R), rankdata(second_R)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else math.nan


def folds_of(num_runs: int, num_folds: int, seed: int) -> list[NDArray[np.int64]]:
    """Return disjoint sets of runs that make up all of them, of sizes that differ by at most one."""
    order = stream(seed, "mixing.folds").permutation(num_runs)
    return [np.sort(part) for part in np.array_split(order, min(num_folds, num_runs))]


def out_of_fold(
    fit: Callable[[Floats, Floats], Predictor], mixtures_RK: Floats, losses_R: Floats, folds: list[NDArray[np.int64]]
) -> Floats:
    """Return the loss of each run [R] as predicted by a fit to the other folds."""
    predicted = np.empty(len(losses_R))
    for held in folds:
        rest = np.setdiff1d(np.arange(len(losses_R)), held)
        predicted[held] = fit(mixtures_RK[rest], losses_R[rest])(mixtures_RK[held])
    return predicted


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Quality of the fit of one task, out of fold."""

    spearman: float  # rank correlation of predicted and measured losses; NaN when one of them is constant
    error: float  # mean absolute difference in nats
    spread: float  # standard deviation of the measured losses, to compare the error with

    @property
    def usable(self) -> bool:
        """Whether the error is not much larger than that of predicting every run by the mean of all."""
        return bool(self.error <= max(_WORST * self.spread, _NOISE))


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One model per task."""

    method: Method
    names: tuple[str, ...]  # domains [K]
    tasks: tuple[str, ...]  # held-out sets [T]
    theta: Floats | None = None  # parameters of the laws [T, K + 2]; None for trees
    trees: tuple[str, ...] = ()  # text of each task's trees; empty for laws
    quality: Mapping[str, Quality] = field(default_factory=dict)  # by task, out of fold
    runs: tuple[str, ...] = ()  # runs that were fitted
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def predict(self, mixtures_RK: Floats, tasks: Sequence[str] = ()) -> Floats:
        """Return predicted losses [R, T] of mixtures [R, K], of all tasks or of those named."""
        places = [self.tasks.index(task) for task in tasks or self.tasks]
        if self.theta is not None:
            return np.stack([predict(self.theta[place], mixtures_RK) for place in places], axis=1)
        boosters = [lightgbm().Booster(model_str=self.trees[place]) for place in places]
        return np.stack([booster.predict(np.asarray(mixtures_RK)) for booster in boosters], axis=1)


def fit_losses(
    method: Method, mixtures: Table, losses: Table, *, folds: int, seed: int = 0, provenance: Mapping[str, Any]
) -> Fit:
    """Fit one model per task to mixtures [R, K] and held-out losses [R, T] of runs, and measure its quality.

    Quality is measured with ``folds`` folds; R folds or more mean leave-one-out.
    """
    num_runs = len(mixtures.runs)
    if num_runs < LEAST_RUNS:
        raise DataError(
            f"{num_runs} finished runs with held-out losses; a fit needs at least {LEAST_RUNS}, and Olmix advises "
            f"3 (domains + 1) = {3 * (len(mixtures.columns) + 1)}"
        )
    if method in LAWS:
        _check_reachable(losses)

    def trees(fitted_RK: Floats, fitted_R: Floats) -> Predictor:
        booster = fit_trees(fitted_RK, fitted_R, seed=seed)
        return lambda unseen: np.asarray(booster.predict(unseen))

    def law(fitted_RK: Floats, fitted_R: Floats) -> Predictor:
        assert method != "lightgbm"
        found = fit_law(method, fitted_RK, fitted_R, seed=seed, restarts=min(_FOLD_RESTARTS, RESTARTS))
        return lambda unseen: predict(found, unseen)

    parts = folds_of(num_runs, folds, seed)
    theta, texts, quality = [], [], {}
    for task, losses_R in zip(losses.columns, losses.values.T, strict=True):
        if method == "lightgbm":
            texts.append(fit_trees(mixtures.values, losses_R, seed=seed).model_to_string())
        else:
            theta.append(fit_law(method, mixtures.values, losses_R, seed=seed, restarts=RESTARTS))
        predicted = out_of_fold(trees if method == "lightgbm" else law, mixtures.values, losses_R, parts)
        quality[task] = Quality(
            spearman=spearman(predicted, losses_R),
            error=float(np.abs(predicted - losses_R).mean()),
            spread=float(losses_R.std()),
        )
    return Fit(
        method=method,
        names=mixtures.columns,
        tasks=losses.columns,
        theta=np.stack(theta) if theta else None,
        trees=tuple(texts),
        quality=quality,
        runs=mixtures.runs,
        provenance=provenance,
    )


def _check_reachable(losses: Table) -> None:
    """Raise unless all losses are numbers that a law, a sum of two bounded exponentials, comes near."""
    most = math.exp(_MOST_EXPONENT)
    problems = [
        f"run {losses.runs[r]}: the held-out loss of {losses.columns[t]} is {losses.values[r, t]:g}, and a law "
        f"predicts numbers of at least 0 and below {most:.0e}, such as nats; correct it, or leave it out (--without)"
        for r, t in np.argwhere((losses.values < 0) | (losses.values >= most))
    ]
    if problems:
        raise DataError("\n".join(problems[:20]))


def write_fit(folder: Path, fit: Fit) -> Path:
    """Write ``fit.json`` and, for trees, ``trees/task-000.txt`` and so on; return the path of the former."""
    for number, text in enumerate(fit.trees):
        path = _tree_file(folder, number)
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as file:
            file.write(text.encode())
    body = {key: value for key, value in dataclasses.asdict(fit).items() if key != "trees"}
    write_json(folder / FIT, redacted(plain({"format": _FORMAT, **body})))
    return folder / FIT


def read_fit(folder: Path) -> Fit:
    """Read what ``write_fit`` wrote; ``DataError`` if there is no fit yet, or its files are damaged."""
    path = folder / FIT
    if not path.is_file():
        raise DataError(f"{folder} holds no {FIT}; run 'dataflex mix fit {folder}' first")
    try:
        body = read_json(path)
        method = body["method"]
        theta = None if body["theta"] is None else np.asarray(body["theta"], dtype=np.float64)
        if method not in METHODS or (method in LAWS) != (theta is not None):
            raise ValueError(f"method {method!r} and its parameters do not fit together")
        if theta is not None and theta.shape != (len(body["tasks"]), len(body["names"]) + 2):
            raise ValueError(f"parameters of shape {theta.shape}")
        num_trees = len(body["tasks"]) if theta is None else 0
        quality = {
            task: Quality(**{key: math.nan if value is None else float(value) for key, value in values.items()})
            for task, values in body["quality"].items()
        }
        return Fit(
            method=method,
            names=tuple(body["names"]),
            tasks=tuple(body["tasks"]),
            theta=theta,
            trees=tuple(_tree_file(folder, number).read_text() for number in range(num_trees)),
            quality=quality,
            runs=tuple(body["runs"]),
            provenance=body["provenance"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error}; run 'dataflex mix fit {folder}' again") from error


def _tree_file(folder: Path, number: int) -> Path:
    return folder / "trees" / f"task-{number:03d}.txt"


# ---- the step


def _losses(
    options: argparse.Namespace, swarm: Swarm | None, without: Sequence[str], notes: list[str]
) -> dict[str, dict[str, float]]:
    """Return the held-out losses of each run that is to be fitted."""
    if options.metrics:
        table = read_table(options.metrics, skip=without)
        rows = zip(table.runs, table.values.tolist(), strict=True)
        return {run: dict(zip(table.columns, row, strict=True)) for run, row in rows}
    if swarm is None:
        raise ConfigError(f"--metrics: missing; {options.folder} holds no {SWARM} whose runs could be read")
    unfinished = [run for run in swarm.unfinished() if run not in without]
    if unfinished:
        told = ", ".join(unfinished[:4]) + (", ..." if len(unfinished) > 4 else "")
        notes.append(f"{len(unfinished)} of {len(swarm.runs)} runs are not finished and were left out ({told})")
    done = [run for run in swarm.runs if run not in unfinished and run not in without]
    losses = {run: losses_of_run(swarm.output_dir(run)) for run in done}
    return {run: found for run, found in losses.items() if found}


def _joined(ratios: Table, losses: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> tuple[Table, Table]:
    """Return mixtures and losses of the runs that have both, in the order of ``ratios``; no ``tasks`` means all."""
    runs = [run for run in ratios.runs if run in losses]
    strangers = [run for run in losses if run not in ratios.runs]
    problems = [f"run {run}: has losses, but no mixture{did_you_mean(run, ratios.runs)}" for run in strangers]
    known = list(dict.fromkeys(task for run in runs for task in losses[run]))
    problems += [
        f"--tasks: {task}: no run has a held-out loss of it{did_you_mean(task, known)} (known: {', '.join(known)})"
        for task in tasks
        if task not in known
    ]
    wanted = [task for task in known if not tasks or task in tasks]
    for run, task in ((run, task) for run in runs for task in wanted):
        if task not in losses[run]:
            problems.append(f"run {run}: has no held-out loss of {task}, which other runs have")
        elif not math.isfinite(losses[run][task]):
            problems.append(f"run {run}: the held-out loss of {task} is not finite; leave it out with --without {run}")
    if problems:
        raise DataError("\n".join(problems[:20]))
    if not runs or not wanted:
        raise DataError(
            "no run has a held-out loss yet; let the runs finish with an 'eval_dataset' in their configuration, or "
            "give --metrics"
        )
    mixtures = ratios.values[[ratios.runs.index(run) for run in runs]]
    values = np.asarray([[losses[run][task] for task in wanted] for run in runs], dtype=np.float64)
    return (
        Table(runs=tuple(runs), columns=ratios.columns, values=mixtures),
        Table(runs=tuple(runs), columns=tuple(wanted), values=values),
    )


def warnings_of(method: Method, num_runs: int, num_domains: int) -> list[str]:
    """Return what makes a fit doubtful, one line each."""
    lines = few_runs_note(num_runs, num_domains)
    if method == "lightgbm" and num_runs <= _TREES_ENOUGH:
        lines.append(
            f"{num_runs} runs: trees were found to need more than {_TREES_ENOUGH} runs to match the log-linear law"
        )
    return lines


def _quality_notes(fit: Fit) -> list[str]:
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


def fit_step(options: argparse.Namespace) -> Answer:
    """Fit losses to mixtures, write ``fit.json`` and return what to print."""
    if options.folds < 0 or options.folds == 1:
        raise ConfigError(f"--folds: must be 0 (leave one out) or at least 2, found {options.folds}")
    if options.method == "lightgbm":
        lightgbm()
    if not (options.folder / RATIOS).is_file():
        lacks = f"DIR: {options.folder} holds no {RATIOS}, the mixtures of the runs"
        raise ConfigError(f"{lacks}; make a swarm with 'dataflex mix swarm CONFIG --out {options.folder}'")
    ratios = read_table(options.folder / RATIOS, shares=True)
    swarm = read_swarm(options.folder) if (options.folder / SWARM).is_file() else None
    without = data_set_names(options.without)
    strangers = [run for run in without if run not in ratios.runs]
    if strangers:
        raise ConfigError([f"--without: {run}: no such run{did_you_mean(run, ratios.runs)}" for run in strangers])
    notes: list[str] = []
    mixtures, losses = _joined(ratios, _losses(options, swarm, without, notes), data_set_names(options.tasks))
    unseen = [name for name, column in zip(mixtures.columns, mixtures.values.T, strict=True) if column.max() == 0]
    if unseen:
        raise DataError(f"no run has any of {', '.join(unseen)}, so nothing is known about it; leave the column out")
    source = provenance(
        "dataflex mix fit",
        inputs=[options.folder / RATIOS, *([options.metrics] if options.metrics else [])],
        settings=given(options, "method", "tasks", "without", "folds", "seed"),
        packages=("scipy", "lightgbm") if options.method == "lightgbm" else ("scipy",),
        config_digest=swarm.config_digest if swarm else None,
    )
    folds = options.folds or len(mixtures.runs)
    found = fit_losses(options.method, mixtures, losses, folds=folds, seed=options.seed, provenance=source)
    path = write_fit(options.folder, found)
    how = "leave-one-out" if folds >= len(found.runs) else f"{folds}-fold cross-validation"
    table = [["held-out set", "Spearman", "error (nats)", "spread (nats)"]]
    for task, quality in found.quality.items():
        error = f"{quality.error:.4f}" if quality.error < 1e4 else f"{quality.error:.3g}"
        table.append([task, f"{quality.spearman:.3f}", error, f"{quality.spread:.4f}"])
    notes += [*_quality_notes(found), *warnings_of(found.method, len(found.runs), len(found.names))]
    lines = [
        f"{found.method} on {len(found.runs)} runs; quality by {how}, on runs that the fit has not seen",
        *columns(table),
        *(f"note: {note}" for note in notes),
        f"written: {path}; next: dataflex mix propose {options.folder}",
    ]
    told = {task: asdict(each) for task, each in found.quality.items()}
    values = {"out": path, "method": found.method, "runs": found.runs, "quality": told, "notes": notes}
    return Answer("\n".join(lines), values)
