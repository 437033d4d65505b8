"""Whatever stands in a configuration, ``plan`` says what it does or what is wrong with it, without a traceback."""

from __future__ import annotations

import json
from pathlib import Path

from tests.random_configurations import accepted, configurations


def test_plan_never_ends_in_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    rows = [{"instruction": f"q {i}", "input": "", "output": f"a {i}", "sample_weight": 1.0} for i in range(40)]
    names = ("alpha", "beta", "goal", "held")
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = {name: {"file_name": f"{name}.jsonl"} for name in names}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    found = [accepted(each, tmp_path) for each in configurations(9, 40, tmp_path / "model", tmp_path)]
    assert 5 <= sum(found) <= 35
