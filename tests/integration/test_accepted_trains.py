"""What ``plan`` accepts, trains."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from tests.random_configurations import accepted, configurations, trained


@pytest.mark.slow
def test_what_plan_accepts_trains(tiny_model: Path, data_dir: Path, tmp_path: Path) -> None:
    good = (each for each in configurations(11, 100, tiny_model, data_dir) if accepted(each, tmp_path))
    for mapping in islice(good, 4):
        told = trained(tmp_path)
        assert "Traceback" not in told, (mapping, told)
