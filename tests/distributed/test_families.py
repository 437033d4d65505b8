"""Four families in one run, each at its own pace: resumed bit for bit on one and on two ranks, and over 2 -> 1 -> 2."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from dataflex.record.read import load_plan
from dataflex.state import load_state

pytestmark = pytest.mark.gloo

STEPS, BATCH, KEPT = 12, 8, 0.6
SETTINGS = {
    "dataset": "alpha,beta",
    "max_steps": STEPS,
    "gradient_accumulation_steps": 2,
    "ddp_find_unused_parameters": False,
    "save_strategy": "steps",
    "save_steps": 3,
    "dynamic": {
        "keep_ratio": KEPT,
        "repeat": True,
        "selector": {"name": "loss", "every": 5, "warmup_steps": 1},
        "mixer": {"name": "odm", "every": 2},
        "orderer": {"name": "folding", "by": "loss", "layers": 2, "every": 3},
        "weighter": {"name": "adapt", "targets": ["goal"], "refresh_steps": 4, "warmup_steps": 2},
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model, data_dir, two_ranks):
    from tests.integration.conftest import Outcome, Runner, base_settings

    folder = tmp_path_factory.mktemp("families")
    runner, found = Runner(base_settings(tiny_model, data_dir), folder), {}

    def run(world, *names, of=None, step=None):
        """Run on so many ranks, from a checkpoint of another run if it is named."""
        files = []
        for name, at in zip(names, step or [None] * len(names), strict=True):
            settings = {**SETTINGS, "per_device_train_batch_size": 4 // world}
            if at is not None:
                for part in (f"checkpoint-{at}", "dataflex"):
                    shutil.copytree(folder / of / part, folder / name / part)
                settings["resume_from_checkpoint"] = str(folder / name / f"checkpoint-{at}")
            if world == 1:
                runner(name, **settings)
            files.append(folder / f"{name}.json")
            files[-1].write_text(json.dumps(runner.mapping(name, **settings)))
            found[name] = Outcome(folder / name)
        if world == 2:
            two_ranks(files)
        errors = [path.read_text() for path in folder.glob("*.error")]
        assert not errors, errors

    run(1, "one")
    run(1, "one-3", "one-9", of="one", step=[3, 9])
    run(2, "two")
    run(2, "two-3", "two-9", of="two", step=[3, 9])
    run(1, "to-one", of="two", step=[3])
    run(2, "and-back", of="to-one", step=[6])
    return found


def plans(outcome):
    return [load_plan(outcome.folder, event["interval"]) for event in planned(outcome)]


def planned(outcome):
    return [event for event in outcome.events if event["event"] == "planned"]


def rows(outcome):
    return np.concatenate([plan.rows for plan in plans(outcome)]).tolist()


@pytest.mark.parametrize(("world", "step"), [("one", 3), ("one", 9), ("two", 3), ("two", 9)])
def test_a_resumed_twin_is_equal_to_the_bit(runs, world, step):
    straight, resumed = runs[world], runs[f"{world}-{step}"]
    assert resumed.series() == straight.series()
    assert resumed.series("grad_norm") == straight.series("grad_norm")
    assert rows(resumed) == rows(straight)
    ours, theirs = resumed.weights(), straight.weights()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["one", "to-one", "and-back"])
def test_other_ranks_serve_the_same_rows(runs, name):
    straight, moved = runs["two"], runs[name]
    assert rows(moved) == rows(straight)
    np.testing.assert_allclose(moved.series(), straight.series(), rtol=1e-5)
    np.testing.assert_allclose(moved.series("grad_norm"), straight.series("grad_norm"), rtol=1e-4)


def test_budgets_are_met_and_repeats_counted(runs):
    """Decisions begin where any family decides; a selection's share of the pool is served until the next one."""
    outcome = runs["two"]
    events, found = planned(outcome), plans(outcome)
    assert [event["start_step"] for event in events] == [0, 1, 2, 3, 4, 6, 8, 9, 10, 11]
    steps = [event["stop_step"] - event["start_step"] for event in events]
    assert [len(plan.rows) for plan in found] == [num * BATCH for num in steps]
    kept = {event["start_step"]: plan.kept for event, plan in zip(events, found, strict=True) if plan.kept is not None}
    assert {step: len(each) for step, each in kept.items()} == dict.fromkeys((1, 6, 11), round(KEPT * 61))
    for first, stop in ((1, 6), (6, 11), (11, 12)):
        served = rows(outcome)[first * BATCH : stop * BATCH]
        assert set(served) <= set(kept[first].tolist())
        assert max(np.bincount(served)) - 1 <= len(served) // len(kept[first])
    state = load_state(outcome.folder / "checkpoint-9" / "dataflex", "methods")["controller"]
    so_far = np.concatenate([plan.rows for event, plan in zip(events, found, strict=True) if event["start_step"] < 9])
    assert state["repeats"]["times"].tolist() == np.bincount(so_far, minlength=61).tolist()
    assert state["totals"]["rows"].sum() == 9 * BATCH
