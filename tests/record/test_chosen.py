"""The table of chosen rows, derived from records that are made without a run: what was planned is known."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataflex.commands.rows import rows
from dataflex.errors import DataError
from dataflex.plan.domains import Domains
from dataflex.plan.schedule import Interval
from dataflex.record import chosen as chosen_module
from dataflex.record import recorder as recorder_module
from dataflex.record.chosen import (
    CHOSEN,
    FIXED,
    ROWS,
    Origins,
    Source,
    chosen_notes,
    chosen_table,
    moved_name,
    raw_rows,
)
from dataflex.record.read import LEDGER
from dataflex.record.recorded import recorded
from dataflex.record.recorder import RunRecorder
from tests.record.synthetic import Plan, space_of

SIZE, BATCH = 12, 2


def space(folder, size=SIZE, **changes):
    """Twelve rows of two data sets: one of lines with blanks between, one of an array."""
    half = size // 2
    lines = [f'{{"id": {k}, "text": "line {k}"}}' for k in range(half)]
    (folder / "a.jsonl").write_text("\n".join(lines[:2]) + "\n\n  \r\n" + "\n".join(lines[2:]))
    (folder / "b.json").write_text(json.dumps([{"text": f"item {k}"} for k in range(size - half)], indent=1))
    labels = ["a"] * half + ["b"] * (size - half)
    position = np.concatenate([np.arange(half), np.arange(size - half)])
    origins = Origins(
        sources=[
            Source(name="a", paths=[folder / "a.jsonl"], rows_read=half, entry={"file_name": "a.jsonl"}),
            Source(name="b", paths=[folder / "b.json"], rows_read=size - half),
        ],
        source_of=np.array([0] * half + [1] * (size - half), dtype=np.int32),
        position=position,
        ids=pa.array([str(k) for k in range(half)] + [None] * (size - half)),
    )
    given = {
        "sources": {"a": half, "b": size - half},
        "domains": Domains.from_labels(labels, np.arange(1, size + 1)),
        "lengths": np.arange(1, size + 1),
        "supervised": np.ones(size, dtype=np.int64),
        "num_rows": size,
        "keys": np.arange(size) % (size - 2),
        "fingerprint": "f" * 16,
        "columns": {"grade": np.arange(size) / 4, "score_3": np.arange(size)},
        "origins": origins,
    }
    return SimpleNamespace(**{**given, **changes})


def begun(folder, rows=None, resume_step=None, **options):
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows or space(folder.parent)
    recorder = RunRecorder(folder, resume_step, **options)
    recorder.run_started(
        config={"dynamic": {"selector": {"name": "near", "targets": ["t", "u"]}}},
        schedule={"total_steps": 6},
        row_space={"fingerprint": rows.fingerprint, "domains": {"a": 6, "b": 6}},
        global_batch=BATCH,
    )
    recorder.rows_known(rows)
    return recorder


def plan(recorder, index, steps, rows, **arrays):
    first, stop = steps
    interval = Interval(index=index, kind="dynamic", start_step=first, stop_step=stop)
    rows = np.array(rows, dtype=np.int64)
    recorder.planned(plan=Plan(interval=interval, rows=rows), domain_counts={}, seconds={}, reason="why", **arrays)


SCORES = np.array([5, 4, 9, np.nan, 1, 2, 8, 7, 0, 3, 6, 4], dtype=np.float32)


def record(recorder, first=0):
    """Steps 0 and 1 warm up; the next two are decided on all rows, the last two on six of them."""
    if first <= 0:
        plan(recorder, 0, (0, 2), [0, 1, 2, 0])
        recorder.stepped(2, {"loss": 1.0})
    if first <= 2:
        nearest = np.array([0, 1] * 6), np.arange(12)
        plan(recorder, 1, (2, 4), [2, 6, 7, 10], scores=SCORES, kept=np.array([2, 6, 7, 10]), nearest=nearest)
        recorder.stepped(4, {"loss": 1.0})
    pool = np.array([0, 2, 4, 6, 8, 10])
    plan(recorder, 2, (4, 6), [8, -1, 4, 8], scores=SCORES[pool], pool=pool, kept=np.array([8, 4]))
    recorder.stepped(5, {"loss": 1.0})


def column(table, name):
    return table.column(name).to_pylist()


def test_a_row_tells_where_it_is_from_when_it_was_served_and_why(tmp_path):
    record(begun(tmp_path / "run" / "dataflex", space(tmp_path)))
    table = chosen_table(tmp_path / "run")
    assert table.column_names[: len(FIXED)] == list(FIXED)
    assert column(table, "line") == [1, 2, 5, 6, 7, 8] + [None] * 6
    assert column(table, "file") == [str(tmp_path / "a.jsonl")] * 6 + [str(tmp_path / "b.json")] * 6
    assert column(table, "position") == [*range(6), *range(6)]
    assert column(table, "id")[5:7] == ["5", None]
    assert column(table, "domain") == column(table, "dataset") == ["a"] * 6 + ["b"] * 6
    # Step 5 is planned and not done: of the last plan only row 8 was served.
    assert column(table, "times_served") == [2, 1, 2, 0, 0, 0, 1, 1, 1, 0, 1, 0]
    assert column(table, "served_at")[:4] == [[0, 1], [0], [1, 2], []]
    assert column(table, "first_served") == [0, 0, 1, None, None, None, 2, 3, 4, None, 3, None]
    assert column(table, "last_served") == [1, 0, 2, None, None, None, 2, 3, 4, None, 3, None]
    assert column(table, "decision") == [2, 1] * 5 + [2, 1]
    assert column(table, "chosen") == [k in (7, 8, 4) for k in range(12)]
    assert column(table, "place") == [None] * 4 + [2] + [None] * 2 + [3, 1] + [None] * 3
    assert column(table, "score_1") == [None if np.isnan(value) else value for value in SCORES]
    assert column(table, "rank_1") == [5, 6, 1, None, 10, 9, 2, 3, 11, 8, 4, 7]
    assert column(table, "rank") == [4, 6, 1, None, 5, 9, 2, 3, 6, 8, 3, 7]
    assert column(table, "times_chosen") == [0, 0, 1, 0, 1, 0, 1, 1, 1, 0, 1, 0]
    assert column(table, "times_scored") == [2, 1, 2, 0, 2, 1, 2, 1, 2, 1, 2, 1]
    assert column(table, "nearest_target")[:4] == [None, "u", None, "u"]
    assert column(table, "nearest_row")[:4] == [None, 1, None, 3]
    assert column(table, "raw_score_3") == list(range(12))
    assert column(table, "grade") == [k / 4 for k in range(12)]
    assert column(table, "weight") == [None] * 12
    notes = chosen_notes(table)
    assert (notes["step"], notes["notes"]) == (5, [])
    wanted = {"pool": 12, "kept": 4, "scored": 11, "cut": 6.0, "prefers": "high", "exceptions": 0}
    assert {key: notes["decisions"][0][key] for key in wanted} == wanted
    wanted = {"interval": 2, "pool": 6, "kept": 2, "scored": 6, "cut": 1.0, "prefers": "low", "exceptions": 0}
    assert {key: notes["decisions"][1][key] for key in wanted} == wanted


def test_the_nearest_target_is_one_of_the_targets_at_that_time(tmp_path):
    recorder = begun(tmp_path / "run" / "dataflex", space(tmp_path))
    record(recorder)
    recorder = RunRecorder(tmp_path / "run" / "dataflex", 4, plan_in_progress=1)
    recorder.run_started(
        config={"dynamic": {"selector": {"name": "near", "targets": ["v", "t"]}}}, row_space={"fingerprint": "f" * 16}
    )
    nearest = np.array([0, 1, -1, 2]), np.arange(4)
    plan(recorder, 2, (4, 6), [1], scores=SCORES[:4], pool=np.arange(4), kept=np.array([1]), nearest=nearest)
    table = chosen_table(tmp_path / "run")
    assert column(table, "nearest_target") == ["v", "t", None, None] + ["t", "u"] * 4


def test_rows_of_a_run_that_was_resumed_into_another_folder_are_those_since_then(tmp_path):
    recorder = begun(tmp_path / "run" / "dataflex", space(tmp_path))
    recorder.resumed(2, "elsewhere/checkpoint-2")
    record(recorder, first=2)
    table = chosen_table(tmp_path / "run")
    assert chosen_notes(table)["since"] == 2
    assert chosen_notes(table)["notes"] == [
        "rows that were served before are not known: plans are recorded since step 2"
    ]
    told = rows(tmp_path / "run", by="never")
    assert "rows were served (41.7%) since step 2, " in told
    assert "of 7 rows that were never served since step 2:" in told


@pytest.mark.parametrize(
    ("kept", "wanted"),
    [
        ("111000000000", (10.0, "high", 0)),
        ("111101000000", (8.0, "high", 1)),
        ("000000000011", (2.0, "low", 0)),
        ("010000001000", (None, None, 1)),
        ("111111111111", (None, None, 0)),
        ("000000000000", (None, None, 0)),
    ],
)
def test_the_cut_is_the_score_of_the_last_row_kept_where_the_choice_follows_scores(kept, wanted):
    from dataflex.record.chosen import _cut

    assert _cut(np.arange(12, 0, -1, dtype=np.float32), np.array([*kept]) == "1") == wanted


def test_weights_and_credits_are_of_the_rows_that_have_them(tmp_path):
    folder = tmp_path / "dataflex"
    recorder = begun(folder)
    record(recorder)
    mine = {"fingerprint": "f" * 16}
    weights = pa.table({"row": [2, 7], "weight": [0.5, 2.0], "times_weighed": [1, 3]})
    pq.write_table(weights.replace_schema_metadata(mine), folder / "weights.parquet")
    credits = pa.table({"row": [7], "credit_t": [-0.25]})
    pq.write_table(credits.replace_schema_metadata(mine), folder / LEDGER)
    table = chosen_table(folder)
    assert [k for k, weight in enumerate(column(table, "weight")) if weight is not None] == [2, 7]
    assert column(table, "times_weighed")[7] == 3
    assert column(table, "credit_t")[6:8] == [None, -0.25]
    pq.write_table(credits.replace_schema_metadata({"fingerprint": "other"}), folder / LEDGER)
    table = chosen_table(folder)
    assert "credit_t" not in table.column_names
    assert chosen_notes(table)["notes"] == ["ledger.parquet cannot be read: it is of other rows"]


def test_a_resumed_record_gives_the_bytes_of_one_that_never_stopped(tmp_path):
    whole, cut = tmp_path / "whole" / "dataflex", tmp_path / "cut" / "dataflex"
    rows = space(tmp_path)
    recorder = begun(whole, rows)
    record(recorder)
    recorder.refresh(now=True)
    record(begun(cut, rows))  # killed after step 5: the checkpoint is of step 3, inside the plan of interval 1
    recorder = begun(cut, rows, 3, plan_in_progress=1)
    assert column(chosen_table(cut), "times_served")[7] == 0  # step 3 is served once more
    record(recorder, first=4)
    recorder.refresh(now=True)
    assert (cut / CHOSEN).read_bytes() == (whole / CHOSEN).read_bytes()
    assert pq.read_table(cut / CHOSEN).equals(chosen_table(cut))


def test_the_file_is_there_from_the_start_and_takes_a_hundredth_of_the_time(tmp_path, monkeypatch):
    now, written = [100.0], []
    monkeypatch.setattr(recorder_module, "perf_counter", lambda: now[0])

    def write(folder):
        now[0] += 2.0
        written.append(now[0])

    monkeypatch.setattr(recorder_module, "write_chosen", write)
    recorder = begun(tmp_path / "dataflex")
    assert written == [102.0]
    for step, after in enumerate((0.0, 100.0, 99.0, 2.0)):
        now[0] += after
        recorder.stepped(step, {})
        recorder.refresh()
    assert written == [102.0, 305.0]
    recorder.refresh(now=True)  # nothing was recorded since
    recorder.stepped(4, {})
    recorder.refresh(now=True)
    assert len(written) == 3


def test_rows_of_thinned_intervals_count(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder_module, "_PLANS", 2)
    recorder = begun(tmp_path / "dataflex")
    for index in range(6):
        plan(recorder, index, (index, index + 1), [index, 11])
        recorder.stepped(index + 1, {})
    stored = sorted(path.name for path in (tmp_path / "dataflex" / "plans").glob("*.npz"))
    assert stored == [f"plan-0000{index}.npz" for index in (0, 1, 2, 4)]
    table = chosen_table(tmp_path)
    assert column(table, "times_served") == [1] * 6 + [0] * 5 + [6]
    recorder = begun(tmp_path / "dataflex", None, 3, plan_in_progress=2)
    assert column(chosen_table(tmp_path), "times_served") == [1] * 3 + [0] * 8 + [3]
    for index in range(3, 6):
        plan(recorder, index, (index, index + 1), [index + 3, 11])
        recorder.stepped(index + 1, {})
    assert column(chosen_table(tmp_path), "times_served") == [1] * 3 + [0] * 3 + [1] * 3 + [0] * 2 + [6]


def test_decisions_with_columns_of_their_own_stay_few_and_spread(tmp_path, monkeypatch):
    monkeypatch.setattr("dataflex.record.chosen._DECISIONS", 4)
    recorder = begun(tmp_path / "dataflex")
    for index in range(11):
        plan(recorder, index, (index, index + 1), [0, 1], scores=SCORES + index, kept=np.array([2, 6]))
    table = chosen_table(tmp_path)
    assert [name for name in table.column_names if name.startswith("rank_")] == ["rank_0", "rank_4", "rank_8"]
    assert column(table, "score")[0] == 15.0
    assert column(table, "times_chosen")[2] == 11


def test_plans_of_an_earlier_pool_are_those_of_rows_that_are_still_there(tmp_path):
    folder = tmp_path / "dataflex"
    record(begun(folder, space(tmp_path)))
    before = chosen_table(folder)
    # Rows 0 and 6 left the pool, the order is another, and the last row is new.
    found = np.array([*range(11, 6, -1), *range(1, 6), -1])
    now = space(tmp_path, size=11, fingerprint="0" * 16)
    recorder = RunRecorder(folder, 5, plan_in_progress=2)
    recorder.run_started(config={}, row_space={"fingerprint": now.fingerprint, "domains": {"a": 11}})
    recorder.rows_known(now, ("f" * 16, found))
    table = chosen_table(folder)
    assert chosen_notes(table)["notes"] == []
    old = np.flatnonzero(found >= 0)
    for name in ("times_served", "first_served", "served_at", "decision", "chosen", "score", "times_chosen"):
        values = [column(before, name)[row] for row in found[old]]
        assert [column(table, name)[row] for row in old] == values, name
    assert (column(table, "times_served")[10], column(table, "decision")[10]) == (0, None)
    view = recorded(folder)
    scores = {k: SCORES[row] for k, row in enumerate(found) if row >= 0 and np.isfinite(SCORES[row])}
    assert dict(zip(view.scored[0][1].tolist(), view.scored[0][2], strict=True)) == scores
    assert [ids.tolist() for _, ids in view.plans] == [[5, 6], [6, 4, 1], [3, 8, 3]]
    assert view.left_out == []
    # Once more: the new row leaves, and row 1 of the first pool comes first.
    plan(recorder, 3, (5, 6), [0, 10])
    recorder.stepped(6, {})
    again = space(tmp_path, size=10, fingerprint="1" * 16)
    recorder.run_started(config={}, row_space={"fingerprint": again.fingerprint})
    recorder.rows_known(again, ("0" * 16, np.array([5, 0, 1, 2, 3, 4, 6, 7, 8, 9])))
    times = column(before, "times_served")
    assert column(chosen_table(folder), "times_served")[:3] == [times[1], times[11] + 1, times[10]]
    (folder / moved_name("f" * 16, "0" * 16)).unlink()
    table = chosen_table(folder)
    assert column(table, "times_served")[:3] == [0, 1, 0]
    assert "the plan is of another pool of rows" in chosen_notes(table)["notes"][0]


@pytest.mark.slow
def test_a_million_rows(tmp_path):
    size, kept = 1_000_000, np.arange(0, 1_000_000, 500)
    folder = tmp_path / "dataflex"
    rows = space_of({"a": size // 2, "b": size // 2})
    recorder = begun(folder, rows)
    for index in range(2):
        scores = np.where(np.arange(size) % 500 == 0, 1.0, 0.0).astype(np.float32)
        plan(recorder, index, (10 * index, 10 * index + 10), kept[::-1], scores=scores, kept=kept)
        recorder.stepped(10 * index + 10, {})
    table = chosen_table(folder)
    assert table.num_rows == size
    assert np.flatnonzero(table.column("times_served").to_numpy() == 2).tolist() == kept.tolist()
    assert np.flatnonzero(table.column("rank").to_numpy() <= len(kept)).tolist() == kept.tolist()
    assert chosen_notes(table)["decisions"][1]["cut"] == 1.0


def test_the_original_lines_are_found(tmp_path):
    record(begun(tmp_path / "run" / "dataflex", space(tmp_path)))
    table = chosen_table(tmp_path / "run")
    found = dict(raw_rows(table, np.array([11, 2, 0])))
    assert found.pop(11) == b'{\n  "text": "item 5"\n }'
    assert found == {0: b'{"id": 0, "text": "line 0"}', 2: b'{"id": 2, "text": "line 2"}'}
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert list(dict(raw_rows(table, np.array([11, 2, 0])))) == [11]


def test_rows_whose_place_is_not_known_have_none(tmp_path):
    packed = space(tmp_path)
    packed.origins = replace(packed.origins, position=np.full(SIZE, -1), ids=None)
    begun(tmp_path / "packed" / "dataflex", packed)
    table = chosen_table(tmp_path / "packed")
    assert column(table, "file")[0] == str(tmp_path / "a.jsonl")
    assert set(column(table, "line") + column(table, "position") + column(table, "id")) == {None}
    begun(tmp_path / "own" / "dataflex", space(tmp_path, origins=None))
    table = chosen_table(tmp_path / "own")
    assert column(table, "dataset") == ["a"] * 6 + ["b"] * 6
    assert set(column(table, "file")) == {None}


def test_a_file_that_was_read_otherwise_than_it_is_counted_has_no_lines(tmp_path):
    rows = space(tmp_path)
    sources = [replace(rows.origins.sources[0], rows_read=5), *rows.origins.sources[1:]]
    rows.origins = replace(rows.origins, sources=sources)
    begun(tmp_path / "run" / "dataflex", rows)
    assert set(column(chosen_table(tmp_path / "run"), "line")) == {None}


def test_what_is_damaged_is_named_and_the_rest_is_shown(tmp_path):
    folder = tmp_path / "dataflex"
    record(begun(folder))
    path = folder / "plans" / "plan-00001.npz"
    path.write_bytes(path.read_bytes()[:80])
    (folder / "weights.parquet").write_bytes(b"PAR1")
    table = chosen_table(tmp_path)
    assert column(table, "times_served") == [2, 1, 1] + [0] * 5 + [1] + [0] * 3
    told = chosen_notes(table)["notes"]
    assert len(told) == 2
    assert "plan-00001.npz is damaged" in told[0]
    assert told[0].endswith("its rows are not counted")
    assert told[1].startswith("weights.parquet cannot be read")
    for name, values in (("rows", [99]), ("rows", [-2]), ("rows", [0.5]), ("kept", [-1]), ("scores", [1.0])):
        np.savez(path, **{"rows": np.array([0, 1, 2, 3]), name: np.array(values)})
        assert f"plan of interval 1: {name} " in chosen_notes(chosen_table(tmp_path))["notes"][0]


def test_folders_that_are_no_runs_are_told(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no dataflex/events\.jsonl"):
        chosen_table(tmp_path / "empty")
    folder = tmp_path / "half" / "dataflex"
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no event that can be read"):
        chosen_table(tmp_path / "half")
    RunRecorder(folder).stepped(1, {"loss": 1.0})
    with pytest.raises(DataError, match=r"has no rows\.parquet, which says what its rows are"):
        chosen_table(tmp_path / "half")
    begun(folder)
    good = pq.read_table(folder / ROWS)
    for told, message in (
        ({"format": 2}, r"has format 2, written by another version; this one reads 1"),
        ({"fingerprint": "0"}, r"is of other rows than the events beside it"),
        ({"sources": [3]}, r"is damaged: .*lacks the data sets"),
    ):
        meta = {**json.loads(good.schema.metadata[b"dataflex"]), **told}
        pq.write_table(good.replace_schema_metadata({b"dataflex": json.dumps(meta)}), folder / ROWS)
        with pytest.raises(DataError, match=message):
            chosen_table(tmp_path / "half")
    pq.write_table(good.drop_columns(["tokens"]), folder / ROWS)
    with pytest.raises(DataError, match="lacks tokens"):
        chosen_table(tmp_path / "half")
    (folder / ROWS).write_bytes(b"x")
    with pytest.raises(DataError, match=r"rows\.parquet is damaged"):
        chosen_table(tmp_path / "half")
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=r"has no dataflex/events\.jsonl"):
        chosen_table(tmp_path / "half")


def cut_by_sorting(scores, kept):
    """Sort the rows by score, first ones first, and count."""
    order = sorted(range(len(scores)), key=lambda row: -scores[row])
    count, flags = int(kept.sum()), [bool(kept[row]) for row in order]
    if not 0 < count < len(order):
        return None, None, 0
    high, low = count - sum(flags[:count]), count - sum(flags[-count:])
    if 2 * min(high, low) * len(order) >= count * (len(order) - count):
        return None, None, min(high, low)
    return (scores[order[count - 1]], "high", high) if high <= low else (scores[order[-count]], "low", low)


def test_the_cut_is_that_of_sorted_scores_with_equal_ones_too():
    rng = np.random.default_rng(0)
    for turn in range(600):
        size = int(rng.integers(1, 30))
        scores = rng.integers(-2, int(rng.integers(-1, 9)), size).astype(np.float32)
        kept = rng.random(size) < rng.random()
        if turn % 2:
            kept[:] = False
            kept[np.argsort(scores if turn % 4 == 1 else -scores, kind="stable")[: int(rng.integers(0, size + 1))]] = (
                True
            )
        assert chosen_module._cut(scores, kept) == cut_by_sorting(scores, kept)
