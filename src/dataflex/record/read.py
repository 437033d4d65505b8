"""Reads a run's record back: the events, and the stored plans.

Works while the run is still going on and after it was killed, so a torn last line is left out; any
other damage is an error, since a record with holes would be summed up wrongly.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.core.protocols import Rows
from dataflex.errors import DataError

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
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    last = max((number for number, line in enumerate(lines) if line.strip()), default=-1)
    events: list[dict[str, Any]] = []
    for number, line in enumerate(lines[: last + 1]):
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or not {"event", "step", "time"} <= event.keys():
                raise ValueError("an event is an object with the keys event, step and time")
        except ValueError as error:
            if number == last and number == len(lines) - 1:  # no newline: the process ended while writing it
                break
            raise DataError(
                f"{path}, line {number + 1} is not an event ({error}); the record is damaged: "
                "remove that line to read the rest, or move the file away to record afresh"
            ) from error
        events.append(event)
    return events


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
        stored: dict[str, Any] = json.loads(path.read_bytes())
        assert {"step", "rows", "most", "least"} <= stored.keys()
    except (OSError, ValueError, AssertionError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error}; move it away to read the rest") from error
    return stored


def read_found(run_dir: Path | str, mixer: str | None) -> dict[str, Any] | None:
    """Read the proportions that the run's mixer has found so far; None where it looks for none, or there are none yet.

    Raises:
        DataError: The folder has no record, or the file is damaged.
    """
    path = record_dir(run_dir) / f"{mixer}.json"
    if mixer is None or not path.is_file():
        return None
    from dataflex.errors import ConfigError
    from dataflex.mixing.proportions_file import read_proportions

    try:
        found = read_proportions(path, "proportions")
    except ConfigError as error:
        raise DataError(f"{error}; move it away to read the rest") from error
    details = dict(found.details) if isinstance(found.details, dict) else {}
    return {"names": found.names, "proportions": found.proportions, "method": found.method, "details": details}


def load_plan(run_dir: Path | str, index: int) -> StoredPlan:
    """Load the arrays of interval ``index``.

    Raises:
        DataError: The folder has no record, or no plan of that interval, or the file is damaged.
    """
    folder = record_dir(run_dir)
    path = folder / plan_name(index)
    if not path.is_file():
        known = sorted(int(file.stem.removeprefix("plan-")) for file in (folder / "plans").glob("plan-*.npz"))
        told = f"it has {known[0]} to {known[-1]}" if known else "it has none yet"
        raise DataError(f"{folder} holds no plan of interval {index}; {told}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            return StoredPlan(**{name: stored[name] for name in stored.files})
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged: {error}") from error
