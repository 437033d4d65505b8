"""Checkpoints through the real training path: killed while they are written, of another run, damaged, rewritten."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dataflex.errors import CheckpointError

BLOCK = {"warmup_steps": 1, "interval_steps": 2, "selector": "loss"}
SETTINGS = {
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 2,
    "finetuning_type": "lora",
    "lora_rank": 2,
    "lora_dropout": 0.1,
    "dataset": "alpha,beta",
}
POINTS = ("before", "begun", "weights", "optimizer", "half_ours", "ours", "state", "manifest")
DRIVER = Path(__file__).with_name("killed_at.py")


def resumed_at(outcome) -> list[int]:
    return [event["step"] for event in outcome.events if event["event"] == "resumed"]


def ids(outcome) -> set[str]:
    told = [event["run"] for event in outcome.events if event["event"] == "run_started"]
    kept = [json.loads(path.read_text())["run"] for path in outcome.folder.glob("checkpoint-*/dataflex/manifest.json")]
    return {*told, *kept, json.loads((outcome.folder / "dataflex" / "run.json").read_text())["run"]}


@pytest.mark.slow
def test_killed_while_a_checkpoint_replaces_an_older_runs(run):
    """A fresh run in the folder of another one, killed at each point of a save; none of the other's is taken up."""
    older = run("older", **{**SETTINGS, "seed": 8, "learning_rate": 5e-3}, dynamic=BLOCK)
    straight = run("straight", **SETTINGS, dynamic=BLOCK)
    for point in POINTS:
        shutil.copytree(older.folder, run.folder / f"killed-{point}")
    config = run.folder / "killed.json"
    mapping = run.mapping("killed-POINT", **SETTINGS, overwrite_output_dir=True, dynamic=BLOCK)
    config.write_text(json.dumps(mapping))
    env = dict(os.environ)
    command = [sys.executable, str(DRIVER), str(config), "4", *POINTS]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    ends = dict(line.split() for line in done.stdout.splitlines() if line.split()[:1] and line.split()[0] in POINTS)
    assert ends == dict.fromkeys(POINTS, "9"), done.stderr[-2000:]
    for point in POINTS:
        resumed = run(f"killed-{point}", **SETTINGS, dynamic=BLOCK, resume_from_checkpoint=True)
        assert resumed_at(resumed) == [4 if point == "manifest" else 2], point
        assert resumed.series() == straight.series(), point
        ours, theirs = resumed.weights(), straight.weights()
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs), point
        assert len(ids(resumed)) == 1, "every checkpoint of the older run was replaced"
        assert not list((resumed.folder / "dataflex").rglob(".*")), point

    # Killed before its first checkpoint: it begins afresh.
    shutil.rmtree(run.folder / "killed-before")
    shutil.copytree(older.folder, run.folder / "killed-before")
    subprocess.run([*command[:3], "2", "before"], env=env, capture_output=True, check=False, timeout=300)
    again = {**SETTINGS, "dynamic": BLOCK}
    with pytest.raises(CheckpointError, match="Remove the key to start afresh"):
        run("killed-before", **again, resume_from_checkpoint=True)
    fresh = run("killed-before", **again)
    assert resumed_at(fresh) == []
    assert fresh.series() == straight.series()


def test_a_checkpoint_of_another_version_is_refused_unless_its_plan_is_ignored(run, monkeypatch):
    """The Trainer's own state is still of use."""
    with monkeypatch.context() as older:
        older.setattr("dataflex.train.checkpoint._FORMAT", 1)
        first = run("first", **SETTINGS, dynamic=BLOCK)
    resumed = {**SETTINGS, "resume_from_checkpoint": str(first.folder / "checkpoint-4")}
    with pytest.raises(CheckpointError, match=r"written by another version of DataFlex \(its format is 1, and this"):
        run("again", **resumed, dynamic=BLOCK)
    assert resumed_at(run("again", **resumed, dynamic={**BLOCK, "resume_plan": "ignore"})) == [4]


def test_an_older_runs_checkpoint_that_is_named_is_gone_on_from_as_that_run(run):
    older = run("both", **SETTINGS, dynamic=BLOCK)
    kept = run.folder / "kept"
    shutil.copytree(older.folder / "checkpoint-4", kept)
    losses, (first,) = older.series(), ids(older)
    newer = run("both", **{**SETTINGS, "max_steps": 4}, dynamic=BLOCK, overwrite_output_dir=True, seed=9)
    assert first not in {event.get("run") for event in newer.events}
    back = run("both", **SETTINGS, dynamic=BLOCK, resume_from_checkpoint=str(kept))
    assert back.series() == losses
    assert resumed_at(back) == [4], "the newer run's record is not continued"
    told = [event["run"] for event in back.events if event["event"] == "run_started"]
    assert told == [first]
    at_8 = json.loads((back.folder / "checkpoint-8" / "dataflex" / "manifest.json").read_text())
    assert at_8["run"] == first


