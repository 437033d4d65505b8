"""Runs that are made longer wherever they ended: nothing is lost from the record, and no stream is used twice."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.errors import DataError
from dataflex.plan.plan import DataPlan
from dataflex.record.digest import digest
from dataflex.record.read import load_plan, read_events
from dataflex.record.recorder import NullRecorder, RunRecorder
from dataflex.registry import find
from tests.train.test_controller import built as controller
from tests.train.test_controller import row_space

SIZES = {"web": 60, "code": 41, "papers": 26}
ROWS = sum(SIZES.values())
BATCH, LONG = 4, 24

RUNS = {
    "epochs": {},
    "random": {"selector": ("random", {})},
    "warm": {"selector": ("random", {}), "warmup_steps": 9},
    "share": {"selector": ("random", {}), "keep_ratio": 0.1},
    "static": {"mixer": ("static", {"proportions": (5, 3, 2)})},
    "moving": {"mixer": ("random", {}), "interval_steps": 5},
    "both": {"selector": ("random", {}), "mixer": ("static", {"proportions": (5, 3, 2)}), "keep_ratio": 0.8},
}


def built(total, recorder=None, world=1, **block):
    methods = {
        kind: MethodConfig(kind=kind, name=name, params=find(kind, name).Params(**params))
        for kind in ("selector", "mixer")
        if block.get(kind)
        for name, params in [block.pop(kind)]
    }
    block = {"interval_steps": 11, **block}
    config = DynamicConfig(**methods, **block)
    return controller(config, total, 4, row_space(SIZES), world=world, recorder=recorder or NullRecorder())


def taken_up(before, total, recorder=None, **block):
    """Return a run of ``total`` steps that goes on where ``before`` stands, as by a checkpoint."""
    after = built(total, recorder, **block)
    after.plan = DataPlan.from_arrays(before.plan.to_arrays())
    after.load_state_dict(before.state_dict())
    return after


def serve(one, first, stop):
    """Return the rows of each step up to ``stop``, or up to where the data end."""
    steps = []
    for step in range(first, stop):
        plan = one.plan_for(step)
        if one.ends_at is not None and step >= one.ends_at:
            break
        place = (step - plan.interval.start_step) * BATCH
        steps.append(plan.rows[place : place + BATCH].tolist())
    return steps


def grown(ends, folder=None, **block):
    """Return the rows of each step of a run that was made longer at each of ``ends`` but the last."""
    one, steps = None, []
    for end in ends:
        recorder = NullRecorder()
        if folder is not None:
            current = None if one is None else one.plan.interval.index
            recorder = RunRecorder(folder, None if one is None else len(steps), plan_in_progress=current)
        one = built(end, recorder, **block) if one is None else taken_up(one, end, recorder, **block)
        steps += serve(one, len(steps), end)
    return steps


ENDS = st.lists(st.integers(1, LONG - 1), max_size=4, unique=True).map(lambda ends: [*sorted(ends), LONG])


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(RUNS)), ENDS)
def test_every_served_row_is_in_the_record(name, ends):
    with tempfile.TemporaryDirectory() as folder:
        steps = grown(ends, Path(folder), **RUNS[name])
        planned = digest(read_events(Path(folder))).planned
        assert [event["start_step"] for event in planned] == [0, *(event["stop_step"] for event in planned[:-1])]
        assert planned[-1]["stop_step"] == LONG
        assert len({event["plan"] for event in planned}) == len(planned)
        assert sum(event["rows"] for event in planned) == sum(row >= 0 for rows in steps for row in rows)
        stored = [load_plan(Path(folder), event["interval"]).rows.reshape(-1, BATCH).tolist() for event in planned]
        assert [rows for plan in stored for rows in plan] == steps


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["epochs", "static"]), ENDS)
def test_what_no_decision_depends_on_is_served_as_if_never_cut(name, ends):
    assert grown(ends, **RUNS[name]) == serve(built(LONG, **RUNS[name]), 0, LONG)


def test_epochs_on_two_ranks_are_filled_up_as_if_never_cut():
    block = {"world": 2, "interval_steps": 1000}
    straight = built(100, **block).plan_for(0)
    assert straight.fill.size, "no step is short"
    one = built(40, **block)
    one.plan_for(0)
    for end in (50, 100):
        first = one.plan.interval.stop_step
        one = taken_up(one, end, **block)
        assert one.plan_for(first).fill.tolist() == straight.fill.tolist()


@settings(max_examples=20, deadline=None)
@given(ENDS)
def test_an_interval_serves_a_row_once_wherever_it_was_cut(ends):
    steps = grown(ends, **RUNS["random"])
    for first in range(0, LONG, 11):
        served = np.concatenate(steps[first : first + 11])
        assert len(np.unique(served)) == len(served)
    warm = np.concatenate(grown(ends, **RUNS["warm"])[:9])
    assert len(np.unique(warm)) == len(warm)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 79), max_size=3, unique=True).map(lambda ends: [*sorted(ends), 80]))
def test_a_warm_up_longer_than_the_pool_serves_all_rows_alike(ends):
    served = np.concatenate(grown(ends, selector=("random", {}), warmup_steps=80))
    counts = np.bincount(served, minlength=ROWS)
    assert counts.max() - counts.min() <= 1


def test_the_rest_of_an_interval_is_drawn_anew():
    """The pool of a decision, and a mixer's draw, are those of its own number."""
    block = {"selector": ("random", {}), "interval_steps": 8}
    first, rest = np.split(np.array(grown([4, 8], **block)), 2)
    assert not set(first.ravel()) & set(rest.ravel())
    one = built(4, **RUNS["moving"])
    serve(one, 0, 4)
    longer = taken_up(one, LONG, **RUNS["moving"])
    assert [longer.plan_for(step).interval.index for step in (4, 5, 10)] == [1, 2, 3]


