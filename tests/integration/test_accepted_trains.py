"""What ``plan`` accepts, trains."""

from __future__ import annotations

import shutil
from itertools import count, islice
from pathlib import Path

import pytest

from dataflex.cli import main
from dataflex.record.recorded import recorded
from tests.random_configurations import accepted, configurations, trained


@pytest.mark.slow
def test_what_plan_accepts_trains(tiny_model: Path, data_dir: Path, tmp_path: Path) -> None:
    folders = (tmp_path / str(i) for i in count())  # one each: a model card left by LoRA misleads the Trainer
    tried = ((each, next(folders)) for each in configurations(11, 100, tiny_model, data_dir))
    good = ((mapping, folder) for mapping, folder in tried if not folder.mkdir() and accepted(mapping, folder))
    for mapping, folder in islice(good, 4):
        told = trained(folder)
        assert "Traceback" not in told, (mapping, told)


@pytest.mark.slow
def test_what_init_writes_trains(tiny_model: Path, data_dir: Path, tmp_path: Path) -> None:
    for name in ("alpha", "beta", "goal"):
        shutil.copy(data_dir / f"{name}.jsonl", tmp_path)
    data = ["--data", "alpha.jsonl", "beta.jsonl", "--targets", "goal.jsonl"]
    assert main(["init", "towards", "--model", str(tiny_model), *data, "use_cpu=true"]) == 0
    short = ["max_steps=4", "dynamic.warmup_steps=2", "dynamic.interval_steps=2", "save_strategy=no"]
    assert main(["train", "towards.yaml", *short]) == 0
    run = recorded(Path("runs/towards")).run
    assert run.finished is not None
    assert run.steps_done == 4
