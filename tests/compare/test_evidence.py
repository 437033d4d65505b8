"""The suites of evidence/ pass every check on the data that its script writes, and those data are what they say."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from dataflex.compare.suite import read_suite

ROOT = Path(__file__).resolve().parents[2]
SUITES = sorted(
    path.name for path in (ROOT / "evidence").glob("*.yaml") if path.read_text(encoding="utf-8").startswith("suite:")
)


@pytest.fixture
def data(tmp_path):
    for name in ("examples", "evidence"):
        (tmp_path / name).symlink_to(ROOT / name)
    spec = importlib.util.spec_from_file_location("evidence_data", ROOT / "evidence" / "data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(Path("runs/evidence/data")) == 0
    (tmp_path / "runs/evidence/w1_reference").symlink_to(ROOT / "examples/models/base-4m")
    return tmp_path / "runs/evidence/data"


def rows(data, name):
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_suites_and_pools(data, tmp_path):
    assert SUITES == ["m1.yaml", "m3.yaml", "quick.yaml", "s1.yaml", "s2.yaml", "s3.yaml", "w1.yaml"]
    for name in SUITES:
        suite = read_suite(Path("evidence") / name, work=tmp_path)
        assert len(suite.runs) == len(suite.seeds) * (len(suite.arms) + len(suite.lengths) - 1), name
        assert suite.claims, name

    original = {row["instruction"]: row["output"] for row in rows(ROOT / "examples/data", "pool")}
    for name in ("s1", "s3"):
        pool = rows(data, name)
        assert Counter(row["source"] for row in pool) == {"relevant": 120, "wrong": 180, "other": 300}
        assert all(row["output"] == original[row["instruction"]] for row in pool if row["source"] == "relevant")
        wrong = [(row["output"], original[row["instruction"]]) for row in pool if row["source"] == "wrong"]
        assert sum(now != before for now, before in wrong) >= 178
        if name == "s3":
            assert all(Counter(now.split()) == Counter(before.split()) for now, before in wrong)
            assert all(now.count("\n") == before.count("\n") for now, before in wrong)
    pool, right = rows(data, "w1"), rows(data, "w1_right")
    assert 0.28 < 1 - len(right) / len(pool) <= 0.301
    held = {row["instruction"] for row in rows(data, "w1_held")}
    assert not held & {row["instruction"] for row in (*pool, *rows(data, "w1_clean"))}
