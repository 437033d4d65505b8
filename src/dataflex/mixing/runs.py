"""Small runs: their configurations, training, mixtures and held-out losses."""

from __future__ import annotations

import csv
import math
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.inputs import inputs_of
from dataflex.config.schema import DynamicConfig
from dataflex.config.split import split
from dataflex.console import child_stdout
from dataflex.ending import run_child
from dataflex.errors import ConfigError, DataError
from dataflex.mixing.options import numbers_by_name
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import digest_of, read_proportions
from dataflex.printable import shown, without_secrets
from dataflex.record.read import read_events
from dataflex.state import read_json, refusals, replacing

RATIOS = "ratios.csv"

_LOSS = re.compile(r"eval_(.+)_loss")
_UNNAMED = "eval"
_SUM_TOLERANCE = 1e-6


def without_mixer(mapping: Mapping[str, Any], base_dir: Path) -> tuple[LlamaFactoryArgs, DynamicConfig]:
    """Return the two parts of a configuration whose mixer is replaced."""
    block = mapping.get("dynamic")
    if block is not None and not isinstance(block, Mapping):
        raise ConfigError("dynamic: expected a mapping")
    parts = split({**mapping, "dynamic": {**(block or {}), "mixer": "size"}}, base_dir)
    assert parts.dynamic is not None
    return parts.lf, parts.dynamic


def configuration(
    mapping: Mapping[str, Any], output_dir: Path, name: str, block: Mapping[str, Any], plugins: Sequence[str]
) -> dict[str, Any]:
    """Return the configuration of one run, without the keys that keep it from going on after a kill.

    It is the user's with another ``output_dir`` and ``dynamic`` block, absolute paths of plugins in it, and ``name``
    appended to its ``run_name``.
    """
    left_out = ("dynamic", "overwrite_output_dir", "resume_from_checkpoint")
    result = {key: value for key, value in mapping.items() if key not in left_out}
    if result.get("run_name"):
        result["run_name"] = f"{result['run_name']}-{name}"
    block = {**block, "plugins": list(plugins)} if plugins else block
    return {**result, "output_dir": str(output_dir), "dynamic": block}


def write_configurations(folder: Path, configs: Mapping[Path, Mapping[str, Any]]) -> None:
    """Write configurations, given by the path of their file, without secrets."""
    import yaml

    with refusals(folder, ConfigError, key="--out"):
        for path, config in configs.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, None) as file:
                file.write(yaml.safe_dump(without_secrets(config), sort_keys=False, allow_unicode=True).encode())


def digest_of_runs(mapping: Mapping[str, Any], plugins: Sequence[str] = (), **more: Any) -> str:
    """Return a hash of a configuration, of the data, models and files that it names, and of JSON values beside it."""
    told = {key: value for key, value in mapping.items() if key != "output_dir"}
    lf = LlamaFactoryArgs.read(told)
    inputs = inputs_of({"config": told, "plugins": list(plugins), **more}, [*lf.train_sets, *lf.eval_sets], lf)
    return digest_of({"config": told, "inputs": inputs, **more})


def refuse_another(record: Path, config_digest: str, what: str) -> None:
    """Raise ``ConfigError`` where the folder of ``record`` holds runs of another configuration.

    ``what`` says whose they would be. ``DataError`` for a record that cannot be read.
    """
    if not record.is_file():
        return
    try:
        before = read_json(record)["config_digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{record} is damaged: {error}") from error
    if before != config_digest:
        raise ConfigError(f"--out: {record.parent} holds {what}; name another folder, or move that away")


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(shown(line, sys.stdout) + "\n")
    sys.stdout.flush()


def train(config: Path, *overrides: str) -> int:
    """Train one configuration in a process of its own, so that no run inherits anything from another."""
    return run_child([sys.executable, "-m", "dataflex", "train", str(config), *overrides], out=child_stdout())


def train_unfinished(
    what: str, config: Path, output_dir: Path, is_finished: Callable[[], bool], overrides: Sequence[str] = ()
) -> int:
    """Train one configuration unless its run has finished, and return the exit code.

    A run that was killed goes on from its newest complete checkpoint, or starts anew without one.
    """
    if is_finished():
        say(f"{what}: finished before ({output_dir})")
        return 0
    say(f"{what}: training ({config})")
    code = train(config, *overrides)
    if code != 0:
        say(f"{what}: ended with exit code {code}; its messages are above. The same command goes on from here.")
    elif not is_finished():
        raise DataError(f"{what}: ended with exit code 0, but {output_dir} holds no record of a finished run")
    return code


def finished(run_dir: Path, held_out: Sequence[str] = (), *, evaluates: bool = False) -> bool:
    """Whether a run has finished, with a last evaluation of every set in ``held_out``, or of any (``evaluates``)."""
    try:
        events = read_events(run_dir)
    except DataError:
        return False
    ends = [place for place, event in enumerate(events) if event["event"] == "finished"]
    found = _losses(events[ends[-1] :]) if ends else {}
    return bool(ends) and set(held_out) <= found.keys() and (bool(found) or not evaluates)


def losses_of_run(run_dir: Path) -> dict[str, float]:
    """Return the last held-out losses that a run recorded, by name; NaN where they were not finite.

    ``eval_<name>_token_loss``, the mean over tokens, is preferred to ``eval_<name>_loss``, the mean over
    batches. A run with one unnamed held-out set gives ``{"eval": its loss}``.
    """
    found = _losses(read_events(run_dir))
    return {name: loss for name, loss in found.items() if name != _UNNAMED} or found


