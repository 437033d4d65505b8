"""Reads a run's record back: the events, and the stored plans.

Works while the run is still going on and after it was killed, so a torn last line is left out; any
other damage is an error, since a record with holes would be gone on with wrongly. A report reads what it
can, and names the rest.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.core.file_names import file_name_problem
from dataflex.core.printable import on_one_line
from dataflex.core.protocols import Rows
from dataflex.errors import DataError
from dataflex.record.sound import sound, sound_numbers, sound_weights

__all__ = [
    "ENDING",
    "EVENTS",
    "WEIGHTS",
    "StoredPlan",
    "load_plan",
    "parse_events",
    "plan_name",
    "read_ending",
    "read_events",
    "read_record",
    "read_weights",
    "record_dir",
    "recorded_run",
    "thinned",
]

EVENTS = "events.jsonl"
ENDING = "ended.json"
"""The last event of a process that came to its end, beside the others."""
WEIGHTS = "weights.json"
"""Rows that weighed most and least, beside the events."""


@dataclass(frozen=True, kw_only=True)
class StoredPlan:
    """The arrays of one interval.

    Attributes:
        rows: Row ids in serving order [m], int64.
        pool: Row ids chosen from [n], int64; None when that was every row, in order.
        scores: Score of every pool row [n], float32, NaN where not scored; None without scores.
        weights: Weight of every row of ``rows`` [m], float32; None when not known beforehand.
    """

    rows: Rows
    pool: Rows | None = None
    scores: NDArray[np.float32] | None = None
    weights: NDArray[np.float32] | None = None


def plan_name(interval: int) -> str:
    """Path of an interval's arrays, relative to the record's folder."""
    return f"plans/plan-{interval:05d}.npz"


def thinned(index: int, first: int) -> bool:
    """Whether interval ``index`` is one of those kept of a long run.

    The ``first`` ones are, then every second up to twice as many, every fourth up to four times as many, and so on.
    """
    return index % (1 << (index // first).bit_length()) == 0


def record_dir(run_dir: Path | str) -> Path:
    """Find the record of a run.

    Args:
        run_dir: The run's ``output_dir``, or the ``dataflex`` folder in it.

    Raises:
        DataError: There is none.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is not a folder; give the output_dir of a run with a dynamic block")
    for folder in (run_dir / "dataflex", run_dir):
        if (folder / EVENTS).is_file():
            return folder
    raise DataError(f"{run_dir} has no dataflex/{EVENTS}; is it the output_dir of a run with a dynamic block?")


def recorded_run(directory: Path) -> str | None:
    """Return the id of the run that a record is of, "" if it tells none, and None without a record."""
    try:
        with open(Path(directory) / EVENTS, encoding="utf-8") as lines:
            for line in lines:
                event = json.loads(line)
                if event["event"] == "run_started":
                    return str(event.get("run", ""))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):  # told when the record is gone on with
        return ""
    return ""


def parse_events(path: Path) -> list[dict[str, Any]]:
    """Read a file of events in the order they were written; a torn last line is left out.

    Raises:
        DataError: The file cannot be read, or a line before the last is not an event.
    """
    lines, torn = _lines(path)
    events: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        event, problem = _event(line)
        if event is None:
            if number == len(lines) and torn:
                break
            raise DataError(
                f"{path}, line {number} is not an event ({problem}); the record is damaged: "
                "remove that line to read the rest, or move the file away to record afresh"
            )
        events.append(event)
    return events


