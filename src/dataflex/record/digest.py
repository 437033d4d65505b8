"""What the events of a run add up to: steps done, time by phase, served rows by domain, curves.

The text summary and the plots are both made from it, so that they show the same numbers. No files, no plots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, zip_longest
from typing import Any

from dataflex.errors import DataError
from dataflex.registry import KINDS

Event = dict[str, Any]
Curve = list[tuple[int, float]]
"""(optimizer steps done, value), in order."""

DECIDING = ("signals", "decide")
"""Phases that decisions are made of."""
_NAMES = {"train": "training", "evaluate": "evaluation"}
_FIRST_PHASES = ("training", *DECIDING, "evaluation", "checkpoint")
_LOWER = ("loss", "perplexity", "ppl")
_HIGHER = ("accuracy", "acc", "f1", "bleu", "bleu-4", "rouge-1", "rouge-2", "rouge-l", "exact_match", "margins")
_NO_METRIC = ("_runtime", "_per_second", "_time", "epoch")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The events of one run, sorted by kind; each list in the order of the record."""

    started: Event
    """The latest "run_started", which says what runs now; empty when the record begins with a resume."""
    started_times: list[float]
    """Unix seconds at which each process that is still part of the record began."""
    processes: list[list[Event]]
    """All events, in the order of the record, by the process that wrote them."""
    spent: dict[str, float]
    """Seconds by phase over all processes, by their own clocks."""
    steps_done: int
    first_step: int
    """Steps done where the record begins: above 0 for a run that was resumed into another folder."""
    planned: list[Event]
    stepped: list[Event]
    evaluated: list[Event]
    credited: Event | None
    """The latest accounts of the ledger."""
    resumed: list[Event]
    finished: Event | None

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        return self.started.get("config") or {}

    @property
    def dynamic(self) -> Mapping[str, Any]:
        """The ``dynamic`` block of the configuration."""
        block = self.config.get("dynamic")
        return block if isinstance(block, Mapping) else {}

    @cached_property
    def methods(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Name of each method by its kind, and its settings that are not null."""
        block = self.dynamic
        entries = {kind: block[kind] for kind in KINDS if isinstance(block.get(kind), Mapping)}
        return {
            kind: (str(entry["name"]), {key: each for key, each in entry.items() if key != "name" and each is not None})
            for kind, entry in entries.items()
            if entry.get("name")
        }

    @property
    def caps(self) -> dict[str, float]:
        """Most epochs of each domain that has a cap."""
        written = self.dynamic.get("max_epochs")
        caps: Mapping[str, Any] = written if isinstance(written, Mapping) else dict.fromkeys(self.pool, written)
        return {str(name): float(cap) for name, cap in caps.items() if _is_number(cap)}

    @property
    def stock(self) -> bool:
        """Whether it is a run of LLaMA-Factory's own, which plans nothing."""
        block = self.config.get("dynamic")
        return isinstance(block, Mapping) and block.get("record") is True and not self.methods

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
    def served(self) -> dict[str, float]:
        """Rows served by domain: of the row space in its order, then any others in plans.

        The interval in progress counts by its share of steps done. Of a stock run, which plans nothing, they are those
        of the log.
        """
        total = dict.fromkeys(self.pool, 0.0)
        if not self.planned:
            total |= {name: curve[-1][1] for name, curve in self.by_domain("sequences").items()}
        for event in self.planned:
            steps = event["stop_step"] - event["start_step"]
            done = min(max(self.steps_done - event["start_step"], 0), steps)
            for name, rows in (event.get("domain_counts") or {}).items():
                total[name] = total.get(name, 0.0) + (rows * done / steps if steps else 0.0)
        return total

    @property
    def steps_recorded(self) -> int:
        """Number of steps done since the record begins."""
        return self.steps_done - self.first_step

    @property
    def served_since(self) -> int:
        """Steps done where it begins to be known which rows were served."""
        return int(self.planned[0]["start_step"]) if self.planned else 0

    @property
    def wall_seconds(self) -> float:
        """Seconds of all processes."""
        return sum(self.spent.values())

    def phase_seconds(self) -> dict[str, float]:
        """Seconds by phase: training, those of deciding, evaluation, checkpoint, ..., other; in all the wall time."""
        found = {_NAMES.get(phase, phase): seconds for phase, seconds in self.spent.items()}
        order = dict.fromkeys((*_FIRST_PHASES, *(phase for phase in found if phase != "other"), "other"))
        return {phase: found[phase] for phase in order if found.get(phase, 0.0) > 0.0}

    def logged(self, key: str) -> Curve:
        """Curve of a number of the training log, at the Trainer's rhythm: "loss", "dataflex/plain_loss", ..."""
        return [(event["step"], event[key]) for event in self.stepped if _is_number(event.get(key))]

    def by_domain(self, what: str) -> dict[str, Curve]:
        """Curves of "loss", "tokens" or "sequences" of the training log by domain, of the row space in its order."""
        curves = self._curves.get(what, {})
        return {name: curves[name] for name in dict.fromkeys((*self.pool, *curves)) if name in curves}

    @cached_property
    def _curves(self) -> dict[str, dict[str, Curve]]:
        """Curves of the training log's numbers of single domains, by what they are and by domain."""
        found: dict[str, dict[str, Curve]] = {}
        for event in self.stepped:
            for key, value in event.items():
                if key.startswith("dataflex/") and _is_number(value):
                    _, what, *name = key.split("/", 2)
                    if name:
                        found.setdefault(what, {}).setdefault(name[0], []).append((event["step"], value))
        return found

    def weight_curve(self, key: str) -> Curve:
        """Curve of "ess" (share of the sequences, 0 to 1), "p05", "p50", "p95" or "max"; empty for unit weights."""
        curve = self.logged(f"dataflex/weight_{key}")
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
    served = run.served
    kept = set(sorted(served, key=lambda name: -served[name])[:most])
    rest = [name for name in served if name not in kept]
    alone = [(name, [name]) for name in served if name in kept]
    return [*alone, (f"{len(rest)} others", rest)] if rest else alone


def domain_rows(run: Run, most: int) -> list[tuple[str, float, int]]:
    """Rows served of each group of domains, and its rows in the pool."""
    return [
        (name, sum(run.served[each] for each in members), sum(run.pool.get(each, 0) for each in members))
        for name, members in domain_groups(run, most)
    ]


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
    processes: list[list[Event]] = []
    before = ""
    for event in events:
        kind = event["event"]
        kinds.setdefault(kind, []).append(event)
        # A start or a resume begins a process, unless the resume comes right after a start.
        if not processes or kind == "run_started" or (kind == "resumed" and before != "run_started"):
            processes.append([])
        processes[-1].append(event)
        before = kind
    spent: dict[str, float] = {}
    for process in processes:
        last: dict[str, float] = next((event["spent"] for event in reversed(process) if event.get("spent")), {})
        for phase, seconds in last.items():
            spent[phase] = spent.get(phase, 0.0) + seconds
    return Run(
        started=kinds.get("run_started", [{}])[-1],
        started_times=[process[0]["time"] - sum((process[0].get("spent") or {}).values()) for process in processes],
        processes=processes,
        spent=spent,
        steps_done=max(int(event["step"]) for event in events),
        first_step=_first_step(events),
        planned=_in_force(kinds.get("planned", [])),
        stepped=kinds.get("stepped", []),
        evaluated=kinds.get("evaluated", []),
        credited=kinds.get("credited", [None])[-1],
        resumed=kinds.get("resumed", []),
        finished=kinds.get("finished", [None])[-1],
    )


def _first_step(events: Sequence[Event]) -> int:
    first = next((event for event in events if event["event"] != "run_started"), None)
    return int(first["step"]) if first is not None and first["event"] == "resumed" else 0


def since(step: int) -> str:
    """Return " since step N", where a record tells what happened from there on; "" where that is all there was."""
    return f" since step {step}" if step else ""


def _in_force(planned: Sequence[Event]) -> list[Event]:
    """Return the plans in order of their steps, each without the steps that a later decision took over.

    The counts of a plan that is cut are multiplied by the share of its steps that are left.
    """
    plans = {event["start_step"]: event for event in planned}
    starts, kept = sorted(plans), []
    for start, after in zip_longest(starts, starts[1:]):
        event = plans[start]
        if after is not None and after < event["stop_step"]:
            left = (after - start) / (event["stop_step"] - start)
            counts = {name: rows * left for name, rows in (event.get("domain_counts") or {}).items()}
            event = {**event, "stop_step": after, "rows": round(event["rows"] * left), "domain_counts": counts}
        kept.append(event)
    return kept


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
