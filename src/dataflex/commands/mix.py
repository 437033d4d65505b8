"""``dataflex mix``: proportions from small runs, from one proxy per domain, or from embeddings."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dataflex.ending import run_child
from dataflex.errors import ConfigError, DataError, did_you_mean
from dataflex.mixing.models import (
    centred_kernel,
    check_matrix,
    leverage,
    leverage_weights,
    log_likelihoods,
    mean_states,
    objective,
    read_embeddings,
    read_matrix,
    read_texts,
    sample_texts,
    solve,
    split_rows,
    write_embeddings,
    write_matrix,
)
from dataflex.plan.proportions import ProportionsFile, collapsed, provenance, read_proportions, write_proportions
from dataflex.printable import left_out_note, passing_on, shown
from dataflex.record.text import columns

if TYPE_CHECKING:
    from dataflex.mixing.swarm import Swarm


def mix(options: argparse.Namespace) -> str | int:
    """Run one step and return what to print, or an exit code where runs have printed already.

    Raises:
        ConfigError: Options that cannot work together.
        DataError: Numbers that cannot be used.
    """
    if options.step == "doremi":
        return doremi(options, _train, _say)
    steps: dict[str, Callable[[argparse.Namespace], str | int]] = {
        "swarm": _swarm,
        "fit": fit,
        "propose": propose,
        "mixmin": mixmin,
        "chameleon": chameleon,
    }
    return steps[options.step](options)


def _swarm(options: argparse.Namespace) -> str | int:
    from dataflex.config.load import load_mapping
    from dataflex.mixing.fit import warnings_of
    from dataflex.mixing.runs import run_missing, write_swarm
    from dataflex.mixing.swarm import settings_of

    low, high, count = _strengths(options.strengths)
    settings = settings_of(
        options.style,
        options.runs,
        options.seed,
        least_strength=low,
        most_strength=high,
        strengths=count,
        prior_power=options.prior_power,
        max_ratio=options.max_ratio,
        min_weight=options.min_weight,
        step=options.round,
    )
    mapping = load_mapping(options.config, options.overrides)
    swarm = write_swarm(mapping, options.config.absolute().parent, options.out, settings, options.natural)
    natural = swarm.sizes / swarm.sizes.sum()
    table = [["domain", f"natural ({swarm.unit})", "least", "mean", "most"]]
    for k in np.argsort(-natural, kind="stable")[:32]:
        drawn = swarm.mixtures[:, k]
        table.append([swarm.names[k], *(f"{x:.4f}" for x in (natural[k], drawn.min(), drawn.mean(), drawn.max()))])
    lines = [f"{len(swarm.runs)} mixtures of {len(swarm.names)} domains in {swarm.folder}", *columns(table)]
    lines += [f"note: {line}" for line in warnings_of("log_linear", len(swarm.runs), len(swarm.names))]
    lines += left_out_note(mapping)
    if not swarm.held_out:
        lines.append(
            "note: the configuration has no 'eval_dataset', so the runs measure no held-out losses; add one data set "
            "per domain, or give 'mix fit' your own --metrics"
        )
    if options.run:
        _say("\n".join(lines))
        with passing_on(mapping):
            code = run_missing(swarm, _train, _say)
        return code if code else f"all runs are finished; next: dataflex mix fit {swarm.folder}"
    lines += [
        f"{len(swarm.unfinished())} of them are not run yet: dataflex train {swarm.config(swarm.runs[0])} and so on, "
        "on any machine, or the same command with --run",
        f"then: dataflex mix fit {swarm.folder}",
    ]
    return "\n".join(lines)


def _train(config: Path) -> int:
    """Train one configuration in a process of its own, so that no run inherits anything from another."""
    return run_child([sys.executable, "-m", "dataflex", "train", str(config)])


def _say(line: str) -> None:
    sys.stdout.write(shown(line, sys.stdout) + "\n")
    sys.stdout.flush()


def _strengths(text: str | None) -> tuple[float | None, float | None, int | None]:
    if text is None:
        return None, None, None
    try:
        low, high, count = text.split(",")
        return float(low), float(high), int(count)
    except ValueError as error:
        raise ConfigError(f"--strengths: expected LEAST,MOST,COUNT such as 0.1,5,15, found {text!r}") from error


MIX_STEPS = {
    "doremi": (
        "Train a reference, a proxy and the final model with the proportions that the proxy found (DoReMi).",
        "dataflex mix doremi run.yaml --small small.yaml --out runs/doremi",
    ),
    "swarm": (
        "Write the configurations of many small runs with mixtures drawn around the natural one, and run them.",
        "dataflex mix swarm run.yaml --runs 24 --out swarm --run",
    ),
    "fit": (
        "Fit held-out losses to mixtures, and say how well unseen mixtures are ordered.",
        "dataflex mix fit swarm --method log_linear",
    ),
    "propose": (
        "Write the proportions with the lowest predicted loss, near the natural mix and under caps.",
        "dataflex mix propose swarm --budget 2000000 --max-epochs 4 --out mixture.json",
    ),
    "mixmin": (
        "Weigh domains by how well their proxies together explain a target (one proxy per domain).",
        "dataflex mix mixmin --models web=runs/web,code=runs/code --target goal.jsonl --out mixture.json",
    ),
    "chameleon": (
        "Weigh domains by their embeddings alone (leverage scores), in minutes.",
        "dataflex mix chameleon --model runs/small --domains web=web.jsonl,code=code.jsonl --out mixture.json",
    ),
}
"""Name of a step -> what it does, and an example."""

_USE = "\n\nThe file it writes is taken by 'mixer: {name: static, from: FILE}'."


def add_mix_steps(command: argparse.ArgumentParser, handler: Callable[[argparse.Namespace], str | int]) -> None:
    """Add the steps below ``dataflex mix``; each calls ``handler`` with ``options.step`` set to its name."""
    steps = command.add_subparsers(dest="step", metavar="STEP")
    parsers = {}
    for name, (told, example) in MIX_STEPS.items():
        more = _USE if name in ("doremi", "propose", "mixmin", "chameleon") else ""
        parsers[name] = steps.add_parser(name, help=told, description=told + more, epilog=f"example:\n  {example}")
        parsers[name].set_defaults(handler=handler)
    _doremi(parsers["doremi"])
    _swarm_options(parsers["swarm"])
    _fit(parsers["fit"])
    _propose(parsers["propose"])
    _mixmin(parsers["mixmin"])
    _chameleon(parsers["chameleon"])
    command.epilog = "examples:\n" + "\n".join(f"  {example}" for _, example in MIX_STEPS.values())


def _doremi(step: argparse.ArgumentParser) -> None:
    told = "configuration of the final run; 'mixer: {name: doremi, ...}' in it holds the proxy's parameters"
    step.add_argument("config", type=Path, metavar="CONFIG", help=told)
    step.add_argument("--small", type=Path, metavar="FILE", help="keys that differ in the reference and proxy runs")
    step.add_argument("--out", type=Path, metavar="DIR", help="folder of all runs (default: CONFIG's output_dir)")
    step.add_argument("--reference", metavar="FOLDER", help="a reference model that is there already (first round)")
    step.add_argument(
        "--reference-mix",
        default="size",
        metavar="WHAT",
        help="what the first reference is trained on: size (default), uniform, or a proportions file",
    )
    step.add_argument("--rounds", type=int, default=1, metavar="N", help="rounds at most (default: 1)")
    parts = ("reference", "proxy", "proportions", "final")
    step.add_argument("--step", dest="part", choices=parts, help="this step alone (default: all that are not done)")
    step.add_argument("--round", dest="number", type=int, metavar="N", help="round of that step (default: 1)")
    step.add_argument("--write", action="store_true", help="only write the configurations, for another machine to run")
    _overrides(step)


def _swarm_options(step: argparse.ArgumentParser) -> None:
    step.add_argument("config", type=Path, metavar="CONFIG", help="configuration of a small run; its mixer is replaced")
    step.add_argument("--runs", type=int, required=True, metavar="N", help="mixtures; 3 (domains + 1) or more")
    step.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for configurations and runs")
    step.add_argument("--run", action="store_true", help="run them here, one after another; finished ones are skipped")
    step.add_argument(
        "--natural", metavar="WHAT", help="rows, bytes, a run's folder, a proportions file or web=9,code=1"
    )
    step.add_argument("--style", choices=("olmix", "regmix"), default="olmix", help="whose settings (default: olmix)")
    step.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    step.add_argument("--strengths", metavar="LEAST,MOST,COUNT", help="concentrations (default: 0.1,5,15)")
    step.add_argument("--prior-power", type=float, metavar="P", help="prior ~ natural share^P (olmix: 1, regmix: 0.5)")
    step.add_argument("--max-ratio", type=float, metavar="X", help="most times the natural share (regmix: 15)")
    step.add_argument("--min-weight", type=float, metavar="W", help="shares below it become 0 (default: 0.0002)")
    step.add_argument("--round", type=float, metavar="W", help="shares are multiples of it (default: 0.0002)")
    _overrides(step)


def _fit(step: argparse.ArgumentParser) -> None:
    step.add_argument("folder", type=Path, metavar="DIR", help="folder of a swarm, or one with a ratios.csv")
    step.add_argument("--method", choices=("log_linear", "mixing_law", "lightgbm"), default="log_linear")
    step.add_argument("--metrics", type=Path, metavar="CSV", help="losses: a column 'run' and one per task")
    step.add_argument("--tasks", metavar="NAME[,NAME]", help="held-out sets to fit (default: all)")
    step.add_argument("--without", metavar="RUN[,RUN]", help="runs to leave out")
    step.add_argument("--folds", type=int, default=10, help="folds of the cross-validation; 0: leave one out")
    step.add_argument("--seed", type=int, default=0, help="seed of starts, trees and folds (default: 0)")


def _propose(step: argparse.ArgumentParser) -> None:
    step.add_argument("folder", type=Path, metavar="DIR", help="folder with a fit.json")
    step.add_argument("--kl", type=float, metavar="L", help="weight of staying near the natural mix (default: 0.05)")
    step.add_argument("--budget", type=float, metavar="R", help="what the large run uses, in the unit of the sizes")
    step.add_argument("--max-epochs", type=float, metavar="N", help="most epochs over any domain within --budget (4)")
    step.add_argument("--cap", metavar="NAME=SHARE,...", help="largest shares of single domains")
    step.add_argument("--tasks", metavar="NAME[,NAME]", help="held-out sets whose mean loss is lowered (default: all)")
    step.add_argument("--natural", metavar="WHAT", help="sizes, for a folder without swarm.json (see 'mix swarm')")
    step.add_argument("--seed", type=int, default=0, help="seed of the search among mixtures (lightgbm)")
    _out(step, "DIR/proportions.json")


def _mixmin(step: argparse.ArgumentParser) -> None:
    step.add_argument("--models", metavar="NAME=FOLDER,...", help="one proxy model per domain")
    step.add_argument("--target", type=Path, metavar="FILE", help="target texts: .jsonl, .json or .txt")
    step.add_argument("--column", default="text", metavar="KEY[,KEY]", help="keys of a row to join (default: text)")
    step.add_argument("--piece-tokens", type=int, default=64, metavar="N", help="texts are cut to this (default: 64)")
    step.add_argument("--most-texts", type=int, default=2048, metavar="N", help="texts drawn at most (default: 2048)")
    step.add_argument("--matrix", type=Path, metavar="FILE", help=".npz or .csv of log-likelihoods, instead of models")
    step.add_argument("--save-matrix", type=Path, metavar="FILE", help="keep the log-likelihoods (.npz)")
    step.add_argument("--rate", type=float, default=1.0, help="step size (default: 1)")
    step.add_argument("--steps", type=int, default=100, help="steps at most (default: 100)")
    step.add_argument("--test-share", type=float, default=0.2, help="share of pieces to test on (default: 0.2)")
    step.add_argument("--seed", type=int, default=0, help="seed of that split (default: 0)")
    _out(step, None)


def _chameleon(step: argparse.ArgumentParser) -> None:
    step.add_argument("--model", metavar="FOLDER", help="model that embeds the texts")
    step.add_argument("--domains", metavar="NAME=FILE,...", help="texts of each domain: .jsonl, .json or .txt")
    step.add_argument("--column", default="text", metavar="KEY[,KEY]", help="keys of a row to join (default: text)")
    step.add_argument("--samples", type=int, default=2048, metavar="N", help="texts per domain (default: 2048)")
    step.add_argument("--tokens", type=int, default=512, metavar="N", help="tokens of each text (default: 512)")
    step.add_argument("--embeddings", type=Path, metavar="NPZ", help="one array per domain, instead of a model")
    step.add_argument("--save-embeddings", type=Path, metavar="NPZ", help="keep the domains' mean embeddings")
    step.add_argument("--purpose", choices=("pretraining", "finetuning"), default="pretraining")
    step.add_argument("--ridge", type=float, default=10.0, help="lambda of the leverage scores (default: 10)")
    step.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    _out(step, None)


def _out(step: argparse.ArgumentParser, default: str | None) -> None:
    told = "proportions file to write" + (f" (default: {default})" if default else "")
    step.add_argument("--out", type=Path, required=default is None, metavar="FILE", help=told)


def _overrides(step: argparse.ArgumentParser) -> None:
    step.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="overrides of the configuration")


Floats = NDArray[np.float64]


def write_result(
    path: Path,
    names: Sequence[str],
    shares: Floats,
    *,
    method: str,
    source: dict[str, Any],
    details: dict[str, Any],
    natural: Floats | None = None,
    caps: Floats | None = None,
) -> list[str]:
    """Write a proportions file and return what to print about it.

    Args:
        path: The file.
        names: Domains [K].
        shares: Their proportions [K].
        method: What made them.
        source: Where they are from.
        details: Numbers of the method.
        natural: Natural shares to show beside them [K].
        caps: Largest shares that were allowed [K].

    Raises:
        ConfigError: Something else than proportions lies there.
    """
    if os.path.lexists(path):
        try:
            read_proportions(path, "--out")
        except ConfigError as error:
            raise ConfigError(f"--out: {path} is there and holds no proportions; name another file") from error
    content = ProportionsFile(
        names=tuple(names), proportions=tuple(shares.tolist()), method=method, provenance=source, details=details
    )
    write_proportions(path, content)
    table = [["domain", "proportion", *(["natural"] if natural is not None else []), ""]]
    for k in np.argsort(-shares, kind="stable"):
        at_cap = "at its cap" if caps is not None and caps[k] < 1 and shares[k] >= caps[k] - 1e-9 else ""
        table.append([names[k], f"{shares[k]:.4f}", *([f"{natural[k]:.4f}"] if natural is not None else []), at_cap])
    lines = [f"{method}: written: {path}", f"  use it with 'mixer: {{name: static, from: {path}}}'", *columns(table)]
    most = collapsed(content.by_name)
    if most is not None:
        lines.append(f"warning: {most[0]} has {most[1]:.1%} of the proportions, and the others are hardly served")
    return lines


def check_names(key: str, given: Collection[str], names: Sequence[str], *, every: bool) -> None:
    """Raise unless all of ``given`` are among ``names`` and, with ``every``, the other way round.

    Raises:
        ConfigError: All names that are not, with the nearest spelling.
    """
    problems = [f"{key}: {name}: no such domain{did_you_mean(name, names)}" for name in given if name not in names]
    problems += [f"{key}: {name}: missing" for name in names if every and name not in given]
    if problems:
        raise ConfigError([f"{problem} (domains: {', '.join(names)})" for problem in problems])


def names_of(text: str | None) -> list[str]:
    """Return the names in a text with commas."""
    return [name.strip() for name in text.split(",") if name.strip()] if text else []


def doremi(options: argparse.Namespace, train: Callable[[Path], int], tell: Callable[[str], None]) -> str | int:
    """Run the steps that are not done yet and return what to print, or the exit code of a run that failed.

    Args:
        options: Parsed options.
        train: Trains one configuration in a process of its own and returns its exit code.
        tell: Takes one line per step, as it happens.

    Raises:
        ConfigError: Options or configurations that cannot work, or a step whose input is not there yet.
    """
    from dataflex.config.load import load_mapping
    from dataflex.mixing.doremi import Settings, Steps, make_plan, table_of

    if options.rounds < 1:
        raise ConfigError(f"--rounds: must be at least 1, found {options.rounds}")
    if options.part is None and options.number is not None:
        raise ConfigError("--round: has no effect without --step")
    number = options.number or 1
    if number < 1 or number > max(options.rounds, 1):
        raise ConfigError(f"--round: must be from 1 to {options.rounds} (--rounds), found {number}")
    mapping = load_mapping(options.config, options.overrides)
    small = {} if options.small is None else load_mapping(options.small)
    folder = options.out or mapping.get("output_dir")
    if not folder:
        raise ConfigError("--out: missing, and the configuration has no output_dir; name a folder for all runs")
    settings = Settings(rounds=options.rounds, reference=options.reference, reference_mix=options.reference_mix)
    plan = make_plan(mapping, small, options.config.absolute().parent, Path(folder), settings)
    if options.write:
        lines = [f"dataflex train {at.folder / name}" for at in plan.rounds for name in _names(at.trains_reference)]
        return "\n".join(
            ["written, in the order in which they can be run:", *lines, *_end(plan.folder), *left_out_note(mapping)]
        )
    steps = Steps(plan, train, tell)
    with passing_on({**mapping, **small}):
        code = steps.all() if options.part is None else steps.one(options.part, number)
    if code or options.part is not None:
        return code
    lines = [
        f"the final model is in {plan.final}, its proportions in {plan.proportions}",
        f"  use them with 'mixer: {{name: static, from: {plan.proportions}}}'",
        *table_of(read_proportions(plan.proportions)),
    ]
    return "\n".join(lines)


def _names(trains_reference: bool) -> list[str]:
    return [*(["reference.yaml"] if trains_reference else []), "proxy.yaml"]


def _end(folder: Path) -> list[str]:
    return [
        "(after each proxy: the same command with --step proportions --round N instead of --write)",
        f"dataflex train {folder / 'final.yaml'}",
    ]


_MAX_EPOCHS = 4.0


def fit(options: argparse.Namespace) -> str:
    """Fit losses to mixtures, write ``fit.json`` and return what to print.

    Raises:
        ConfigError: Options that cannot work.
        DataError: Too few runs, or numbers that cannot be used.
    """
    from dataflex.mixing.fit import fit_losses, lightgbm, quality_notes, warnings_of, write_fit
    from dataflex.mixing.swarm import RATIOS, SWARM, join, read_swarm, read_table

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
    from dataflex.mixing.swarm import losses_of_run, read_table

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
    from dataflex.mixing.runs import given_sizes

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
    from dataflex.mixing.propose import caps_of_epochs
    from dataflex.mixing.runs import numbers_by_name

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
    texts = sample_texts(
        read_texts(options.target, names_of(options.column)), options.most_texts, options.seed, "target"
    )
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
        name: sample_texts(read_texts(file, columns), options.samples, options.seed, name)
        for name, file in files.items()
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
