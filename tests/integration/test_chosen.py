"""Real runs leave a table of chosen rows that agrees with what was planted in the pool."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from dataflex.cli import main
from dataflex.record.chosen import CHOSEN, ROWS, chosen_notes, chosen_table, raw_rows
from tests.conftest import WORDS

SELECTION = {"max_steps": 8, "dynamic": {"warmup_steps": 2, "interval_steps": 2, "selector": {"name": "longest"}}}


@pytest.fixture
def planted(tmp_path, data_dir):
    """30 rows: every fifth has no answer, rows 1, 6, 11, ... are long; blank lines stand between."""
    folder = tmp_path / "planted"
    folder.mkdir()
    with (folder / "pool.jsonl").open("w") as file:
        for k in range(30):
            words = WORDS[: 20 if k % 5 == 1 else 3 + k % 3]
            answer = {"output": " ".join(words) if k % 5 else None}
            text = json.dumps({"instruction": f"{WORDS[k]} ?", "input": "", **answer, "source": "x", "id": f"r{k}"})
            file.write(text + "\n" + ("\n" if k % 7 == 0 else ""))
    (folder / "dataset_info.json").write_text(json.dumps({"pool": {"file_name": "pool.jsonl"}}))
    return folder


def column(table, name):
    return table.column(name).to_pylist()


def test_planted_rows_are_told_with_lines_though_rows_were_dropped_and_held_out(run, planted):
    given = {"dataset_dir": str(planted), "dataset": "pool", "val_size": 0.2, "save_steps": 3, "save_strategy": "steps"}
    left = run("run", **given, **SELECTION)
    table = chosen_table(left.folder)
    lines = (planted / "pool.jsonl").read_text().split("\n")
    planted_rows: list[int] = []
    for row, text in raw_rows(table, np.arange(table.num_rows)):
        line = json.loads(lines[column(table, "line")[row] - 1])
        assert json.loads(text) == line
        assert (line["id"], line["output"] is None) == (column(table, "id")[row], False)
        planted_rows += [row] if len(line["output"].split()) == 20 else []
    # What is long was planted: it is what the selector keeps.
    assert len(planted_rows) >= 4
    assert sorted(column(table, "rank")[row] for row in planted_rows) == list(range(1, len(planted_rows) + 1))
    assert len(set(column(table, "line"))) == table.num_rows < 24
    served = sum(len(event_rows) for event_rows in column(table, "served_at"))
    assert served == sum(column(table, "times_served")) == 16
    chosen = [row for row in range(table.num_rows) if column(table, "times_chosen")[row] == 3]
    assert set(chosen) == {row for row in range(table.num_rows) if column(table, "rank")[row] <= 4}
    assert {at for row in chosen for at in column(table, "served_at")[row]} >= {2, 3, 4, 5, 6, 7}
    assert chosen_notes(table)["decisions"][0]["prefers"] == "high"
    assert pq.read_table(left.folder / "dataflex" / CHOSEN).equals(table)
    written = (left.folder / "dataflex" / CHOSEN).read_bytes()
    rows = (left.folder / "dataflex" / ROWS).stat()
    run("run", **given, **SELECTION, resume_from_checkpoint=str(left.folder / "checkpoint-3"))
    assert (left.folder / "dataflex" / CHOSEN).read_bytes() == written
    assert (left.folder / "dataflex" / ROWS).stat() == rows  # what is known before training is not written again
    (planted / "pool.jsonl").touch()  # and may be another file: lines are looked up again
    run("run", **given, **SELECTION, resume_from_checkpoint=str(left.folder / "checkpoint-3"))
    assert (left.folder / "dataflex" / ROWS).stat().st_mtime_ns > rows.st_mtime_ns


@pytest.mark.parametrize("packing", ["packing", "neat_packing"])
def test_packed_rows_are_told_with_the_lines_of_their_documents(run, planted, packing, capsys):
    """Rows were dropped and held out; a label of a pack is a word of an answer, or its end."""
    given = {"dataset_dir": str(planted), "dataset": "pool", "val_size": 0.2, packing: True, "cutoff_len": 80}
    left = run("run", **given, preprocessing_batch_size=9, max_steps=2, dynamic={"selector": "all"})
    table, lines = chosen_table(left.folder), (planted / "pool.jsonl").read_text().split("\n")
    answers = {}
    for row, pack in enumerate(column(table, "documents")):
        told = [json.loads(lines[each["line"] - 1]) for each in pack]
        answers |= {each["id"]: each["output"] for each in told}
        assert [each["id"] for each in told] == [each["id"] for each in pack]
        assert sum(1 + len(each["output"].split()) for each in told) == column(table, "supervised_tokens")[row]
    assert None not in answers.values()
    assert len(answers) == sum(map(len, column(table, "documents"))) == 24 - sum(k % 5 > 0 for k in held_out(30, 0.2))
    served = {
        each["line"]
        for k, pack in enumerate(column(table, "documents"))
        if column(table, "times_served")[k]
        for each in pack
    }
    assert main(["rows", str(left.folder), "--export", str(planted / "kept.jsonl")]) == 0
    assert set((planted / "kept.jsonl").read_text().splitlines()) == {lines[line - 1] for line in served}


def held_out(size, share):
    from dataflex.llamafactory.loading import split_rows

    return split_rows(size, share, 7)["test"]


def test_packed_rows_and_several_sets_and_weights(run, tiny_model):
    left = run(
        "packed",
        dataset="alpha,beta",
        packing=True,
        max_steps=4,
        dynamic={"mixer": "size", "weighter": {"name": "loss", "warmup_steps": 0}},
    )
    table = chosen_table(left.folder)
    assert set(column(table, "dataset")) == {"alpha", "beta"}
    assert set(column(table, "line")) == {None}
    packs = list(zip(column(table, "dataset"), column(table, "documents"), strict=True))
    assert {each["dataset"] == name for name, pack in packs for each in pack} == {True}
    lines = sorted((each["dataset"], each["line"]) for _, pack in packs for each in pack)
    assert lines == [(name, k + 1) for name, size in (("alpha", 40), ("beta", 21)) for k in range(size)]
    assert sum(column(table, "times_served")) == 8
    weighed = [row for row, weight in enumerate(column(table, "weight")) if weight is not None]
    assert weighed == [row for row, times in enumerate(column(table, "times_served")) if times]


def test_the_nearest_row_of_a_target_is_told_and_drawn_rows_have_lines(run, data_dir, tmp_path):
    info = json.loads((data_dir / "dataset_info.json").read_text())
    for name in ("alpha", "goal"):
        info[name]["file_name"] = str(data_dir / info[name]["file_name"])
    rows = [json.loads(line) for line in (data_dir / "alpha.jsonl").read_text().splitlines()]
    goals = [json.loads(line) for line in (data_dir / "goal.jsonl").read_text().splitlines()]
    folder = tmp_path / "near"
    folder.mkdir()
    pool = [*rows[:12], *goals]
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pool))
    (folder / "goal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in goals))
    drawn = {"pool": {"file_name": "pool.jsonl", "num_samples": 17}, "goal": {"file_name": "goal.jsonl"}}
    (folder / "dataset_info.json").write_text(json.dumps(drawn))
    left = run(
        "near",
        dataset_dir=str(folder),
        dataset="pool",
        max_steps=2,
        dynamic={"interval_steps": 2, "selector": {"name": "rds_plus", "targets": ["goal"]}},
    )
    table = chosen_table(left.folder)
    assert sorted(column(table, "line")) == list(range(1, 18))
    for row, text in raw_rows(table, np.arange(17)):
        if column(table, "line")[row] > 12:  # a row of the target itself
            assert json.loads(text) == goals[column(table, "nearest_row")[row]]
            assert column(table, "score")[row] == pytest.approx(1.0, abs=1e-4)
    assert set(column(table, "nearest_target")) == {"goal"}


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_rows_of_a_folder_are_told_with_their_files_whatever_the_order(run, planted, unsorted, ending):
    """Three shards, listed as c, a, b; the weights that ``plan`` looks at are those of the rows, too."""
    import pandas as pd

    from dataflex.config.args import LlamaFactoryArgs
    from dataflex.config.data import Source, loaded_values

    rows = [json.loads(line) for line in (planted / "pool.jsonl").read_text().splitlines() if line]
    (planted / "shards").mkdir()
    parts = {"a": rows[:7], "b": rows[7:21], "c": rows[21:]}
    for name, part in parts.items():
        frame = pd.DataFrame(part)
        path = planted / "shards" / f"{name}{ending}"
        frame.to_json(path, orient="records", lines=True) if ending == ".jsonl" else frame.to_parquet(path)
    (planted / "dataset_info.json").write_text(json.dumps({"shards": {"file_name": "shards"}}))
    left = run("run", dataset_dir=str(planted), dataset="shards", **SELECTION)
    table = chosen_table(left.folder)
    assert table.num_rows == 24
    found = dict(raw_rows(table, np.arange(table.num_rows)))
    assert [json.loads(found[row])["id"] for row in range(24)] == column(table, "id")
    in_order = [*rows[21:], *rows[:21]]
    assert column(table, "id") == [row["id"] for row in in_order if row["output"]]
    files = {row["id"]: name for name, part in parts.items() for row in part}
    told = [path.rsplit("/", 1)[1][0] for path in column(table, "file")]
    assert told == [files[name] for name in column(table, "id")]
    source = Source(name="shards", path=planted / "shards")
    known = [value for _, value in loaded_values(source, LlamaFactoryArgs.read({"stage": "sft"}), "id")]
    assert known == [row["id"] for row in in_order if row["output"]]
