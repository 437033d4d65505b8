"""``dataflex init``: a configuration for files of one's own, whole and accepted, or nothing."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
import yaml

from dataflex.cli import main
from dataflex.commands.init import RECIPES
from dataflex.commands.plan import plan
from dataflex.config.build import method_class
from dataflex.config.mappings import key_of
from dataflex.registry import KINDS
from tests.docs.pages import EXAMPLES

MODEL = str(EXAMPLES / "models" / "base-4m")
ROW = {"instruction": "the cat", "input": "", "output": "a mat", "source": "a"}


@pytest.fixture
def my(tmp_path):
    folder = tmp_path / "my"
    folder.mkdir()
    for name, rows in (("pool", 64), ("more", 40), ("goal", 8)):
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(ROW)}\n" * rows)
    return folder


def start(name, *arguments, data=("my/pool.jsonl", "my/more.jsonl")):
    """With what is in ``arguments`` at either end: overrides may follow files."""
    flags = [word for word in arguments if "=" not in word]
    return main(["init", name, *flags, "--model", MODEL, "--data", *data, *(set(arguments) - set(flags))])


@pytest.mark.parametrize(
    "name", [*RECIPES, "mixer/static", "segment", "slm", "greats", "compose", "staged", "all", "weighter/loss"]
)
def test_what_is_written_is_accepted(name, my, capsys):
    more = ["--targets", "my/goal.jsonl"] if name in ("towards", "words", "greats", "compose") else []
    more += [f"dynamic.weighter.reference={MODEL}"] if name == "slm" else []
    assert start(name, *more) == 0, capsys.readouterr().err
    file = my / f"{name.replace('/', '_')}.yaml"
    text = file.read_text()
    assert "passes" in plan(file).values
    assert f"dataflex train my/{file.name}" in text
    config = yaml.safe_load(text)
    assert config["dataset"] == "pool, more"
    assert config["dataset_dir"] == "my"
    for kind in {*KINDS} & {*config["dynamic"]}:
        cls = method_class(kind, config["dynamic"][kind]["name"], "", [])
        for field in dataclasses.fields(cls.Params):
            assert re.search(rf"^    (# )?{key_of(field)}: ", text, re.MULTILINE), field.name
    # the defaults that stand there as comments are the defaults
    loud = "\n".join(
        line.replace("    # ", "    ", 1) if line.startswith("    # ") else line for line in text.splitlines()
    )
    file.write_text(loud)
    assert plan(file).values["config"]["dynamic"] == plan(_again(file, text)).values["config"]["dynamic"]


def _again(file: Path, text: str) -> Path:
    other = file.with_name("again.yaml")
    other.write_text(text)
    return other


def test_nothing_is_replaced(my, capsys):
    assert start("selector/loss") == 0
    info, text = (my / "dataset_info.json").read_text(), (my / "selector_loss.yaml").read_text()
    assert start("selector/loss") == 2
    assert "my/selector_loss.yaml exists; name another file with --out" in capsys.readouterr().err
    assert start("selector/loss", "--out", "my/two.yaml", "dynamic.selector.focus=high") == 0
    assert "focus: high" in (my / "two.yaml").read_text()
    assert (my / "selector_loss.yaml").read_text() == text
    assert (my / "dataset_info.json").read_text() == info
    assert sorted(file.name for file in my.iterdir() if file.suffix in (".yaml", ".json")) == [
        "dataset_info.json",
        "selector_loss.yaml",
        "two.yaml",
    ]


def test_what_is_refused_leaves_nothing_behind(my, capsys):
    before = sorted(my.iterdir())
    assert start("doremi") == 2
    assert "dynamic.mixer.reference: missing" in capsys.readouterr().err
    assert sorted(my.iterdir()) == before
    (my / "dataset_info.json").write_text('{"old": {"file_name": "old.jsonl"}}')
    assert start("selector/loss", "lora_rnak=3") == 2
    assert (my / "dataset_info.json").read_text() == '{"old": {"file_name": "old.jsonl"}}'
    assert start("selector/loss") == 0
    assert [*json.loads((my / "dataset_info.json").read_text())] == ["old", "pool", "more"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lss", "--data", "my/pool.jsonl", "--model", "m"], "no recipe or method 'lss'; did you mean 'loss'?"),
        (["loss", "--data", "my/pool.jsonl", "--model", "m"], "init: loss is selector/loss and weighter/loss"),
        ([], "init: METHOD, --data, --model must be given where no terminal can ask"),
        (["less", "--data", "my/pool.jsonl", "--model", "m"], "init: --targets must be given where no terminal"),
        (["tacs", "--data", "pool", "--model", "m", "--targets", "g"], "--data: no such file: pool; data sets by name"),
        (
            ["grad_norm", "--data", "my/odd.jsonl", "--model", "m"],
            "the columns of my/odd.jsonl (a) are of no known format",
        ),
        (["grad_norm", "--data", "my/pool.jsonl", "--model", "m", "--out", "x.txt"], "must end in .yaml or .yml"),
        (["grad_norm", "--data", "my/pool.jsonl", "--model", "m", "--out", "no/x.yaml"], "--out: no is no folder"),
    ],
)
def test_mistakes(arguments, message, my, capsys):
    (my / "odd.jsonl").write_text('{"a": 1}\n')
    before = sorted(my.iterdir())
    assert main(["init", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(my.iterdir()) == before


@pytest.mark.parametrize(
    ("row", "stage", "entry"),
    [
        ({"text": "a b"}, "pt", {"columns": {"prompt": "text"}}),
        ({"question": "a", "answer": "b"}, "sft", {"columns": {"prompt": "question", "response": "answer"}}),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "dpo",
            {"ranking": True, "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}},
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "sft",
            {"formatting": "sharegpt", "columns": {"messages": "conversations"}},
        ),
        (
            {
                "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
                **{"system": "s", "tools": "[]", "images": ["a.png"]},
            },
            "sft",
            {
                "formatting": "sharegpt",
                "columns": {"messages": "conversations", "system": "system", "tools": "tools", "images": "images"},
            },
        ),
        (
            {"instruction": "a", "input": "b", "output": "c", "images": ["a.png"]},
            "sft",
            {"columns": {"prompt": "instruction", "response": "output", "query": "input", "images": "images"}},
        ),
    ],
)
def test_formats(row, stage, entry, my):
    (my / "own.jsonl").write_text(f"{json.dumps(row)}\n" * 30)
    assert start("random", data=["my/own.jsonl"]) == 2  # a selector and a mixer
    assert start("selector/random", data=["my/own.jsonl"]) == 0
    assert yaml.safe_load((my / "selector_random.yaml").read_text())["stage"] == stage
    assert json.loads((my / "dataset_info.json").read_text())["own"] == {"file_name": "own.jsonl", **entry}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_names_with_spaces_are_one_file(my, monkeypatch):
    (my / "pool.jsonl").rename(my / "my pool.jsonl")
    assert start("baseline", data=["my/my pool.jsonl", "my/more.jsonl"]) == 0
    assert yaml.safe_load((my / "baseline.yaml").read_text())["dataset"] == "my pool, more"
    for at, typed in enumerate(
        ("my/my pool.jsonl", '"my/my pool.jsonl", my/more.jsonl', "my/more.jsonl,my/goal.jsonl")
    ):
        monkeypatch.setattr("sys.stdin", Terminal(f"{typed}\n"))
        monkeypatch.setattr("sys.stderr", Terminal())
        assert main(["init", "baseline", "--model", MODEL, "--out", f"my/{at}.yaml"]) == 0
        names = ["my pool", "my pool, more", "more, goal"]
        assert yaml.safe_load((my / f"{at}.yaml").read_text())["dataset"] == names[at]


def test_questions_on_a_terminal(my, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Terminal(f"words\nmy/pool.jsonl\n{MODEL}\nmy/goal.jsonl\n"))
    monkeypatch.setattr("sys.stderr", Terminal())
    assert main(["init"]) == 0
    assert yaml.safe_load((my / "words.yaml").read_text())["dynamic"]["selector"]["targets"] == ["goal"]
