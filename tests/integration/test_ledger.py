"""A run with a ledger: its accounts add up, rows have credits, and the training stays as it is."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

SETTINGS = {
    "dataset": "alpha,beta,gamma",
    "max_steps": 9,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "disable_shuffling": False,
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "constant",
}
LEDGER = {"targets": ["goal", "held"]}


def accounts(outcome):
    return [event for event in outcome.events if event["event"] == "credited"][-1]


def rows_of(outcome):
    import pyarrow.parquet as pq

    return pq.read_table(outcome.folder / "dataflex" / "ledger.parquet").to_pydict()


@pytest.fixture
def start(monkeypatch):
    """Return the numbers of the target losses that the training itself ends with, measured apart."""
    from dataflex.train.ledger import Ledger

    seen = []
    look = Ledger._look
    monkeypatch.setattr(Ledger, "_look", lambda self, step: look(self, step) or seen.append((step, self.last.copy())))
    return seen


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_accounts_add_up(run, start, tuning):
    outcome = run("ours", **SETTINGS, finetuning_type=tuning, dynamic={"ledger": {**LEDGER, "refresh_steps": 2}})
    told = accounts(outcome)
    assert [step for step, _ in start] == [0, 2, 4, 6, 8, 9]
    assert (told["step"], told["looked_at"]) == (9, 9)
    assert told["looks"] >= 6
    for k, name in enumerate(LEDGER["targets"]):
        of = told["targets"][name]
        assert of["before"] == start[0][1][k]
        assert of["now"] == start[-1][1][k]
        measured = of["now"] - of["before"]
        assert measured < -0.01
        lines = sum(of["domains"].values()) + sum(of["others"].values())
        assert lines + of["unexplained"] == pytest.approx(measured, abs=1e-9)
        assert abs(of["unexplained"]) < 0.02 * abs(measured)
        assert abs(of["others"]["other"]) < 1e-5, "all that is trained was split"
        assert of["others"]["before"] == 0.0
        assert of["others"]["weight decay"] != 0.0
        assert (of["clipping"] > 0.0 > of["domains"]["alpha"]) or tuning == "lora", "LoRA's gradients are not clipped"
    rows = rows_of(outcome)
    assert sum(rows["times"]) == 36
    assert list(rows) == ["row", "domain", "times", "tokens", "credit_goal", "credit_held"]
    assert told["tokens"] == {
        name: sum(t for t, d in zip(rows["tokens"], rows["domain"], strict=True) if d == name)
        for name in ("alpha", "beta", "gamma")
    }
    assert sum(rows["credit_goal"]) == pytest.approx(told["targets"]["goal"]["rows"])
    assert np.count_nonzero(rows["credit_goal"]) >= 30, "all rows but those of the first step"


def test_the_training_is_the_same(run):
    in_order = {**SETTINGS, "disable_shuffling": True}
    ours = run("ours", **in_order, dynamic={"ledger": {**LEDGER, "refresh_steps": 9, "unexplained": 1e-4}})
    assert accounts(ours)["looks"] > 2, "parameters were moved to look at the way between two looks"
    stock = run("stock", **in_order)
    assert ours.series() == stock.series()
    assert ours.series("grad_norm") == stock.series("grad_norm")
    mine, theirs = ours.weights(), stock.weights()
    assert all(np.array_equal(mine[key], theirs[key]) for key in theirs)


def test_parameters_that_are_not_split_are_a_line(run):
    block = {"ledger": {**LEDGER, "parameters": "self_attn|mlp"}}
    of = accounts(run("some", **SETTINGS, dynamic=block))["targets"]["goal"]
    lines = sum(of["domains"].values()) + sum(of["others"].values())
    assert lines + of["unexplained"] == pytest.approx(of["now"] - of["before"], abs=1e-9)
    assert of["others"]["other"] < -1e-3
    assert abs(of["unexplained"]) < 0.05 * abs(of["now"] - of["before"])


@pytest.mark.parametrize("refresh", [2, "auto"])
def test_a_resumed_run_is_as_if_never_stopped(run, refresh):
    ledger = {**LEDGER, "refresh_steps": refresh, "target_rows": 3}
    block = {"mixer": {"name": "ledger", "targets": ["goal"]}, "interval_steps": 3, "ledger": ledger}
    saving = {**SETTINGS, "save_strategy": "steps", "save_steps": 1, "dynamic": block}
    straight = run("straight", **saving)
    mixed = [event["proportions"] for event in straight.events if event["event"] == "planned"]
    assert len({json.dumps(each) for each in mixed}) == 3
    for step in (1, 4, 6):
        folder = run.folder / f"resumed-{step}"
        shutil.copytree(straight.folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copytree(straight.folder / "dataflex", folder / "dataflex")
        resumed = run(folder.name, **saving, resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert resumed.series() == straight.series(), step
        ours, theirs = accounts(resumed), accounts(straight)
        assert {key: ours[key] for key in ("targets", "tokens", "looks", "refresh_steps")} == {
            key: theirs[key] for key in ("targets", "tokens", "looks", "refresh_steps")
        }
        assert rows_of(resumed) == rows_of(straight)


def test_what_a_fresh_decision_finds_in_the_moments_is_a_line(run):
    saving = {**SETTINGS, "save_strategy": "steps", "save_steps": 4}
    run("stock", **saving)
    block = {"ledger": LEDGER, "resume_plan": "ignore"}
    resumed = run("stock", **saving, dynamic=block, resume_from_checkpoint=str(run.folder / "stock" / "checkpoint-4"))
    told = accounts(resumed)
    of = told["targets"]["goal"]
    assert told["looks"] >= 4
    assert of["others"]["before"] < 0.0
    lines = sum(of["domains"].values()) + sum(of["others"].values())
    assert lines + of["unexplained"] == pytest.approx(of["now"] - of["before"], abs=1e-9)
    assert abs(of["others"]["other"]) < 1e-5


def test_rows_of_weight_0_have_no_credit(run, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "zero")
    rows = [json.loads(line) for line in (data_dir / "beta.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**row, "sample_weight": 0.0}) + "\n" for row in rows)
    (tmp_path / "zero" / "beta.jsonl").write_text(text)
    block = {"ledger": LEDGER, "weighter": {"name": "column", "column": "sample_weight"}}
    outcome = run("weighed", **{**SETTINGS, "dataset_dir": str(tmp_path / "zero")}, dynamic=block)
    credits = rows_of(outcome)
    assert "beta" in credits["domain"]
    for domain, credit in zip(credits["domain"], credits["credit_goal"], strict=True):
        assert domain != "beta" or credit == 0.0
    of = accounts(outcome)["targets"]["goal"]
    assert of["domains"]["beta"] == 0.0 != of["domains"]["alpha"]