def test_too_few_rows_left_of_a_cut_interval_bring_all_back():
    block = {"selector": ("random", {}), "interval_steps": 100}
    steps = grown([20, 45], **block)  # 127 rows, of which 80 were served when 100 more are wanted
    assert len(np.unique(steps[20:])) == 100


def test_with_quotas_what_was_not_served_comes_first():
    steps = grown([5, 11], **RUNS["both"])
    assert len(np.unique(steps)) == 44


@settings(max_examples=20, deadline=None)
@given(ENDS)
def test_a_run_that_was_never_cut_numbers_its_decisions_as_the_schedule(ends):
    one = built(LONG, **RUNS["warm"])
    found = [one.plan_for(step).interval for step in range(LONG)]
    assert found == [one.schedule.interval(step) for step in range(LONG)]


CAPPED = {"mixer": ("static", {"proportions": (5, 3, 2)}), "at_cap": "stop", "interval_steps": 100}


@pytest.mark.parametrize("cap", [0.26, 0.31, 0.4])
def test_a_raised_cap_trains_on_as_if_it_had_always_been_so(cap):
    low = built(LONG, max_epochs=cap, **CAPPED)
    head = serve(low, 0, LONG)
    assert 0 < len(head) < LONG
    high = taken_up(low, LONG, max_epochs=2.0, **CAPPED)
    straight = serve(built(LONG, max_epochs=2.0, **CAPPED), 0, LONG)
    assert head + serve(high, len(head), LONG) == straight
    within = built(LONG, max_epochs=cap, **CAPPED)
    rest = serve(within, 0, 2)
    assert rest + serve(taken_up(within, LONG, max_epochs=2.0, **CAPPED), 2, LONG) == straight


def test_the_same_cap_does_not_train_on():
    one = built(LONG, max_epochs=0.3, **CAPPED)
    head = serve(one, 0, LONG)
    again = taken_up(one, LONG + 9, max_epochs=0.3, **CAPPED)
    assert serve(again, len(head), LONG + 9) == []
    assert again.ends_at == len(head)
    lower = taken_up(one, LONG, max_epochs=0.2, **CAPPED)
    assert serve(lower, len(head), LONG) == []
    other = {**CAPPED, "at_cap": "redistribute"}
    assert len(serve(taken_up(one, LONG, max_epochs=2.0, **other), len(head), len(head) + 2)) == 2


def test_a_cap_at_the_end_of_an_interval_ends_the_run_there():
    block = {"mixer": ("static", {"proportions": (1, 0, 0)}), "at_cap": "stop", "interval_steps": 5}
    one = built(LONG, max_epochs=1 / 3, **block)  # 20 of 60 rows
    assert len(serve(one, 0, LONG)) == 5
    assert one.ends_at == 5
    with pytest.raises(DataError, match=r"dynamic\.max_epochs: not one whole step .*\(web\)"):
        built(LONG, max_epochs=0.05, **block).plan_for(0)


def test_a_fresh_plan_has_a_number_of_its_own():
    one = built(LONG, **RUNS["random"])
    one.decided = 3
    assert [one.plan_for(step).interval.index for step in (5, 11)] == [3, 4]


def test_numbers_never_repeat():
    for before, after in pairwise([[3, LONG], [3, 5, LONG], [3, 5, 13, LONG]]):
        one, numbers = None, []
        for end in after:
            one = built(end, **RUNS["random"]) if one is None else taken_up(one, end, **RUNS["random"])
            for step in range(end):
                if one.plan is None or step >= one.plan.interval.stop_step:
                    numbers.append(one.plan_for(step).interval.index)
        assert numbers == list(range(len(numbers)))
        assert len(numbers) > len(before)
