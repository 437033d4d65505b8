"""What a run cost: seconds by phase, passes, what was forecast, and the training steps that this would have bought."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataflex.clock import PHASES
from dataflex.config.build import method_block
from dataflex.record.chart import Json, table
from dataflex.record.digest import DECIDING, Run, since
from dataflex.record.text import duration, percent

_ASIDE = ("ledger", "reference")  # phases that are neither training nor a decision
_BACKWARD_IN_FORWARDS = 2.0  # as the forecast counts


def beside_training(run: Run) -> float:
    """Return the seconds of decisions, of the ledger and of a reference model."""
    spent = run.phase_seconds()
    return sum(spent.get(phase, 0.0) for phase in (*DECIDING, *_ASIDE))


def steps_bought(run: Run) -> float | None:
    """Return the training steps that the seconds beside training would have bought; None where that is not known."""
    training, steps = run.phase_seconds().get("training", 0.0), run.steps_recorded
    return beside_training(run) * steps / training if training and steps else None


def cost_sentence(run: Run) -> str:
    """Return in one sentence what deciding cost."""
    spent = run.phase_seconds()
    if not spent:
        return "What it cost: the record has no times."
    deciding, bought = sum(spent.get(phase, 0.0) for phase in DECIDING), steps_bought(run)
    told = f"What it cost{since(run.first_step)}: deciding took {duration(deciding)}, "
    told += f"{percent(deciding / run.wall_seconds)} of the run's "
    told += duration(run.wall_seconds)
    told += "".join(f", the {phase} {duration(spent[phase])}" for phase in _ASIDE if phase in spent)
    if bought is not None:
        told += f"; that would have bought {bought:.0f} more training steps beside the {run.steps_recorded} done"
    return told + "."


def cost_section(run: Run) -> Json:
    """Return notes and tables of seconds and passes."""
    spent = run.phase_seconds()
    if not spent:
        return {}
    meant = {"training": PHASES["train"], "evaluation": PHASES["evaluate"]}
    rows = [
        [name, seconds, seconds / run.wall_seconds, meant.get(name, PHASES.get(name, ""))]
        for name, seconds in spent.items()
    ]
    rows.append(["all", run.wall_seconds, 1.0, "the phases add up to it"])
    columns = [("phase", "text"), ("seconds", "seconds"), ("share", "share"), ("what it is", "text")]
    tables, notes = [table(f"Seconds by phase{since(run.first_step)}", columns, rows)], []
    if (bought := steps_bought(run)) is not None:
        steps = run.steps_recorded
        each = spent["training"] / steps
        notes.append(
            f"Deciding would have bought {bought:.1f} training steps at {each:.3g} s each, "
            f"{percent(bought / steps)} of the {steps} that were done{since(run.first_step)}."
        )
    forecast = _forecast(run)
    if told := _compared(run, forecast):
        notes.append(told)
    if passes := _passes(run, forecast):
        columns = [("passes over", "text"), ("F forecast", "count"), ("B forecast", "count"), ("F", "count")]
        columns += [("B", "count"), ("how counted", "text")]
        done = f"{run.steps_recorded} are done{since(run.first_step)}"
        of = f"The forecast is of all {run.total_steps} steps, {done}." if forecast else ""
        tables.append(table("Passes of single sequences (F forward, B backward)", columns, passes, of))
    return {"notes": notes, "tables": tables}


def _forecast(run: Run) -> dict[str, tuple[float | None, float | None]]:
    """Return the passes (F, B) that were forecast when the run began, by what they are of."""
    told = run.started.get("forecast") or {}
    return {name: (passes.get("forward"), passes.get("backward")) for name, passes in told.items()}


def _compared(run: Run, forecast: Mapping[str, tuple[float | None, float | None]]) -> str:
    """Return what deciding was forecast to cost, relative to training, and what it did."""

    def in_forwards(label: str) -> float | None:
        forward, backward = forecast[label]
        return None if forward is None else forward + _BACKWARD_IN_FORWARDS * (backward or 0.0)

    training = run.phase_seconds().get("training", 0.0)
    whole = in_forwards("training") if "training" in forecast else None
    others = [in_forwards(label) for label in forecast if label != "training"]
    if not whole or not training or not others or None in others:
        return ""
    expected = sum(passes or 0.0 for passes in others) / whole
    told = f"Forecast: passes beside training come to {percent(expected, 0)} of those of training, a B counted as two F"
    return f"{told}; in seconds it was {percent(beside_training(run) / training, 0)}."


def _passes(run: Run, forecast: Mapping[str, tuple[float | None, float | None]]) -> list[list[Any]]:
    """Return forecast and actual passes of training and, where a pool was scored, of the selector."""
    served = round(sum(run.served.values()))
    done: dict[str, list[Any]] = {"training": [served, served, "each sequence served"]} if served else {}
    scored = sum(round((event.get("scores") or {}).get("scored") or 0) for event in run.planned)
    selector, signals = run.dynamic.get("selector"), run.dynamic.get("signals")
    budget = signals.get("budget") if isinstance(signals, Mapping) else None
    if served and scored and isinstance(selector, Mapping):
        label = f"selector {selector.get('name')}"
        problems: list[str] = []
        given = {key: value for key, value in selector.items() if value is not None}
        method = method_block("selector", given, "selector", problems)
        if budget is not None:
            done[label] = [None, None, f"within {budget} of the training's own"]
        elif problems or method is None:
            done[label] = [None, None, f"{scored:,} rows were given a score"]
        else:
            forward, backward = method.requires.passes.over_pool(len(method.targets))
            told = f"the {scored:,} rows that were given a score, targets left out; {method.cost}"
            done[label] = [round(scored * forward), round(scored * backward), told]
    return [
        [label, *forecast.get(label, (None, None)), *done.get(label, [None, None, "not counted in the record"])]
        for label in {**done, **forecast}
        if label in done or any(forecast[label]) or None in forecast[label]
    ]
