"""``dataflex rows``: what is printed and exported of a record whose rows are known, and conditions on its columns."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataflex.cli import main
from dataflex.commands.rows import _excerpt
from dataflex.errors import ConfigError
from dataflex.plan.domains import Domains
from dataflex.record.chosen import Origins, Source, text_of
from dataflex.record.text import WIDTH, width
from dataflex.record.where import where
from tests.record.test_chosen import begun, plan, record, space


@pytest.fixture
def run(tmp_path):
    record(begun(tmp_path / "run" / "dataflex", space(tmp_path)))
    return tmp_path / "run"


def told(capsys, *arguments):
    """Return the printed rows as JSON; the command must succeed."""
    assert main(["rows", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def ids(capsys, *arguments):
    return [row["row"] for row in told(capsys, *arguments)["rows"]]


def failed(capsys, *arguments):
    assert main(["rows", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_orders(run, capsys):
    assert ids(capsys, run) == ids(capsys, run, "--most") == [2, 0, 8, 7, 10, 6, 1]
    assert ids(capsys, run, "--never") == [3, 4, 5, 9, 11]
    assert ids(capsys, run, "--never", "--limit", 2) == [3, 4]
    # Interval 1 kept ranks 1 to 4 of rows 1, 7 (3), 3, 5, 9, 11; interval 2 the last two of six, rows 4 and 8.
    assert ids(capsys, run, "--near-cut", "--limit", 2) == [0, 4]
    assert ids(capsys, run, "--where", "decision == 1 and rank != None", "--near-cut", "--limit", 2) == [7, 1]
    assert "no row has a weight" in failed(capsys, run, "--heaviest")
    table = pa.table({"row": [2, 7, 4], "weight": [0.5, 2.0, 1.0], "times_weighed": [1, 3, 1]})
    pq.write_table(table.replace_schema_metadata({"fingerprint": "f" * 16}), run / "dataflex" / "weights.parquet")
    assert ids(capsys, run, "--heaviest") == [7, 4, 2]
    assert ids(capsys, run, "--lightest", "--limit", 1) == [2]
    assert "expected a number of at least 1, found 0" in failed(capsys, run, "--limit", 0)
    assert "not allowed with" in failed(capsys, run, "--most", "--never")


def test_options_that_would_have_no_effect_and_places_are_told_by_their_option(run, tmp_path, capsys):
    assert "--overwrite: has no effect without --export" in failed(capsys, run, "--overwrite")
    assert "--text: has no effect with --export" in failed(capsys, run, "--text", "--export", tmp_path / "x.jsonl")
    (tmp_path / "file").write_text("")
    told = failed(capsys, run, "--export", tmp_path / "file" / "x.jsonl")
    assert told == f"dataflex: --export: {tmp_path / 'file'} is a file, not a folder\n"
    assert "--export: " in (told := failed(capsys, run, "--export", tmp_path / "x.xyz"))
    assert "--out" not in told


def test_what_is_printed(run, capsys):
    assert main(["rows", str(run), "--never", "--text", "--limit", "3"]) == 0
    assert capsys.readouterr().out == (
        "after step 5: 7 of 12 rows were served (58.3%), 2 of them more than once, up to 2 times\n"
        "interval 2: 2 of 6 rows were kept, 6 scored; the cut is at 1, low scores are kept\n"
        "\n"
        "3 of 5 rows that were never served:\n"
        "  row  from  domain  tokens  served  last at   score  rank  kept  nearest\n"
        "    3  a:6   a            4       0        -       -     -    no      u 3\n"
        "      id: 3 | text: line 3\n"
        "    4  a:7   a            5       0        -  1.0000     5   yes        -\n"
        "      id: 4 | text: line 4\n"
        "    5  a:8   a            6       0        -  2.0000     9    no      u 5\n"
        "      id: 5 | text: line 5\n"
    )


def test_a_long_text_is_shown_with_its_end():
    text = _excerpt("prompt " * 40 + "\u6570" * 30 + "\x1b[2J the answer is 42")
    assert width(text) == WIDTH - 6
    assert text.startswith("prompt prompt")
    assert text.endswith("\u6570\\x1b[2J the answer is 42")


def test_json_has_every_column_and_the_decisions(run, capsys):
    found = told(capsys, run, "--most", "--limit", 1, "--text")
    assert (found["pool"], found["matching"], found["step"], found["notes"]) == (12, 7, 5, [])
    assert [one["interval"] for one in found["decisions"]] == [1, 2]
    assert found["rows"][0]["served_at"] == [1, 2]
    assert found["rows"][0]["text"] == "id: 2 | text: line 2"


def test_rows_are_exported_as_they_stand_and_can_be_selected_again(run, tmp_path, capsys):
    out = tmp_path / "kept.jsonl"
    assert main(["rows", str(run), "--where", 'dataset == "a"', "--most", "--export", str(out)]) == 0
    assert capsys.readouterr().out == f"3 rows (6 tokens) of a -> {out}\n"
    assert out.read_text().splitlines() == [f'{{"id": {k}, "text": "line {k}"}}' for k in (2, 0, 1)]
    assert json.loads((tmp_path / "kept.dataset_info.json").read_text()) == {"kept": {"file_name": "kept.jsonl"}}
    provenance = json.loads((tmp_path / "kept.provenance.json").read_text())
    assert provenance["rows"] == {"by": "most", "where": 'dataset == "a"', "limit": None, "step": 5}
    assert main(["rows", str(run), "--never", "--export", str(tmp_path / "folder")]) == 0
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        "a.jsonl",
        "b.json",
        "dataset_info.json",
        "provenance.json",
    ]
    assert [row["text"] for row in json.loads((tmp_path / "folder" / "b.json").read_text())] == ["item 3", "item 5"]
    capsys.readouterr()
    assert "the rows are of 2 data sets (a, b)" in failed(capsys, run, "--export", tmp_path / "both.jsonl")
    assert "no row is asked for" in failed(capsys, run, "--where", "tokens > 99", "--export", out)
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text().replace("line 0", "line X"))
    error = failed(capsys, run, "--where", 'dataset == "a"', "--export", tmp_path / "other.jsonl")
    assert f"a: {tmp_path / 'a.jsonl'} changed since its rows were read" in error
    assert error.rstrip().endswith("cannot be told apart; restore it, or score or train again")
    (tmp_path / "a.jsonl").unlink()
    assert main(["rows", str(run), "--where", 'dataset == "a"', "--text", "--limit", "1"]) == 0
    assert "(no text: its file is missing, or changed since)" in capsys.readouterr().out


def test_a_part_of_a_file_is_exported_too(tmp_path, capsys):
    rows = space(tmp_path)
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text() + '\n{"id": 6}\n')
    rows.origins.sources[0] = replace(rows.origins.sources[0], limited=True)
    record(begun(tmp_path / "run" / "dataflex", rows))
    out = tmp_path / "kept.jsonl"
    assert main(["rows", str(tmp_path / "run"), "--where", 'id == "5"', "--export", str(out)]) == 0
    assert out.read_text() == '{"id": 5, "text": "line 5"}\n'


def test_rows_without_a_place_are_not_exported(tmp_path, capsys):
    record(begun(tmp_path / "own" / "dataflex", space(tmp_path, origins=None)))
    assert "7 of the 7 rows have no place in a file" in failed(
        capsys, tmp_path / "own", "--export", tmp_path / "x.jsonl"
    )
    assert main(["rows", str(tmp_path / "own"), "--text", "--limit", "1"]) == 0
    assert "(no text: its place in a file is not known)" in capsys.readouterr().out


def test_packed_rows_have_the_places_of_their_documents(tmp_path, capsys):
    """Three packs of the twelve documents of two sets; one document is in two of them, as text that was cut is."""
    rows = space(tmp_path, size=3, keys=np.arange(3), domains=Domains.from_labels(["all"] * 3, np.full(3, 9)))
    every = space(tmp_path).origins
    packs = pa.array([[0, 7, 1], [1, 2], [8]])
    lists = Origins(
        sources=[Source(name="all")],
        source_of=np.zeros(3, dtype=np.int32),
        position=np.full(3, -1),
        documents=(packs, every),
    )
    rows.origins = lists.taken(np.array([1, 0, 2]))
    recorder = begun(tmp_path / "run" / "dataflex", rows)
    plan(recorder, 0, (0, 1), [1, 2])
    recorder.stepped(1, {"loss": 1.0})
    found = told(capsys, tmp_path / "run", "--text")["rows"]
    assert [row["row"] for row in found] == [1, 2]
    assert found[0]["text"] == "id: 0 | text: line 0 || text: item 1 || id: 1 | text: line 1"
    places = [(each["dataset"], each["line"], each["position"], each["id"]) for each in found[0]["documents"]]
    assert places == [("a", 1, 0, "0"), ("b", None, 1, None), ("a", 2, 1, "1")]
    assert (found[0]["dataset"], found[0]["line"], found[0]["position"]) == ("all", None, None)
    assert main(["rows", str(tmp_path / "run")]) == 0
    assert "    1  all:1 and 2 more  all" in capsys.readouterr().out
    out = tmp_path / "export"
    assert main(["rows", str(tmp_path / "run"), "--where", "row < 2", "--export", str(out)]) == 0
    assert (
        capsys.readouterr().out == f"3 rows (3 tokens) of a -> {out}/a.jsonl\n1 rows (0 tokens) of b -> {out}/b.json\n"
    )
    assert (out / "a.jsonl").read_text() == "".join(f'{{"id": {k}, "text": "line {k}"}}\n' for k in (0, 1, 2))


def test_text_from_data_cannot_steer_the_terminal(tmp_path, capsys):
    rows = space(tmp_path)
    hostile = json.dumps({"text": '\x1b[2J\u202e password="a b"\r\n\x07 NaN'}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text("\n".join([hostile.replace("\n", "\\n").replace("\r", "\\r")] * 6))
    record(begun(tmp_path / "run" / "dataflex", rows))
    for options in ([], ["--json"]):
        assert main(["rows", str(tmp_path / "run"), "--text", *options]) == 0
        out = capsys.readouterr().out
        assert not {"\x1b", "\u202e", "\x07", "\r"} & set(out)
    assert json.loads(out)["rows"][0]["text"] == 'text: \x1b[2J\u202e password="a b"\r\n\x07 NaN'


def test_a_row_as_text():
    assert text_of(b'{"a": "x", "b": [1, {"c": "y"}], "d": "", "e": null}') == 'a: x | b: [1, {"c": "y"}]'
    assert text_of(b"plain \xff") == "plain \ufffd"
    assert text_of(b"[" * 100_000) == "[" * 100_000


TABLE = pa.table(
    {
        "domain": pa.array(["code", "math", None, "code"]).dictionary_encode(),
        "score": [1.0, None, 3.0, 4.0],
        "times": [1, 2, 3, 4],
        "chosen": [True, False, None, True],
        "a name": [1, 1, 2, 2],
        "at": pa.array([[1], [], None, [2]], type=pa.list_(pa.int32())),
    }
)


@pytest.mark.parametrize(
    ("condition", "wanted"),
    [
        ('domain == "code"', [0, 3]),
        ('domain == "code" and times > 3', [3]),
        ('domain != "code"', [1]),
        ("not score > 2", [0]),
        ("score == None", [1]),
        ("None != score", []),
        ("score != None and not chosen", []),
        ("1 < times <= 3", [1, 2]),
        ("times in [1, 4]", [0, 3]),
        ("times not in (1, 4)", [1, 2]),
        ('"at" in domain', [1]),
        ('"at" not in domain', [0, 3]),
        ('col("a name") == 2', [2, 3]),
        ("times / 2 > 1.5", [3]),
        ("-times + 2 * score - 1 == -times + 1", [0]),
        ("chosen", [0, 3]),
        ("chosen == False", [1]),
        ("True", [0, 1, 2, 3]),
        ("score > 3 or times == 1", [0, 3]),
    ],
)
def test_conditions(condition, wanted):
    if condition.startswith("None"):
        with pytest.raises(ConfigError, match="compares a number with nothing"):
            where(TABLE, condition)
        return
    assert np.flatnonzero(where(TABLE, condition).to_numpy(zero_copy_only=False)).tolist() == wanted


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ('domian == "code"', "no column 'domian'; did you mean 'domain'? (columns: domain, score, times, chosen"),
        ("domain == code", "no column 'code'"),
        ("domain == 3", "'domain == 3' compares a number with text; texts stand in quotes, numbers do not"),
        ("chosen == 1", "compares a number with true or false"),
        ("at == 1", "compares a list with a number"),
        ("score", "'score' is no condition but a number"),
        ("score and times", "'score' is no condition but a number"),
        ("domain + 1 > 2", "'domain' is no number but text"),
        ("times ==", "cannot be read"),
        ("", "cannot be read"),
        ("times = 3", "cannot be read"),
        ("__import__('os').system('true')", "has no place in a condition"),
        ("times.real == 1", "'times.real' has no place in a condition"),
        ("(lambda: 1)() == 1", "has no place in a condition"),
        ("[x for x in times] == 1", "has no place in a condition"),
        ("times ** 9999999 > 1", "has no place in a condition"),
        ("domain in 'code'", 'write "a text" in COLUMN'),
        ("f'{times}' == 1", "has no place in a condition"),
        ("times is 3", "compares in a way that is not known"),
        ("times == " + "(" * 500 + "1" + ")" * 500, "cannot be read"),
        ("times == 1 or " * 400 + "chosen", "has 5,606 characters; at most 4,096 are read"),
        ("-" * 3000 + "times > 1", "cannot be read"),
        ("times > 10000000000000000000000", "cannot be read"),
        ('domain == "\x1b[2J"  x', "'domain == \"\\x1b[2J\"  x' cannot be read"),
    ],
)
def test_conditions_that_cannot_be_read_are_told(condition, message):
    with pytest.raises(ConfigError) as error:
        where(TABLE, condition)
    assert message in str(error.value).replace("\\\\", "\\")
    assert "\x1b" not in str(error.value)


def test_runs_without_a_record_are_told(tmp_path, capsys):
    assert "has no dataflex/events.jsonl" in failed(capsys, tmp_path)
    assert "nowhere is not a folder" in failed(capsys, tmp_path / "nowhere")
