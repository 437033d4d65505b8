"""Writes what a run decides and does while it happens, so that the record of a killed run is there as well.

``events.jsonl`` holds one JSON object a line, appended and flushed at once; ``plans/plan-00003.npz`` holds the arrays
of one interval, written aside and renamed; docs/report.md lists the fields. Only rank 0 records; the other ranks hold
a ``NullRecorder``. No model and no random stream is read.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dataflex import checkpoints
from dataflex.clock import PhaseClock
from dataflex.errors import DataError
from dataflex.plan.domains import Rows
from dataflex.printable import plain, redacted
from dataflex.record.chosen import CHOSEN, ROWS, Pool, write_chosen, write_moved, write_rows
from dataflex.record.read import (
    ENDING,
    EVENTS,
    LEDGER,
    ROW_WEIGHTS,
    THINNED,
    WEIGHTS,
    parse_events,
    plan_name,
    read_ending,
    thinned,
)
from dataflex.state import clear_left, refusals, replacing

if TYPE_CHECKING:
    from dataflex.plan.plan import DataPlan

_QUANTILES = {"min": 0.0, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


def summarize_scores(scores: NDArray[np.floating]) -> dict[str, float | int | None]:
    """Summarize scores [n]: count, scored (finite ones), mean, std, min, p05 p25 p50 p75 p95, max.

    NaN and infinities count as not scored. Without any score, the statistics are None.
    """
    values = np.asarray(scores, dtype=np.float64).ravel()
    finite = values[np.isfinite(values)]
    known: dict[str, float | int | None] = {"count": int(values.size), "scored": int(finite.size)}
    if not finite.size:
        return {**known, **dict.fromkeys(("mean", "std", *_QUANTILES))}
    quantiles = np.quantile(finite, list(_QUANTILES.values())).tolist()
    return {
        **known,
        "mean": float(finite.mean()),
        "std": float(finite.std()),
        **dict(zip(_QUANTILES, quantiles, strict=True)),
    }


def scores_of(rows: Rows, pool: Rows | None, scores: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the scores of ``rows`` [m], given the scores [n] of ``pool`` [n]; rows outside the pool are left out.

    A pool of None is every row, in order.
    """
    if pool is None or not len(pool):
        return scores[rows] if pool is None else scores[:0]
    order = np.argsort(pool, kind="stable")
    found = order[np.minimum(np.searchsorted(pool, rows, sorter=order), len(pool) - 1)]
    return scores[found[pool[found] == rows]]


_OURS = ("event", "step", "time", "spent", "nonfinite")

_PLANS = 1024
"""Intervals whose arrays are all stored; of later ones fewer and fewer."""
_SHARE = 0.01
"""Largest share of the time that goes into writing the table of chosen rows."""
_SECONDS_PER_ROW = 1e-6
"""About what that takes, where it was not measured yet."""


def _happens_again(event: Mapping[str, Any], step: int, plan_in_progress: int | None) -> bool:
    """Whether a run that is resumed after ``step`` optimizer steps will record this event once more."""
    if event["event"] == "finished":
        return True
    if event["event"] == "planned":
        return event["start_step"] >= step and event["interval"] != plan_in_progress
    return event["step"] > step


