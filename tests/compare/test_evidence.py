"""The suites of evidence/ pass every check on the data that its script writes, and those data are what they say."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from dataflex.compare.audit import read_audit
from dataflex.compare.suite import read_suite
from dataflex.plan.proportions import ProportionsFile, write_proportions

ROOT = Path(__file__).resolve().parents[2]
SUITES = sorted(
    path.name for path in (ROOT / "evidence").glob("*.yaml") if "\narms:" in path.read_text(encoding="utf-8")
)


def module_of(name):
    spec = importlib.util.spec_from_file_location(f"evidence_{name}", ROOT / "evidence" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path):
    for name in ("examples", "evidence"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert module_of("data").main(Path("runs/evidence/data")) == 0
    for config in (ROOT / "evidence").glob("*_reference.yaml"):
        (tmp_path / "runs/evidence" / config.stem).symlink_to(ROOT / "examples/models/base-4m")
    for config in (ROOT / "evidence").glob("*_proxy.yaml"):
        names = yaml.safe_load(config.read_text(encoding="utf-8"))["dataset"].split(",")
        (tmp_path / "runs/evidence" / config.stem / "dataflex").mkdir(parents=True)
        write_proportions(
            tmp_path / "runs/evidence" / config.stem / "dataflex/doremi.json",
            ProportionsFile(names=tuple(names), proportions=(1 / len(names),) * len(names), method="doremi"),
        )
    return tmp_path / "runs/evidence/data"


def rows(data, name):
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_suites_and_pools(data, tmp_path):
    names = "aa m1 m1_ledger m2 m2_grid m3 quick s1 s2 s3 w1".split()
    assert [name.removesuffix(".yaml") for name in SUITES] == names
    for name in SUITES:
        suite = read_suite(Path("evidence") / name, work=tmp_path)
        assert len(suite.runs) == len(suite.seeds) * (len(suite.arms) + len(suite.lengths) - 1), name
        assert suite.claims or name == "m2_grid.yaml"

    audit = read_audit(Path("evidence/audit.yaml"))
    assert len(audit.names) == 15

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


def test_results_are_rendered_between_their_marks(tmp_path):
    """What a suite wrote takes the place of what stood there; a suite without results keeps its text."""
    page = "a\n<!-- suite s1 -->\nold\n<!-- end of suite -->\nb\n<!-- suite s2 -->\nNot run\n<!-- end of suite -->\n"
    (tmp_path / "s1").mkdir()
    (tmp_path / "s1" / "results.md").write_text("### s1\n\nnew\n\n| a |\n")
    rendered = module_of("render").rendered(page, tmp_path)
    assert rendered == page.replace("old", "new\n\n| a |")
    real = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"<!-- suite (\w+) -->", real)) == sorted(
        ["audit", *(name.removesuffix(".yaml") for name in SUITES)]
    )
