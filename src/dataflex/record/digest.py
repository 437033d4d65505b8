"""What the events of a run add up to: steps done, time by phase, served rows by domain, curves.

Read by the text summary and the plots, so that both tell the same numbers. Pure; no files, no plots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from dataflex.errors import DataError

Event = dict[str, Any]
Curve = list[tuple[int, float]]
"""(optimizer steps done, value), in order."""

_LOWER = ("loss", "perplexity", "ppl")
_HIGHER = ("accuracy", "acc", "f1", "bleu", "bleu-4", "rouge-1", "rouge-2", "rouge-l", "exact_match", "margins")
_DECIDING = ("signals", "select", "mix", "order", "decide", "plan")
_OURS = ("train", "evaluate", "training", "evaluation", "other")
_TOLD = {"train": "training", "evaluate": "evaluation"}
_NO_METRIC = ("_runtime", "_per_second", "_time", "epoch")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The events of one run, sorted by kind; each list in the order of the record."""

    started: Event
    """The latest "run_started", which says what runs now; empty when the record begins with a resume."""
    started_times: list[float]
    """Unix seconds at which each process that is still part of the record began."""
    wall_seconds: float
    spent: dict[str, float]
    """Seconds by phase over all processes, as their own clocks had them; empty where they had none."""
    steps_done: int
    planned: list[Event]
    stepped: list[Event]
    evaluated: list[Event]
    checkpointed: list[Event]
    resumed: list[Event]
    finished: Event | None

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps that the schedule asks for, when it says so."""
        total = (self.started.get("schedule") or {}).get("total_steps")
        return int(total) if total else None

    @cached_property
    def pool(self) -> dict[str, int]:
        """Rows of the training data by domain."""
        space = self.started.get("row_space") or {}
        return {str(name): int(rows) for name, rows in (space.get("domains") or space.get("sources") or {}).items()}

    @cached_property
    def domains(self) -> list[str]:
        """Every domain: those of the row space in its order, then any others met in plans."""
        names = dict.fromkeys(self.pool)
        for event in self.planned:
            names.update(dict.fromkeys(event.get("domain_counts") or {}))
        return list(names)

    def served(self) -> dict[str, float]:
        """Rows served by domain; the interval in progress counts by its share of steps done."""
        return dict(self._served)

    @cached_property
    def _served(self) -> dict[str, float]:
        total = dict.fromkeys(self.domains, 0.0)
        for event in self.planned:
            steps = event["stop_step"] - event["start_step"]
            done = min(max(self.steps_done - event["start_step"], 0), steps)
            for name, rows in (event.get("domain_counts") or {}).items():
                total[name] += rows * done / steps if steps else 0.0
        return total

    def phase_seconds(self) -> dict[str, float]:
        """Seconds by phase: training, the phases of deciding, evaluation, checkpoint, ..., other; in all the wall time.

        They are what the clocks of the processes say. Of a record without those, training is what the logs say, or
        what is left of the wall time where they do not (nothing is "other" then), and the closing event is asked
        only about phases that no other event carries.
        """
        phases = {phase: 0.0 for phase in ("training", *self.deciding_phases())}
        if self.spent:
            spent = {_TOLD.get(phase, phase): seconds for phase, seconds in self.spent.items()}
            phases = {**phases, "evaluation": 0.0, "checkpoint": 0.0, **spent}
            phases["other"] = phases.pop("other", 0.0)
            return {phase: seconds for phase, seconds in phases.items() if seconds > 0.0}
        for event in self.planned:
            for phase, seconds in (event.get("seconds") or {}).items():
                phases[phase] += seconds or 0.0
        phases["evaluation"] = sum(
            sum(_numbers(value for key, value in event["metrics"].items() if key.endswith("_runtime")))
            for event in self.evaluated
        )
        phases["checkpoint"] = sum(_numbers(event.get("seconds") for event in self.checkpointed))
        for phase, seconds in ((self.finished or {}).get("seconds") or {}).items():
            if phase not in _OURS and not phases.get(phase):
                phases[phase] = seconds or 0.0
        phases["training"] = sum(_numbers(event.get("seconds") for event in self.stepped))
        left = max(self.wall_seconds - sum(phases.values()), 0.0)
        phases["other" if phases["training"] else "training"] = left
        return {phase: seconds for phase, seconds in phases.items() if seconds > 0.0}

    def deciding_phases(self) -> list[str]:
        """Names of the phases that deciding is made of, in the order in which they happen."""
        met = {phase: None for event in self.planned for phase in (event.get("seconds") or {})}
        known = [phase for phase in _DECIDING if phase in met]
        return known + [phase for phase in met if phase not in _DECIDING]

    def train_loss(self) -> Curve:
        """Training loss at the Trainer's logging rhythm."""
        return [(event["step"], event["loss"]) for event in self.stepped if _is_number(event.get("loss"))]

    def plain_loss(self) -> Curve:
        """Token mean of the losses before any weights, of the first rank; empty without a weighter."""
        name = "dataflex/plain_loss"
        return [(event["step"], event[name]) for event in self.stepped if _is_number(event.get(name))]

    def weight_curve(self, key: str) -> Curve:
        """Curve of "ess" (share of the sequences, 0 to 1), "p05", "p50", "p95" or "max"; empty for unit weights."""
        name = f"dataflex/weight_{key}"
        curve = [(event["step"], event[name]) for event in self.stepped if _is_number(event.get(name))]
        return curve if any(abs(value - 1.0) > 1e-9 for _, value in curve) else []

    def metrics(self) -> dict[str, Curve]:
        """Curves of the evaluation metrics; speeds and run times are left out.

        A step evaluated twice (a last evaluation after training) keeps its last value.
        """
        curves: dict[str, dict[int, float]] = {}
        for event in self.evaluated:
            for key, value in event["metrics"].items():
                if _is_number(value) and not key.endswith(_NO_METRIC):
                    curves.setdefault(key, {})[event["step"]] = value
        return {key: sorted(curve.items()) for key, curve in curves.items()}


