"""Every second is in one phase: nested, switched and moved ones, those of several processes, and the report's."""

from __future__ import annotations

import itertools
import re
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex import clock as module
from dataflex.clock import LAUNCHED, PHASES, PhaseClock, launch_time
from dataflex.record.digest import digest
from dataflex.record.read import read_ending, read_events
from dataflex.record.recorder import NullRecorder, RunRecorder
from dataflex.record.report import report
from tests.record.synthetic import started

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def seconds(monkeypatch):
    """Time that stands still until a test adds to it."""
    now = [5000.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module.time, "time", lambda: 1.7e9 + now[0])
    return now


def test_a_second_counts_in_the_innermost_phase(seconds):
    clock = PhaseClock()
    seconds[0] += 1.0
    clock.switch("other")
    seconds[0] += 2.0
    with clock.phase("prepare"):
        seconds[0] += 4.0
        with clock.phase("reference"):
            seconds[0] += 8.0
        clock.switch("train")
        seconds[0] += 16.0
        with suppress(ValueError), clock.phase("decide"):
            seconds[0] += 32.0
            clock.move(20.0, "signals")
            raise ValueError("broken")
        with clock.phase("evaluate"), clock.phase("evaluate"):
            seconds[0] += 64.0
        assert clock.now == "train"
    seconds[0] += 0.5
    expected = {"startup": 1.0, "prepare": 4.0, "reference": 8.0, "train": 16.0, "signals": 20.0, "decide": 12.0}
    assert clock.spent() == {**expected, "evaluate": 64.0, "other": 2.5}
    assert list(clock.spent()) == [phase for phase in PHASES if phase in clock.spent()]
    clock.before = {"train": 100.0, "save": 3.0}
    assert clock.totals() == {**expected, "train": 116.0, "evaluate": 64.0, "save": 3.0, "other": 2.5}


def test_no_more_is_moved_than_there_is(seconds):
    clock = PhaseClock()
    seconds[0] += 1.0
    clock.move(5.0, "signals")
    clock.move(-5.0, "signals")
    assert clock.spent() == {"startup": 0.0, "signals": 1.0}


@given(walk=st.lists(st.tuples(st.sampled_from(["in", "out", "switch", "move"]), st.sampled_from(list(PHASES)))))
def test_phases_always_add_up_to_the_time_gone_by(walk):
    began = time.perf_counter()
    clock, inside = PhaseClock(), []
    for action, name in walk:
        if action == "in":
            inside.append(clock.phase(name))
            inside[-1].__enter__()
        elif action == "out" and inside:
            inside.pop().__exit__(None, None, None)
        elif action == "switch":
            clock.switch(name)
        elif action == "move":
            clock.move(1e-6, name)
    total = sum(clock.spent().values())
    assert 0.0 <= total <= time.perf_counter() - began
    assert all(seconds >= 0.0 for seconds in clock.spent().values())


def test_the_time_before_a_rank_is_the_launchers(seconds, monkeypatch):
    assert launch_time() is None
    monkeypatch.setenv(LAUNCHED, repr(1.7e9 + 4990.0))
    clock = PhaseClock(launch_time())
    assert clock.spent() == {"startup": 10.0}
    assert launch_time() is None  # what this process starts begins by itself
    monkeypatch.setenv(LAUNCHED, repr(1.7e9))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert launch_time() is None


def test_a_run_that_goes_on_has_the_time_of_all_its_processes(tmp_path, seconds):
    def begin(resume_step=None):
        clock = PhaseClock()
        seconds[0] += 2.0
        clock.switch("train")
        return RunRecorder(tmp_path, resume_step, clock=clock), clock

    recorder, clock = begin()
    started(recorder, dynamic={"selector": "all"}, sources={"a": 3}, schedule={"total_steps": 8})
    for step in range(1, 5):
        seconds[0] += 1.0
        recorder.stepped(step, {"loss": 1.0})
        if step == 2:
            with clock.phase("checkpoint"):
                seconds[0] += 0.25
            recorder.checkpointed(2, "checkpoint-2", 0.25)
    seconds[0] += 50.0  # and the machine is switched off

    recorder, clock = begin(2)
    recorder.resumed(2, "checkpoint-2")
    for step in range(3, 5):
        seconds[0] += 1.0
        recorder.stepped(step, {"loss": 1.0})
    recorder.finished(4, {})
    assert read_ending(tmp_path) == []
    with clock.phase("save"):
        seconds[0] += 3.0
    recorder.ended()
    assert [event["event"] for event in (*read_events(tmp_path)[-1:], *read_ending(tmp_path))] == ["finished", "ended"]
    with clock.phase("evaluate"):  # by a loop of one's own
        seconds[0] += 1.0
    recorder.evaluated(4, {"eval_loss": 1.0})
    assert read_ending(tmp_path)[0]["spent"]["evaluate"] == 1.0
    first = {"training": 2.0, "checkpoint": 0.25, "startup": 2.0}
    run = digest([*read_events(tmp_path), *read_ending(tmp_path)])
    both = {**first, "training": 4.0, "startup": 4.0, "save": 3.0, "evaluation": 1.0}
    assert run.phase_seconds() == pytest.approx(both)
    assert run.wall_seconds == pytest.approx(sum(both.values()))
    assert run.started_times == pytest.approx([1.7e9 + 5000.0, 1.7e9 + 5000.0 + 2.0 + 4.25 + 50.0])
    text = report([tmp_path])
    assert "Time: 12.2 s" in text
    assert re.search(r"save +3\.0 s", text)

    # A third process makes the run longer: what came after the end of the second is kept.
    recorder, clock = begin(4)
    recorder.resumed(4, "checkpoint-4")
    assert [event["event"] for event in read_events(tmp_path)][-2:] == ["ended", "resumed"]
    assert digest(read_events(tmp_path)).phase_seconds() == pytest.approx({**both, "startup": 6.0})
    # A fourth goes back to before it: of the second and third, what led up to there is left.
    recorder, clock = begin(2)
    recorder.resumed(2, "checkpoint-2")
    assert digest(read_events(tmp_path)).phase_seconds() == pytest.approx({**first, "startup": 6.0})
    NullRecorder().ended()


def test_every_phase_is_described():
    text = (ROOT / "docs/report.md").read_text(encoding="utf-8")
    text = text[text.index("### Phases\n") :]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", text[: text.index("### `weights.json`")], re.MULTILINE)
    assert dict(rows) == PHASES
    assert list(itertools.islice(PHASES, 2)) == ["startup", "data"]
