"""``dataflex completion SHELL``: a script that completes commands, options, choices, names of methods, and files.

The script is a table made of the parser, so that no Python is started while somebody types.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from typing import Any

from dataflex.registry import KINDS, names

SHELLS = ("bash", "zsh", "fish")
_OF_METHODS = ("methods", "init")
"""Commands whose first word may be the name of a method."""

_BASH = """\
_dataflex() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}} words=
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=($(compgen -W {commands} -- "$word"))
    return
  fi
  case "$command $before" in
{choices}
  esac
  if [[ -n $words ]]; then
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    return
  fi
  case "$command" in
{options}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  if [[ $word != -* ]]; then COMPREPLY+=($(compgen -f -- "$word")); fi
}}
complete -o filenames -F _dataflex dataflex dataflex-cli
"""


def completion(shell: str, parser: argparse.ArgumentParser) -> str:
    """Return the script for a shell, one of ``SHELLS``, that is made of the parser of all commands."""
    commands = dict(_commands(parser))
    if shell == "fish":
        return _fish(commands)
    choices, options = [], []
    for name, command in commands.items():
        for action in command._actions:
            if action.choices and action.option_strings:
                keys = "|".join(f'"{name} {option}"' for option in action.option_strings)
                choices.append(f"    {keys}) words={_words(action.choices)} ;;")
        options.append(f"    {name}) words={_words([*_methods(name), *_steps(command), *_options(command)])} ;;")
    text = _BASH.format(commands=_words(commands), choices="\n".join(choices), options="\n".join(options))
    return (
        text
        if shell == "bash"
        else f"#compdef dataflex dataflex-cli\nautoload -U +X bashcompinit && bashcompinit\n{text}"
    )


def _words(words: Any) -> str:
    return shlex.quote(" ".join(map(str, words)))


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def _options(command: argparse.ArgumentParser) -> list[str]:
    return [text for action in command._actions for text in action.option_strings if text.startswith("--")]


def _steps(command: argparse.ArgumentParser) -> list[str]:
    """Return the steps of a command that has some, as ``mix``."""
    return [name for name, _ in _commands(command)]


def _methods(command: str) -> list[str]:
    if command not in _OF_METHODS:
        return []
    return [*KINDS, *(f"{kind}/{name}" for kind in KINDS for name in names(kind))]


def _fish(commands: dict[str, argparse.ArgumentParser]) -> str:
    lines = []
    for program in ("dataflex", "dataflex-cli"):
        for name, command in commands.items():
            told = (command.description or "").split("\n")[0]
            first, within = "__fish_use_subcommand", f"__fish_seen_subcommand_from {name}"
            lines.append(f"complete -c {program} -n {first} -a {name} -d {_quoted(told)}")
            if words := [*_methods(name), *_steps(command)]:
                lines.append(f"complete -c {program} -n {_quoted(within)} -a {_quoted(' '.join(words))}")
            for action in command._actions:
                for option in (text[2:] for text in action.option_strings if text.startswith("--")):
                    taken = f" -x -a {_quoted(' '.join(map(str, action.choices)))}" if action.choices else ""
                    takes = taken or ("" if action.nargs == 0 else " -r")
                    help_of = _quoted((action.help or "").replace("%%", "%"))
                    lines.append(f"complete -c {program} -n {_quoted(within)} -l {option}{takes} -d {help_of}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Return a text in single quotes as fish reads them."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
