"""Data sets in files of their own, and the command line run in this process."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.conftest import sentence
from tests.integration.conftest import base_settings


class Scoring:
    """A folder of data sets, a configuration of the tiny model, and the commands."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        self.data.mkdir()
        self.info: dict[str, dict] = {}
        self.base = base_settings(model, self.data)

    def write(self, name: str, rows: list[dict], ending: str = ".jsonl", **entry) -> Path:
        path = self.data / f"{name}{ending}"
        if ending == ".json":
            path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.info[name] = {"file_name": path.name, **entry}
        (self.data / "dataset_info.json").write_text(json.dumps(self.info))
        return path

    def config(self, **changes) -> str:
        path = self.folder / "run.json"
        path.write_text(json.dumps({**self.base, "output_dir": str(self.folder / "never"), **changes}))
        return str(path)

    def command(self, *arguments: str) -> Path:
        """Return a file by which ``two_ranks`` runs a command."""
        path = self.folder / "command.json"
        path.write_text(json.dumps({"command": arguments}))
        return path

    def run(self, *arguments: str) -> int:
        from dataflex.cli import main

        return main(list(arguments))


def rows_of(count: int, seed: int = 3) -> list[dict]:
    rng = random.Random(seed)
    return [
        {"instruction": sentence(rng, 2, 9), "input": "", "output": sentence(rng, 1, 12), "id": i} for i in range(count)
    ]


@pytest.fixture
def scoring(tmp_path, tiny_model) -> Scoring:
    return Scoring(tmp_path, tiny_model)
