"""Weights that a selector gives its rows: they reach the loss, and a resumed run has them again."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

SETTINGS = {
    "dataset": "beta",
    "max_steps": 12,
    "disable_shuffling": False,
    "save_strategy": "steps",
    "save_steps": 3,
    "dynamic": {"selector": {"name": "infobatch", "delta": 1.0}, "warmup_steps": 8, "interval_steps": 2},
}


def test_weights_reach_the_loss_and_come_back_after_a_resume(run):
    """A step in which rows weigh more has a larger loss than the plain one, and by as much as they say."""
    import pyarrow.parquet as pq

    straight = run("straight", **SETTINGS)
    ratio = np.array(straight.series()) / straight.series("dataflex/plain_loss")
    assert ratio[:8] == pytest.approx(1.0, abs=2e-4)  # the warm-up; the Trainer's log rounds
    assert ratio[8:].max() > 1.05
    largest = straight.series("dataflex/weight_max")
    assert largest[:8] == [1.0] * 8
    reasons = [event["reason"] for event in straight.events if event["event"] == "planned"][1:]
    told = [float(reason.split(", weight ")[1].split(";")[0]) for reason in reasons]
    assert {round(value, 3) for value in largest[8:]} <= {1.0, *(round(value, 3) for value in told)}
    weights = pq.read_table(straight.folder / "dataflex" / "weights.parquet").column("weight").to_numpy()
    assert weights.max() > 1.0
    assert weights.min() == 1.0
    for step in (6, 9):  # before the first decision, and inside an interval
        folder = run.folder / f"resumed-{step}"
        shutil.copytree(straight.folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copytree(straight.folder / "dataflex", folder / "dataflex")
        resumed = run(folder.name, **SETTINGS, resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert resumed.series() == straight.series()
        assert resumed.series("dataflex/weight_max") == largest
