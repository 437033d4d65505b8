"""Draws a swarm of mixtures around the natural one, for one small run each.

Sources: RegMix (Liu et al., ICLR 2025, arXiv 2407.01492), data sampling; Olmix (Chen et al., arXiv
2602.12237), which found the untempered natural prior better, and caps better left to the proposal.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError, DataError, did_you_mean
from dataflex.printable import file_name_problem, plain, redacted, without_secrets
from dataflex.record.read import read_events
from dataflex.rng import stream
from dataflex.state import replacing, write_json

RATIOS = "ratios.csv"

_LOSS = re.compile(r"eval_(.+)_loss")
_UNNAMED = "eval"
_SUM_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Table:
    """One row of numbers per run.

    Attributes:
        runs: Names of the runs [R].
        columns: Names of the columns [C].
        values: float64 [R, C].
    """

    runs: tuple[str, ...]
    columns: tuple[str, ...]
    values: NDArray[np.float64]


def write_table(path: Path, table: Table) -> None:
    """Write a table as CSV with a column ``run``; numbers are written so that they read back exactly."""
    lines = [["run", *table.columns]]
    lines += [[run, *map(repr, row)] for run, row in zip(table.runs, table.values.tolist(), strict=True)]
    with replacing(path) as file:
        file.write("".join(",".join(_quoted(cell) for cell in line) + "\n" for line in lines).encode())


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if re.search(r'[",\r\n]', cell) else cell


def read_table(path: Path, *, shares: bool = False, skip: Collection[str] = ()) -> Table:
    """Read a CSV file with a column ``run`` and one column of numbers per domain or task.

    Args:
        path: The file.
        shares: Whether each row must be proportions: >= 0 and summing to 1.
        skip: Runs whose lines are not read.

    Raises:
        DataError: The file is missing or malformed, or holds NaN; all such cells are told.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    head = [cell.strip() for cell in lines[0]] if lines else []
    if head[:1] != ["run"] or len(head) < 2:
        raise DataError(f"{path}: the first line must be 'run' and the names of domains or tasks, found {head[:4]}")
    if len(set(head)) < len(head):
        raise DataError(f"{path}: names a column twice: {', '.join(head)}")
    problems: list[str] = []
    kept = [line for line in lines[1:] if line[0].strip() not in skip]
    runs = [line[0].strip() for line in kept]
    rows = [_numbers(line, head, problems) for line in kept]
    problems += [f"run {run} is there twice" for run in dict.fromkeys(runs) if runs.count(run) > 1]
    if shares and not problems:
        for run, row in zip(runs, rows, strict=True):
            if min(row) < 0 or abs(math.fsum(row) - 1) > _SUM_TOLERANCE:
                problems.append(f"run {run}: proportions must be at least 0 and sum to 1, the sum is {sum(row):.6g}")
    if problems:
        raise DataError("\n".join(f"{path}: {problem}" for problem in problems[:20]))
    if not runs:
        raise DataError(f"{path}: holds no run")
    return Table(runs=tuple(runs), columns=tuple(head[1:]), values=np.asarray(rows, dtype=np.float64))


def _numbers(line: Sequence[str], head: Sequence[str], problems: list[str]) -> list[float]:
    if len(line) != len(head):
        problems.append(f"run {line[0]}: {len(line) - 1} numbers for {len(head) - 1} columns")
        return [0.0] * (len(head) - 1)
    row = []
    for name, cell in zip(head[1:], line[1:], strict=True):
        try:
            number = float(cell)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            problems.append(f"run {line[0]}, {name}: {cell.strip() or 'nothing'} is not a finite number; mend it, or")
            problems[-1] += f" leave the run out with '--without {line[0]}' or by removing its line"
        row.append(number)
    return row


def finished(run_dir: Path, held_out: Sequence[str] = (), *, evaluates: bool = False) -> bool:
    """Whether a run has come to its end, its last evaluation of every held-out set included.

    Args:
        run_dir: The run's output_dir.
        held_out: Names of the held-out sets that it must have evaluated; ``eval`` is the unnamed one.
        evaluates: Whether it must have evaluated anything.
    """
    try:
        events = read_events(run_dir)
    except DataError:
        return False
    ends = [place for place, event in enumerate(events) if event["event"] == "finished"]
    if not ends:
        return False
    found = _losses(events[ends[-1] :])
    return set(held_out) <= found.keys() and (bool(found) or not evaluates)


