"""``dataflex select`` on tables written by hand: which rows, in what form, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from dataflex.cli import main
from dataflex.config.files import FileRecord
from dataflex.errors import ConfigError
from dataflex.offline.subset import Budget
from dataflex.score_table import ScoreTable, read_scores, write_scores


@pytest.fixture
def lines(tmp_path):
    """12 rows of ``pool``; its rows 3 and 8 were dropped when it was tokenized."""
    lines = [json.dumps({"id": i, "text": "word " * i}) for i in range(12)]
    (tmp_path / "pool.jsonl").write_text("".join(line + "\n" for line in lines))
    (tmp_path / "more.json").write_text(json.dumps([{"id": 100 + i} for i in range(4)]))
    return lines


def write(tmp_path, **columns):
    kept = [i for i in range(12) if i not in (3, 8)]
    sources = [
        {
            "name": name,
            "rows": rows,
            "rows_read": read,
            "entry": {"file_name": f"{name}{ending}", "columns": {"prompt": "text"}},
            "files": [vars(FileRecord.of(tmp_path / f"{name}{ending}"))],
        }
        for name, ending, rows, read in (("pool", ".jsonl", 10, 12), ("more", ".json", 4, 4))
    ]
    methods = list(dict.fromkeys(name.split(".")[0].split("/")[0] for name in columns))
    table = ScoreTable(
        datasets=("pool", "more"),
        dataset_of=np.repeat([0, 1], [10, 4]),
        domains=("x", "y"),
        domain_of=np.array([0] * 3 + [1] * 11),
        position=np.array([*kept, 0, 1, 2, 3]),
        tokens=np.array([10 + i for i in range(14)]),
        supervised_tokens=np.full(14, 5),
        columns={name: np.asarray(values) for name, values in columns.items()},
        provenance={"methods": [{"name": name} for name in methods], "data": {"sources": sources}, "config": {}},
    )
    write_scores(tmp_path / "scores.parquet", table)
    return table


SCORES = np.array([3.0, 9.0, np.nan, 1.0, 8.0, 7.0, 7.0, 2.0, 0.0, 5.0, -1.0, -2.0, -3.0, -np.inf])


def test_the_table_comes_back(tmp_path, lines):
    table = write(tmp_path, loss=SCORES.astype(np.float32), **{"loss.rank": np.arange(14) - 1})
    found = read_scores(tmp_path / "scores.parquet")
    np.testing.assert_array_equal(found.columns["loss"], table.columns["loss"])
    assert found.columns["loss"].dtype == np.float32
    assert np.isnan(found.columns["loss.rank"][0])
    assert found.columns["loss.rank"][13] == 12
    assert (found.datasets, found.domains) == (("pool", "more"), ("x", "y"))
    np.testing.assert_array_equal(found.position, table.position)
    np.testing.assert_array_equal(found.dataset_of, table.dataset_of)
    assert found.provenance["methods"] == [{"name": "loss"}]
    assert pq.read_schema(tmp_path / "scores.parquet").names[:4] == ["row", "dataset", "domain", "position"]


def test_best_rows_byte_for_byte(tmp_path, lines):
    """Rows 1, 4, 5, 6 of the table are rows 1, 5, 6, 7 of the file, which lost two rows."""
    write(tmp_path, loss=SCORES)
    assert main(["select", "scores.parquet", "--budget", "4", "--out", "best.jsonl"]) == 0
    assert (tmp_path / "best.jsonl").read_text().splitlines() == [lines[i] for i in (1, 5, 6, 7)]
    assert json.loads((tmp_path / "best.dataset_info.json").read_text()) == {
        "best": {"file_name": "best.jsonl", "columns": {"prompt": "text"}}
    }
    told = json.loads((tmp_path / "best.provenance.json").read_text())
    assert told["rule"] == {"name": "top_k"}
    assert told["scores"]["blake2b"] == FileRecord.of(tmp_path / "scores.parquet").blake2b
    assert told["files"][0]["blake2b"] == FileRecord.of(tmp_path / "best.jsonl").blake2b
    assert told["files"][0]["rows"] == 4
    assert told["files"][0]["tokens"] == 11 + 14 + 15 + 16


def test_order_of_preference_and_low_scores(tmp_path, lines, capsys):
    write(tmp_path, loss=SCORES)
    command = ["select", "scores.parquet", "--budget", "3", "--out", "low.jsonl", "--order", "preference"]
    scores = SCORES.copy()
    scores[10:] = np.nan  # one data set only
    write(tmp_path, loss=scores)
    assert main([*command, "--prefer", "low", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == [{**told["files"][0], "dataset": "pool", "rows": told["rows"]}]
    # 0.0 (table row 8 = file row 10), 1.0 (3 = 4), 2.0 (7 = 9)
    assert (tmp_path / "low.jsonl").read_text().splitlines() == [lines[i] for i in (10, 4, 9)]


def test_ranks_prefer_low(tmp_path, lines):
    ranks = np.full(14, -1)
    ranks[[6, 2, 0]] = [0, 1, 2]
    write(tmp_path, **{"random.rank": ranks})
    assert main(["select", "scores.parquet", "--budget", "2", "--out", "r.jsonl", "--order", "preference"]) == 0
    assert (tmp_path / "r.jsonl").read_text().splitlines() == [lines[7], lines[2]]


def test_several_data_sets_make_a_folder(tmp_path, lines, capsys):
    scores = np.zeros(14)
    scores[[1, 11, 13]] = [1, 3, 2]
    write(tmp_path, loss=scores)
    assert main(["select", "scores.parquet", "--budget", "3", "--out", "subset"]) == 0
    assert (tmp_path / "subset/pool.jsonl").read_text() == lines[1] + "\n"
    assert json.loads((tmp_path / "subset/more.json").read_text()) == [{"id": 101}, {"id": 103}]
    info = json.loads((tmp_path / "subset/dataset_info.json").read_text())
    assert {name: entry["file_name"] for name, entry in info.items()} == {"pool": "pool.jsonl", "more": "more.json"}
    assert "2 rows (44 tokens) of more -> subset/more.json" in capsys.readouterr().out
    assert main(["select", "scores.parquet", "--budget", "3", "--out", "subset.jsonl"]) == 2
    assert "name a folder" in capsys.readouterr().err


def test_a_budget_of_tokens_passes_over_rows_that_do_not_fit(tmp_path, lines):
    write(tmp_path, loss=SCORES)
    assert main(["select", "scores.parquet", "--budget", "36tokens", "--out", "t.jsonl"]) == 0
    # best first: 11 tokens (row 1), 14 (row 4) -> 25; 15 and 16 do not fit; 11 left: row 0 has 10.
    kept = [1, 4]
    left = 36 - 25
    for row in np.argsort(-np.nan_to_num(SCORES, nan=-99), kind="stable")[2:]:
        if np.isfinite(SCORES[row]) and 10 + row <= left:
            kept.append(int(row))
            left -= 10 + int(row)
    file_rows = [i for i in range(12) if i not in (3, 8)]
    assert sorted(kept) == [0, 1, 4]
    assert (tmp_path / "t.jsonl").read_text().splitlines() == [lines[file_rows[i]] for i in sorted(kept)]


def test_draws_follow_the_seed(tmp_path, lines):
    scores = SCORES.copy()
    scores[10:] = np.nan
    write(tmp_path, loss=scores)
    command = ["select", "scores.parquet", "--rule", "gumbel_top_k", "--budget", "0.3", "temperature=100"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main([*command, "--out", f"{name}.jsonl", "--seed", seed]) == 0
    a, b, c = ((tmp_path / f"{name}.jsonl").read_text() for name in "abc")
    assert a == b
    assert a != c
    assert len(a.splitlines()) == 4  # 0.3 of 14 rows


def test_domains_share_equally_and_targets_take_turns(tmp_path, lines):
    scores = np.arange(14, dtype=float)
    scores[10:] = np.nan
    aim, other = np.where(np.isnan(scores), np.nan, np.arange(14)), np.where(np.isnan(scores), np.nan, -np.arange(14.0))
    write(tmp_path, less=scores, **{"less/a": aim, "less/b": other})
    base = ["select", "scores.parquet", "--score", "less", "--budget", "4"]
    assert main([*base, "--rule", "water_filling", "--out", "w.jsonl"]) == 0
    # Domain x holds rows 0 to 2, y the rest: two of the best of each.
    ids = [json.loads(line)["id"] for line in (tmp_path / "w.jsonl").read_text().splitlines()]
    assert ids == [1, 2, 10, 11]
    assert main([*base, "--rule", "round_robin", "--order", "preference", "--out", "r.jsonl"]) == 0
    ids = [json.loads(line)["id"] for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert ids == [11, 0, 10, 1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--budget", "13"], "13 rows are wanted, and 12 of 14 have a value in loss"),
        (["--budget", "0"], "'0' is nothing"),
        (["--budget", "1.5"], "a share lies above 0"),
        (["--budget", "many"], "expected a share"),
        (["--budget", "5tokens"], "no row fits"),
        (["--budget", "2", "--score", "lose"], "no column 'lose'; did you mean 'loss'?"),
        (["--budget", "2", "--rule", "topk"], "unknown rule 'topk'; did you mean 'top_k'?"),
        (["--budget", "2", "--rule", "k_center"], "k_center needs vectors"),
        (["--budget", "2", "--rule", "knn_kde"], "--method compose --budget ROWS compose.rule=knn_kde"),
        (["--budget", "2", "--rule", "token_budget"], "wants a number of tokens"),
        (["--budget", "9tokens", "--rule", "water_filling"], "wants a number of rows or a share"),
        (["--budget", "2", "--rule", "round_robin"], "loss has no columns by target"),
        (["--budget", "2", "--rule", "gumbel_top_k", "temprature=2"], "did you mean 'temperature'?"),
        (["--budget", "2", "--out", "x.json"], "must end in .jsonl"),
        (["--budget", "2", "--out", "pool.jsonl"], "is the file that the rows are from"),
        (["--budget", "2", "--budgets", "3"], "unrecognized arguments: --budgets"),
    ],
)
def test_what_is_refused(tmp_path, lines, capsys, arguments, told):
    write(tmp_path, loss=SCORES)
    before = (tmp_path / "pool.jsonl").read_bytes()
    out = [] if "--out" in arguments else ["--out", "x.jsonl"]
    assert main(["select", "scores.parquet", *arguments, *out]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.glob("x.*"))
    assert (tmp_path / "pool.jsonl").read_bytes() == before


def test_a_source_that_changed_is_refused(tmp_path, lines, capsys):
    write(tmp_path, loss=SCORES)
    content = (tmp_path / "pool.jsonl").read_bytes()
    (tmp_path / "pool.jsonl").write_bytes(content.replace(b'"id": 7', b'"id": 8'))
    assert main(["select", "scores.parquet", "--budget", "2", "--out", "x.jsonl"]) == 2
    assert "changed since its rows were read" in capsys.readouterr().err
    (tmp_path / "pool.jsonl").unlink()
    assert main(["select", "scores.parquet", "--budget", "2", "--out", "x.jsonl"]) == 2
    assert "no such file: pool.jsonl" in capsys.readouterr().err.replace(f"{tmp_path}/", "")
    assert not (tmp_path / "x.jsonl").exists()


def test_foreign_files_are_told(tmp_path, capsys):
    import pyarrow as pa

    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("no parquet")
    for name, told in (("other", "is not a file of scores"), ("text", "cannot be read"), ("gone", "no such file")):
        assert main(["select", f"{name}.parquet", "--budget", "2", "--out", "x.jsonl"]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.1", Budget(rows=7)),
        (".5", Budget(rows=36)),
        ("1.0", Budget(rows=72)),
        ("0.001", Budget(rows=1)),
        ("1", Budget(rows=1)),
        ("500", Budget(rows=500)),
        ("500 rows", Budget(rows=500)),
        ("200_000tokens", Budget(tokens=200_000)),
        ("1Token", Budget(tokens=1)),
    ],
)
def test_budgets(text, expected):
    assert Budget.read(text, 72) == expected


@pytest.mark.parametrize("text", ["", "-3", "0.0", "1.01", "3.5tokens", "tokens", "5 apples", "1e3", "0tokens"])
def test_budgets_that_are_none(text):
    with pytest.raises(ConfigError, match="--budget"):
        Budget.read(text, 72)


def test_near_duplicates_of_preferred_rows_are_left_out(tmp_path, lines, monkeypatch, capsys):
    """Rows 0, 2 and 5 are much alike, one word of 60 differs, and 1 is of other words."""
    words = [f"w{i}" for i in range(60)]
    texts = {0: words, 2: [*words[:-1], "end"], 5: ["begin", *words[1:]], 1: [f"v{i}" for i in range(60)]}
    rows = [{"id": i, "text": " ".join(texts.get(i, [f"t{i}x{k}" for k in range(60)]))} for i in range(12)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path, loss=SCORES)
    monkeypatch.chdir(tmp_path)
    command = ["select", "scores.parquet", "--budget", "3", "--overwrite", "--out", "chosen", "--order", "preference"]

    def chosen(*more):
        assert main([*command, *more]) == 0
        told = capsys.readouterr().out
        return [json.loads(line)["id"] for line in (tmp_path / "chosen/pool.jsonl").read_text().splitlines()], told

    kept = [i for i in range(12) if i not in (3, 8)]  # positions of the table's rows in the file
    best = [kept[row] for row in np.argsort(-np.nan_to_num(SCORES[:10], nan=-9), kind="stable")]
    plain, _ = chosen()
    assert plain == best[:3]
    # Of 0, 2 and 5 only the one of the highest score stays; row 2 of the table has no score.
    first = next(i for i in best if i in (0, 2, 5))
    expected = [i for i in best if i not in (0, 2, 5) or i == first]
    alone, told = chosen("--near-duplicates", "0.7")
    assert alone == expected[:3]
    assert "1 near-duplicates of preferred rows were left out" in told
    assert main([*command, "--near-duplicates", "1.5"]) == 2
    assert "--near-duplicates: 1.5" in capsys.readouterr().err


def test_a_row_near_a_duplicate_alone_is_kept():
    """Each row shares half of its runs with the one before: near by 0.3, and every second one is no duplicate."""
    from dataflex.offline.duplicates import near_duplicates

    words = [f"w{i}" for i in range(400)]
    rows = [json.dumps({"text": " ".join(words[start : start + 100])}).encode() for start in range(0, 250, 50)]
    exact = len(set(range(96)) & set(range(50, 146))) / len(set(range(96)) | set(range(50, 146)))
    assert 0.3 < exact < 0.35
    assert near_duplicates(rows, 0.2).tolist() == [False, True, False, True, False]
    assert not near_duplicates(rows, 0.6).any()


@pytest.mark.parametrize("share", [0.001, 0.98, 0.99, 1.0])
def test_every_share_finds_equal_rows(share):
    from dataflex.offline.duplicates import near_duplicates

    rows = [json.dumps({"text": " ".join(f"w{i}" for i in range(start, start + 50))}).encode() for start in (0, 0, 100)]
    assert near_duplicates(rows, share).tolist() == [False, True, False]


def test_chinese_rows_are_compared_by_characters():
    """The last four of 40 characters differ: 32 of 36 runs of five are shared, 32 / 40 in all."""
    from dataflex.offline.duplicates import near_duplicates

    text = "".join(chr(0x4E00 + i) for i in range(40))
    changed = text[:36] + "\u9fa0\u9fa1\u9fa2\u9fa3"
    rows = [json.dumps({"text": one}).encode() for one in (text, changed, text[::-1])]
    assert near_duplicates(rows, 0.6).tolist() == [False, True, False]
