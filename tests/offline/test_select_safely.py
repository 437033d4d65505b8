"""``dataflex select`` with scores from anywhere: names are no paths, nothing of others' is replaced, damage is told."""

from __future__ import annotations

import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataflex.cli import main
from dataflex.config.files import FileRecord
from dataflex.printable import file_name_problem
from dataflex.score_table import ScoreTable, write_scores

COMMAND = ["select", "scores.parquet", "--budget", "2"]
BAD_NAMES = [
    "../victim/pool",
    "..",
    ".",
    "",
    "/tmp/pool",
    "a/b",
    "..\\victim",
    "C:pool",
    "pool\x00",
    "a\nb",
    "\x1b[2J",
    "\u202epool",
    ".hidden",
    "~root",
    "-rf",
    "pool ",
    "pool.",
    "CON",
    "nul.txt",
    "x" * 300,
    "\u6570" * 80,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_cannot_name_a_file(name):
    assert file_name_problem(name)


@pytest.mark.parametrize("name", ["pool", "alpaca_en.v2", "\u6570\u5b66", "a b", "console", "x" * 200, "..a"[2:]])
def test_names_that_can(name):
    assert file_name_problem(name) == ""


def scores(folder, name="pool", **changes):
    """Scores of four rows of ``pool.jsonl``, whose data set has the name."""
    file = folder / "pool.jsonl"
    file.write_text("".join(json.dumps({"id": at}) + "\n" for at in range(4)))
    source = {
        "name": name,
        "rows": 4,
        "rows_read": 4,
        "entry": {"file_name": "pool.jsonl", "hf_hub_url": "evil/data", "columns": {"prompt": "id"}},
        "files": [vars(FileRecord.of(file))],
    }
    provenance = {
        "methods": [{"name": "loss"}],
        "data": {"sources": [source]},
        "config": {"hub_token": "s3cr3t", "max_samples": None},
        **changes,
    }
    table = ScoreTable(
        datasets=(name,),
        dataset_of=np.zeros(4, dtype=np.int64),
        domains=("x",),
        domain_of=np.zeros(4, dtype=np.int64),
        position=np.arange(4),
        tokens=np.full(4, 10),
        supervised_tokens=np.full(4, 5),
        columns={"loss": np.arange(4.0)},
        provenance=provenance,
    )
    write_scores(folder / "scores.parquet", table)


def everything(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path not in (folder / "scores.parquet", folder / "pool.jsonl")
    }


@pytest.mark.parametrize("name", [name for name in BAD_NAMES if name])
def test_a_data_set_that_is_named_like_a_path_writes_nothing(tmp_path, capsys, name):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "pool.jsonl").write_text("mine")
    scores(tmp_path, name)
    before = everything(tmp_path)
    assert main([*COMMAND, "--out", "subset"]) == 2
    told = capsys.readouterr().err
    assert "cannot name a file; name a file with --out" in told
    assert "\x1b" not in told
    assert everything(tmp_path) == before
    assert (tmp_path / "victim" / "pool.jsonl").read_text() == "mine"
    assert main([*COMMAND, "--out", "mine.jsonl"]) == 0  # whose name is the user's own
    assert (tmp_path / "mine.jsonl").read_text().count("\n") == 2


def test_other_data_sets_stay_and_an_earlier_subset_is_replaced(tmp_path, capsys):
    scores(tmp_path)
    out = tmp_path / "subset"
    out.mkdir()
    (out / "dataset_info.json").write_text(json.dumps({"other": {"file_name": "other.jsonl"}}))
    for _ in range(2):
        assert main([*COMMAND, "--out", "subset"]) == 0
        assert json.loads((out / "dataset_info.json").read_text()) == {
            "other": {"file_name": "other.jsonl"},
            "pool": {"file_name": "pool.jsonl", "columns": {"prompt": "id"}},
        }
        assert "s3cr3t" not in (out / "provenance.json").read_text()
    (out / "pool.jsonl").write_text("edited by hand\n")
    assert main([*COMMAND, "--out", "subset"]) == 2
    assert "subset/pool.jsonl is there, and no earlier subset wrote it so" in capsys.readouterr().err
    assert (out / "pool.jsonl").read_text() == "edited by hand\n"
    assert main([*COMMAND, "--out", "subset", "--overwrite"]) == 0
    assert (out / "pool.jsonl").read_text().count("\n") == 2


