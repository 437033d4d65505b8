"""Where the seconds of whole runs go: slowed down in every part, each part shows, and together they are the run."""

from __future__ import annotations

import json
import time

import pytest

from dataflex.record.digest import digest
from dataflex.record.read import read_ending, read_events
from dataflex.record.report import report

ROUNDING = 0.01
"""Seconds: what rounding each phase to a thousandth can add."""
MARGIN = 5.0
"""Seconds that a crowded machine may take between a look at the clock here and one in the run."""
SLOW = 0.3


def slowed(monkeypatch, owner, name):
    original = getattr(owner, name)

    def slow(*args, **kwargs):
        time.sleep(SLOW)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, slow)


def account(folder):
    run = digest([*read_events(folder), *read_ending(folder)])
    return run, run.phase_seconds()


@pytest.fixture
def settings(run, tiny_model):
    return {
        "dataset": "alpha,beta",
        "eval_dataset": "held",
        "do_eval": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "dynamic": {"interval_steps": 2, "selector": "loss", "weighter": {"name": "slm", "reference": str(tiny_model)}},
    }


def test_every_second_of_a_run_is_accounted_for(run, settings, monkeypatch):
    from llamafactory.train.sft import workflow

    from dataflex.huggingface import trainer
    from dataflex.llamafactory import datasets
    from dataflex.run import train
    from dataflex.signals.runner import SignalRunner
    from dataflex.train import checkpoint
    from dataflex.train.reference import ReferenceLosses

    parts = {
        "data": (datasets, "measure"),
        "leakage": (datasets, "find_leaks"),
        "model": (workflow, "load_model"),
        "reference": (ReferenceLosses, "__init__"),
        "prepare": (trainer, "loop_of"),
        "signals": (SignalRunner, "_compute"),
        "evaluation": (trainer.TrainerMixin, "evaluation_loop"),
        "checkpoint": (checkpoint, "save"),
        "training": (trainer.TrainerMixin, "training_step"),
    }
    for owner, name in parts.values():
        slowed(monkeypatch, owner, name)
    config = run.folder / "timed.json"
    config.write_text(json.dumps(run.mapping("timed", **settings)))
    began = time.time()
    assert train([str(config)]) == 0
    wall = time.time() - began
    told, phases = account(run.folder / "timed")
    assert told.wall_seconds == pytest.approx(sum(phases.values()), abs=1e-6)
    assert -ROUNDING <= wall - told.wall_seconds < MARGIN
    for phase in parts:
        assert phases[phase] >= SLOW, phase
    assert phases["training"] >= 4 * SLOW
    assert phases["checkpoint"] >= 2 * SLOW
    assert phases["evaluation"] >= 3 * SLOW  # twice on the way, once at the end
    assert phases["save"] > 0.0
    text = report([run.folder / "timed"])
    assert "reference" in text
    assert "other" in text
    finished = [event for event in read_events(run.folder / "timed") if event["event"] == "finished"][-1]
    assert finished["seconds"]["reference"] >= SLOW
    assert sum(finished["seconds"].values()) == pytest.approx(sum(finished["spent"].values()), abs=0.1)


def test_a_resumed_run_counts_its_processes(run, settings, monkeypatch):
    from dataflex.train import checkpoint
    from dataflex.train.reference import ReferenceLosses

    slowed(monkeypatch, ReferenceLosses, "__init__")
    slowed(monkeypatch, checkpoint, "load")
    first = run("long", **{**settings, "max_steps": 2})
    _, before = account(first.folder)
    began = time.time()
    run("long", **settings, resume_from_checkpoint=str(first.folder / "checkpoint-2"))
    wall = time.time() - began
    told, phases = account(first.folder)
    assert told.wall_seconds == pytest.approx(sum(phases.values()), abs=1e-6)
    assert -2 * ROUNDING <= sum(before.values()) + wall - told.wall_seconds < MARGIN
    assert phases["reference"] >= 2 * SLOW
    assert phases["prepare"] >= before["prepare"] + SLOW
    finished = [event for event in read_events(first.folder) if event["event"] == "finished"]
    assert len(finished) == 1
    assert finished[0]["seconds"]["reference"] >= 2 * SLOW
    assert finished[0]["seconds"]["train"] > finished[0]["spent"]["train"]
