"""Runs under LLaMA-Factory's Muon whose decisions go through it: its momentum is taken, kept and taken back."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

SETTINGS = {
    "dataset": "alpha,beta",
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "use_muon": True,
}
LESS = {"name": "less", "targets": ["goal"]}
BLOCKS = {
    "less": {"warmup_steps": 1, "interval_steps": 1, "selector": LESS},
    "opus": {
        "warmup_steps": 1,
        "interval_steps": 1,
        "candidate_batches": 3,
        "selector": {"name": "opus", "targets": ["goal"]},
    },
    "in_run": {"warmup_steps": 3, "interval_steps": 1, "selector": LESS, "signals": {"budget": 0.5}},
}


def decisions(outcome):
    """Reason, rows and scores of every decision."""
    found = []
    for event in outcome.events:
        if event["event"] == "planned" and event["kind"] == "dynamic":
            with np.load(outcome.folder / "dataflex" / event["plan"]) as arrays:
                scores = arrays["scores"].tolist() if "scores" in arrays else None
                found.append((event["reason"], arrays["rows"].tolist(), scores))
    return found


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("case", BLOCKS)
def test_decisions_go_by_the_momentum_and_come_back(run, case, tuning):
    settings = {**SETTINGS, "finetuning_type": tuning}
    straight = run("straight", **settings, dynamic=BLOCKS[case])
    folder = run.folder / "resumed"
    shutil.copytree(straight.folder / "checkpoint-4", folder / "checkpoint-4")
    shutil.copytree(straight.folder / "dataflex", folder / "dataflex")
    again = run("resumed", **settings, dynamic=BLOCKS[case], resume_from_checkpoint=True)
    assert again.series() == straight.series()
    assert decisions(again) == decisions(straight) != []
    selector = {**BLOCKS[case]["selector"], "precondition": "none"}
    plain = run("plain", **settings, dynamic={**BLOCKS[case], "selector": selector})
    assert decisions(plain)[0] != decisions(straight)[0]
