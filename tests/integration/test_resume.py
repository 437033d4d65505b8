"""A resumed run continues bit for bit, at every step where a checkpoint can be written."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

CASES = {
    "selection": {"dynamic": {"warmup_steps": 2, "interval_steps": 3, "selector": {"name": "loss"}}},
    "mixture": {
        "dataset": "alpha,beta,gamma",
        "dynamic": {
            "interval_steps": 4,
            "mixer": {
                "name": "staged",
                "stages": [
                    {"start_step": 0, "proportions": [0.5, 0.4, 0.1]},
                    {"start_step": 6, "proportions": [0.2, 0.5, 0.3]},
                ],
            },
        },
    },
    "reweighting": {"dynamic": {"weighter": {"name": "loss", "warmup_steps": 3}}},
    "everything": {
        "dataset": "alpha,beta",
        "dynamic": {
            "warmup_steps": 1,
            "keep_ratio": 0.6,
            "repeat": True,
            "selector": {"name": "loss", "focus": "medium", "every": 5},
            "mixer": {"name": "random", "every": 2},
            "orderer": {"name": "folding", "by": "loss", "layers": 2, "every": 3},
            "weighter": {"name": "column"},
        },
    },
    "epochs": {"dynamic": {"selector": "all"}, "disable_shuffling": False, "dataset": "beta"},
}

SETTINGS = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_dropout": 0.1,
    "max_steps": 12,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "save_strategy": "steps",
    "save_steps": 1,
}


def ids_of(outcome):
    from dataflex.record.read import load_plan

    served = {}
    for event in outcome.events:
        if event["event"] == "planned":
            rows = load_plan(outcome.folder, event["interval"]).rows.reshape(-1, 4)
            for offset, step_rows in enumerate(rows):
                served[event["start_step"] + offset] = step_rows.tolist()
    return served


@pytest.mark.parametrize("case", CASES)
def test_resume_is_exact_at_every_step(run, case):
    straight = run("straight", **SETTINGS, **CASES[case])
    losses = straight.series()
    assert losses[1] != losses[2], "a run that does not change cannot show that resuming works"
    for step in range(1, 12, 2 if case in {"everything", "epochs"} else 1):
        name = f"resumed-{step}"
        folder = run.folder / name
        shutil.copytree(straight.folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copytree(straight.folder / "dataflex", folder / "dataflex")
        resumed = run(name, **SETTINGS, **CASES[case], resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert resumed.series() == losses, step
        assert resumed.series("grad_norm") == straight.series("grad_norm"), step
        assert resumed.series("epoch") == straight.series("epoch"), step
        assert ids_of(resumed) == ids_of(straight), step
        first, second = ([e["passes"] for e in each.events if e["event"] == "finished"] for each in (straight, resumed))
        assert first == second, step
        ours, theirs = resumed.weights(), straight.weights()
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs), step
        shutil.rmtree(folder)


def test_resume_true_takes_the_newest_complete_checkpoint(run):
    straight = run("straight", **SETTINGS, **CASES["selection"])
    folder = run.folder / "again"
    for step in (3, 6, 9, 11):
        shutil.copytree(straight.folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    (folder / "checkpoint-11" / "trainer_state.json").unlink()  # killed before it was written
    torn = folder / "checkpoint-9" / "dataflex" / "run.json"
    torn.write_text(torn.read_text()[:20])
    resumed = run("again", **SETTINGS, **CASES["selection"], resume_from_checkpoint=True)
    started = [event for event in resumed.events if event["event"] == "resumed"]
    assert [event["step"] for event in started] == [6]
    assert resumed.series() == straight.series()


def test_changed_runs_refuse(run, data_dir, tmp_path):
    from dataflex.errors import CheckpointError

    straight = run("straight", **{**SETTINGS, "save_steps": 6}, **CASES["selection"])
    checkpoint = str(straight.folder / "checkpoint-6")

    def refused(expected, **changes):
        with pytest.raises(CheckpointError, match=expected):
            run("changed", **{**SETTINGS, **CASES["selection"], "resume_from_checkpoint": checkpoint, **changes})

    other = tmp_path / "other"
    shutil.copytree(data_dir, other)
    rows = (other / "ones.jsonl").read_text().splitlines()
    (other / "ones.jsonl").write_text("\n".join(rows[:-2]) + "\n")
    refused(r"row space changed \(source 'ones': 37 -> 35 rows\)", dataset_dir=str(other))
    same_size = [json.loads(row) for row in rows]
    same_size[3]["output"] = "the cat"
    (other / "ones.jsonl").write_text("".join(json.dumps(row) + "\n" for row in same_size))
    refused("row space changed", dataset_dir=str(other))
    refused(r"global batch changed \(4 -> 8 sequences\)", gradient_accumulation_steps=4)
    refused("dynamic.selector changed", dynamic={"warmup_steps": 2, "interval_steps": 3, "selector": "random"})
    seen = {"warmup_steps": 2, "interval_steps": 3, "selector": {"name": "loss"}, "exclude_seen": True}
    refused(r"^resume: dynamic.exclude_seen changed \(false -> true\)\nThe saved", dynamic=seen)
    refused(r"^resume: disable_shuffling changed \(true -> false\)\nThe saved", disable_shuffling=False)
    refused(r"interval_steps changed \(3 -> 4\)", dynamic={"warmup_steps": 2, "interval_steps": 4, "selector": "loss"})


def test_resume_plan_ignore_starts_afresh(run):
    straight = run("straight", **{**SETTINGS, "save_steps": 6}, **CASES["selection"])
    checkpoint = str(straight.folder / "checkpoint-6")
    block = {"warmup_steps": 2, "interval_steps": 3, "selector": "random", "resume_plan": "ignore"}
    fresh = run("fresh", **{**SETTINGS, "resume_from_checkpoint": checkpoint}, dynamic=block)
    assert len(fresh.series()) == 12
    assert fresh.series()[:6] == straight.series()[:6]
    assert fresh.series()[6:] != straight.series()[6:]


def test_foreign_checkpoint_refuses(run):
    from dataflex.errors import CheckpointError

    stock = run("stock", **{**SETTINGS, "save_steps": 6})
    with pytest.raises(CheckpointError, match="no 'dataflex' folder"):
        run("ours", **SETTINGS, **CASES["selection"], resume_from_checkpoint=str(stock.folder / "checkpoint-6"))


def test_a_finished_run_can_be_made_longer(run):
    settings = {**SETTINGS, "lr_scheduler_type": "constant"}
    long = run("long", **settings, **CASES["selection"])
    short = run("short", **{**settings, "max_steps": 8}, **CASES["selection"])  # ends with an interval
    assert short.series() == long.series()[:8]
    longer = run("short", **settings, **CASES["selection"], resume_from_checkpoint=True)
    assert longer.series() == long.series()


def test_another_batch_or_order_is_one_line(run):
    from dataflex.errors import CheckpointError

    block = {"dataset": "alpha,beta", "dynamic": {"mixer": "uniform"}}
    straight = run("straight", **{**SETTINGS, "save_steps": 6}, **block)
    again = {**SETTINGS, **block, "resume_from_checkpoint": str(straight.folder / "checkpoint-6")}
    for change, expected in (
        (
            {"gradient_accumulation_steps": 4},
            "gradient_accumulation_steps changed (2 -> 4): global batch changed (4 -> 8 sequences)",
        ),
        (
            {"dataset": "beta,alpha"},
            "dataset changed (alpha, beta -> beta, alpha): row space changed (the data sets are in another order: "
            "alpha, beta -> beta, alpha)",
        ),
    ):
        with pytest.raises(CheckpointError) as caught:
            run("changed", **{**again, **change})
        assert str(caught.value).splitlines()[:-1] == [f"resume: {expected}"]


def test_a_mixture_made_longer_inside_its_interval_is_as_if_never_cut(run):
    """One decision for the whole run, cut by the end of the shorter one: all rows are in the record."""
    from dataflex.record.digest import digest

    settings = {**SETTINGS, "lr_scheduler_type": "constant", "dataset": "alpha,beta", "save_steps": 2}
    block = {"dynamic": {"mixer": {"name": "static", "proportions": [0.3, 0.7]}}}
    long = run("long", **settings, **block)
    run("short", **{**settings, "max_steps": 4}, **block)
    run("short", **{**settings, "max_steps": 6}, **block, resume_from_checkpoint=True)
    longer = run("short", **settings, **block, resume_from_checkpoint=True)
    assert longer.series() == long.series()
    assert ids_of(longer) == ids_of(long)
    told = digest(longer.events)
    assert [event["plan"] for event in told.planned] == [f"plans/plan-0000{number}.npz" for number in range(3)]
    assert sum(event["rows"] for event in told.planned) == 12 * 4
    assert told.total_steps == 12


def test_a_fresh_plan_inside_an_interval_keeps_the_record_of_what_was_served(run):
    from dataflex.record.digest import digest

    straight = run("straight", **{**SETTINGS, "save_steps": 6}, **CASES["selection"])  # an interval of steps 5 to 7
    block = {"warmup_steps": 2, "interval_steps": 3, "selector": "random", "resume_plan": "ignore"}
    fresh = run("straight", **SETTINGS, dynamic=block, resume_from_checkpoint=str(straight.folder / "checkpoint-6"))
    told = digest(fresh.events).planned
    assert [(event["start_step"], event["stop_step"]) for event in told] == [
        (0, 2),
        (2, 5),
        (5, 6),
        (6, 8),
        (8, 11),
        (11, 12),
    ]
    assert sum(event["rows"] for event in told) == 12 * 4


def test_a_raised_cap_trains_on(run):
    settings = {**SETTINGS, "lr_scheduler_type": "constant", "dataset": "alpha,beta"}
    block = {"mixer": "uniform", "at_cap": "stop"}
    long = run("long", **settings, dynamic={**block, "max_epochs": 9})
    low = run("low", **settings, dynamic={**block, "max_epochs": 0.3})
    steps = len(low.series())
    assert 0 < steps < 12
    same = run("low", **settings, dynamic={**block, "max_epochs": 0.3}, resume_from_checkpoint=True)
    assert len(same.series()) == steps
    high = run("low", **settings, dynamic={**block, "max_epochs": 9}, resume_from_checkpoint=True)
    assert high.series() == long.series()
    assert ids_of(high) == ids_of(long)


@pytest.mark.parametrize("block", [CASES["selection"], {"dynamic": {"record": True}}], ids=["selection", "stock"])
def test_early_stopping_counts_on_over_a_checkpoint(run, block):
    """At a learning rate of 0 nothing is gained after step 1, so that a patience of 3 ends at step 4."""
    early = {
        **SETTINGS,
        **block,
        "learning_rate": 0.0,
        "eval_dataset": "beta",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "early_stopping_steps": 3,
    }
    straight = run("straight", **early)
    assert len(straight.series()) == 4
    resumed = run("resumed", **early, resume_from_checkpoint=str(straight.folder / "checkpoint-3"))
    assert resumed.series() == straight.series()
    assert run("straight", **early).series() == straight.series()  # started again it ends at once
    assert len(run("straight", **{**early, "early_stopping_steps": 5}).series()) == 6


def test_a_finished_run_is_not_trained_further(run):
    done = run("done", **SETTINGS, **CASES["selection"])
    before = done.weights()
    again = run("done", **SETTINGS, **CASES["selection"])  # LLaMA-Factory resumes by itself where checkpoints lie
    assert again.series() == done.series()
    assert all(np.array_equal(before[name], value) for name, value in again.weights().items())
