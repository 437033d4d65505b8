"""The command line: help, exit codes, messages without traces, and a quick start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.cli import main
from dataflex.errors import ConfigError
from dataflex.registry import KINDS, names

Config = Callable[..., dict[str, Any]]

COMMANDS = ("train", "plan", "methods", "init", "schema", "completion", "report", "version")

HEAVY = ("torch", "transformers", "llamafactory", "datasets", "accelerate", "peft", "matplotlib")


@pytest.fixture
def run_file(project: Path, config: Config) -> Path:
    file = project / "run.json"
    file.write_text(json.dumps(config()))
    return file


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(f"    {command} " in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: dataflex {command}" in out
    assert f"example:\n  dataflex {command}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "x.yaml"], "dataflex: unknown command 'trian'; did you mean 'train'? (commands: train, plan"),
        (["train"], "dataflex: train: name a configuration file, as in 'dataflex train run.yaml"),
        (["plan"], "dataflex: the following arguments are required: CONFIG (see 'dataflex plan --help')"),
        (["plan", "run.yaml"], "dataflex: run.yaml: no such file; did you mean 'run.json'?"),
        (["plan", "run.json", "--seed"], "dataflex: unrecognized arguments: --seed"),
        (
            ["report", "x", "--ou", "y"],
            "dataflex: unrecognized arguments: --ou; did you mean '--out'? (see 'dataflex report",
        ),
        (["score", "--metod", "loss", "x"], "dataflex: unrecognized arguments: --metod; did you mean '--method'?"),
        (
            ["query", "i", "--target", "a", "--target", "b", "--out", "x"],
            "dataflex: argument --target: is given 2 times; give all it is to have once: '--target A B'",
        ),
        (
            ["select", "s", "--budget", "3", "--out", "x", "--budget=5"],
            "dataflex: argument --budget: is given 2 times; give all it is to have once (see",
        ),
        (
            ["select", "s", "--budget", "3", "--out", ""],
            "dataflex: argument --out: expected a path, found an empty text",
        ),
        (["rows", " "], "dataflex: argument RUN: expected a path, found an empty text"),
        (["--versin"], "dataflex: unrecognized arguments: --versin; did you mean '--version'?"),
        (["plan", "run.json", "--jsno", "a=1"], "dataflex: unrecognized arguments: --jsno; did you mean '--json'?"),
        (["report"], "dataflex: the following arguments are required: RUN (see 'dataflex report --help')"),
        (["methods", "a", "b"], "dataflex: unrecognized arguments: b"),
        (["methods", "lss"], "dataflex: methods: there is no 'lss'; did you mean 'loss'? (known: all, random"),
        (["methods", "mixer/focal"], "dataflex: methods: there is no 'focal' (known: static, uniform"),
        (["methods", "mixr/loss"], "dataflex: methods: 'mixr' is not a kind; did you mean 'mixer'?"),
        (["mix", "ftt", "x"], "dataflex: argument STEP: invalid choice: 'ftt' (choose from 'doremi', 'msft', 'swarm'"),
        (["--verbose"], "dataflex: "),
    ],
)
def test_mistakes_are_told_in_plain_lines(
    arguments: list[str], message: str, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert "Traceback" not in captured.err


def test_every_problem_has_its_own_line(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "run.json", "group_by_length=true", "dynamic.interval_steps=0", "dynamic.selector.k=3"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("dataflex: ") for line in lines)


def test_train_hands_its_arguments_on_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataflex.run

    seen: list[list[str]] = []
    codes = iter([0, 2, 1, 137])
    monkeypatch.setattr(dataflex.run, "train", lambda args: (seen.append(args), next(codes))[1])
    flags = ["--stage", "sft", "--do_train", "True", "--help"]
    assert [main(["train", *flags]) for _ in range(4)] == [0, 2, 1, 1]
    assert seen[0] == flags


def test_a_mistake_found_while_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import dataflex.run

    def refuse(args: list[str]) -> int:
        raise ConfigError(["one: wrong", "two: wrong too"])

    monkeypatch.setattr(dataflex.run, "train", refuse)
    assert main(["train", "run.yaml"]) == 2
    assert capsys.readouterr().err == "dataflex: one: wrong\ndataflex: two: wrong too\n"


def test_a_defect_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataflex.run

    def fail(args: list[str]) -> int:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(dataflex.run, "train", fail)
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["train", "run.yaml"])


def test_exit_codes_are_those_of_the_page() -> None:
    from dataflex.cli import _FAILED, _MISTAKE
    from dataflex.ending import TERMINATED
    from tests.docs.pages import TEXTS

    section = TEXTS["docs/configuration.md"].partition("## Signals of the system and exit codes")[2]
    told = re.findall(r"^\| (\d+) \|", section.partition("\n## ")[0], re.MULTILINE)
    assert [*map(int, told)] == [0, _FAILED, _MISTAKE, TERMINATED]


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import dataflex.run

    def stop(args: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(dataflex.run, "train", stop)
    assert main(["train", "run.yaml"]) == 1
    assert capsys.readouterr().err == "dataflex: interrupted\n"


def test_report_prints_the_summary(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import dataflex.record.report

    seen: list[tuple[object, ...]] = []

    def report(run_dirs: list[Path], out: Path | None, watched: bool, served: bool, **address: object) -> str:
        seen.append((run_dirs, out, watched, *((address["host"], address["port"]) if served else ())))
        return "summary"

    monkeypatch.setattr(dataflex.record.report, "report", report)
    assert main(["report", "saves/run"]) == 0
    assert main(["report", "saves/run", "b", "--out", "plots", "--watch"]) == 0
    assert main(["report", "saves/run", "--serve", "--port", "0"]) == 0
    assert seen == [
        ([Path("saves/run")], None, False),
        ([Path("saves/run"), Path("b")], Path("plots"), True),
        ([Path("saves/run")], None, False, None, 0),
    ]
    assert capsys.readouterr().out == "summary\n" * 3


def test_version_names_what_it_stands_on(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    from dataflex.version import __version__

    assert main(["version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"dataflex {__version__}"
    assert [line.split()[0] for line in lines] == ["dataflex", "python", "llamafactory", "transformers", "torch"]
    assert lines[2] == f"llamafactory {version('llamafactory')}"


def test_versions_that_were_not_tested_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataflex import version

    assert version.untested() == []
    found = {"llamafactory": "0.9.4", "transformers": "5.24.0"}
    monkeypatch.setattr(version, "version_of", found.get)
    oldest, newest = version.TESTED["transformers"]
    told = [
        f"llamafactory 0.9.4 is older than what dataflex {version.__version__} is tested with: 0.9.5",
        f"transformers 5.24.0 is newer than what dataflex {version.__version__} is tested with: {oldest} to {newest}",
    ]
    assert version.untested() == told
    assert main(["plan", "no.yaml"]) == 2
    assert capsys.readouterr().err.splitlines()[:2] == [f"dataflex: warning: {line}" for line in told]
    monkeypatch.setenv("RANK", "1")
    assert main(["plan", "no.yaml"]) == 2
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr(version, "version_of", lambda _: None)
    assert version.untested() == []


def test_json_of_versions_and_methods(capsys: pytest.CaptureFixture[str]) -> None:
    def told(*arguments: str) -> dict[str, Any]:
        assert main([*arguments, "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    assert {"dataflex", "python", "torch", "numpy"} <= set(told("version"))
    every = told("methods")
    assert every["not_available"] == []
    assert [(each["kind"], each["name"]) for each in every["methods"]] == [
        (kind, name) for kind in KINDS for name in names(kind)
    ]
    assert {each["kind"] for each in told("methods", "mixer")["methods"]} == {"mixer"}
    (loss,) = told("methods", "selector/loss")["methods"]
    assert loss in every["methods"]
    assert next(each for each in loss["parameters"] if each["name"] == "focus")["required"] is False
    assert loss["example"]["dynamic"]["selector"] == "loss"


PROGRAM = """
import sys
from dataflex.cli import main
code = main(sys.argv[1:])
heavy = [name for name in {heavy!r} if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["version"], 0),
        (["methods"], 0),
        (["methods", "loss"], 0),
        (["methods", "--needs", "targets", "--stage", "dpo", "--family", "selector"], 0),
        (["schema"], 0),
        (["completion", "zsh"], 0),
        (["init", "baseline"], 2),
        (["plan", "run.json"], 0),
        (["plan", "run.json", "dynamic.selector=lose"], 2),
    ],
)
def test_answers_without_torch(arguments: list[str], code: int, run_file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(heavy=HEAVY), *arguments],
        cwd=run_file.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_stops_early_is_no_failure(project: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "dataflex.cli", "methods"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("named", ["run", "run.txt", "no/such/run.YAML"])
def test_what_is_no_flag_names_a_configuration(named, capsys):
    assert main(["train", named]) == 2
    assert capsys.readouterr().err.startswith(f"dataflex: {named}: ")
