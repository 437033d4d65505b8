"""Reads a run's record back: the events, and the stored plans.

Works while the run is still going on and after it was killed: a last line that was not written to its end is left
out. Any other damage is an error, since a resumed run must not continue a record with holes. A report reads what it
can, and names the rest. ``run_dir`` is the run's ``output_dir``, or the ``dataflex`` folder in it; every reader raises
``DataError`` where there is no record, or what it reads is damaged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError, DataError
from dataflex.plan.domains import Rows
from dataflex.plan.proportions import ProportionsFile, read_proportions
from dataflex.printable import file_name_problem, on_one_line

Event = dict[str, Any]

_LARGEST = 3.5e38
_DEPTH = 16
_TORN = "the process ended while writing it"

Check = Callable[[Any], bool]


def _within(least: float, most: float, *kinds: type) -> Check:
    return lambda value: type(value) in (kinds or (int, float)) and least <= value <= most


def _each(check: Check, *, or_null: bool = False) -> Check:
    def holds(value: Any) -> bool:
        return isinstance(value, dict) and all(check(item) or (or_null and item is None) for item in value.values())

    return holds


def _with(**checks: Check) -> Check:
    """Return the check of a mapping in which those keys, where they are not null, have such values."""

    def holds(value: Any) -> bool:
        return isinstance(value, dict) and all(
            value.get(key) is None or check(value[key]) for key, check in checks.items()
        )

    return holds


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _tokens(value: Any) -> bool:
    return _count(value) or _counts(value)


_count, _index = _within(0, 1e15, int), _within(-1, 1e15, int)
_real, _share, _seconds = _within(-_LARGEST, _LARGEST), _within(0, _LARGEST), _within(0, 1e15)
_moment = _within(0, 253_402_300_799)  # up to the year 9999
_counts, _reals = _each(_count), _each(_real, or_null=True)
_account = _with(
    **dict.fromkeys(("before", "now", "unexplained", "clipping", "rows"), _real), domains=_reals, others=_reals
)

_REQUIRED: dict[str, dict[str, Check]] = {
    "": {"event": _text, "step": _count, "time": _moment},
    "planned": {"interval": _count, "kind": _text, "start_step": _count, "stop_step": _count, "rows": _count},
    "evaluated": {"metrics": _with()},
    "resumed": {"checkpoint": _text},
}
_OPTIONAL: dict[str, dict[str, Check]] = {
    "": {"nonfinite": _texts, "spent": _each(_seconds), "passes": _counts, "compute": _share},
    "run_started": {
        "config": _with(),
        "schedule": _with(total_steps=_count),
        "row_space": _with(domains=_counts, sources=_counts, fingerprint=_text, tokens=_tokens),
        "versions": _with(),
        "forecast": _each(_with(forward=_real, backward=_real)),
        "world": _count,
        "process": _with(host=_text, pid=_count),
        "global_batch": _count,
    },
    "planned": {
        "domain_counts": _counts,
        "proportions": _each(_share, or_null=True),
        "scores": _reals,
        "served_scores": _reals,
    },
    "stepped": {"loss": _real},
    "credited": {"tokens": _counts, "looked_at": _count, "looks": _count, "targets": _each(_account)},
    "rolled_out": {
        **dict.fromkeys(("groups", "answers", "tokens", "informative", "dropped", "unscored", "truncated"), _count),
        **{"mean_reward": _real, "uniform_share": _share, "saved_answers": _real, "domains": _each(_with())},
    },
    "finished": {"seconds": _each(_seconds, or_null=True)},
}


def _shallow(value: Any, depth: int = 0) -> Any:
    """Return a JSON value without numbers and nesting that nothing can be made of; null stands for not finite."""
    if isinstance(value, float):
        return value if abs(value) <= _LARGEST else None
    if isinstance(value, int):
        return "..." if abs(value) > _LARGEST else value
    if not isinstance(value, dict | list):
        return value
    if depth > _DEPTH:
        return "..."
    if isinstance(value, dict):
        return {key: _shallow(item, depth + 1) for key, item in value.items()}
    return [_shallow(item, depth + 1) for item in value]


def sound_event(found: Any) -> tuple[Event | None, list[str]]:
    """Return the event with what can be relied on, and the keys left out; None where a key that it needs is bad."""
    if not isinstance(found, dict):
        return None, ["not an object"]
    event = _shallow(found)
    kind = event["event"] if _text(event.get("event")) else ""
    for key, check in {**_REQUIRED[""], **_REQUIRED.get(kind, {})}.items():
        if key not in event or not check(event[key]):
            return None, [key]
    if kind == "planned" and event["stop_step"] < event["start_step"]:
        return None, ["stop_step"]
    checks = {**_OPTIONAL[""], **_OPTIONAL.get(kind, {})}
    if kind == "stepped":
        checks |= {key: _real for key in event if key.startswith("dataflex/")}
    left_out = [key for key, value in event.items() if value is not None and key in checks and not checks[key](value)]
    return {key: value for key, value in event.items() if key not in left_out}, left_out


EVENTS = "events.jsonl"
ENDING = "ended.json"
"""The last event of a process that came to its end, beside the others."""
LEDGER = "ledger.parquet"
"""Credit of each row that was trained on, beside the events."""
WEIGHTS = "weights.json"
"""Rows with the largest and the smallest weights, beside the events."""
ROW_WEIGHTS = "weights.parquet"
"""Mean weight of each row that was weighed, beside the events."""
THINNED = "plans/thinned.i32"
"""Rows (int32) of the intervals whose arrays are not stored, in serving order, one interval after the other."""


@dataclass(frozen=True, kw_only=True)
class StoredPlan:
    """The arrays of one interval."""

    rows: Rows  # row ids in serving order [m], int64
    pool: Rows | None = None  # row ids chosen from [n], int64; None when that was every row, in order
    scores: NDArray[np.float32] | None = None  # of every pool row [n], NaN where not scored; None without scores
    kept: Rows | None = None  # row ids that the selector chose, in its order of preference; None: it was not asked
    target: NDArray[np.int16] | None = None  # target of the selector that each pool row is nearest to [n], -1 for none
    target_row: NDArray[np.int32] | None = None  # the nearest row of that target [n], -1 for none


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


def _parsed(path: Path) -> Iterator[tuple[int, Event | None, str]]:
    """Yield each line's number, its event, and the keys left out of it, or why there is no event."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    written = content.rstrip()
    lines = written.split(b"\n") if written else []
    for number, line in enumerate(lines, 1):
        event: Event | None = None
        try:
            event, left_out = sound_event(json.loads(line))
            problem = ", ".join(on_one_line(str(key))[:60] for key in left_out[:8])
            if event is None:
                problem += (
                    " cannot be read; an event is an object with the keys event, step, time and those of its kind"
                )
        except RecursionError:
            problem = "it is nested without end"
        except ValueError as error:
            problem = on_one_line(str(error))[:200]
        if event is None and number == len(lines) and b"\n" not in content[len(written) :]:
            problem = _TORN
        yield number, event, problem