def _lines(path: Path) -> tuple[list[bytes], bool]:
    """Return the lines of a file, and whether the last one has no end: the process ended while writing it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    written = content.rstrip()
    return (written.split(b"\n") if written else []), b"\n" not in content[len(written) :]


def _event(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """Return the event of a line with what can be relied on, and what cannot: all of it where there is no event."""
    try:
        found = json.loads(line)
    except RecursionError:
        return None, "it is nested without end"
    except ValueError as error:
        return None, on_one_line(str(error))[:200]
    event, left_out = sound(found)
    names = ", ".join(on_one_line(str(key))[:60] for key in left_out[:8])
    if event is None:
        return (
            None,
            f"{names} cannot be read; an event is an object with the keys event, step, time and those of its kind",
        )
    return event, names


def read_record(run_dir: Path | str) -> tuple[list[dict[str, Any]], list[str]]:
    """Read what can be read of a run's events, and say what cannot, one line each.

    Args:
        run_dir: The run's ``output_dir``, or the ``dataflex`` folder in it.

    Raises:
        DataError: The folder has no record, or the file cannot be read.
    """
    path = record_dir(run_dir) / EVENTS
    events: list[dict[str, Any]] = []
    left_out: list[str] = []
    lines, torn = _lines(path)
    for number, line in enumerate(lines, 1):
        event, problem = _event(line)
        if event is None and torn and number == len(lines):
            problem = "the process ended while writing it"
        if event is not None:
            events.append(event)
        if problem:
            kind = "" if event is None else f" ({on_one_line(event['event'])[:30]}): the values of"
            left_out.append(f"{EVENTS}, line {number}{kind or ' is not an event:'} {problem}")
    return events, left_out


def read_events(run_dir: Path | str) -> list[dict[str, Any]]:
    """Read the events of a run.

    Args:
        run_dir: The run's ``output_dir``, or the ``dataflex`` folder in it.

    Raises:
        DataError: The folder has no record, or the record is damaged.
    """
    return parse_events(record_dir(run_dir) / EVENTS)


def read_ending(run_dir: Path | str) -> list[dict[str, Any]]:
    """Read the event with which the last process of a run came to its end; none while it goes on, or was killed.

    Raises:
        DataError: The folder has no record, or the file is damaged.
    """
    path = record_dir(run_dir) / ENDING
    return parse_events(path) if path.is_file() else []


def read_weights(run_dir: Path | str) -> dict[str, Any] | None:
    """Read the rows that weighed most and least; None where a run has weighed none.

    Raises:
        DataError: The folder has no record, or the file is damaged.
    """
    path = record_dir(run_dir) / WEIGHTS
    if not path.is_file():
        return None
    try:
        stored = sound_weights(json.loads(path.read_bytes()))
        problem: object = "it does not hold rows with their weights"
    except (OSError, ValueError, RecursionError) as error:
        stored, problem = None, error
    if stored is None:
        raise DataError(f"{path} is damaged: {problem}; move it away to read the rest")
    return stored


def read_found(run_dir: Path | str, mixer: str | None) -> dict[str, Any] | None:
    """Read the proportions that the run's mixer has found so far; None where it looks for none, or there are none yet.

    Raises:
        DataError: The folder has no record, or the file is damaged.
    """
    if mixer is None or file_name_problem(mixer):
        return None
    path = record_dir(run_dir) / f"{mixer}.json"
    if not path.is_file():
        return None
    from dataflex.errors import ConfigError
    from dataflex.mixing.proportions_file import read_proportions

    try:
        found = read_proportions(path, "proportions")
    except (ConfigError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}; move it away to read the rest") from error
    told = found.details if isinstance(found.details, dict) else {}
    details = {"last": sound_numbers(told.get("last")), "warning": str(told.get("warning") or "")[:500]}
    return {"names": found.names, "proportions": found.proportions, "method": found.method, "details": details}


def load_plan(run_dir: Path | str, index: int) -> StoredPlan:
    """Load the arrays of interval ``index``.

    Raises:
        DataError: The folder has no record, or no plan of that interval, or the file is damaged.
    """
    folder = record_dir(run_dir)
    path = folder / plan_name(index)
    if not path.is_file():
        numbers = (file.stem.removeprefix("plan-") for file in (folder / "plans").glob("plan-*.npz"))
        known = sorted(int(number) for number in numbers if re.fullmatch("[0-9]{1,15}", number))
        told = f"it has {known[0]} to {known[-1]}" if known else "it has none yet"
        raise DataError(f"{folder} holds no plan of interval {index}; {told}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            return StoredPlan(**{name: stored[name] for name in stored.files})
    except Exception as error:  # numpy, zlib and zipfile each have their own for broken files
        raise DataError(f"{path} is damaged: {type(error).__name__}: {error}") from error
