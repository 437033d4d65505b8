"""Reading records back: whole, torn, damaged, foreign."""

from __future__ import annotations

import numpy as np
import pytest

from dataflex.errors import DataError
from dataflex.record.read import load_plan, read_events, read_weights, record_dir
from dataflex.record.recorder import RunRecorder
from tests.record.synthetic import SELECTION, simulate


def test_the_output_dir_and_the_folder_in_it_both_name_the_run(tmp_path):
    RunRecorder(tmp_path / "run" / "dataflex").stepped(1, {"loss": 1.0})
    assert record_dir(tmp_path / "run") == record_dir(tmp_path / "run" / "dataflex") == tmp_path / "run" / "dataflex"
    assert read_events(tmp_path / "run") == read_events(str(tmp_path / "run" / "dataflex"))


def test_a_foreign_folder_is_told(tmp_path):
    with pytest.raises(DataError) as error:
        read_events(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} has no dataflex/events.jsonl; is it the output_dir of a run with a dynamic block?"
    )
    with pytest.raises(DataError, match=r"nowhere is not a folder; give the output_dir of a run"):
        read_events(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "tail", [b"", b"{", b'{"event": "stepped"', b'{"event": "stepped", "step": 3, "time": 1.0, "l']
)
def test_a_torn_last_line_is_left_out(tmp_path, tail):
    recorder = RunRecorder(tmp_path)
    for step in (1, 2):
        recorder.stepped(step, {"loss": 1.0})
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(tail)
    assert [event["step"] for event in read_events(tmp_path)] == [1, 2]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_cutting_the_file_anywhere_loses_only_the_line_that_was_cut(tmp_path, cut):
    recorder = RunRecorder(tmp_path)
    for step in (1, 2, 3):
        recorder.stepped(step, {"loss": 1.0})
    path = tmp_path / "events.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [event["step"] for event in read_events(tmp_path)] == ([1, 2, 3] if cut == 1 else [1, 2])


@pytest.mark.parametrize("line", [b"not json", b"[1]", b'{"step": 3}', b"\xff\xfe", b""])
def test_damage_before_the_end_is_an_error_with_its_line(tmp_path, line):
    recorder = RunRecorder(tmp_path)
    recorder.stepped(1, {"loss": 1.0})
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(line + b"\n")
    recorder.stepped(2, {"loss": 1.0})
    with pytest.raises(DataError, match=r"events\.jsonl, line 2 is not an event .*; the record is damaged"):
        read_events(tmp_path)
    with pytest.raises(DataError, match="line 2"):
        RunRecorder(tmp_path, 1)


def test_a_plan_that_is_not_there_or_damaged_is_told(tmp_path):
    RunRecorder(tmp_path)
    with pytest.raises(DataError, match="holds no plan of interval 0; it has none yet"):
        load_plan(tmp_path, 0)
    simulate(tmp_path, **SELECTION)
    stored = load_plan(tmp_path, 3)
    assert len(stored.rows) == 160
    assert stored.scores is not None
    assert np.isnan(stored.scores[::50]).all()
    assert stored.pool is None
    with pytest.raises(DataError, match="holds no plan of interval 10; it has 0 to 9"):
        load_plan(tmp_path, 10)
    path = tmp_path / "plans" / "plan-00003.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"plan-00003\.npz is damaged"):
        load_plan(tmp_path, 3)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(DataError, match=r"plan-00003\.npz is damaged"):
        load_plan(tmp_path, 3)


def test_rows_that_weigh_most_and_least_are_read_back_and_belong_to_one_run(tmp_path):
    recorder = RunRecorder(tmp_path)
    recorder.stepped(1, {"loss": 1.0})
    assert read_weights(tmp_path) is None
    row = {"row": 3, "weight": float("nan"), "times": 2, "domain": "a", "text": "x => y"}
    recorder.weighed(4, most=[row], least=[row], rows=9)
    stored = read_weights(tmp_path)
    assert (stored["step"], stored["rows"], stored["most"]) == (4, 9, [{**row, "weight": None}])
    RunRecorder(tmp_path, 4)
    assert read_weights(tmp_path) == stored
    (tmp_path / "weights.json").write_text("[]")
    with pytest.raises(DataError, match=r"weights.json is damaged"):
        read_weights(tmp_path)
    RunRecorder(tmp_path).stepped(1, {"loss": 1.0})
    assert read_weights(tmp_path) is None


def test_arrays_of_long_runs_are_thinned():
    from dataflex.record.read import thinned

    assert [index for index in range(16) if thinned(index, 2)] == [0, 1, 2, 4, 8]
    assert [index for index in range(64) if thinned(index, 8)] == [
        *range(8),
        *range(8, 16, 2),
        *range(16, 32, 4),
        32,
        40,
        48,
        56,
    ]
    assert all(thinned(index, 1024) for index in range(1024))
    assert sum(thinned(index, 1024) for index in range(1_000_000)) < 1024 * 8