def higher_is_better(metric: str) -> bool | None:
    """Direction of an evaluation metric by its name; None when the name does not say."""
    if metric.endswith(_LOWER):
        return False
    return True if metric.endswith(_HIGHER) else None


def domain_groups(run: Run, most: int) -> list[tuple[str, list[str]]]:
    """Group domains: the most served ones alone, in the order of the row space, and the rest together."""
    served = run.served()
    kept = set(sorted(run.domains, key=lambda name: -served[name])[:most])
    rest = [name for name in run.domains if name not in kept]
    alone = [(name, [name]) for name in run.domains if name in kept]
    return [*alone, (f"{len(rest)} others", rest)] if rest else alone


def domain_shares(planned: Sequence[Event], key: str, members: Sequence[str]) -> list[float | None]:
    """Share of some domains in a count or proportion of each interval; None where there is no such thing."""
    shares: list[float | None] = []
    for event in planned:
        values = event.get(key) or {}
        total = sum(value or 0.0 for value in values.values())
        shares.append(sum(values.get(name) or 0.0 for name in members) / total if total else None)
    return shares


def running_mean(values: Sequence[float], half: int) -> list[float]:
    """Mean of each value and its ``half`` neighbours on either side, fewer at the ends."""
    sums = list(accumulate(values, initial=0.0))
    spans = [(max(at - half, 0), min(at + half + 1, len(values))) for at in range(len(values))]
    return [(sums[high] - sums[low]) / (high - low) for low, high in spans]


def digest(events: Sequence[Event]) -> Run:
    """Sort the events of a run by kind. Of steps that were planned twice, the last plan counts.

    Raises:
        DataError: There is no event yet.
    """
    if not events:
        raise DataError("the record holds no event yet; the run had not begun to train")
    kinds: dict[str, list[Event]] = {}
    for event in events:
        kinds.setdefault(event["event"], []).append(event)
    processes = _processes(events)
    clocks = [_last_spent(process) for process in processes]
    spent: dict[str, float] = {}
    for phase, seconds in ((phase, seconds) for clock in clocks if all(clocks) for phase, seconds in clock.items()):
        spent[phase] = spent.get(phase, 0.0) + seconds
    walls = [max(process[-1]["time"] - process[0]["time"], 0.0) for process in processes]
    return Run(
        started=kinds.get("run_started", [{}])[-1],
        started_times=[process[0]["time"] - sum((process[0].get("spent") or {}).values()) for process in processes],
        wall_seconds=sum(spent.values()) if spent else sum(walls),
        spent=spent,
        steps_done=max(int(event["step"]) for event in events),
        planned=_in_force(kinds.get("planned", [])),
        stepped=kinds.get("stepped", []),
        evaluated=kinds.get("evaluated", []),
        checkpointed=kinds.get("checkpointed", []),
        resumed=kinds.get("resumed", []),
        finished=kinds.get("finished", [None])[-1],
    )


def _in_force(planned: Sequence[Event]) -> list[Event]:
    """Return the plans in order of their steps, each without the steps that a later decision took over."""
    plans = {event["start_step"]: event for event in planned}
    starts = sorted(plans)
    return [_until(plans[start], after) for start, after in zip(starts, [*starts[1:], None], strict=False)]


def _until(event: Event, stop: int | None) -> Event:
    """Return a plan cut at ``stop``, its counts by the share of the steps that are left."""
    if stop is None or stop >= event["stop_step"]:
        return event
    left = (stop - event["start_step"]) / (event["stop_step"] - event["start_step"])
    counts = {name: rows * left for name, rows in (event.get("domain_counts") or {}).items()}
    return {**event, "stop_step": stop, "rows": round(event["rows"] * left), "domain_counts": counts}


def _last_spent(process: Sequence[Event]) -> dict[str, float]:
    """Return the seconds by phase that the last event of a process that has them tells."""
    return next((event["spent"] for event in reversed(process) if event.get("spent")), {})


def _processes(events: Sequence[Event]) -> list[list[Event]]:
    """List the events of each process: a start or a resume begins one, unless right after a start."""
    processes: list[list[Event]] = []
    before = ""
    for event in events:
        begins = event["event"] == "run_started" or (event["event"] == "resumed" and before != "run_started")
        if begins or not processes:
            processes.append([])
        processes[-1].append(event)
        before = event["event"]
    return processes


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(values: Any) -> list[float]:
    return [value for value in values if _is_number(value)]
