"""Reads what a fit needs: the mixtures of the runs, and their held-out losses by domain."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError, did_you_mean
from dataflex.record.read import read_events
from dataflex.state import replacing

__all__ = ["RATIOS", "Table", "finished", "join", "losses_of_run", "read_table", "write_table"]

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
