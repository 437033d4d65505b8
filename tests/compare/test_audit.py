"""An audit of the tiny model: made, killed and continued; its statistics against slow loops; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dataflex.cli import main
from dataflex.compare.audit import as_markdown, judged, read_audit, spearman
from dataflex.config.inputs import hash_of
from dataflex.errors import ConfigError
from tests.integration.conftest import base_settings


def slow_spearman(a, b):
    """Pearson's correlation of mean ranks, counted pair by pair."""

    def ranks(values):
        return [sum(x < v for x in values) + (sum(x == v for x in values) + 1) / 2 for v in values]

    x, y = ranks(a), ranks(b)
    mx, my = sum(x) / len(x), sum(y) / len(y)
    above = sum((i - mx) * (j - my) for i, j in zip(x, y, strict=True))
    return above / (sum((i - mx) ** 2 for i in x) * sum((j - my) ** 2 for j in y)) ** 0.5


def test_spearman_against_a_loop():
    rng = np.random.default_rng(3)
    for n in (3, 8, 40):
        a = rng.integers(0, n, size=n).astype(float)
        b = a + rng.normal(size=n) * n / 4
        found = spearman(a, b)
        assert found.value == pytest.approx(slow_spearman(a, b))
        assert found.n == n
        assert (found.low is None) == (n < 4)
        if found.low is not None:
            assert found.low <= found.value <= found.high
    assert spearman([1, 1, 1, 1], [1, 2, 3, 4]).value is None
    assert spearman([1, 2, 3, 4, 5], [2, 4, 6, 8, 99]).value == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4, 5], [5, 4, 3, 2, 1]).value == pytest.approx(-1.0)


def test_an_additive_world_is_predicted_and_random_scores_are_not():
    """Where rows add up, their true effects have rank correlation 1, their negatives -1, and random scores about 0."""
    rng = np.random.default_rng(5)
    effect = rng.normal(size=60)
    kept = np.array([rng.permutation(60) < 30 for _ in range(80)])
    losses = [9.0 - sum(effect[i] for i in range(60) if row[i]) for row in kept]
    rows = np.arange(0, 60, 2)
    measured = {"subsets": (kept, losses), "leave_one_out": (rows, effect[rows])}
    right, wrong, noise = (judged(each, measured) for each in (effect, -effect, rng.normal(size=60)))
    for key in measured:
        assert right[key].value == pytest.approx(1.0)
        assert wrong[key].value == pytest.approx(-1.0)
        assert noise[key].low < 0 < noise[key].high
        assert abs(noise[key].value) < 0.4


@pytest.fixture
def suite(tiny_model, data_dir, tmp_path):
    def write(**changes):
        base = base_settings(tiny_model, data_dir) | {"learning_rate": 1.0e-2}
        content = {
            "suite": "small",
            "base": base,
            "targets": ["goal"],
            "scores": {"random": {}, "loss": None, "gradients": {"name": "less"}, "ledger": {}},
            "subsets": {"count": 4},
            "leave_one_out": 3,
            "brittleness": {"rows": 5, "random": 2},
            "out": str(tmp_path / "out"),
        }
        path = tmp_path / "audit.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
        return path

    return write


@pytest.mark.slow
def test_an_audit_is_killed_continued_and_extended(suite, tmp_path, monkeypatch):
    from dataflex.compare.removal import Experiments

    path, train, made = suite(), Experiments.run, []

    def killed(self, kept, *args, **kwargs):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(int(kept.sum()))
        train(self, kept, *args, **kwargs)

    monkeypatch.setattr(Experiments, "run", killed)
    assert main(["audit", str(path)]) == 1
    assert made[:3] == [37, 37, 37]  # up to the scores, with the ledger, and all rows
    (journal,) = (tmp_path / "out").glob("audit-*.jsonl")
    finished = journal.read_text()
    journal.write_text(finished + '{"key": "run 1", "val')  # cut off by the kill
    monkeypatch.setattr(Experiments, "run", train)
    assert main(["audit", str(path)]) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["runs"] == 4 - 2 + 3 + 2 + len({"random", "loss", "gradients", "ledger"})
    assert journal.read_text().startswith(finished)
    assert list(found["scores"]) == ["random", "loss", "gradients", "ledger"]
    told = found["scores"]["gradients"]
    assert [told[key]["n"] for key in ("subsets", "leave_one_out", "brittleness")] == [4, 3, 5]
    text = (tmp_path / "out/results.md").read_text()
    assert text == as_markdown(found)
    assert "| gradients |" in text

    # The same from nothing, in one go: to the bit.
    assert main(["audit", str(path), f"out={tmp_path / 'whole'}"]) == 0
    whole = json.loads((tmp_path / "whole/results.json").read_text())
    assert whole["runs"] > found["runs"]
    assert (whole["scores"], whole["leave_one_out"]) == (found["scores"], found["leave_one_out"])

    # Scores made of the effects themselves predict them; only what is new is trained.
    effects = np.full(37, np.nan)
    for row, rise in found["leave_one_out"].items():
        assert rise != 0
        effects[int(row)] = rise
    pq.write_table(pa.table({"effect": effects, "against": -effects}), tmp_path / "oracle.parquet")
    oracle = {name: {"file": str(tmp_path / "oracle.parquet"), "column": name} for name in ("effect", "against")}
    assert main(["audit", str(suite(scores=oracle, brittleness=None))]) == 0
    again = json.loads((tmp_path / "out/results.json").read_text())
    assert again["runs"] == 0
    assert again["scores"]["effect"]["leave_one_out"]["value"] == pytest.approx(1.0)
    assert again["scores"]["against"]["leave_one_out"]["value"] == pytest.approx(-1.0)


