"""What a run's folder holds, read for a report: the record, or the Trainer's own logs where there is no record.

What cannot be read is named and the rest is given; only a folder with neither is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.plan.domains import Rows
from dataflex.plan.proportions import ProportionsFile
from dataflex.record.digest import Event, Run, digest
from dataflex.record.read import (
    EVENTS,
    StoredPlan,
    read_ending,
    read_found,
    read_record,
    read_weights,
    record_dir,
    sound_event,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from dataflex.record.chosen import Plans

TRAINER_STATE, RESULTS = "trainer_state.json", "eval_results.json"
_PLANS = 2048
_SCORED = 24
"""Intervals whose scores are read, evenly spaced."""
_NO_LOG = ("step", "epoch")


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One run as a report sees it."""

    title: str
    folder: Path
    """Folder of the record, whether it is there or not."""
    run: Run
    weighed: dict[str, Any] | None = None
    """What ``read_weights`` gives."""
    found: ProportionsFile | None = None
    left_out: list[str] = field(default_factory=list)
    """What is missing or cannot be read, one line each."""
    read: tuple[list[Event], list[str]] | None = None
    """What ``read_record`` gave."""
    no_rows: list[str] = field(default_factory=list)
    """Why there is no table of chosen rows."""

    @property
    def run_dir(self) -> Path:
        """Folder of the run, whose whole path the title may lack."""
        return self.folder.parent if self.folder.name == "dataflex" else self.folder

    @cached_property
    def plans(self) -> list[tuple[Event, Rows]]:
        """Each interval whose rows are stored, and the ids of the rows served in it [m]; at most 2,048 intervals."""
        kept = spaced([event for event in self.run.planned if event.get("plan")], _PLANS)
        return [(event, rows) for event in kept if (rows := self.served(event)) is not None]

    def served(self, event: Event) -> Rows | None:
        """Return the ids of the rows served in an interval [m]; None where they are not stored, or cannot be read."""
        plan = self._plan(event) if event.get("plan") else None
        return None if plan is None else plan.rows[plan.rows >= 0]

    @cached_property
    def scored(self) -> list[tuple[Event, Rows, NDArray[np.float64]]]:
        """Of up to 24 decisions: the interval, the ids of the rows with a finite score [n], and the scores [n]."""
        events = [event for event in self.run.planned if event.get("plan") and event.get("scores")]
        found = []
        for event in spaced(events, _SCORED):
            plan = self._plan(event)
            if plan is None or plan.scores is None:
                continue
            scores = np.asarray(plan.scores, np.float64)
            rows = np.arange(len(scores)) if plan.pool is None else plan.pool
            finite = np.isfinite(scores)
            found.append((event, rows[finite], scores[finite]))
        return found

    @cached_property
    def rows(self) -> pa.Table | None:
        """The table of chosen rows; None where the record has none that can be read, which is told."""
        from dataflex.record.chosen import chosen_notes, chosen_table

        try:
            found = chosen_table(self.folder, self.read)
        except DataError as error:
            self.no_rows.append(str(error).removeprefix(f"{self.folder}/"))
            return None
        self.left_out.extend(note for note in chosen_notes(found)["notes"] if note not in self.left_out)
        return found

    @cached_property
    def _plans(self) -> Plans:
        from dataflex.record.chosen import Plans

        return Plans(self.folder, self.read[0] if self.read else [], self.run.planned)

    def _plan(self, event: Event) -> StoredPlan | None:
        """Return an interval's plan in rows of the present pool; None where it cannot be read, which is told."""
        size = sum(self.run.pool.values())
        try:
            return self._plans.of(event, size) if size else None
        except DataError as error:
            if str(error) not in self.left_out:
                self.left_out.append(str(error))
            return None


def spaced(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most ``most`` items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[at] for at in np.linspace(0, len(items) - 1, most).round().astype(int)]


def recorded(run_dir: Path | str) -> Recorded:
    """Read a run's folder.

    Args:
        run_dir: The run's ``output_dir``, or the ``dataflex`` folder in it.

    Raises:
        DataError: There is neither a record nor a Trainer's log, or nothing of it can be read.
    """
    run_dir = Path(run_dir)
    try:
        folder = record_dir(run_dir)
    except DataError:
        if (run_dir / TRAINER_STATE).is_file():
            return _without_record(run_dir)
        raise
    events, left_out = read_record(folder)
    read = events, list(left_out)
    if left_out and not events:
        raise DataError(f"{folder / EVENTS} is damaged: none of its lines is an event, such as {left_out[0]}")

    def readable(read: Callable[..., Any], *arguments: str) -> Any:
        try:
            return read(folder, *arguments)
        except DataError as error:
            left_out.append(str(error).removeprefix(f"{folder}/"))
            return None

    run = digest([*events, *(readable(read_ending) or [])])
    if run.first_step:
        told = f"{EVENTS} begins at step {run.first_step}, where the run was resumed into this folder"
        left_out.append(f"{told}; losses and seconds of the steps before are not in it")
    view = Recorded(
        title="",
        folder=folder,
        run=run,
        weighed=readable(read_weights),
        found=readable(read_found, run.methods["mixer"][0]) if "mixer" in run.methods else None,
        left_out=left_out,
        read=read,
    )
    return replace(view, title=str(view.run_dir))


def _evaluated_last(path: Path, step: Any) -> list[Event]:
    """Return what LLaMA-Factory measured after the last step, which is not in the Trainer's log."""
    try:
        metrics = {key: value for key, value in json.loads(path.read_bytes()).items() if key not in _NO_LOG}
    except (OSError, ValueError, RecursionError, AttributeError):
        return []
    event, _ = sound_event({"event": "evaluated", "step": step, "time": 0, "metrics": metrics})
    return [] if event is None else [event]


def _without_record(run_dir: Path) -> Recorded:
    """Read the losses and metrics that the Trainer itself keeps of a run."""
    path = run_dir / TRAINER_STATE
    try:
        stored = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    logs = stored.get("log_history") if isinstance(stored, Mapping) else None
    events: list[Event] = []
    for log in logs if isinstance(logs, list) else ():
        step = log.get("step") if isinstance(log, Mapping) else None
        metrics = {key: value for key, value in log.items() if key not in _NO_LOG} if step is not None else {}
        evaluated = any(str(key).startswith("eval_") for key in metrics)
        told = {"metrics": metrics} if evaluated else metrics
        kind = "evaluated" if evaluated else "stepped"
        event, _ = sound_event({**told, "event": kind, "step": step, "time": 0})
        if event is not None and metrics:
            events.append(event)
    last = stored.get("global_step") if events else None
    if not any(event["event"] == "evaluated" and event["step"] == last for event in events):
        events += _evaluated_last(run_dir / RESULTS, last)
    if not events:
        raise DataError(f"{run_dir} has no dataflex/{EVENTS}, and {path.name} holds no log")
    missing = (
        f"dataflex/{EVENTS}: there is no record; losses and metrics are those of {path.name}, nothing else is known"
    )
    return Recorded(title=str(run_dir), folder=run_dir / "dataflex", run=digest(events), left_out=[missing])
