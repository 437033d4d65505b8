"""Reads a run's record back: the events, and the stored plans.

Works while the run is still going on and after it was killed, so a torn last line is left out; any
other damage is an error, since a record with holes would be gone on with wrongly. A report reads what it
can, and names the rest.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.plan.domains import Rows
from dataflex.plan.proportions import read_proportions
from dataflex.printable import file_name_problem, on_one_line

_MOST = 1e15
_LARGEST = 3.5e38
_LAST_SECOND = 253_402_300_799  # the year 9999
_DEPTH = 16
_BAD = object()

Check = Callable[[Any], Any]
"""Returns the value, what is left of it, or ``_BAD``."""


def _number(value: Any, least: float, most: float) -> Any:
    good = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    return value if good else _BAD


def _count(value: Any) -> Any:
    return _number(value, 0, _MOST) if isinstance(value, int) else _BAD


def _index(value: Any) -> Any:
    return _number(value, -1, _MOST) if isinstance(value, int) else _BAD


def _seconds(value: Any) -> Any:
    return _number(value, 0, _MOST)


def _moment(value: Any) -> Any:
    return _number(value, 0, _LAST_SECOND)


def _real(value: Any) -> Any:
    return _number(value, -_LARGEST, _LARGEST)


def _share(value: Any) -> Any:
    return _number(value, 0, _LARGEST)


def _text(value: Any) -> Any:
    return value if isinstance(value, str) else _BAD


def _texts(value: Any) -> Any:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else _BAD


def _each(check: Check) -> Check:
    """Return the check of a mapping from names to such values; a null stands for nothing."""

    def checked(value: Any) -> Any:
        if not isinstance(value, Mapping) or not all(
            item is None or check(item) is not _BAD for item in value.values()
        ):
            return _BAD
        return dict(value)

    return checked


def _counts(value: Any) -> Any:
    return {name: count or 0 for name, count in value.items()} if _each(_count)(value) is not _BAD else _BAD


def _spent(value: Any) -> Any:
    return {name: seconds or 0.0 for name, seconds in value.items()} if _each(_seconds)(value) is not _BAD else _BAD


def _settings(value: Any) -> Any:
    return _shallow(value, 0) if isinstance(value, Mapping) else _BAD


def _shallow(value: Any, depth: int) -> Any:
    if isinstance(value, Mapping | list) and depth > _DEPTH:
        return "..."
    if isinstance(value, Mapping):
        return {key: _shallow(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_shallow(item, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and abs(value) > _LARGEST:
        return "..."
    return value


def _metrics(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return _BAD
    return {key: None if _real(item) is _BAD else item for key, item in value.items()}  # null: not finite


def _schedule(value: Any) -> Any:
    value = _settings(value)
    return _BAD if value is _BAD or _count(value.get("total_steps") or 0) is _BAD else value


def _space(value: Any) -> Any:
    value = _settings(value)
    if value is _BAD:
        return _BAD
    checks: dict[str, Check] = {"domains": _counts, "sources": _counts, "fingerprint": _text}
    checks["tokens"] = _counts if isinstance(value.get("tokens"), Mapping) else _count
    good = {key: checks[key](item) for key, item in value.items() if key in checks and item is not None}
    return _BAD if any(item is _BAD for item in good.values()) else {**value, **good}


_REQUIRED: dict[str, dict[str, Check]] = {
    "": {"event": _text, "step": _count, "time": _moment},
    "planned": {"interval": _count, "kind": _text, "start_step": _count, "stop_step": _count, "rows": _count},
    "evaluated": {"metrics": _metrics},
    "resumed": {"checkpoint": _text},
}
_OPTIONAL: dict[str, dict[str, Check]] = {
    "": {"nonfinite": _texts, "spent": _spent},
    "run_started": {
        "config": _settings,
        "schedule": _schedule,
        "row_space": _space,
        "versions": _settings,
        "world": _count,
        "global_batch": _count,
        "run": _text,
    },
    "planned": {
        "domain_counts": _counts,
        "proportions": _each(_share),
        "scores": _each(_real),
        "served_scores": _each(_real),
        "seconds": _each(_seconds),
        "reason": _text,
        "plan": _text,
        "digest": _text,
        "decided_at_step": _count,
    },
    "stepped": {"seconds": _seconds, "loss": _real},
    "checkpointed": {"seconds": _seconds, "path": _text},
    "finished": {"metrics": _metrics, "seconds": _each(_seconds)},
}


def sound(event: Any) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the event with what can be relied on, and the keys left out; None where it says nothing without them."""
    if not isinstance(event, dict):
        return None, ["not an object"]
    kind: str = event["event"] if isinstance(event.get("event"), str) else ""
    for key, check in {**_REQUIRED[""], **_REQUIRED.get(kind, {})}.items():
        if key not in event or check(event[key]) is _BAD:
            return None, [key]
    if kind == "planned" and event["stop_step"] < event["start_step"]:
        return None, ["stop_step"]
    checks = {**_OPTIONAL[""], **_REQUIRED.get(kind, {}), **_OPTIONAL.get(kind, {})}
    if kind == "stepped":
        checks |= {key: _real for key in event if key.startswith("dataflex/")}
    kept, left_out = {}, []
    for key, value in event.items():
        found = _shallow(value, 0) if key not in checks or value is None else checks[key](value)
        if found is _BAD:
            left_out.append(key)
        else:
            kept[key] = found
    return kept, left_out


def sound_numbers(value: Any) -> dict[str, float]:
    """Return what is a number in a mapping from names to numbers; nothing of anything else."""
    found = _metrics(value)
    return {} if found is _BAD else found


def sound_weights(stored: Any) -> dict[str, Any] | None:
    """Return what ``RunRecorder.weighed`` stored, or None where it is anything else."""
    checks: dict[str, Check] = {"row": _index, "times": _count, "domain": _text, "text": _text}
    if not isinstance(stored, dict) or any(_count(stored.get(key)) is _BAD for key in ("step", "rows")):
        return None
    for part in ("most", "least"):
        if not isinstance(stored.get(part), list):
            return None
        for entry in stored[part]:
            if not isinstance(entry, dict) or any(check(entry.get(key)) is _BAD for key, check in checks.items()):
                return None
            if "weight" not in entry or (entry["weight"] is not None and _real(entry["weight"]) is _BAD):
                return None
    return stored


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
    """

    rows: Rows
    pool: Rows | None = None
    scores: NDArray[np.float32] | None = None


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
