"""What events add up to, with numbers small enough to add by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.errors import DataError
from dataflex.record.digest import digest, domain_groups, higher_is_better, running_mean

START = {
    "event": "run_started",
    "step": 0,
    "time": 100.0,
    "schedule": {"total_steps": 20},
    "row_space": {"sources": {"s": 40}, "domains": {"a": 30, "b": 10}},
}


def planned(interval: int, start: int, stop: int, counts: dict, **more) -> dict:
    return {
        "event": "planned",
        "step": start,
        "time": 100.0 + start,
        "interval": interval,
        "kind": "dynamic",
        "start_step": start,
        "stop_step": stop,
        "domain_counts": counts,
        "rows": sum(counts.values()),
        **more,
    }


def stepped(step: int, **more) -> dict:
    return {"event": "stepped", "step": step, "time": 100.0 + step, **more}


def test_no_event_is_told():
    with pytest.raises(DataError, match="no event yet"):
        digest([])


def test_served_rows_count_an_interval_in_progress_by_the_steps_done():
    events = [START, planned(0, 0, 4, {"a": 8, "b": 0}), planned(1, 4, 8, {"a": 2, "b": 6}), stepped(6)]
    run = digest(events)
    assert run.steps_done == 6
    assert run.total_steps == 20
    assert run.pool == {"a": 30, "b": 10}
    assert run.served == {"a": 8 + 1, "b": 3}
    # A domain that only a plan names is still a domain.
    assert digest([START, planned(0, 0, 2, {"c": 4}), stepped(2)]).served == {"a": 0, "b": 0, "c": 4}
    assert digest([{**START, "row_space": {"sources": {"s": 40}}}]).pool == {"s": 40}


def test_an_interval_planned_twice_counts_once():
    run = digest([START, planned(0, 0, 4, {"a": 8}), planned(0, 0, 4, {"b": 8}), stepped(4)])
    assert run.served == {"a": 0, "b": 8}


def test_wall_time_leaves_out_the_pause_before_a_resume():
    first = {**START, "spent": {"startup": 1.0}}
    resumed = {"event": "resumed", "step": 5, "time": 900.0, "checkpoint": "c", "spent": {"startup": 2.0}}
    events = [first, stepped(5, spent={"startup": 1.0, "train": 29.0}), resumed]
    events.append({**stepped(6, spent={"startup": 2.0, "train": 7.0}), "time": 907.0})
    run = digest(events)
    assert run.wall_seconds == 30.0 + 9.0
    assert run.started_times == [99.0, 898.0]
    # A start and a resume right after it are one process.
    run = digest([first, resumed, events[-1]])
    assert run.wall_seconds == 9.0
    assert run.started_times == [99.0]
    assert digest([resumed, events[-1]]).started == {}


def test_phases_have_an_order():
    spent = {"startup": 2.0, "train": 7.0, "signals": 2.0, "decide": 0.0, "evaluate": 2.0, "checkpoint": 1.25}
    run = digest([START, stepped(1, spent={**spent, "other": 5.0, "save": 3.0})])
    phases = run.phase_seconds()
    assert list(phases) == ["training", "signals", "evaluation", "checkpoint", "startup", "save", "other"]
    assert sum(phases.values()) == run.wall_seconds == 22.25


def test_curves_take_numbers_only():
    run = digest(
        [
            START,
            stepped(1, loss=2.0),
            stepped(2, loss=None, nonfinite=["loss"]),
            stepped(3, **{"loss": 1.0, "dataflex/weight_ess": 0.5, "dataflex/weight_max": 3.0}),
            {"event": "evaluated", "step": 3, "time": 104.0, "metrics": {"eval_loss": 1.5, "eval_runtime": 1.0}},
            {"event": "evaluated", "step": 3, "time": 105.0, "metrics": {"eval_loss": 1.4, "epoch": 1.0, "x": True}},
        ]
    )
    assert run.logged("loss") == [(1, 2.0), (3, 1.0)]
    assert run.weight_curve("ess") == [(3, 0.5)]
    assert run.weight_curve("max") == [(3, 3.0)]
    assert run.metrics() == {"eval_loss": [(3, 1.4)]}
    assert digest([START, stepped(1, **{"dataflex/weight_ess": 1.0})]).weight_curve("ess") == []


def test_the_direction_of_a_metric_is_known_or_left_open():
    assert higher_is_better("eval_loss") is False
    assert higher_is_better("eval_gsm8k_loss") is False
    assert higher_is_better("eval_accuracy") is True
    assert higher_is_better("eval_rewards/margins") is True
    assert higher_is_better("eval_length") is None


def test_the_rest_of_many_domains_is_one_group():
    events = [START, planned(0, 0, 4, {"a": 1, "b": 5, "c": 3, "d": 0}), stepped(4)]
    run = digest(events)
    assert domain_groups(run, 2) == [("b", ["b"]), ("c", ["c"]), ("2 others", ["a", "d"])]
    assert [name for name, _ in domain_groups(run, 4)] == ["a", "b", "c", "d"]


@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=30), half=st.integers(0, 5))
def test_running_mean_is_the_slow_one(values, half):
    slow = []
    for at in range(len(values)):
        window = [value for place, value in enumerate(values) if abs(place - at) <= half]
        slow.append(sum(window) / len(window))
    assert running_mean(values, half) == pytest.approx(slow, abs=1e-9)