def losses_of_run(run_dir: Path) -> dict[str, float]:
    """Return the last held-out losses that a run recorded, by name; NaN where they were not finite.

    ``eval_<name>_token_loss``, the mean over tokens, is preferred to ``eval_<name>_loss``, the mean over
    batches. A run with one unnamed held-out set gives ``{"eval": its loss}``.

    Raises:
        DataError: The folder has no record, or the record is damaged.
    """
    found = _losses(read_events(run_dir))
    named = {name: loss for name, loss in found.items() if name != _UNNAMED}
    return named or found


def _losses(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for event in events:
        if event["event"] != "evaluated":
            continue
        metrics = event["metrics"]
        if "eval_loss" in metrics:  # one set without a name, or the averages over all sets
            found[_UNNAMED] = _number(metrics.get("eval_token_loss", metrics["eval_loss"]))
            continue
        names = [match.group(1) for match in map(_LOSS.fullmatch, metrics) if match]
        for name in names:
            if not (name.endswith("_token") and name.removesuffix("_token") in names):
                found[name] = _number(metrics.get(f"eval_{name}_token_loss", metrics[f"eval_{name}_loss"]))
    return found


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def join(ratios: Table, losses: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> tuple[Table, Table]:
    """Return mixtures and losses of the runs that have both, in the order of ``ratios``.

    Args:
        ratios: Mixtures of all runs.
        losses: Task -> loss by run.
        tasks: Tasks to keep; none means all.

    Raises:
        DataError: A task is unknown, a run lacks one that others have, a loss is not finite, or no run is left.
    """
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
    for run in runs:
        for task in wanted:
            if task not in losses[run]:
                problems.append(f"run {run}: has no held-out loss of {task}, which other runs have")
            elif not math.isfinite(losses[run][task]):
                problems.append(
                    f"run {run}: the held-out loss of {task} is not finite; leave it out with --without {run}"
                )
    if problems:
        raise DataError("\n".join(problems[:20]))
    if not runs or not wanted:
        raise DataError(
            "no run has a held-out loss yet; let the runs finish with an 'eval_dataset' in their configuration, or "
            "give --metrics"
        )
    places: dict[str, Any] = {run: row for run, row in zip(ratios.runs, ratios.values, strict=True)}
    mixtures = Table(runs=tuple(runs), columns=ratios.columns, values=np.stack([places[run] for run in runs]))
    values = np.asarray([[losses[run][task] for task in wanted] for run in runs], dtype=np.float64)
    return mixtures, Table(runs=tuple(runs), columns=tuple(wanted), values=values)


Floats = NDArray[np.float64]

_BATCH = 1024
_MOST_BATCHES = 2000


@dataclass(frozen=True, kw_only=True)
class SwarmSettings:
    """How mixtures are drawn.

    Attributes:
        runs: Number of mixtures.
        seed: Seed of all draws; the first mixtures of a larger swarm are those of a smaller one.
        least_strength: Smallest concentration of the Dirichlet draws.
        most_strength: Largest one.
        strengths: Number of concentrations, evenly spaced in logarithm.
        prior_power: Power of the natural shares that the prior is proportional to.
        max_ratio: Most times its natural share that a domain may get, at least 1; None for no cap.
        min_weight: Shares below it become 0.
        step: Shares are rounded to multiples of it.
        distance: Mixtures at most this far apart (L1) count as one.
        oversample: Candidates drawn per mixture wanted, at most.
    """

    runs: int
    seed: int = 0
    least_strength: float = 0.1
    most_strength: float = 5.0
    strengths: int = 15
    prior_power: float = 1.0
    max_ratio: float | None = None
    min_weight: float = 2e-4
    step: float = 2e-4
    distance: float = 1e-5
    oversample: int = 100

    def __post_init__(self) -> None:
        problems = []
        if self.runs < 1:
            problems.append(f"--runs: must be at least 1, found {self.runs}")
        if not 0 < self.least_strength <= self.most_strength:
            problems.append(
                f"--strengths: must be 0 < least <= most, found {self.least_strength:g} and {self.most_strength:g}"
            )
        if self.strengths < 1:
            problems.append(f"--strengths: their number must be at least 1, found {self.strengths}")
        if self.prior_power < 0:
            problems.append(f"--prior-power: must be at least 0, found {self.prior_power:g}")
        if self.max_ratio is not None and not self.max_ratio >= 1:
            problems.append(
                f"--max-ratio: a cap of {self.max_ratio:g} times the natural share cannot be met, since the caps then "
                "sum to less than 1; give at least 1"
            )
        if not 0 <= self.min_weight < 1:
            problems.append(f"--min-weight: must be at least 0 and below 1, found {self.min_weight:g}")
        if not 0 <= self.step <= 0.5:
            problems.append(f"--round: must be from 0 (no rounding) to 0.5, found {self.step:g}")
        if problems:
            raise ConfigError(problems)


def settings_of(style: Literal["regmix", "olmix"], runs: int, seed: int, **changes: object) -> SwarmSettings:
    """Return the settings of a paper, with those ``changes`` that are not None.

    Args:
        style: "regmix": prior ~ share^0.5, at most 15 times the natural share; "olmix": the natural prior, no cap.
        runs: Number of mixtures.
        seed: Seed of the draws.
        changes: Fields of ``SwarmSettings``.

    Raises:
        ConfigError: Settings that cannot work.
    """
    paper = {"prior_power": 0.5, "max_ratio": 15.0} if style == "regmix" else {}
    given = {key: value for key, value in changes.items() if value is not None}
    return replace(SwarmSettings(runs=runs, seed=seed), **{**paper, **given})  # type: ignore[arg-type]


def prior_of(sizes_K: Floats, power: float) -> Floats:
    """Return the prior [K]: natural shares to ``power``, renormalized; a domain of size 0 stays at 0.

    Args:
        sizes_K: Sizes in any unit [K], >= 0, not all 0.
        power: 1 for the natural shares, 0 for equal ones.
    """
    prior = np.where(sizes_K > 0, np.power(np.maximum(sizes_K, 1e-300) / sizes_K.max(), power), 0.0)
    return prior / prior.sum()


def dirichlet(rng: np.random.Generator, alpha_BK: Floats) -> Floats:
    """Draw one mixture per row of concentrations; exact also where concentrations are far below 1.

    A Gamma(a) variable is a Gamma(a + 1) variable times U^(1/a); in logarithms nothing underflows.

    Args:
        rng: Source of randomness.
        alpha_BK: Concentrations [B, K], >= 0; a 0 gives a share of 0.
    """
    with np.errstate(divide="ignore"):
        logs = np.log(rng.standard_gamma(alpha_BK + 1.0)) + np.log1p(-rng.random(alpha_BK.shape)) / alpha_BK
    logs -= logs.max(axis=1, keepdims=True)
    weights = np.exp(logs)
    return weights / weights.sum(axis=1, keepdims=True)


def sample_swarm(sizes_K: Floats, settings: SwarmSettings) -> Floats:
    """Draw the mixtures of a swarm.

    Per candidate: one of the strengths at random, one Dirichlet(strength x prior) draw; refused above
    the caps; small shares become 0; renormalized, rounded, renormalized; dropped when it repeats an
    earlier one.

    Args:
        sizes_K: Natural sizes in any unit [K], >= 0.
        settings: How to draw.

    Returns:
        float64 [runs, K], rows on the simplex; the same for the same sizes, settings and seed.

    Raises:
        ConfigError: Fewer than two domains have a size, or too few distinct mixtures meet the settings.
    """
    sizes_K = np.asarray(sizes_K, dtype=np.float64)
    if not np.isfinite(sizes_K).all() or (sizes_K < 0).any() or (sizes_K > 0).sum() < 2:
        raise ConfigError("--natural: sizes must be finite numbers of at least 0, two of them above 0")
    natural = sizes_K / sizes_K.sum()
    prior = prior_of(sizes_K, settings.prior_power)
    caps = np.ones_like(natural) if settings.max_ratio is None else np.minimum(settings.max_ratio * natural, 1.0)
    strengths = np.geomspace(settings.least_strength, settings.most_strength, settings.strengths)
    kept = np.empty((settings.runs, len(natural)))
    num_kept = num_accepted = batch = 0
    while num_kept < settings.runs and num_accepted < settings.oversample * settings.runs and batch < _MOST_BATCHES:
        rng = stream(settings.seed, "mixing.swarm", batch)
        batch += 1
        drawn = dirichlet(rng, strengths[rng.integers(len(strengths), size=_BATCH), None] * prior)
        for mixture in _tidied(drawn[(drawn <= caps).all(axis=1)], caps, settings):
            num_accepted += 1
            if num_kept and np.abs(kept[:num_kept] - mixture).sum(axis=1).min() <= settings.distance:
                continue
            kept[num_kept] = mixture
            num_kept += 1
            if num_kept == settings.runs:
                break
    if num_kept < settings.runs:
        raise ConfigError(
            f"--runs: only {num_kept} of {settings.runs} distinct mixtures were found in {batch * _BATCH:,} draws; "
            "ask for fewer runs, raise --max-ratio, or lower --min-weight and --round"
        )
    return kept


def _tidied(drawn_BK: Floats, caps_K: Floats, settings: SwarmSettings) -> Floats:
    """Zero small shares, renormalize, round, renormalize; leave out what is empty or above its cap by then."""
    weights = np.where(drawn_BK < settings.min_weight, 0.0, drawn_BK)
    weights = weights[weights.sum(axis=1) > 0]
    weights /= weights.sum(axis=1, keepdims=True)
    if settings.step > 0:
        weights = np.round(weights / settings.step) * settings.step
        weights = weights[weights.sum(axis=1) > 0]
        weights /= weights.sum(axis=1, keepdims=True)
    return weights[(weights <= caps_K).all(axis=1)]


SWARM = "swarm.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Swarm:
    """A swarm of runs.

    Attributes:
        folder: Where it lies.
        names: Domains [K].
        sizes: Their natural sizes [K].
        unit: What sizes count: "rows", "bytes", "shares" or "given".
        settings: How mixtures were drawn.
        runs: Names of the runs [R].
        mixtures: float64 [R, K].
        held_out: Names of the held-out sets that the runs evaluate; ``eval`` is an unnamed one.
        config_digest: Digest of the configuration that they are made from.
        provenance: Where it is from.
    """

    folder: Path
    names: tuple[str, ...]
    sizes: NDArray[np.float64]
    unit: str
    settings: SwarmSettings
    runs: tuple[str, ...]
    mixtures: NDArray[np.float64]
    held_out: tuple[str, ...]
    config_digest: str
    provenance: Mapping[str, Any]

    def config(self, run: str) -> Path:
        """Path of a run's configuration."""
        return self.folder / "configs" / f"{run}.yaml"

    def output_dir(self, run: str) -> Path:
        """Folder that a run writes to."""
        return self.folder / "runs" / run

    def unfinished(self) -> list[str]:
        """Names of the runs that have not come to their end."""
        return [run for run in self.runs if not finished(self.output_dir(run), self.held_out)]


def save_swarm(swarm: Swarm, configs: Sequence[Mapping[str, Any]]) -> None:
    """Write a swarm and the configurations of its runs; ``swarm.json`` comes last.

    Raises:
        ConfigError: The folder cannot be written.
    """
    import yaml

    try:
        (swarm.folder / "configs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {swarm.folder} cannot be written: {error.strerror or error}") from error
    for run, config in zip(swarm.runs, configs, strict=True):
        with replacing(swarm.config(run)) as file:
            file.write(yaml.safe_dump(without_secrets(config), sort_keys=False, allow_unicode=True).encode())
    write_table(swarm.folder / RATIOS, Table(runs=swarm.runs, columns=swarm.names, values=swarm.mixtures))
    body = {
        "format": _FORMAT,
        "names": list(swarm.names),
        "sizes": swarm.sizes.tolist(),
        "unit": swarm.unit,
        "settings": dataclasses.asdict(swarm.settings),
        "runs": list(swarm.runs),
        "mixtures": swarm.mixtures.tolist(),
        "held_out": list(swarm.held_out),
        "config_digest": swarm.config_digest,
        "provenance": swarm.provenance,
    }
    write_json(swarm.folder / SWARM, redacted(plain(body)))


def read_swarm(folder: Path) -> Swarm:
    """Read the swarm in a folder.

    Raises:
        DataError: There is none, or its file is damaged.
    """
    path = folder / SWARM
    if not path.is_file():
        raise DataError(f"{folder} holds no {SWARM}; make a swarm with 'dataflex mix swarm CONFIG --out {folder}'")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        for run in body["runs"]:
            if problem := file_name_problem(run):
                raise ValueError(f"the name of a run {str(run)[:80]!r} {problem}, and cannot name a folder")
        return Swarm(
            folder=folder,
            names=tuple(body["names"]),
            sizes=np.asarray(body["sizes"], dtype=np.float64),
            unit=body["unit"],
            settings=SwarmSettings(**body["settings"]),
            runs=tuple(body["runs"]),
            mixtures=np.asarray(body["mixtures"], dtype=np.float64),
            held_out=tuple(body["held_out"]),
            config_digest=body["config_digest"],
            provenance=body["provenance"],
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
