"""What is written, byte for byte and array for array, and what a resume leaves of it."""

from __future__ import annotations

import enum
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dataflex.errors import DataError
from dataflex.plan.schedule import Interval
from dataflex.printable import plain
from dataflex.record.read import load_plan, read_events
from dataflex.record.recorder import NullRecorder, RunRecorder, scores_of, summarize_scores
from dataflex.state import replacing
from tests.record.synthetic import MIXTURE, SELECTION, Plan, Spent, simulate, started, tick

FIRST = Interval(index=0, kind="dynamic", start_step=0, stop_step=4)
SECOND = Interval(index=1, kind="dynamic", start_step=4, stop_step=8)


def plan(recorder: RunRecorder, interval: Interval, rows=(3, 1, 2, -1), **more) -> None:
    recorder.planned(
        plan=Plan(interval=interval, rows=np.array(rows)), domain_counts={"a": 3}, seconds={"decide": 0.1}, **more
    )


def without_times(events: list[dict]) -> list[dict]:
    return [{key: value for key, value in event.items() if key not in ("time", "spent")} for event in events]


def test_events_are_one_json_object_a_line_readable_at_once(tmp_path, monkeypatch):
    tick(monkeypatch)
    recorder = RunRecorder(tmp_path / "dataflex", clock=Spent(train=0.25))
    recorder.stepped(1, {"loss": 2.5, "epoch": 0.1, "step": 99, "dataflex/interval": 0.0})
    recorder.evaluated(1, {"eval_loss": 2.0})
    recorder.checkpointed(1, Path("out/checkpoint-1"), 0.5)
    lines = (tmp_path / "dataflex" / "events.jsonl").read_text().splitlines()
    spent = {"spent": {"train": 0.25}}
    assert [json.loads(line) for line in lines] == [
        {
            "event": "stepped",
            "step": 1,
            "time": 1.7e9,
            "spent": {"train": 0.25},
            "loss": 2.5,
            "epoch": 0.1,
            "dataflex/interval": 0.0,
        },
        {"event": "evaluated", "step": 1, "time": 1.7e9 + 1, **spent, "metrics": {"eval_loss": 2.0}},
        {"event": "checkpointed", "step": 1, "time": 1.7e9 + 2, **spent, "path": "out/checkpoint-1", "seconds": 0.5},
    ]
    recorder.finished(1, {"train_loss": 2.5})
    recorder.evaluated(1, {"eval_loss": 1.9})  # LLaMA-Factory evaluates once more after training
    assert [event["event"] for event in read_events(tmp_path)][-2:] == ["finished", "evaluated"]