def recorded_run(directory: Path) -> str | None:
    """Return the id of the run that a record is of, "" if it tells none, and None without a record."""
    path = Path(directory) / EVENTS
    if not path.exists():
        return None
    try:
        started = (event for _, event, _ in _parsed(path) if event and event["event"] == "run_started")
        return str(next(started, {}).get("run", ""))
    except DataError:  # told when the record is continued
        return ""


def parse_events(path: Path) -> list[Event]:
    """Read a file of events in the order they were written; a last line without its end is left out."""
    events: list[Event] = []
    for number, event, problem in _parsed(path):
        if event is not None:
            events.append(event)
        elif problem != _TORN:
            raise DataError(
                f"{path}, line {number} is not an event ({problem}); the record is damaged: "
                "remove that line to read the rest, or move the file away to record afresh"
            )
    return events


def read_record(run_dir: Path | str) -> tuple[list[Event], list[str]]:
    """Read what can be read of a run's events, and say what cannot, one line each."""
    events: list[Event] = []
    left_out: list[str] = []
    for number, event, problem in _parsed(record_dir(run_dir) / EVENTS):
        what = "is not an event:"
        if event is not None:
            events.append(event)
            what = f"({on_one_line(event['event'])[:30]}): the values of"
        if problem:
            left_out.append(f"{EVENTS}, line {number} {what} {problem}")
    return events, left_out


def read_events(run_dir: Path | str) -> list[Event]:
    """Read the events of a run."""
    return parse_events(record_dir(run_dir) / EVENTS)


def read_ending(run_dir: Path | str) -> list[Event]:
    """Read the last event of a process that came to its end; none while it goes on, or where it was killed."""
    path = record_dir(run_dir) / ENDING
    return parse_events(path) if path.is_file() else []


def read_weights(run_dir: Path | str) -> dict[str, Any] | None:
    """Read the rows with the largest and the smallest weights; None for a run without weights."""
    path = record_dir(run_dir) / WEIGHTS
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_bytes())
        problem: object = "" if _holds_weights(stored) else "it does not hold rows with their weights"
    except (OSError, ValueError, RecursionError) as error:
        problem = error
    if problem:
        raise DataError(f"{path} is damaged: {problem}; move it away to read the rest")
    return dict(stored)


def _holds_weights(stored: Any) -> bool:
    """Whether a JSON value is what ``RunRecorder.weighed`` stores."""
    checks = {"row": _index, "times": _count, "domain": _text, "text": _text}
    if not isinstance(stored, dict) or not all(_count(stored.get(key)) for key in ("step", "rows")):
        return False
    if not all(isinstance(stored.get(part), list) for part in ("most", "least")):
        return False
    return all(
        isinstance(entry, dict)
        and all(check(entry.get(key)) for key, check in checks.items())
        and "weight" in entry
        and (entry["weight"] is None or _real(entry["weight"]))
        for entry in (*stored["most"], *stored["least"])
    )


def read_found(run_dir: Path | str, mixer: str) -> ProportionsFile | None:
    """Read the proportions that the run's mixer has found so far; None where it looks for none, or has none yet."""
    if file_name_problem(mixer):
        return None
    path = record_dir(run_dir) / f"{mixer}.json"
    if not path.is_file():
        return None
    try:
        found = read_proportions(path, "proportions")
    except (ConfigError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}; move it away to read the rest") from error
    told = found.details if isinstance(found.details, dict) else {}
    last = told.get("last")
    last = {name: share for name, share in last.items() if _real(share)} if isinstance(last, dict) else {}
    return replace(found, details={"last": last, "warning": str(told.get("warning") or "")[:500]})


def load_plan(run_dir: Path | str, index: int) -> StoredPlan:
    """Load the arrays of interval ``index``."""
    folder = record_dir(run_dir)
    path = folder / plan_name(index)
    if not path.is_file():
        numbers = (file.stem.removeprefix("plan-") for file in (folder / "plans").glob("plan-*.npz"))
        known = sorted(int(number) for number in numbers if re.fullmatch("[0-9]{1,15}", number))
        told = f"it has {known[0]} to {known[-1]}" if known else "it has none yet"
        raise DataError(f"{folder} holds no plan of interval {index}; {told}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return StoredPlan(**{name: stored[name] for name in stored.files})
    except Exception as error:  # numpy, zlib and zipfile each have their own for broken files
        raise DataError(f"{path} is damaged: {type(error).__name__}: {error}") from error
