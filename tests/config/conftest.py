"""A small project on disk: two data sets, a model folder, and a configuration that is in order."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_LAUNCH = ("FORCE_TORCHRUN", "NPROC_PER_NODE", "NNODES", "WORLD_SIZE", "USE_RAY", "USE_MCA")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _LAUNCH:
        monkeypatch.delenv(name, raising=False)


def add_column(project: Path, name: str, value: Any) -> None:
    """Give every row of the data sets a and b a column."""
    for file in (project / "data" / "a.jsonl", project / "data" / "b.json"):
        file.write_text(file.read_text().replace('"input":', f'"{name}": {json.dumps(value)}, "input":'))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with data sets a (100 rows), b (50 rows) and t (10 rows), which is the working directory."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"instruction": f"question {i}", "input": "", "output": f"answer {i}"} for i in range(100)]
    (data / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "b.json").write_text(json.dumps(rows[:50], indent=1))
    (data / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:10]))
    (data / "empty.jsonl").write_text("")
    (data / "odd.xyz").write_text("x")
    info = {
        "a": {"file_name": "a.jsonl"},
        "b": {"file_name": "b.json"},
        "t": {"file_name": "t.jsonl"},
        "gone": {"file_name": "gone.jsonl"},
        "empty": {"file_name": "empty.jsonl"},
        "odd": {"file_name": "odd.xyz"},
        "nothing": {"columns": {}},
        "hub": {"hf_hub_url": "someone/something"},
    }
    (data / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def config(project: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that gives a configuration in order, with changes; a value of None removes a key."""
    base = {
        "model_name_or_path": "./model",
        "stage": "sft",
        "do_train": True,
        "dataset": "a,b",
        "output_dir": "out",
        "per_device_train_batch_size": 2,
        "dynamic": {"selector": "random", "interval_steps": 5},
    }

    def changed(**changes: Any) -> dict[str, Any]:
        mapping = {**copy.deepcopy(base), **changes}
        return {key: value for key, value in mapping.items() if value is not None}

    return changed
