"""Intervals against a step-by-step simulation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.errors import ConfigError
from dataflex.plan.schedule import Interval, Schedule


def simulate(warmup, interval, total, cycle):
    """Walk through the run one step at a time; [(kind, start, stop)]."""
    found = []
    left = 0  # steps left in the current interval
    for step in range(total):
        local = step % (cycle or total)
        if left == 0 or local == 0:
            kind = "warmup" if local < warmup else "dynamic"
            left = warmup - local if kind == "warmup" else interval
            found.append([kind, step, step])
        found[-1][2] = step + 1
        left -= 1
    return [tuple(item) for item in found]


@st.composite
def schedules(draw):
    warmup = draw(st.integers(0, 12))
    cycle = draw(st.none() | st.integers(warmup + 1, warmup + 25))
    return warmup, draw(st.integers(1, 15)), draw(st.integers(1, 80)), cycle


@given(schedules())
def test_equals_the_simulation_and_covers_every_step_once(numbers):
    warmup, interval, total, cycle = numbers
    schedule = Schedule(warmup_steps=warmup, interval_steps=interval, total_steps=total, cycle_steps=cycle)
    expected = simulate(*numbers)
    found = list(schedule.intervals())
    assert [(i.kind, i.start_step, i.stop_step) for i in found] == expected
    assert [i.index for i in found] == list(range(len(expected)))
    assert schedule.num_intervals == len(expected)
    assert [step for i in found for step in range(i.start_step, i.stop_step)] == list(range(total))
    for i in found:
        for step in range(i.start_step, i.stop_step):
            assert schedule.interval(step) == i


def test_a_plain_run():
    schedule = Schedule(warmup_steps=10, interval_steps=20, total_steps=45)
    assert list(schedule.intervals()) == [
        Interval(index=0, kind="warmup", start_step=0, stop_step=10),
        Interval(index=1, kind="dynamic", start_step=10, stop_step=30),
        Interval(index=2, kind="dynamic", start_step=30, stop_step=45),
    ]
    assert [i.steps for i in schedule.intervals()] == [10, 20, 15]


def test_a_warmup_longer_than_the_run():
    schedule = Schedule(warmup_steps=100, interval_steps=20, total_steps=45)
    assert list(schedule.intervals()) == [Interval(index=0, kind="warmup", start_step=0, stop_step=45)]


def test_looking_up_a_step_of_a_huge_run_is_immediate():
    schedule = Schedule(warmup_steps=3, interval_steps=7, total_steps=10**15, cycle_steps=1000)
    interval = schedule.interval(10**15 - 1)
    # 1 warm-up and ceil(997 / 7) = 143 intervals a cycle.
    assert interval.index == 10**12 * 144 - 1
    assert (interval.start_step, interval.stop_step) == (10**15 - 1000 + 3 + 142 * 7, 10**15)


def test_runs_without_a_step_or_a_decision_are_refused():
    with pytest.raises(ConfigError, match="total steps: must be a whole number >= 1, got 0"):
        Schedule(interval_steps=1, total_steps=0)
    with pytest.raises(ConfigError, match=r"a cycle of 5 steps is all warm-up \(dynamic.warmup_steps is 5\)"):
        Schedule(warmup_steps=5, interval_steps=1, total_steps=9, cycle_steps=5)


def test_a_step_outside_the_run_is_a_defect():
    schedule = Schedule(interval_steps=1, total_steps=3)
    for step in (-1, 3):
        with pytest.raises(AssertionError):
            schedule.interval(step)