def test_a_process_that_dies_leaves_every_line(tmp_path):
    code = (
        "import os, sys, pathlib\n"
        "from dataflex.record.recorder import RunRecorder\n"
        "recorder = RunRecorder(pathlib.Path(sys.argv[1]))\n"
        "for step in range(1, 8):\n"
        "    recorder.stepped(step, {'loss': 1.0})\n"
        "heavy = [name for name in ('torch', 'matplotlib') if name in sys.modules]\n"
        "os._exit(len(heavy))\n"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == 0
    assert [event["step"] for event in read_events(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_numbers_of_numpy_and_torch_and_odd_settings_are_written(tmp_path):
    class Strategy(enum.Enum):
        STEPS = "steps"

    recorder = RunRecorder(tmp_path)
    config = {
        "path": Path("a/b"),
        "dtype": torch.bfloat16,
        "names": {"y", "x"},
        "pair": (1, np.int64(2)),
        "array": np.array([[1.5, np.nan]]),
        "strategy": Strategy.STEPS,
        "flag": np.bool_(True),
        7: None,
    }
    recorder.run_started(config=config, schedule={}, row_space={}, versions={}, world=1, global_batch=4)
    recorder.stepped(
        np.int64(3),
        {
            "loss": torch.tensor(1.5, dtype=torch.bfloat16, requires_grad=True),
            "grad_norm": np.float32("inf"),
            "learning_rate": float("nan"),
            "nested": {"deep": [1.0, -math.inf]},
        },
    )
    first, second = read_events(tmp_path)
    assert first["config"] == {
        "path": "a/b",
        "dtype": "torch.bfloat16",
        "names": ["x", "y"],
        "pair": [1, 2],
        "array": [[1.5, None]],
        "strategy": "Strategy.STEPS",
        "flag": True,
        "7": None,
    }
    assert first["nonfinite"] == ["config.array.0.1"]
    assert second["step"] == 3
    assert second["loss"] == 1.5
    assert second["grad_norm"] is None
    assert second["learning_rate"] is None
    assert second["nested"] == {"deep": [1.0, None]}
    assert second["nonfinite"] == ["grad_norm", "learning_rate", "nested.deep.1"]
    assert b"NaN" not in (tmp_path / "events.jsonl").read_bytes()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(value=json_values)
def test_plain_values_survive_json_unless_not_finite(value):
    nonfinite: list[str] = []

    def nulled(item):
        if isinstance(item, dict):
            return {key: nulled(inner) for key, inner in item.items()}
        if isinstance(item, list):
            return [nulled(inner) for inner in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    def count(item):
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        return sum(map(count, inner)) + (isinstance(item, float) and not math.isfinite(item))

    assert json.loads(json.dumps(plain(value, "top", nonfinite), allow_nan=False)) == nulled(value)
    assert len(nonfinite) == count(value)


def test_a_plan_is_stored_whole_and_summed_up(tmp_path):
    recorder = RunRecorder(tmp_path)
    pool, scores = np.array([9, 3, 1, 2]), np.array([0.5, 4.0, np.nan, 1.0])
    recorder.planned(
        plan=Plan(interval=SECOND, rows=np.array([3, 2, 1, -1])),
        domain_counts={"a": np.int64(2), "b": 1},
        seconds={"signals": 1.5, "decide": 0.25},
        reason="top 3 of 4",
        proportions={"a": 0.5, "b": 0.5},
        pool=pool,
        scores=scores,
    )
    stored = load_plan(tmp_path, 1)
    assert stored.rows.dtype == np.int64
    assert stored.scores is not None
    assert stored.scores.dtype == np.float32
    np.testing.assert_array_equal(stored.rows, [3, 2, 1, -1])
    np.testing.assert_array_equal(stored.pool, pool)
    np.testing.assert_array_equal(stored.scores, scores.astype(np.float32))
    (event,) = read_events(tmp_path)
    assert event["scores"]["count"] == 4
    assert event["scores"]["scored"] == 3
    assert event["scores"]["p50"] == 1.0
    # Rows 3 and 2 have the scores 4 and 1; row 1 was not scored, and -1 is a place without a row.
    assert event["served_scores"]["count"] == 3
    assert event["served_scores"]["mean"] == 2.5
    expected = {
        "event": "planned",
        "step": 4,
        "interval": 1,
        "kind": "dynamic",
        "start_step": 4,
        "stop_step": 8,
        "decided_at_step": 4,
        "rows": 3,
        "digest": Plan(interval=SECOND, rows=np.array([3, 2, 1, -1])).digest(),
        "domain_counts": {"a": 2, "b": 1},
        "proportions": {"a": 0.5, "b": 0.5},
        "seconds": {"signals": 1.5, "decide": 0.25},
        "reason": "top 3 of 4",
        "plan": "plans/plan-00001.npz",
    }
    assert {key: event[key] for key in expected} == expected


floats = st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf])


@given(values=st.lists(floats, max_size=30))
def test_score_summary_is_the_slow_one(values):
    summary = summarize_scores(np.array(values, dtype=np.float64))
    known = sorted(value for value in values if math.isfinite(value))
    assert summary["count"] == len(values)
    assert summary["scored"] == len(known)
    assume(known)
    mean = math.fsum(known) / len(known)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / len(known))
    assert summary["mean"] == pytest.approx(mean, abs=1e-6)
    assert summary["std"] == pytest.approx(spread, rel=1e-6, abs=1e-6)
    assert (summary["min"], summary["max"]) == (known[0], known[-1])
    for name, quantile in (("p05", 0.05), ("p25", 0.25), ("p50", 0.5), ("p75", 0.75), ("p95", 0.95)):
        place = quantile * (len(known) - 1)
        low, high = known[math.floor(place)], known[math.ceil(place)]
        assert summary[name] == pytest.approx(low + (high - low) * (place - math.floor(place)), rel=1e-9, abs=1e-6)


@given(values=st.lists(st.sampled_from([math.nan, math.inf, -math.inf]), max_size=5))
def test_a_summary_of_no_finite_score_has_no_numbers(values):
    summary = summarize_scores(np.array(values, dtype=np.float64))
    assert (summary["count"], summary["scored"]) == (len(values), 0)
    assert all(summary[name] is None for name in ("mean", "std", "min", "p05", "p50", "p95", "max"))


@given(pool=st.lists(st.integers(0, 40), unique=True, max_size=20), rows=st.lists(st.integers(0, 40), max_size=20))
def test_scores_of_rows_are_looked_up_by_row_id(pool, rows):
    scores = np.array([row * 0.5 for row in pool])
    found = scores_of(np.array(rows, dtype=np.int64), np.array(pool, dtype=np.int64), scores)
    assert found.tolist() == [row * 0.5 for row in rows if row in pool]
    everything = np.arange(41) * 0.5
    assert scores_of(np.array(rows, dtype=np.int64), None, everything).tolist() == [row * 0.5 for row in rows]


def test_a_torn_last_line_is_cut_before_the_run_goes_on(tmp_path):
    RunRecorder(tmp_path).stepped(1, {"loss": 1.0})
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "stepped", "step": 2, "ti')
    assert [event["step"] for event in read_events(tmp_path)] == [1]
    RunRecorder(tmp_path, 1).stepped(2, {"loss": 0.5})
    assert [event["step"] for event in read_events(tmp_path)] == [1, 2]


def test_resuming_drops_what_will_happen_again(tmp_path):
    recorder = RunRecorder(tmp_path)
    plan(recorder, FIRST)
    for step in (1, 2, 3, 4):
        recorder.stepped(step, {"loss": 1.0})
    recorder.evaluated(4, {"eval_loss": 1.0})
    recorder.checkpointed(4, "out/checkpoint-4", 0.1)
    plan(recorder, SECOND)
    recorder.stepped(5, {"loss": 1.0})
    recorder.finished(5, {})

    def kept(step: int, **more) -> list[tuple[str, int]]:
        (tmp_path / "again" / "plans").mkdir(parents=True, exist_ok=True)
        (tmp_path / "again" / "events.jsonl").write_bytes((tmp_path / "events.jsonl").read_bytes())
        for index in (0, 1):
            name = f"plans/plan-{index:05d}.npz"
            (tmp_path / "again" / name).write_bytes((tmp_path / name).read_bytes())
        RunRecorder(tmp_path / "again", step, **more)
        return [(event["event"], event["step"]) for event in read_events(tmp_path / "again")]

    first = [("planned", 0), *(("stepped", step) for step in (1, 2, 3, 4))]
    at_four = [*first, ("evaluated", 4), ("checkpointed", 4)]
    assert kept(4) == at_four
    assert sorted(path.name for path in (tmp_path / "again" / "plans").iterdir()) == ["plan-00000.npz"]
    assert kept(5) == [*at_four, ("planned", 4), ("stepped", 5)]
    assert kept(2) == first[:3]
    assert kept(4, plan_in_progress=1) == [*at_four, ("planned", 4)]
    assert kept(0) == []
    assert list((tmp_path / "again" / "plans").iterdir()) == []


@pytest.mark.parametrize(("stop", "resume"), [(25, 20), (20, 20), (33, 20), (40, 40), (99, 80), (19, 0)])
def test_a_killed_and_resumed_run_has_the_record_of_one_never_stopped(tmp_path, stop, resume):
    simulate(tmp_path / "straight", **SELECTION)
    simulate(tmp_path / "resumed", **SELECTION, stop_step=stop)
    assert len(read_events(tmp_path / "resumed")) < len(read_events(tmp_path / "straight"))
    simulate(tmp_path / "resumed", **SELECTION, resume_step=resume)
    straight = [event for event in read_events(tmp_path / "straight") if resume or event["event"] != "run_started"]
    resumed = [event for event in read_events(tmp_path / "resumed") if event["event"] != "resumed"]
    if not resume:  # everything happens again, the start too
        resumed = [event for event in resumed if event["event"] != "run_started"]
    assert without_times(resumed) == without_times(straight)
    for index in range(10):
        np.testing.assert_array_equal(
            load_plan(tmp_path / "straight", index).rows, load_plan(tmp_path / "resumed", index).rows
        )


def test_a_second_resume_from_an_earlier_checkpoint_forgets_the_first(tmp_path):
    simulate(tmp_path, **MIXTURE, stop_step=200)
    simulate(tmp_path, **MIXTURE, resume_step=180, stop_step=190)
    simulate(tmp_path, **MIXTURE, resume_step=60, stop_step=70)
    events = read_events(tmp_path)
    assert [event["step"] for event in events if event["event"] == "resumed"] == [60]
    assert max(event["step"] for event in events) == 70


def test_a_fresh_run_replaces_the_record_of_an_older_one(tmp_path):
    simulate(tmp_path, **SELECTION)
    (tmp_path / "report").mkdir()
    (tmp_path / "plans" / ".plan-00003.npz.77.tmp").write_bytes(b"half")
    recorder = RunRecorder(tmp_path)
    assert read_events(tmp_path) == []
    assert list((tmp_path / "plans").iterdir()) == []
    assert (tmp_path / "report").is_dir()
    started(recorder, dynamic={}, sources={"a": 5}, schedule={})
    assert [event["event"] for event in read_events(tmp_path)] == ["run_started"]


def test_resuming_into_an_empty_folder_begins_a_record(tmp_path):
    recorder = RunRecorder(tmp_path / "dataflex", 40)
    recorder.resumed(40, "elsewhere/checkpoint-40")
    assert without_times(read_events(tmp_path)) == [
        {"event": "resumed", "step": 40, "checkpoint": "elsewhere/checkpoint-40"}
    ]


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "dataflex").write_text("a file where the folder should be")
    with pytest.raises(
        DataError, match=r"^output_dir: cannot write the record of the run in .*dataflex: Not a directory"
    ):
        RunRecorder(tmp_path / "dataflex")
    recorder = RunRecorder(tmp_path / "other")
    (tmp_path / "other" / "events.jsonl").unlink()
    (tmp_path / "other" / "events.jsonl").mkdir()
    with pytest.raises(DataError, match=r"^output_dir: cannot write .*events\.jsonl: Is a directory"):
        recorder.stepped(1, {"loss": 1.0})


def test_replacing_leaves_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with replacing(path) as file:
            file.write(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    with pytest.raises(DataError, match="cannot write"), replacing(tmp_path / "nowhere" / "file"):
        pass


def test_other_ranks_record_nothing(tmp_path):
    recorder = NullRecorder()
    started(recorder, dynamic={}, sources={"a": 5}, schedule={})
    plan(recorder, FIRST, scores=np.zeros(4))
    recorder.stepped(1, {"loss": 1.0})
    recorder.evaluated(1, {})
    recorder.checkpointed(1, "c", 0.1)
    recorder.resumed(1, "c")
    recorder.finished(1, {}, {})
    assert list(tmp_path.iterdir()) == []
    assert vars(recorder) == {}
