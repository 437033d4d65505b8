"""What ``plan`` accepts, trains."""

from __future__ import annotations

from itertools import count, islice
from pathlib import Path

import pytest

from tests.random_configurations import accepted, configurations, trained


@pytest.mark.slow
def test_what_plan_accepts_trains(tiny_model: Path, data_dir: Path, tmp_path: Path) -> None:
    folders = (tmp_path / str(i) for i in count())  # one each: a model card left by LoRA misleads the Trainer
    tried = ((each, next(folders)) for each in configurations(11, 100, tiny_model, data_dir))
    good = ((mapping, folder) for mapping, folder in tried if not folder.mkdir() and accepted(mapping, folder))
    for mapping, folder in islice(good, 4):
        told = trained(folder)
        assert "Traceback" not in told, (mapping, told)