class RunRecorder:
    """The record of one run, kept by rank 0.

    A fresh run replaces an older record of the same folder. A resumed run keeps the lines up to the
    step it starts from, drops those that will happen again, and appends.

    Args:
        directory: ``<output_dir>/dataflex``; made when missing.
        resume_step: Optimizer steps done in the checkpoint that the run starts from; None when fresh.
        plan_in_progress: Index of the interval whose plan the checkpoint holds; it matters where that plan
            starts exactly at ``resume_step``.
        clock: Tells the seconds of this process by phase; None: a clock that begins now.

    Raises:
        DataError: The folder cannot be written, or the record to be continued is damaged.
    """

    def __init__(
        self,
        directory: Path,
        resume_step: int | None = None,
        *,
        plan_in_progress: int | None = None,
        clock: PhaseClock | None = None,
    ) -> None:
        self.directory = Path(directory)
        self._step = resume_step or 0
        self._clock = clock or PhaseClock()
        path = self.directory / EVENTS
        with refusals(f"the record of the run in {self.directory}", DataError, key="output_dir"):
            (self.directory / "plans").mkdir(parents=True, exist_ok=True)
            clear_left(self.directory)
            kept: list[dict[str, Any]] = []
            if resume_step is not None and path.is_file():
                events = [*parse_events(path), *read_ending(self.directory)]
                kept = [event for event in events if not _happens_again(event, resume_step, plan_in_progress)]
            with replacing(path) as file:
                file.writelines(json.dumps(event).encode() + b"\n" for event in kept)
            names = {plan_name(event["interval"]) for event in kept if event["event"] == "planned"}
            for stored in (self.directory / "plans").glob("*.npz"):
                if f"plans/{stored.name}" not in names:
                    stored.unlink()
            (self.directory / ENDING).unlink(missing_ok=True)
            kept_rows = max((sum(event["thinned"]) for event in kept if event.get("thinned")), default=0)
            if kept_rows and (self.directory / THINNED).is_file():
                os.truncate(self.directory / THINNED, 4 * kept_rows)
            if resume_step is None:
                for name in (WEIGHTS, ROW_WEIGHTS, LEDGER, ROWS, CHOSEN, THINNED):
                    (self.directory / name).unlink(missing_ok=True)
        self._num_thinned = kept_rows
        self._refreshed = (-np.inf, 0.0)  # when the table of chosen rows was written, and the seconds it took
        self._stale = True  # whether something was recorded since
        self._ended = False

    def run_started(self, *, config: Mapping[str, Any], **fields: Any) -> None:
        """Record what is about to run; a resumed run may say it again.

        ``config`` is the resolved configuration, which is written without secrets; ``fields`` are ``schedule``,
        ``row_space``, ``versions``, ``world``, ``global_batch`` and ``run``.
        """
        process = {"host": socket.gethostname(), "pid": os.getpid()}
        self._write("run_started", self._step, {"config": redacted(config), **fields, "process": process})

    def planned(
        self,
        *,
        plan: DataPlan,
        domain_counts: Mapping[str, int],
        seconds: Mapping[str, float],
        reason: str = "",
        proportions: Mapping[str, float] | None = None,
        pool: Rows | None = None,
        scores: NDArray[np.floating] | None = None,
        kept: Rows | None = None,
        nearest: tuple[NDArray[np.integer], NDArray[np.integer]] | None = None,
    ) -> None:
        """Record the plan of one interval, decided when its first step was about to begin, and store its arrays.

        Args:
            plan: Row ids in serving order; at negative ones no row is served.
            domain_counts: Rows served in this interval by domain.
            seconds: Phase ("signals", "decide") -> seconds that the decision took.
            reason: The methods' own words.
            proportions: Nominal proportions by domain, when a mixer set them.
            pool: Row ids that the selector chose from [n]; None means every row, in order.
            scores: Score of every pool row [n], NaN where not scored.
            kept: Row ids that the selector chose, in order of preference; None where it was not asked.
            nearest: The target that each pool row is nearest to, and that target's row [n], -1 for none.
        """
        interval = plan.interval
        arrays: dict[str, NDArray[Any]] = {"rows": np.asarray(plan.rows, dtype=np.int64)}
        served = arrays["rows"][arrays["rows"] >= 0]
        summaries: dict[str, Any] = {"scores": None, "served_scores": None}
        if pool is not None:
            arrays["pool"] = np.asarray(pool, dtype=np.int64)
        if scores is not None:
            arrays["scores"] = np.asarray(scores, dtype=np.float32)
            of_served = scores_of(served, arrays.get("pool"), np.asarray(scores))
            summaries = {"scores": summarize_scores(scores), "served_scores": summarize_scores(of_served)}
        if kept is not None:
            arrays["kept"] = np.asarray(kept, dtype=np.int64)
        if nearest is not None:
            arrays["target"], arrays["target_row"] = nearest[0].astype(np.int16), nearest[1].astype(np.int32)
        # The arrays come first: a line that names a plan must never name a file that is not there.
        stored = thinned(interval.index, _PLANS)
        if stored:
            with replacing(self.directory / plan_name(interval.index)) as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        else:
            with refusals(self.directory / THINNED, DataError), (self.directory / THINNED).open("ab") as file:
                file.truncate(4 * self._num_thinned)
                file.write(arrays["rows"].astype("<i4").tobytes())
        fields = {
            "interval": interval.index,
            "kind": interval.kind,
            "start_step": interval.start_step,
            "stop_step": interval.stop_step,
            "decided_at_step": interval.start_step,
            "rows": len(served),
            "digest": plan.digest(),
            "domain_counts": domain_counts,
            "proportions": proportions,
            **summaries,
            "seconds": seconds,
            "reason": reason,
            "plan": plan_name(interval.index) if stored else None,
            **({} if stored else {"thinned": [self._num_thinned, len(plan.rows)]}),
        }
        self._num_thinned += 0 if stored else len(plan.rows)
        self._write("planned", interval.start_step, fields)
        self.refresh()

    def rows_known(self, space: Pool, moved: tuple[str, Rows] | None = None) -> None:
        """Store where each row comes from, and what is known of it before training.

        ``moved``: where a resumed run has another pool, the fingerprint of the one before, and the row there of each
        row [N], -1 for new ones.
        """
        with self._clock.phase("record"):
            if moved is not None:
                write_moved(self.directory, moved[0], space.fingerprint, moved[1])
            new = write_rows(self.directory, space)
        if new or not (self.directory / CHOSEN).is_file():
            self.refresh(now=True)
        else:  # a resumed run: what an earlier start wrote will do until training has gone on for a while
            self._refreshed = (perf_counter(), space.num_rows * _SECONDS_PER_ROW)

    def refresh(self, *, now: bool = False) -> None:
        """Write the table of chosen rows, unless that would take more than a hundredth of the time; ``now``: anyway."""
        at, took = self._refreshed
        began = perf_counter()
        due = self._stale and (now or began - at >= took / _SHARE)
        if not due or not (self.directory / ROWS).is_file():
            return
        with self._clock.phase("record"):
            write_chosen(self.directory)
        self._stale = False
        self._refreshed = (perf_counter(), perf_counter() - began)

    def stepped(self, step: int, logs: Mapping[str, Any]) -> None:
        """Record a training log after ``step`` optimizer steps ("loss", "grad_norm", "dataflex/...")."""
        self._write("stepped", step, {key: value for key, value in logs.items() if key not in _OURS})

    def weighed(
        self,
        step: int,
        *,
        most: Sequence[Mapping[str, Any]],
        least: Sequence[Mapping[str, Any]],
        rows: int,
        table: bytes | None = None,
    ) -> None:
        """Store the rows with the largest and the smallest mean weight of ``rows`` rows so far, most extreme first.

        Each has ``row``, ``weight``, ``times``, ``domain`` and ``text``; ``table`` is the file of all rows that were
        weighed. Earlier such files are replaced.
        """
        if table is not None:
            self._stale = True
            with replacing(self.directory / ROW_WEIGHTS) as file:
                file.write(table)
        self._store(WEIGHTS, plain({"step": int(step), "rows": int(rows), "most": list(most), "least": list(least)}))

    def credited(self, step: int, accounts: Mapping[str, Any], rows: bytes | None = None) -> None:
        """Record the ledger's accounts after ``step`` optimizer steps, and store its file of ``rows``."""
        if rows is not None:
            with replacing(self.directory / LEDGER) as file:
                file.write(rows)
        self._write("credited", step, accounts)

    def rolled_out(self, step: int, account: Mapping[str, Any]) -> None:
        """Record what was generated for step ``step - 1``: groups, rewards, and answers saved, see docs/report.md."""
        self._write("rolled_out", step, account)

    def evaluated(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of one evaluation ("eval_loss", "eval_runtime", ...)."""
        self._write("evaluated", step, {"metrics": metrics})

    def checkpointed(self, step: int, path: Path | str, seconds: float) -> None:
        """Record a checkpoint that is complete on disk, and the seconds it took."""
        self._write("checkpointed", step, {"path": str(path), "seconds": seconds})
        self.refresh()

    def resumed(self, step: int, checkpoint: Path | str, **changed: Any) -> None:
        """Record that the run is resumed from a checkpoint after ``step`` steps, and what ``changed`` on purpose."""
        self._write("resumed", step, {"checkpoint": str(checkpoint), **changed})

    def finished(
        self,
        step: int,
        metrics: Mapping[str, Any],
        seconds: Mapping[str, float] | None = None,
        costs: Mapping[str, Any] | None = None,
    ) -> None:
        """Record the end of training: closing metrics, and over all processes seconds by phase and passes."""
        self._write("finished", step, {"metrics": metrics, "seconds": seconds or {}, **(costs or {})})

    def ended(self) -> None:
        """Store the seconds of the whole process beside the events, once nothing of the run is left to do.

        Evaluations and the final model come after ``finished``; a run that fails or is stopped has this event alone. A
        resumed run puts it among the others.
        """
        self._ended = True
        with suppress(DataError):  # what ended the run is told first
            self._store(ENDING, self._event("ended", self._step, {}))
        checkpoints.release(self.directory.parent)

    def _event(self, event: str, step: int, fields: Mapping[str, Any]) -> dict[str, Any]:
        nonfinite: list[str] = []
        spent = {phase: round(seconds, 3) for phase, seconds in self._clock.spent().items()}
        line = {"event": event, "step": int(step), "time": time.time(), "spent": spent, **plain(fields, "", nonfinite)}
        return {**line, "nonfinite": nonfinite} if nonfinite else line

    def _store(self, name: str, content: Mapping[str, Any]) -> None:
        with replacing(self.directory / name) as file:
            file.write(json.dumps(content, allow_nan=False).encode() + b"\n")

    def _write(self, event: str, step: int, fields: Mapping[str, Any]) -> None:
        line, self._step, self._stale = self._event(event, step, fields), int(step), True
        path = self.directory / EVENTS
        # Opened for each line: no handle is left behind by a run that fails, at some 20 microseconds a log.
        with refusals(path, DataError, key="output_dir"), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if self._ended:  # an evaluation afterwards, say
            self.ended()


class NullRecorder(RunRecorder):
    """Takes every call and does nothing: for the ranks other than 0."""

    def __init__(self) -> None:
        pass

    def _ignore(self, *_: Any, **__: Any) -> None:
        pass

    run_started = rows_known = refresh = planned = weighed = credited = ended = _write = _ignore
