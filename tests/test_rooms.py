"""Imports run one way: a room names itself and rooms below it, in annotations and inside functions too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "dataflex"
FLOORS = """
    errors  rng  sequences
    ending  printable  state
    version  comm  parts  console  checkpoints
    clock  storage  plan
    signals
    method
    contract  score_table
    ported  validate
    registry
    select
    config
    record  rewards
    preview  selectors  mixers  orderers  weighters  testing
    train  mixing
    huggingface
    __init__  llamafactory
    offline
    compare  run
    commands
    cli
    __main__
"""
"""Rooms from the ground up; those of a line do not name each other."""
FLOOR_OF = {room: floor for floor, line in enumerate(FLOORS.strip().splitlines()) for room in line.split()}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    return file.parts[0].removesuffix(".py")


def named(file: Path) -> Iterator[tuple[int, str]]:
    """Line and room of each import of ours."""
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            if module.startswith("dataflex."):
                yield node.lineno, module.split(".")[1]
            elif module == "dataflex":
                yield from ((node.lineno, alias.name if alias.name in FLOOR_OF else "__init__") for alias in node.names)


def test_every_room_has_a_floor():
    assert {room_of(file) for file in FILES} == FLOOR_OF.keys()


@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_file_names_a_room_above_it(file):
    own = room_of(file)
    up = [f"line {line}: {room}" for line, room in named(file) if room != own and FLOOR_OF[room] >= FLOOR_OF[own]]
    assert not up
