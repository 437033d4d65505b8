"""A run with a budget: rows scored in their own training step, the rest predicted, and the training left as it is."""

from __future__ import annotations

import json

import numpy as np
import pytest

LESS = {"name": "less", "targets": ["goal"]}
SETTINGS = {
    "dataset": "alpha,beta,gamma",
    "max_steps": 24,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "disable_shuffling": False,
    "learning_rate": 3e-3,
}


def block(selector=LESS, budget=0.5, **changes):
    return {
        "warmup_steps": 8,
        "interval_steps": 4,
        "selector": selector,
        "signals": {"budget": budget, **changes.pop("signals", {})},
        **changes,
    }


def decisions(outcome):
    return [event for event in outcome.events if event["event"] == "planned" and event["kind"] == "dynamic"]


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("selector", [LESS, "grad_norm", "loss", {"name": "icons", "targets": ["goal", "held"]}])
def test_scores_come_from_the_steps(run, monkeypatch, selector, tuning):
    from dataflex.train.in_run import InRun

    seen = []
    scores = InRun._scores
    monkeypatch.setattr(InRun, "_scores", lambda self, known, rows: seen.append(known) or scores(self, known, rows))
    outcome = run("budgeted", **SETTINGS, finetuning_type=tuning, dynamic=block(selector))
    told = decisions(outcome)
    assert len(told) == 4
    assert all("drawn uniformly" in event["reason"] for event in told)
    served = seen[-1].groups % 2 == 0
    assert len(np.unique(seen[-1].rows[served])) > 30, "rows of training steps were observed"
    assert np.isfinite(seen[-1].values).all()


def test_listening_changes_nothing(run, monkeypatch):
    from dataflex.train.in_run import InRun

    monkeypatch.setattr(InRun, "chosen", lambda self, wanted: 0)
    monkeypatch.setattr(InRun, "_unseen_first", lambda self, rows, name, interval: rows)
    with_scores = run("scored", **SETTINGS, dynamic=block())
    monkeypatch.setattr(InRun, "begin", lambda self, batch, device: None)
    without = run("deaf", **SETTINGS, dynamic=block())
    assert with_scores.series() == without.series()
    ours, theirs = with_scores.weights(), without.weights()
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)


def test_what_is_spent_stays_within_the_budget(run):
    outcome = run("budgeted", **SETTINGS, dynamic=block(budget=0.3))
    trained = outcome.folder / "dataflex" / "events.jsonl"
    told = [json.loads(line) for line in trained.read_text().splitlines()]
    planned = [event for event in told if event["event"] == "planned"]
    assert planned[-1]["kind"] == "dynamic"
