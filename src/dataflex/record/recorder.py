"""Writes what a run decides and does while it happens, so that a killed run still tells its story.

``events.jsonl`` holds one JSON object a line, appended and flushed at once; ``plans/plan-00003.npz``
holds the arrays of one interval, written aside and renamed. Only rank 0 records; the other ranks
hold a ``NullRecorder``. Nothing here reads a model, a clock other than the wall's, or a random
stream, and nothing is computed per step beyond turning a dozen numbers into text.

Every event is ``{"event": name, "step": optimizer steps done, "time": Unix seconds, "spent": {...}, ...}``,
where ``spent`` has the seconds of this process so far by phase. Numbers that are NaN or infinite are written
as null and their dotted keys listed under ``nonfinite``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.plan.domains import Rows
from dataflex.printable import plain, redacted
from dataflex.record.clock import PhaseClock
from dataflex.record.read import ENDING, EVENTS, WEIGHTS, parse_events, plan_name, read_ending, thinned
from dataflex.state import clear_left, replacing

if TYPE_CHECKING:
    from dataflex.plan.plan import DataPlan
    from dataflex.plan.schedule import Interval

_QUANTILES = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}


def summarize_scores(scores: NDArray[np.floating]) -> dict[str, float | int | None]:
    """Summarize scores [n]: count, scored (finite ones), mean, std, min, p05 p25 p50 p75 p95, max.

    NaN and infinities count as not scored. Statistics of no score at all are None.
    """
    values = np.asarray(scores, dtype=np.float64).ravel()
    finite = values[np.isfinite(values)]
    known: dict[str, float | int | None] = {"count": int(values.size), "scored": int(finite.size)}
    names = ("mean", "std", "min", *_QUANTILES, "max")
    if not finite.size:
        return {**known, **dict.fromkeys(names)}
    quantiles = np.quantile(finite, list(_QUANTILES.values()))
    numbers = (finite.mean(), finite.std(), finite.min(), *quantiles, finite.max())
    return {**known, **{name: float(number) for name, number in zip(names, numbers, strict=True)}}


def scores_of(rows: Rows, pool: Rows | None, scores: NDArray[np.floating]) -> NDArray[np.floating]:
    """Scores of ``rows`` [m], given the scores [n] of the rows of ``pool`` [n]; rows outside the pool are left out.

    A pool of None is every row, in order.
    """
    if pool is None:
        return scores[rows]
    order = np.argsort(pool, kind="stable")
    place = np.minimum(np.searchsorted(pool, rows, sorter=order), max(len(pool) - 1, 0))
    found = order[place] if len(pool) else np.zeros(0, dtype=np.int64)
    return scores[found[pool[found] == rows]] if len(pool) else scores[:0]


_OURS = ("event", "step", "time", "spent", "seconds", "nonfinite")

_PLANS = 1024
"""Intervals whose arrays are all stored; of later ones fewer and fewer."""


def _happens_again(event: Mapping[str, Any], step: int, plan_in_progress: int | None) -> bool:
    """Whether a run that goes on after ``step`` optimizer steps will record this event once more."""
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
        plan_in_progress: Index of the interval whose plan the checkpoint holds. Only needed when that
            plan starts exactly at ``resume_step`` (otherwise it started earlier and is kept anyway).
        clock: Says where the time of this process went; None: events do not say it.

    Raises:
        DataError: The folder cannot be written, or the record to go on with is damaged.
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
        self._first_step = self._step = resume_step or 0
        self._clock = clock
        path = self.directory / EVENTS
        try:
            (self.directory / "plans").mkdir(parents=True, exist_ok=True)
            clear_left(self.directory)
            kept: list[dict[str, Any]] = []
            if resume_step is not None and path.is_file():
                events = [*parse_events(path), *read_ending(self.directory)]
                kept = [event for event in events if not _happens_again(event, resume_step, plan_in_progress)]
            with replacing(path) as file:
                file.writelines(json.dumps(event).encode() + b"\n" for event in kept)
            names = {plan_name(event["interval"]) for event in kept if event["event"] == "planned"}
            for stored in (self.directory / "plans").iterdir():
                if stored.name.endswith(".npz") and f"plans/{stored.name}" not in names:
                    stored.unlink()
            (self.directory / ENDING).unlink(missing_ok=True)
            if resume_step is None:
                (self.directory / WEIGHTS).unlink(missing_ok=True)
        except OSError as error:
            raise DataError(
                f"output_dir: cannot keep the record of the run in {self.directory}: {error.strerror or error}"
            ) from error

    def run_started(
        self,
        *,
        config: Mapping[str, Any],
        schedule: Mapping[str, Any],
        row_space: Mapping[str, Any],
        versions: Mapping[str, str],
        world: int,
        global_batch: int,
        run: str = "",
    ) -> None:
        """Record what is about to run; a resumed run may say it again.

        Args:
            config: Resolved configuration; methods are looked for under its key ``dynamic``, or at its top.
            schedule: ``warmup_steps``, ``interval_steps``, ``total_steps``.
            row_space: ``fingerprint``, ``domains`` {domain: rows} (or ``sources``), ``tokens``.
            versions: Package -> version.
            world: Number of ranks.
            global_batch: Sequences per optimizer step, over all ranks and micro-batches.
            run: The run's id, which its checkpoints carry.
        """
        fields = {"config": redacted(config), "schedule": schedule, "row_space": row_space, "versions": versions}
        self._write(
            "run_started", self._first_step, {**fields, "world": world, "global_batch": global_batch, "run": run}
        )

    def planned(
        self,
        *,
        interval: Interval,
        plan: DataPlan,
        domain_counts: Mapping[str, int],
        seconds: Mapping[str, float],
        reason: str = "",
        proportions: Mapping[str, float] | None = None,
        pool: Rows | None = None,
        scores: NDArray[np.floating] | None = None,
    ) -> None:
        """Record the plan of one interval, decided when its first step was about to begin, and store its arrays.

        Args:
            interval: Which one.
            plan: Its plan; negative row ids are places that no row is served in.
            domain_counts: Rows served in this interval by domain.
            seconds: Phase ("signals", "select", "plan", ...) -> seconds; no second in two phases.
            reason: The methods' own words.
            proportions: Nominal proportions by domain, when a mixer set them.
            pool: Row ids that the selector chose from [n]; None means every row, in order.
            scores: Score of every pool row [n], NaN where not scored.
        """
        arrays: dict[str, NDArray[Any]] = {"rows": np.asarray(plan.rows, dtype=np.int64)}
        served = arrays["rows"][arrays["rows"] >= 0]
        summaries: dict[str, Any] = {"scores": None, "served_scores": None}
        if pool is not None:
            arrays["pool"] = np.asarray(pool, dtype=np.int64)
        if scores is not None:
            arrays["scores"] = np.asarray(scores, dtype=np.float32)
            of_served = scores_of(served, arrays.get("pool"), np.asarray(scores))
            summaries = {"scores": summarize_scores(scores), "served_scores": summarize_scores(of_served)}
        # The arrays come first: a line that names a plan must never name a file that is not there.
        stored = thinned(interval.index, _PLANS)
        if stored:
            with replacing(self.directory / plan_name(interval.index)) as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
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
        }
        self._write("planned", interval.start_step, fields)

    def stepped(self, step: int, logs: Mapping[str, Any], seconds: float | None = None) -> None:
        """Record a training log of the Trainer, at its own rhythm.

        Args:
            step: Optimizer steps done.
            logs: The log as the Trainer gives it ("loss", "grad_norm", "learning_rate", "dataflex/...").
            seconds: Seconds spent in training steps since the last call; deciding, evaluating and
                saving are not part of it. Without them, training counts as what is left of the time.
        """
        fields = {key: value for key, value in logs.items() if key not in _OURS}
        self._write("stepped", step, fields if seconds is None else {**fields, "seconds": seconds})

    def weighed(
        self, step: int, *, most: Sequence[Mapping[str, Any]], least: Sequence[Mapping[str, Any]], rows: int
    ) -> None:
        """Store the rows that weighed most and least so far; an earlier such file is replaced.

        Args:
            step: Optimizer steps done.
            most: Rows of the largest mean weight, largest first: ``row``, ``weight``, ``times``, ``domain``, ``text``.
            least: Rows of the smallest mean weight, smallest first.
            rows: How many rows were weighed.
        """
        nonfinite: list[str] = []
        fields = {"step": int(step), "rows": int(rows), "most": list(most), "least": list(least)}
        told = plain(fields, "", nonfinite)
        with replacing(self.directory / WEIGHTS) as file:
            file.write(json.dumps(told, allow_nan=False).encode() + b"\n")

    def evaluated(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of one evaluation ("eval_loss", "eval_runtime", ...)."""
        self._write("evaluated", step, {"metrics": metrics})

    def checkpointed(self, step: int, path: Path | str, seconds: float) -> None:
        """Record a checkpoint that is complete on disk, and the seconds it took."""
        self._write("checkpointed", step, {"path": str(path), "seconds": seconds})

    def resumed(self, step: int, checkpoint: Path | str) -> None:
        """Record that the run goes on from a checkpoint after ``step`` steps."""
        self._write("resumed", step, {"checkpoint": str(checkpoint)})

    def finished(self, step: int, metrics: Mapping[str, Any], seconds: Mapping[str, float] | None = None) -> None:
        """Record the end of training; evaluations may still follow.

        Args:
            step: Optimizer steps done.
            metrics: The Trainer's closing metrics.
            seconds: Phase -> seconds, over all processes of a resumed run. They are read where events have no
                ``spent``, and there only phases that no other event carries.
        """
        self._write("finished", step, {"metrics": metrics, "seconds": seconds or {}})

    def ended(self) -> None:
        """Store where the time of the whole process went, once nothing of the run is left to do.

        Evaluations and the final model come after ``finished``. This lies beside the events, not among them, until
        a resumed run goes on from here.
        """
        with replacing(self.directory / ENDING) as file:
            file.write(json.dumps(self._event("ended", self._step, {}), allow_nan=False).encode() + b"\n")

    def _event(self, event: str, step: int, fields: Mapping[str, Any]) -> dict[str, Any]:
        nonfinite: list[str] = []
        line = {"event": event, "step": int(step), "time": time.time()}
        if self._clock is not None:
            line["spent"] = {phase: round(seconds, 3) for phase, seconds in self._clock.spent().items()}
        line.update(plain(fields, "", nonfinite))
        return {**line, "nonfinite": nonfinite} if nonfinite else line

    def _write(self, event: str, step: int, fields: Mapping[str, Any]) -> None:
        line, self._step = self._event(event, step, fields), int(step)
        path = self.directory / EVENTS
        try:
            # Opened for each line: no handle is left behind by a run that fails, at some 20 microseconds a log.
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise DataError(f"output_dir: cannot write {path}: {error.strerror or error}") from error


class NullRecorder(RunRecorder):
    """Takes every call and does nothing: for the ranks other than 0."""

    def __init__(self) -> None:
        pass

    def planned(self, **_: Any) -> None:
        """Do nothing."""

    def run_started(self, **_: Any) -> None:
        """Do nothing."""

    def weighed(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def ended(self) -> None:
        """Do nothing."""

    def _write(self, event: str, step: int, fields: Mapping[str, Any]) -> None:
        pass