@pytest.mark.parametrize("weighter", [None, {"name": "loss", "warmup_steps": 1}])
def test_logs_between_checkpoints_are_the_same_after_a_resume(run, weighter):
    """Sums since the last log are part of the checkpoint: the loss, what a weighter and a mixer tell beside it."""
    block = {"weighter": weighter} if weighter else {"interval_steps": 2, "mixer": "odm"}
    settings = {**SETTINGS, "max_steps": 11, "logging_steps": 4, "save_steps": 3, "lr_scheduler_type": "cosine"}
    straight = run("straight", **settings, dynamic=block)
    whole = json.loads((straight.folder / "all_results.json").read_text())["train_loss"]
    for step in (3, 6):
        folder = run.folder / f"resumed-{step}"
        shutil.copytree(straight.folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        resumed = run(folder.name, **settings, dynamic=block, resume_from_checkpoint=True)
        for ours, theirs in zip(resumed.log, straight.log, strict=True):
            timed = {key for key in theirs if "seconds" in key}
            assert {key: ours[key] for key in theirs if key not in timed} == {
                key: theirs[key] for key in theirs if key not in timed
            }, step
        assert json.loads((folder / "all_results.json").read_text())["train_loss"] == whole


def test_a_checkpoint_of_weights_alone_leaves_nothing_old_beside_them(run):
    from dataflex import checkpoints

    first = run("out", **{**SETTINGS, "max_steps": 2}, dynamic=BLOCK)
    checkpoint = first.folder / "checkpoint-2"
    assert (checkpoint / "optimizer.pt").is_file()
    settings = {**SETTINGS, "max_steps": 2, "save_only_model": True, "overwrite_output_dir": True}
    run("out", **settings, dynamic=BLOCK)
    assert not (checkpoint / "optimizer.pt").exists()
    assert not (checkpoint / "dataflex" / "run.json").exists()
    assert checkpoints.broken_reason(checkpoint) is None
    files = json.loads((checkpoint / "dataflex" / "manifest.json").read_text())["files"]
    assert {"adapter_model.safetensors", "trainer_state.json"} <= files.keys()


def test_the_limit_counts_when_the_newest_is_sealed_and_callbacks_are_part_of_it(run, monkeypatch):
    """Stage rm rewrites the weights in a callback after the Trainer's own saving."""
    from dataflex import checkpoints

    seen = []
    real = checkpoints.seal

    def seal(checkpoint, **kwargs):
        seen.append(sorted(path.name for path in checkpoint.parent.glob("checkpoint-*")))
        real(checkpoint, **kwargs)

    monkeypatch.setattr(checkpoints, "seal", seal)
    settings = {**SETTINGS, "max_steps": 6, "save_total_limit": 1, "dataset": "pairs", "stage": "rm"}
    done = run("rm", **settings, dynamic={"interval_steps": 2, "selector": "random"})
    assert seen == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"], ["checkpoint-4", "checkpoint-6"]]
    (left,) = done.folder.glob("checkpoint-*")
    assert left.name == "checkpoint-6"
    assert checkpoints.broken_reason(left) is None
    assert (left / "value_head.safetensors").is_file(), "written by the callback"
    assert "value_head.safetensors" in (left / "dataflex" / "manifest.json").read_text()


def test_a_finished_run_that_is_started_again_keeps_its_checkpoint(run):
    settings = {**SETTINGS, "max_steps": None, "num_train_epochs": 1.0, "save_strategy": "epoch", "dataset": "ones"}
    block = {"interval_steps": 4, "selector": "random"}
    done = run("out", **settings, dynamic=block)
    (checkpoint,) = done.folder.glob("checkpoint-*")
    manifest = checkpoint / "dataflex" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    again = run("out", **settings, dynamic=block, resume_from_checkpoint=True)
    assert manifest.stat().st_mtime_ns == before
    assert again.series() == done.series()


def test_beside_new_final_weights_no_old_trainer_state_is_left(run, monkeypatch):
    from transformers import Trainer

    done = run("out", **{**SETTINGS, "max_steps": 2, "save_strategy": "no"}, dynamic=BLOCK)
    assert (done.folder / "trainer_state.json").is_file()
    seen = []
    real = Trainer.save_model

    def save_model(self, output_dir=None, _internal_call=False):
        seen.append((done.folder / "trainer_state.json").exists())
        real(self, output_dir, _internal_call)

    monkeypatch.setattr(Trainer, "save_model", save_model)
    settings = {**SETTINGS, "max_steps": 2, "save_strategy": "no", "overwrite_output_dir": True}
    run("out", **settings, dynamic=BLOCK)
    assert seen == [False]
    assert (done.folder / "trainer_state.json").is_file()


def test_the_store_does_not_give_scores_of_another_rotary_base(run, tiny_model):
    """Equal weights, another ``rope_theta`` or autocast: the store's losses are computed anew."""
    other = run.folder / "other-model"
    shutil.copytree(tiny_model, other)
    config = json.loads((other / "config.json").read_text())
    (config.get("rope_parameters") or config)["rope_theta"] = 100.0
    (other / "config.json").write_text(json.dumps(config))
    store = run.folder / "store"
    signals = {"store": str(store)}
    settings = {**SETTINGS, "max_steps": 1, "save_strategy": "no"}

    def scores(name, **changes):
        from dataflex.record.read import load_plan

        block = {"interval_steps": 1, "selector": "loss", "signals": changes.pop("signals", {})}
        return load_plan(run(name, **settings, dynamic=block, **changes).folder, 0).scores

    alone = scores("alone", model_name_or_path=str(other))
    first = scores("first", signals=signals)
    stored = len(list(store.glob("*/manifest.json")))
    assert np.array_equal(scores("again", signals=signals), first)
    assert len(list(store.glob("*/manifest.json"))) == stored, "found again"
    assert not np.array_equal(alone, first)
    assert np.array_equal(scores("second", model_name_or_path=str(other), signals=signals), alone)
    scores("third", bf16=True, use_cpu=True, signals=signals)
    assert len(list(store.glob("*/manifest.json"))) == 3 * stored