def losses_by_step(run_dir: Path) -> dict[int, dict[str, float]]:
    """Return the held-out losses that a run recorded, by step and name, as ``losses_of_run`` names them."""
    evaluated = [event for event in read_events(run_dir) if event["event"] == "evaluated"]
    steps = sorted({event["step"] for event in evaluated})
    return {step: _losses([event for event in evaluated if event["step"] == step]) for step in steps}


def _losses(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, float | None] = {}
    for event in events:
        if event["event"] != "evaluated":
            continue
        metrics = event["metrics"]
        if "eval_loss" in metrics:  # one set without a name, or the averages over all sets
            found[_UNNAMED] = metrics.get("eval_token_loss", metrics["eval_loss"])
            continue
        names = [match.group(1) for match in map(_LOSS.fullmatch, metrics) if match]
        for name in names:
            if not (name.endswith("_token") and name.removesuffix("_token") in names):
                found[name] = metrics.get(f"eval_{name}_token_loss", metrics[f"eval_{name}_loss"])
    return {name: math.nan if loss is None else float(loss) for name, loss in found.items()}


@dataclass(frozen=True, kw_only=True)
class Table:
    """One row of numbers per run: float64 [R, C], with the names of the runs [R] and of the columns [C]."""

    runs: tuple[str, ...]
    columns: tuple[str, ...]
    values: Floats


def write_table(path: Path, table: Table) -> None:
    """Write a table as CSV with a column ``run``; numbers are written so that they read back exactly."""
    lines = [["run", *table.columns]]
    lines += [[run, *map(repr, row)] for run, row in zip(table.runs, table.values.tolist(), strict=True)]
    with replacing(path) as file:
        file.write("".join(",".join(map(_quoted, line)) + "\n" for line in lines).encode())


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if re.search(r'[",\r\n]', cell) else cell


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns and the lines of a CSV file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            head, *lines = [line for line in csv.reader(file) if line] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return [cell.strip() for cell in head], lines


def read_table(path: Path, *, shares: bool = False, skip: Collection[str] = ()) -> Table:
    """Read a CSV file with a column ``run`` and one column of numbers per domain or task; not the runs in ``skip``.

    Raises:
        DataError: The file is missing or malformed, holds NaN, or rows are not proportions (``shares``); all at once.
    """
    head, lines = read_csv(path)
    if head[:1] != ["run"] or len(head) < 2:
        raise DataError(f"{path}: the first line must be 'run' and the names of domains or tasks, found {head[:4]}")
    if len(set(head)) < len(head):
        raise DataError(f"{path}: names a column twice: {', '.join(head)}")
    problems = [f"column {place} has no name" for place, name in enumerate(head, 1) if not name]
    rows: dict[str, list[float]] = {}
    for line in lines:
        run = line[0].strip()
        if not run:
            problems.append(f"a line without the name of a run: {','.join(line)[:80]}")
            continue
        if run in skip:
            continue
        if run in rows:
            problems.append(f"run {run} is there twice")
        rows[run] = _numbers(line, head, problems)
    for run, row in rows.items() if shares and not problems else ():
        if min(row) < 0 or abs(math.fsum(row) - 1) > _SUM_TOLERANCE:
            problems.append(f"run {run}: proportions must be at least 0 and sum to 1, the sum is {sum(row):.6g}")
    if problems:
        raise DataError("\n".join(f"{path}: {problem}" for problem in problems[:20]))
    if not rows:
        raise DataError(f"{path}: holds no run")
    return Table(runs=tuple(rows), columns=tuple(head[1:]), values=np.asarray(list(rows.values()), dtype=np.float64))


def _numbers(line: Sequence[str], head: Sequence[str], problems: list[str]) -> list[float]:
    if len(line) != len(head):
        problems.append(f"run {line[0]}: {len(line) - 1} numbers for {len(head) - 1} columns")
        return []
    row = []
    for name, cell in zip(head[1:], line[1:], strict=True):
        try:
            row.append(float(cell))
        except ValueError:
            row.append(math.nan)
        if not math.isfinite(row[-1]):
            problems.append(
                f"run {line[0]}, {name}: {cell.strip() or 'nothing'} is not a finite number; correct it, or leave the "
                f"run out with '--without {line[0]}' or by removing its line"
            )
    return row


Natural = tuple[dict[str, float], str]
"""Sizes of the domains by name, and their unit."""


def given_sizes(asked: str) -> Natural:
    """Return sizes from the output_dir of a run (its rows), a proportions file, or text such as ``web=9,code=1``."""
    if asked in ("rows", "bytes"):
        told = f"--natural: the {asked} of the data sets are counted by 'mix swarm' and 'mix climb', which have them"
        raise ConfigError(f"{told}; give sizes by name such as 'web=900,code=100', or the output_dir of a run")
    path = Path(asked).expanduser()
    if path.is_dir():
        try:
            events = read_events(path)
        except DataError as error:
            raise ConfigError(f"--natural: {error}") from error
        spaces = [event["row_space"] for event in events if event["event"] == "run_started"]
        domains = spaces[-1].get("domains") if spaces else None
        if not domains:
            raise ConfigError(f"--natural: the record in {path} does not say how many rows each domain has")
        return domains, "rows"
    if path.suffix == ".json":
        return read_proportions(path, "--natural").by_name, "shares"
    if "=" not in asked:
        raise ConfigError(
            f"--natural: {asked!r} is neither 'rows' nor 'bytes', nor a folder, a .json file or sizes by name such as "
            "'web=900,code=100'"
        )
    return numbers_by_name(asked, "--natural"), "given"