def test_what_an_earlier_subset_wrote_and_this_one_does_not_is_removed(tmp_path, capsys):
    """Nothing is left without provenance, which the third command would take for the user's own."""
    out = tmp_path / "subset"
    for name in ("first", "second", "first", "third"):
        scores(tmp_path, name)
        if name == "third":
            (out / "first.jsonl").write_text("edited by hand\n")
        assert main([*COMMAND, "--out", "subset"]) == 0, capsys.readouterr().err
        left = {"first.jsonl"} if name == "third" else set()
        assert {path.name for path in out.glob("*.jsonl")} == {f"{name}.jsonl", *left}
        assert list(json.loads((out / "dataset_info.json").read_text())) == [name]
    assert (out / "first.jsonl").read_text() == "edited by hand\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset_info.json", '{"pool": {"file_name": "mine.jsonl"}}'),
        ("dataset_info.json", '{"pool": 3}'),
        ("dataset_info.json", "[1]"),
        ("dataset_info.json", "[" * 100_000),
        ("provenance.json", '{"files": [{"path": "pool.jsonl"}]}'),
        ("provenance.json", "mine"),
        ("pool.jsonl", "mine"),
    ],
)
def test_what_is_of_others_is_left_alone(tmp_path, capsys, name, content):
    scores(tmp_path)
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset" / name).write_text(content)
    assert main([*COMMAND, "--out", "subset"]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert everything(tmp_path / "subset") == ({} if name == "pool.jsonl" else {name: content.encode()})
    assert (tmp_path / "subset" / name).read_text() == content
    assert main([*COMMAND, "--out", "subset", "--overwrite"]) == 0
    assert json.loads((tmp_path / "subset" / "dataset_info.json").read_text())["pool"]["file_name"] == "pool.jsonl"


def test_a_file_of_the_users_own_is_left_alone(tmp_path, capsys):
    scores(tmp_path)
    (tmp_path / "mine.jsonl").write_text("mine")
    assert main([*COMMAND, "--out", "mine.jsonl"]) == 2
    assert (tmp_path / "mine.jsonl").read_text() == "mine"
    assert main([*COMMAND, "--out", "mine.jsonl", "--overwrite"]) == 0
    assert main([*COMMAND, "--out", "mine.jsonl"]) == 0


@pytest.mark.parametrize("name", ["pool.jsonl", "dataset_info.json", "provenance.json"])
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_links_are_not_followed(tmp_path, name, more):
    scores(tmp_path)
    (tmp_path / "subset").mkdir()
    (tmp_path / "victim.json").write_text("{}")
    (tmp_path / "subset" / name).symlink_to(tmp_path / "victim.json")
    assert main([*COMMAND, "--out", "subset", *more]) == (0 if more else 2)
    assert (tmp_path / "victim.json").read_text() == "{}"


VALUES = [None, True, -1, 1.5, 2**62, "text", [], {}, [1], {"a": 1}, "\x1b[2J\ud800", "../x", "x" * 10_000, "/", "\x00"]


def places(value, path=()):
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_damaged_scores_are_told(tmp_path, capsys, seed):
    """50 files a seed: what they say of themselves changed, columns of other types, bytes flipped, cut."""
    rng = random.Random(seed)
    scores(tmp_path)
    whole = pq.read_table(tmp_path / "scores.parquet")
    good = (tmp_path / "scores.parquet").read_bytes()
    codes = set()
    for _ in range(50):
        kind = rng.random()
        table = whole
        if kind < 0.5:
            told = json.loads(whole.schema.metadata[b"dataflex"])
            *above, last = rng.choice([path for path in places(told) if path])
            holder = told
            for key in above:
                holder = holder[key]
            if rng.random() < 0.3:
                del holder[last]
            else:
                holder[last] = rng.choice(VALUES)
            text = rng.choice([json.dumps(told)] * 9 + ["[" * 100_000, "", "null", '{"a":' * 300 + "1" + "}" * 300])
            table = whole.replace_schema_metadata({b"dataflex": text.encode()})
        elif kind < 0.8:
            at = rng.randrange(whole.num_columns)
            other = rng.choice(
                [
                    pa.array([None] * 4),
                    pa.array(["a", "b", None, "\x1b[2J"]),
                    pa.array([1.5, float("nan"), float("inf"), -1.0]),
                    pa.array([2**62, -(2**62), 0, 1]),
                    pa.array([[1], [], None, [2, 3]]),
                    pa.array([b"\xff", b"", None, b"a"]),
                    pa.array([True, False, None, True]),
                    pa.array(["../victim/x"] * 4),
                    pa.array([9, 9, 9, 9]),
                ]
            )
            table = whole.set_column(at, whole.column_names[at], other)
            if rng.random() < 0.2:
                table = table.slice(0, rng.randrange(4))
        content = bytearray(good)
        if kind < 0.8:
            pq.write_table(table, tmp_path / "scores.parquet")
        else:
            for _ in range(rng.choice([1, 5, 50])):
                content[rng.randrange(len(content))] = rng.randrange(256)
            (tmp_path / "scores.parquet").write_bytes(content[: rng.choice([len(content)] * 3 + [10, 0])])
        code = main([*COMMAND, "--out", "subset", "--overwrite"])
        captured = capsys.readouterr()
        assert not {"\x1b", "\x00", "\ud800"} & set(captured.err + captured.out)
        assert code in (0, 2)
        codes.add(code)
        assert {path.name for path in tmp_path.iterdir()} <= {"pool.jsonl", "scores.parquet", "subset"}
    assert codes == {0, 2}


def test_twenty_thousand_domains(tmp_path):
    scores(tmp_path)
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps({"id": at}) + "\n" for at in range(20_000)))
    source = {"name": "pool", "rows_read": 20_000, "entry": {}, "files": [vars(FileRecord.of(tmp_path / "pool.jsonl"))]}
    every = np.arange(20_000)
    write_scores(
        tmp_path / "scores.parquet",
        ScoreTable(
            datasets=("pool",),
            dataset_of=np.zeros(20_000, dtype=np.int64),
            domains=tuple(f"d{at}" for at in every),
            domain_of=every,
            position=every,
            tokens=every,
            supervised_tokens=every,
            columns={"loss": every.astype(float)},
            provenance={"methods": [{"name": "loss"}], "data": {"sources": [source]}, "config": {}},
        ),
    )
    assert main(["select", "scores.parquet", "--budget", "0.5", "--rule", "water_filling", "--out", "half.jsonl"]) == 0
    assert (tmp_path / "half.jsonl").read_text().count("\n") == 10_000
