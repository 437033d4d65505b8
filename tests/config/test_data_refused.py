"""What LLaMA-Factory's loader would end on with a traceback: told by key and in words, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.data import Source, contents_of, count_rows
from dataflex.config.split import resolve
from dataflex.errors import ConfigError

Config = Callable[..., dict[str, Any]]
ROW = {"instruction": "a", "input": "", "output": "b"}
LINE = json.dumps(ROW)

# Name: files of the data set 'x', what dataset_info.json says besides its files, and what is told.
FILES: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "two types": ({"x/1.jsonl": LINE, "x/2.csv": "a,b\n1,2\n"}, {}, "holds files of several types (1.jsonl, 2.csv)"),
    "saved by save_to_disk": (
        {"x/data-00000-of-00001.arrow": "x", "x/state.json": "{}", "x/dataset_info.json": "{}"},
        {},
        "which 'save_to_disk' wrote",
    ),
    "saved as a dictionary": ({"x/dataset_dict.json": "{}", "x/train/state.json": "{}"}, {}, "'save_to_disk' wrote"),
    "a folder in a folder": ({"x/1.jsonl": LINE, "x/old/1.jsonl": LINE}, {}, "which holds a folder, old"),
    "capital letters": ({"x.JSONL": LINE}, {}, "must end in .arrow, .csv, .json, .jsonl, .parquet, .txt (in small"),
    "a broken line": ({"x.jsonl": f"{LINE}\n\n{LINE[:-1]}\n{LINE}\n"}, {}, "is malformed JSON at line 4"),
    "a broken array": ({"x.json": f"[{LINE},\n{LINE}"}, {}, "is malformed JSON at line 2"),
    "a comma after each line": ({"x.jsonl": f"{LINE},\n{LINE},\n"}, {}, "is malformed JSON at line 1"),
    "a line of another kind": ({"x.jsonl": f"{LINE}\n[1]\n"}, {}, "line 2 holds a list where an object"),
    "a key twice": (
        {"x.jsonl": f'{LINE}\n{{"input": "i", {LINE[1:]}\n'},
        {},
        "line 2 holds 'input' twice in one object",
    ),
    "a key twice further in": (
        {"x.json": f"{LINE}\n" + json.dumps({**ROW, "more": [{"a": 1}]}).replace('"a": 1', '"a": 1, "a": null')},
        {},
        "line 2 holds 'a' twice in one object",
    ),
    "two types in a column": (
        {"x.jsonl": f"{LINE}\n" + json.dumps({**ROW, "input": 3})},
        {},
        "'input' is text in line 1 and a number in line 2",
    ),
    "not text": ({"x.jsonl": "\udcff"}, {}, "is not UTF-8 text (byte 0)"),
    "a mark before an array": ({"x.json": f"\ufeff[{LINE}]"}, {}, "begins with a byte order mark and holds an array"),
    "an empty file": ({"x.csv": ""}, {}, "dataset: 'x' has no rows"),
    "a header alone": ({"x.csv": "instruction,input,output\n"}, {}, "dataset: 'x' has no rows"),
    "no parquet": ({"x.parquet": "not at all"}, {}, "is no readable Parquet"),
    "a column that is not there": (
        {"x.jsonl": LINE},
        {"columns": {"prompt": "instuction", "response": "output"}},
        "has no column 'instuction' for the prompt; did you mean 'instruction'? (columns found: input, instruction",
    ),
    "a default column that is not there": (
        {"x.csv": "instruction,output\na,b\n"},
        {},
        "has no column 'input' for the query",
    ),
    "messages that are not there": ({"x.jsonl": LINE}, {"formatting": "sharegpt"}, "has no column 'conversations'"),
    "no response in any row": (
        {"x.jsonl": json.dumps({**ROW, "output": None}) + "\n" + json.dumps({**ROW, "output": None})},
        {},
        "has no row that stage sft can use: line 1 of",
    ),
    "responses that are numbers": (
        {"x.json": json.dumps([{**ROW, "output": 3}])},
        {},
        "has a number in 'output'; the response must be text",
    ),
    "prompts that are numbers": (
        {"x.jsonl": json.dumps({**ROW, "input": 7})},
        {},
        "has a number in 'input'; the query",
    ),
    "answers marked good or bad": (
        {"x.jsonl": json.dumps({**ROW, "good": True})},
        {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "good"}},
        "the kto_tag must be left out of 'columns' in stage sft",
    ),
    "roles of another name": (
        {
            "x.jsonl": json.dumps(
                {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}
            )
        },
        {"formatting": "sharegpt"},
        "has 'from': 'user' in message 1, where 'human' or 'observation' is expected",
    ),
    "a question without an answer": (
        {"x.jsonl": json.dumps({"conversations": [{"from": "human", "value": "a"}]})},
        {"formatting": "sharegpt"},
        "has 1 messages of the two sides in turn; the number must be even",
    ),
    "one conversation that is null": (
        {
            "x.jsonl": json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
            + '\n{"conversations": null}'
        },
        {"formatting": "sharegpt"},
        "cannot be loaded: line 2 of",
    ),
    "messages that are not named": (
        {"x.jsonl": LINE},
        {"formatting": "openai", "columns": {"prompt": "instruction"}},
        "does not say in 'columns' which one holds the messages",
    ),
    "an unknown format": ({"x.jsonl": LINE}, {"formatting": "alpca"}, "is not a format; did you mean 'alpaca'?"),
    "pairs for sft": (
        {"x.jsonl": LINE},
        {"ranking": True},
        "holds pairs of answers ('ranking: true'), which stage sft",
    ),
    "a split of a local file": ({"x.jsonl": LINE}, {"split": "test"}, "has 'split': 'test', and rows of local files"),
    "a number of samples as text": ({"x.jsonl": LINE}, {"num_samples": "5"}, "has 'num_samples': expected a whole"),
    "columns as a list": ({"x.jsonl": LINE}, {"columns": ["a"]}, "has 'columns': expected a mapping"),
}
KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "a comma too many": ({"dataset": "a,,b"}, "dataset: a name is empty in 'a,,b'"),
    "a comma at the end": ({"dataset": "a,b,"}, "dataset: a name is empty in 'a,b,'"),
    "names of evaluation sets": ({"eval_dataset": ",t"}, "eval_dataset: a name is empty in ',t'"),
    "a number for a name": ({"dataset": 2024}, "dataset: expected text or a list, found 2024"),
    "a list as text": ({"max_samples": "9,10"}, "max_samples: expected a whole number, found '9,10'"),
    "a number in quotes": (
        {"max_samples": "10"},
        "max_samples: expected a whole number, found the text '10'; write it w",
    ),
    "no samples": ({"max_samples": 0}, "max_samples: must be at least 1, found 0"),
    "a share as text": ({"val_size": "0.1"}, "val_size: expected a number, found the text '0.1'"),
    "a negative share": (
        {"val_size": -0.1},
        "val_size: expected a share below 1 or a whole number of rows, found -0.1",
    ),
    "everything set aside": ({"val_size": 150}, "val_size: 150 sets aside all 150 rows"),
    "cutoff as text": ({"cutoff_len": "many"}, "cutoff_len: expected a whole number, found 'many'"),
    "an empty evaluation set": ({"eval_dataset": "empty"}, "eval_dataset: 'empty' has no rows"),
    "nothing to evaluate": ({"eval_strategy": "steps"}, "eval_strategy: no rows are held out"),
    "nothing to predict": ({"do_predict": True}, "do_predict: no rows are held out"),
    "nothing held out by domain": (
        {"dynamic": {"mixer": "uniform", "eval_by_domain": True}},
        "dynamic.eval_by_domain: no rows are held out",
    ),
    "one data set to split by domain": (
        {"dataset": "a", "val_size": 0.2, "dynamic": {"selector": "all", "eval_by_domain": True}},
        "dynamic.eval_by_domain: the held-out rows are of one data set",
    ),
    "a column that no row has": (
        {"dynamic": {"weighter": {"name": "column", "column": "outptu"}}},
        "dynamic.weighter: the data set 'a' has no column 'outptu'; did you mean 'output'?",
    ),
    "streaming beside a copy": (
        {"streaming": True, "tokenized_path": "copy"},
        "streaming: rows that are tokenized when",
    ),
    "shares of interleaving": ({"interleave_probs": "0.5,0.5"}, "interleave_probs: data sets are kept apart"),
}


@pytest.mark.parametrize("key", ["dataset", "eval_dataset", "targets"])
@pytest.mark.parametrize("name", FILES)
def test_a_data_set_that_cannot_be_loaded(name: str, key: str, config: Config, project: Path) -> None:
    files, entry, told = FILES[name]
    for file, content in files.items():
        path = project / "data" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    info = json.loads((project / "data/dataset_info.json").read_text())
    info["x"] = {"file_name": next(iter(files)).split("/")[0], **entry}
    (project / "data/dataset_info.json").write_text(json.dumps(info))
    block = {"selector": {"name": "bm25", "targets": ["x"]}, "interval_steps": 5}
    changes: dict[str, Any] = {"dynamic": block} if key == "targets" else {key: "x"}
    with pytest.raises(ConfigError) as caught:
        resolve(config(**changes), project)
    where = "dynamic.selector.targets" if key == "targets" else key
    told = told.replace("dataset: ", f"{where}: ", 1)
    assert any(line.startswith(f"{where}: 'x' ") and told in line for line in caught.value.problems), (
        caught.value.problems
    )


def test_values_that_only_parquet_has_are_told(config: Config, project: Path) -> None:
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{**ROW, "output": datetime.date(2026, 1, 1)}] * 30
    pq.write_table(pa.Table.from_pylist(rows), project / "data/x.parquet")
    info = json.loads((project / "data/dataset_info.json").read_text())
    (project / "data/dataset_info.json").write_text(json.dumps(info | {"x": {"file_name": "x.parquet"}}))
    with pytest.raises(ConfigError, match=r"row 1 of .* has a date in 'output'; the response must be text"):
        resolve(config(dataset="x"), project)


def test_a_row_that_is_not_read_ends_nothing(config: Config, project: Path) -> None:
    rows = [ROW, {**ROW, "output": None}, {**ROW, "instruction": None}]
    broken = {"formatting": "sharegpt", "file_name": "x.jsonl"}
    good = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    lines = [*[good] * 30, {"conversations": None}]
    (project / "data/x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (project / "data/y.jsonl").write_text("\n".join(map(json.dumps, rows * 30)))
    info = json.loads((project / "data/dataset_info.json").read_text())
    (project / "data/dataset_info.json").write_text(json.dumps(info | {"x": broken, "y": {"file_name": "y.jsonl"}}))
    resolve(config(dataset="x", max_samples=30), project)
    resolve(config(dataset="y"), project)
    with pytest.raises(ConfigError, match="has null in 'conversations'; the messages must be a list of messages"):
        resolve(config(dataset="x"), project)


@pytest.mark.parametrize("name", KEYS)
def test_a_key_that_cannot_be_read(name: str, config: Config, project: Path) -> None:
    changes, told = KEYS[name]
    with pytest.raises(ConfigError) as caught:
        resolve(config(**changes), project)
    assert any(line.startswith(told) for line in caught.value.problems), caught.value.problems


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (f"{LINE}\n{LINE}", 2),
        (f"{LINE}{LINE}", 2),
        (json.dumps(ROW, indent=1) * 2, None),
        (f"\ufeff{LINE}\n", 1),
        ('{"a": null}\n{"a": "x"}\n', 2),
        ('{"a": 1}\n{"a": 1.5}\n{"a": NaN}\n', 3),
        ('{"a": 1}\n{"b": "x"}\n', 2),
        ('["x", "y"]', 2),
    ],
)
def test_what_the_data_sets_library_reads_is_let_through(text: str, rows: int | None, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert contents_of(tmp_path / "x.json")[tmp_path / "x.json"].problem == ""
    assert count_rows(Source(name="x", path=tmp_path / "x.json"), LlamaFactoryArgs.read({})) == rows


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, '{"a": ' + "9" * 5_000 + "}\n"])
def test_what_python_does_not_read_is_left_to_the_loader(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    assert count_rows(Source(name="x", path=tmp_path / "x.jsonl"), LlamaFactoryArgs.read({})) is None


def test_packages_that_generation_needs(config: Config, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jieba" else found(name))
    with pytest.raises(ConfigError, match=r"predict_with_generate: needs jieba"):
        resolve(config(predict_with_generate=True, do_predict=True, eval_dataset="t"), project)


def test_a_key_twice_in_an_array_is_read_as_pandas_does(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"a": 1, "a": 2}]')
    assert [found.problem for found in contents_of(tmp_path / "x.json").values()] == [""]


def test_rows_deeper_than_python_reads_are_left_to_the_loader(config: Config, project: Path) -> None:
    (project / "data/a.jsonl").write_text("[" * 100_000)
    resolve(config(), project)