@pytest.mark.slow
def test_what_is_left_out_leaves_no_other_trace(suite, monkeypatch):
    """Without a row the steps before its own are those of the full run; each step is a plain loop's."""
    import torch

    from dataflex.compare import removal

    found = {}

    def looked_at(self):
        target = self.steps[2][0]
        rest = self.without(np.array([target]))
        everyone = np.ones(37, dtype=bool)
        states = {}
        for name, kept, until in (("full", everyone, 2), ("rest", rest, 2), ("full3", everyone, 3), ("rest3", rest, 3)):
            self.run(kept, until)
            states[name] = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.begin)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(self.steps))
        for rows in self.steps[:3]:
            features = [self.trainer.train_dataset[int(row)] for row in rows]
            tokens = sum(sum(label != -100 for label in one["labels"][1:]) for one in features)
            for row, one in zip(rows, features, strict=True):
                if row == target:
                    continue
                logits = self.model(input_ids=torch.tensor([one["input_ids"]])).logits[0, :-1]
                loss = torch.nn.functional.cross_entropy(logits, torch.tensor(one["labels"][1:]), reduction="sum")
                (loss / tokens).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        states["slow3"] = self.model.state_dict()
        found.update(states)
        raise KeyboardInterrupt

    monkeypatch.setattr(removal.Experiments, "found", looked_at)
    assert main(["audit", str(suite())]) == 1
    for key, value in found["full"].items():
        assert torch.equal(value, found["rest"][key]), key
    assert any(not torch.equal(found["full3"][key], found["rest3"][key]) for key in found["full3"])
    for key, value in found["slow3"].items():
        assert torch.allclose(value, found["rest3"][key], atol=2e-4), key


@pytest.mark.slow
def test_first_order_scores_predict_small_plain_steps(suite, tiny_model, data_dir, tmp_path):
    """Under SGD with a small rate effects are of first order: the ledger's credits are them, and LESS is near."""
    plain = {"optim": "sgd", "learning_rate": 1.0e-3, "max_grad_norm": 0, "lr_scheduler_type": "constant"}
    scores = {"less": {"normalize": False, "precondition": "none"}, "ledger": {}, "random": {}}
    base = base_settings(tiny_model, data_dir) | plain
    path = suite(base=base, scores=scores, subsets={"count": 12}, leave_one_out=20, brittleness=None)
    assert main(["audit", str(path)]) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())["scores"]
    assert found["ledger"]["leave_one_out"]["value"] > 0.99
    assert found["ledger"]["subsets"]["value"] > 0.97
    assert found["less"]["leave_one_out"]["low"] > 0
    for key in ("subsets", "leave_one_out"):
        assert found["random"][key]["low"] < 0 < found["random"][key]["high"]


def test_mistakes_are_told_together(suite):
    changes = {"scores": {"lesss": {}, "loss": 3, "ledger": {"a": 1}, "f": {"file": "none.parquet", "column": "x"}}}
    with pytest.raises(ConfigError) as told:
        read_audit(suite(**changes))
    for text in (
        "did you mean 'less'",
        "scores.loss: expected parameters",
        "scores.ledger.a",
        "scores.f.file: no such file: none.parq",
    ):
        assert text in str(told.value)
    with pytest.raises(ConfigError) as told:
        read_audit(suite(subsets={"count": 1, "share": 0.5}, scores={}, targets=["gaol"]))
    for text in ("subsets.count", "subsets.share", "scores: expected one or more"):
        assert text in str(told.value)
    with pytest.raises(ConfigError, match="did you mean 'goal'"):
        read_audit(suite(targets=["gaol"]))
    pq.write_table(pa.table({"y": [1.0]}), "some.parquet")
    with pytest.raises(ConfigError, match=r"scores.f.column: some.parquet has no column 'x' \(columns: y\)"):
        read_audit(suite(scores={"f": {"file": "some.parquet", "column": "x"}}))
    Path("none.txt").write_text("nothing")
    with pytest.raises(ConfigError, match=r"scores.f: expected file \(parquet\)"):
        read_audit(suite(scores={"f": {"file": "none.txt", "column": "x"}}))
    with pytest.raises(ConfigError, match="at least one experiment"):
        read_audit(suite(subsets=None, leave_one_out=0, brittleness=None))
    assert Path(read_audit(suite()).out).name == "out"


def test_scores_are_known_by_targets_of_their_own(suite, data_dir, tmp_path):
    """Other rows of a target that one selector alone has: its scores are asked again, no run and no other score is."""
    shutil.copytree(data_dir, tmp_path / "own")
    scores = {"held": {"name": "less", "targets": ["held"]}, "goal": {"name": "less"}}
    path = suite(scores=scores)
    content = yaml.safe_load(path.read_text())
    content["base"]["dataset_dir"] = str(tmp_path / "own")
    path.write_text(yaml.safe_dump(content))
    before = read_audit(path)
    file = tmp_path / "own/held.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    hash_of.cache_clear()
    now = read_audit(path)
    assert now.fingerprint == before.fingerprint
    assert [now.score_key(name, 5) == before.score_key(name, 5) for name in ("held", "goal")] == [False, True]
