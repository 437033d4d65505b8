"""``dataflex mix fit`` and ``dataflex mix propose``: from the runs of a swarm to a proportions file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dataflex.commands.mix import check_names, names_of, write_result
from dataflex.errors import ConfigError, DataError, did_you_mean
from dataflex.mixing.chameleon import centred_kernel, leverage, leverage_weights, read_texts, sample_texts
from dataflex.mixing.mixmin import check_matrix, objective, read_embeddings, read_matrix, solve, split_rows, write_embeddings, write_matrix
from dataflex.mixing.proxies import log_likelihoods, mean_states
from dataflex.plan.proportions import provenance
from dataflex.record.text import columns

if TYPE_CHECKING:
    from dataflex.mixing.swarm import Swarm

__all__ = ["chameleon", "fit", "mixmin", "propose"]

Floats = NDArray[np.float64]

_MAX_EPOCHS = 4.0


def fit(options: argparse.Namespace) -> str:
    """Fit losses to mixtures, write ``fit.json`` and return what to print.

    Raises:
        ConfigError: Options that cannot work.
        DataError: Too few runs, or numbers that cannot be used.
    """
    from dataflex.mixing.fit import fit_losses, lightgbm, quality_notes, warnings_of, write_fit
    from dataflex.mixing.swarm import SWARM, read_swarm
    from dataflex.mixing.tables import RATIOS, join, read_table

    if options.folds < 0 or options.folds == 1:
        raise ConfigError(f"--folds: must be 0 (leave one out) or at least 2, found {options.folds}")
    if options.method == "lightgbm":
        lightgbm()
    ratios = read_table(options.folder / RATIOS, shares=True)
    swarm = read_swarm(options.folder) if (options.folder / SWARM).is_file() else None
    without = names_of(options.without)
    strangers = [run for run in without if run not in ratios.runs]
    if strangers:
        raise ConfigError([f"--without: {run}: no such run{did_you_mean(run, ratios.runs)}" for run in strangers])
    notes: list[str] = []
    losses = _losses(options, swarm, ratios.runs, without, notes)
    mixtures, measured = join(ratios, losses, names_of(options.tasks))
    unseen = [name for name, column in zip(mixtures.columns, mixtures.values.T, strict=True) if column.max() == 0]
    if unseen:
        raise DataError(f"no run has any of {', '.join(unseen)}, so nothing is known about it; leave the column out")
    inputs = [options.folder / RATIOS, *([options.metrics] if options.metrics else [])]
    told = {key: getattr(options, key) for key in ("method", "tasks", "without", "folds", "seed")}
    packages = ("scipy", "lightgbm") if options.method == "lightgbm" else ("scipy",)
    source = provenance(
        "dataflex mix fit",
        inputs=inputs,
        settings=told,
        packages=packages,
        config_digest=swarm.config_digest if swarm else None,
    )
    folds = options.folds or len(mixtures.runs)
    found = fit_losses(options.method, mixtures, measured, folds=folds, seed=options.seed, provenance=source)
    path = write_fit(options.folder, found)
    how = "leave-one-out" if folds >= len(found.runs) else f"{folds}-fold cross-validation"
    table = [["held-out set", "Spearman", "error (nats)", "spread (nats)"]]
    table += [
        [t, f"{q.spearman:.3f}", f"{q.error:.4f}" if q.error < 1e4 else f"{q.error:.3g}", f"{q.spread:.4f}"]
        for t, q in found.quality.items()
    ]
    lines = [
        f"{found.method} on {len(found.runs)} runs; quality by {how}, on runs that the fit has not seen",
        *columns(table),
    ]
    notes += [*quality_notes(found), *warnings_of(found.method, len(found.runs), len(found.names))]
    lines += [f"note: {note}" for note in notes]
    return "\n".join([*lines, f"written: {path}; next: dataflex mix propose {options.folder}"])


def _losses(
    options: argparse.Namespace, swarm: Swarm | None, runs: Sequence[str], without: Sequence[str], notes: list[str]
) -> dict[str, dict[str, float]]:
    """Return the held-out losses of each run that is to be fitted."""
    from dataflex.mixing.tables import losses_of_run, read_table

    if options.metrics:
        table = read_table(options.metrics, skip=without)
        return {
            run: dict(zip(table.columns, row.tolist(), strict=True))
            for run, row in zip(table.runs, table.values, strict=True)
        }
    if swarm is None:
        raise ConfigError(f"--metrics: missing; {options.folder} holds no swarm.json whose runs could be read")
    unfinished = [run for run in swarm.unfinished() if run not in without]
    if unfinished:
        shown = ", ".join(unfinished[:4]) + (", ..." if len(unfinished) > 4 else "")
        notes.append(f"{len(unfinished)} of {len(runs)} runs are not finished and were left out ({shown})")
    done = [run for run in swarm.runs if run not in unfinished and run not in without]
    losses = {run: losses_of_run(swarm.output_dir(run)) for run in done}
    return {run: found for run, found in losses.items() if found}


def propose(options: argparse.Namespace) -> str:
    """Write the proportions file of a fit and return what to print.

    Raises:
        ConfigError: Options that cannot work, such as caps that cannot be met.
        DataError: There is no fit.
    """
    from dataflex.mixing.fit import FIT, read_fit
    from dataflex.mixing.propose import KL
    from dataflex.mixing.propose import propose as proposed
    from dataflex.mixing.swarm import SWARM, read_swarm

    found = read_fit(options.folder)
    if found.method == "lightgbm" and options.kl is not None:
        raise ConfigError("--kl: has no effect with lightgbm, whose search stays near the natural mix by its draws")
    swarm = read_swarm(options.folder) if (options.folder / SWARM).is_file() else None
    sizes, unit = _sizes(options, swarm, found.names)
    caps, notes = _caps(options, sizes, unit, found.names)
    kl = KL if options.kl is None else options.kl
    tasks = names_of(options.tasks)
    shares, details = proposed(found, sizes, tasks=tasks, kl=kl, caps_K=caps, seed=options.seed)
    keys = ("budget", "max_epochs", "cap", "tasks", "natural", "seed")
    source = provenance(
        "dataflex mix propose",
        inputs=[options.folder / FIT],
        settings={**{key: getattr(options, key) for key in keys}, "kl": kl},
        packages=("scipy",),
        config_digest=found.provenance.get("config_digest"),
    )
    lines = write_result(
        options.out or options.folder / "proportions.json",
        found.names,
        shares,
        method=found.method,
        source={**source, "fit": found.provenance},
        details={**details, "caps": dict(zip(found.names, caps.tolist(), strict=True))},
        natural=sizes / sizes.sum(),
        caps=caps,
    )
    table = [["held-out set", "natural mix", "proposed"]]
    for task, after in details["predicted"].items():
        table.append([task, f"{details['predicted_natural'][task]:.4f}", f"{after:.4f}"])
    notes += [details["warning"]] if "warning" in details else []
    if details["left_out"]:
        notes.append(
            f"left out, as unseen runs are not predicted at all (see 'mix fit'): {', '.join(details['left_out'])}"
        )
    return "\n".join([*lines, "predicted losses", *columns(table), *(f"note: {note}" for note in notes)])


def _sizes(options: argparse.Namespace, swarm: Swarm | None, names: Sequence[str]) -> tuple[Floats, str]:
    """Return the natural sizes [K] in the order of ``names``, and their unit."""
    from dataflex.mixing.natural import given_sizes

    if options.natural is not None:
        given, sizes, unit = given_sizes(options.natural)
    elif swarm is not None:
        given, sizes, unit = swarm.names, swarm.sizes, swarm.unit
    else:
        raise ConfigError(f"--natural: missing; {options.folder} holds no swarm.json with the sizes of the domains")
    known = dict(zip(given, sizes.tolist(), strict=True))
    check_names("--natural", known, names, every=True)
    if not sizes.sum() > 0:
        raise ConfigError("--natural: all sizes are 0")
    return np.asarray([known[name] for name in names]), unit


def _caps(options: argparse.Namespace, sizes: Floats, unit: str, names: Sequence[str]) -> tuple[Floats, list[str]]:
    """Return the largest share of each domain [K], and notes."""
    from dataflex.mixing.natural import numbers_by_name
    from dataflex.mixing.propose import caps_of_epochs

    caps, notes = np.ones(len(names)), []
    epochs = _MAX_EPOCHS if options.max_epochs is None else options.max_epochs
    if options.budget is not None:
        if not options.budget > 0 or not epochs > 0:
            raise ConfigError("--budget and --max-epochs: must be above 0")
        if unit == "shares":
            raise ConfigError("--budget: sizes are known as shares only; give --natural with sizes in a unit")
        caps = caps_of_epochs(sizes, options.budget, epochs)
    elif options.max_epochs is not None:
        raise ConfigError("--max-epochs: has no effect without --budget, what the large run uses in the unit of sizes")
    else:
        notes.append(f"no --budget (in {unit}), so no domain is kept from being repeated too often")
    if options.cap:
        single = numbers_by_name(options.cap, "--cap")
        check_names("--cap", single, names, every=False)
        caps = np.minimum(caps, [single.get(name, 1.0) for name in names])
    return caps, notes


def mixmin(options: argparse.Namespace) -> str:
    """Write proportions by MixMin and return what to print.

    Raises:
        ConfigError: Options that cannot work together.
        DataError: Files or models that cannot be used.
    """
    if (options.matrix is None) == (options.models is None):
        raise ConfigError("--models and --matrix: give one of the two (models with --target)")
    if not 0 <= options.test_share < 1:
        raise ConfigError(f"--test-share: must be at least 0 and below 1, found {options.test_share:g}")
    if options.rate <= 0 or options.steps < 1:
        raise ConfigError("--rate must be above 0 and --steps at least 1")
    if options.matrix is not None:
        names, loglik, lengths = read_matrix(options.matrix)
        inputs = [options.matrix]
    else:
        names, loglik, lengths, inputs = _likelihoods(options)
    check_matrix(loglik, lengths)
    if options.save_matrix is not None:
        write_matrix(options.save_matrix, names, loglik, lengths)
    fitted, tested = split_rows(len(loglik), options.test_share, options.seed)
    if not len(fitted):
        raise ConfigError(f"--test-share: leaves none of {len(loglik)} pieces to fit on")
    found = solve(loglik[fitted], lengths[fitted], rate=options.rate, most_steps=options.steps)
    equal = np.full(len(names), 1 / len(names))
    told = {"pieces": len(loglik), "fitted": _table(found.weights, equal, loglik[fitted], lengths[fitted])}
    if len(tested):
        told["tested"] = _table(found.weights, equal, loglik[tested], lengths[tested])
    keys = ("models", "target", "column", "piece_tokens", "most_texts", "rate", "steps", "test_share", "seed")
    source = provenance("dataflex mix mixmin", inputs=inputs, settings={key: getattr(options, key) for key in keys})
    details = {**told, "gap": found.gap, "steps": found.steps}
    lines = write_result(options.out, names, found.weights, method="mixmin", source=source, details=details)
    where = told.get("tested", told["fitted"])
    assert isinstance(where, dict)
    lines.append(f"nats per token on {'held-out pieces' if len(tested) else 'the fitted pieces'}:")
    lines += [f"  {name:<20} {value:.4f}" for name, value in where.items()]
    if found.gap > 1e-4:
        lines.append(f"note: after {found.steps} steps still up to {found.gap:.2g} above the minimum; raise --steps")
    return "\n".join(lines)


def _table(weights: Floats, equal: Floats, loglik: Floats, lengths: Floats) -> dict[str, float]:
    """Return F of the found weights, of equal ones, and of the best single domain."""
    single = [objective(row, loglik, lengths)[0] for row in np.eye(len(weights))]
    values = [objective(each, loglik, lengths)[0] for each in (weights, equal)]
    return {"mixmin": values[0], "equal": values[1], "best_single": min(single)}


def _likelihoods(options: argparse.Namespace) -> tuple[tuple[str, ...], Floats, Floats, list[Path]]:
    if options.target is None:
        raise ConfigError("--target: missing; name a file of texts that the mixture is for")
    if options.piece_tokens < 2 or options.most_texts < 1:
        raise ConfigError("--piece-tokens must be at least 2 and --most-texts at least 1")
    models = _by_name(options.models, "--models")
    texts = sample_texts(read_texts(options.target, names_of(options.column)), options.most_texts, options.seed, "target")
    loglik, lengths = log_likelihoods(models, texts, piece_tokens=options.piece_tokens)
    return tuple(models), loglik, lengths, [options.target, *(Path(folder) for folder in models.values())]


def chameleon(options: argparse.Namespace) -> str:
    """Write proportions by Chameleon and return what to print.

    Raises:
        ConfigError: Options that cannot work together.
        DataError: Files or a model that cannot be used, or domains that look alike.
    """
    if (options.embeddings is None) == (options.model is None):
        raise ConfigError("--model and --embeddings: give one of the two (a model with --domains)")
    if not options.ridge > 0:
        raise ConfigError(f"--ridge: must be above 0, found {options.ridge:g}")
    if options.embeddings is not None:
        names, means = read_embeddings(options.embeddings)
        inputs = [options.embeddings]
    else:
        names, means, inputs = _embedded(options)
    if options.save_embeddings is not None:
        write_embeddings(options.save_embeddings, names, means)
    scores = leverage(centred_kernel(means), options.ridge)
    shares = leverage_weights(scores, options.purpose, names)
    keys = ("model", "domains", "column", "samples", "tokens", "purpose", "ridge", "seed")
    source = provenance("dataflex mix chameleon", inputs=inputs, settings={key: getattr(options, key) for key in keys})
    details = {"scores": dict(zip(names, scores.tolist(), strict=True)), "purpose": options.purpose}
    method = f"chameleon ({options.purpose})"
    return "\n".join(write_result(options.out, names, shares, method=method, source=source, details=details))


def _embedded(options: argparse.Namespace) -> tuple[tuple[str, ...], Floats, list[Path]]:
    if options.domains is None:
        raise ConfigError("--domains: missing; name a file of texts for each domain, as in web=web.txt,code=code.txt")
    if options.samples < 1 or options.tokens < 1:
        raise ConfigError("--samples and --tokens must be at least 1")
    files = {name: Path(file) for name, file in _by_name(options.domains, "--domains").items()}
    columns = names_of(options.column)
    texts = {
        name: sample_texts(read_texts(file, columns), options.samples, options.seed, name) for name, file in files.items()
    }
    means = [mean_states(options.model, rows, most_tokens=options.tokens).mean(axis=0) for rows in texts.values()]
    return tuple(files), np.stack(means), [*files.values(), Path(options.model)]


def _by_name(text: str, key: str) -> dict[str, str]:
    """Return ``web=FOLDER,code=FOLDER`` as a mapping of two domains or more."""
    found: dict[str, str] = {}
    for entry in text.split(","):
        name, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not name or not value:
            raise ConfigError(f"{key}: {entry.strip()!r} is not NAME=PATH")
        if name in found:
            raise ConfigError(f"{key}: {name} is there twice")
        found[name] = value
    if len(found) < 2:
        raise ConfigError(f"{key}: needs at least two domains, found {len(found)}")
    return found
