"""Completion scripts: what they offer is what the parser knows."""

from __future__ import annotations

import subprocess

import pytest

from dataflex.cli import _EXAMPLES, _parser, main
from dataflex.commands.completion import SHELLS, completion
from dataflex.registry import names


def script(shell: str) -> str:
    return completion(shell, _parser())


def offered(*words: str) -> list[str]:
    """Return what bash offers for the last word."""
    line = " ".join(f"'{word}'" for word in ("dataflex", *words))
    asked = f"COMP_WORDS=({line}) COMP_CWORD={len(words)}"
    program = f"{script('bash')}\n{asked}\n_dataflex\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash(tmp_path):
    (tmp_path / "run.yaml").touch()
    assert offered("tr") == ["train"]
    assert {*offered("")} == {*_EXAMPLES}
    assert offered("plan", "ru") == ["run.yaml"]
    assert offered("plan", "--tok") == ["--tokens-per-second"]
    assert offered("methods", "selector/tac") == ["selector/tacs"]
    assert {f"mixer/{name}" for name in names("mixer")} <= {*offered("methods", "mixer/")}
    assert offered("select", "x.parquet", "--prefer", "") == ["high", "low"]
    assert offered("mix", "swa") == ["swarm"]
    assert offered("completion", "fi") == []


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_and_option_is_in_every_script(shell, capsys):
    assert main(["completion", shell]) == 0
    made = script(shell)
    assert capsys.readouterr().out.strip() == made.strip()
    (of_commands,) = [action for action in _parser()._actions if action.dest == "command"]
    for name, command in of_commands.choices.items():
        assert name in made
        for option in (text for action in command._actions for text in action.option_strings if text[:2] == "--"):
            assert (f" -l {option[2:]}" if shell == "fish" else option) in made


def test_unknown_shells(capsys):
    assert main(["completion", "csh"]) == 2
    assert "invalid choice: 'csh'" in capsys.readouterr().err
