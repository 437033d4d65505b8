"""Stages, tuning types, packing, evaluation and saving, through the real path."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dataflex.record.read import load_plan

SELECTION = {"interval_steps": 2, "warmup_steps": 1, "selector": "loss"}
MIXTURE = {"mixer": {"name": "static", "proportions": [0.25, 0.75]}}
PREFERENCE = {"dpo": "pairs,pairs2", "rm": "pairs,pairs2", "kto": "tagged,tagged2"}


def planned(outcome):
    return [event for event in outcome.events if event["event"] == "planned"]


@pytest.mark.parametrize("stage", ["dpo", "kto", "rm"])
@pytest.mark.parametrize("block", ["selection", "mixture"])
def test_preference_stages(run, stage, block):
    if block == "selection":
        method = "random" if stage == "rm" else "loss"
        dynamic = {**SELECTION, "selector": method}
    else:
        dynamic = MIXTURE
    outcome = run(
        "out",
        stage=stage,
        dataset=PREFERENCE[stage],
        finetuning_type="lora",
        max_steps=5,
        per_device_train_batch_size=4,
        dynamic=dynamic,
    )
    assert len(outcome.series()) == 5
    assert np.isfinite(outcome.series()).all()
    if block == "mixture":
        counts = planned(outcome)[0]["domain_counts"]
        assert list(counts.values()) == [5, 15]
    elif stage != "rm":
        assert planned(outcome)[1]["scores"]["scored"] == 24


@pytest.mark.parametrize("weighter", [{"name": "loss", "warmup_steps": 0}, {"name": "column"}])
@pytest.mark.parametrize("stage", ["sft", "pt"])
def test_reweighting_changes_the_run(run, stage, weighter):
    data = {"dataset": "alpha"} if stage == "sft" else {"dataset": "weighted_text", "packing": False}
    settings = {"stage": stage, "max_steps": 4, "per_device_train_batch_size": 4, **data}
    plain = run("plain", **settings)
    weighted = run("weighted", **settings, dynamic={"weighter": weighter})
    assert weighted.series() != plain.series()
    assert np.isfinite(weighted.series()).all()
    assert all(0.0 < entry["dataflex/weight_ess"] < 1.0 for entry in weighted.log)


def test_pretraining_packs_inside_a_domain_and_serves_exact_quotas(run):
    outcome = run(
        "out",
        stage="pt",
        dataset="text,weighted_text",
        cutoff_len=32,
        max_steps=6,
        per_device_train_batch_size=4,
        dynamic=MIXTURE,
    )
    event = planned(outcome)[0]
    assert event["domain_counts"] == {"text": 6, "weighted_text": 18}


@pytest.mark.parametrize("packing", [{"packing": True}, {"neat_packing": True}])
def test_packing(run, packing):
    outcome = run("out", dataset="alpha", cutoff_len=40, max_steps=4, **packing, dynamic=SELECTION)
    assert len(outcome.series()) == 4
    assert planned(outcome)[1]["scores"]["scored"] > 0


@pytest.mark.parametrize(
    "tuning",
    [
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
        {"finetuning_type": "lora", "lora_dropout": 0.1},
        {"finetuning_type": "full", "bf16": True, "use_cpu": True},
        {"finetuning_type": "full", "gradient_accumulation_steps": 3, "dataloader_num_workers": 2},
    ],
)
def test_tuning_types(run, tuning):
    outcome = run(
        "out",
        dataset="alpha,beta",
        max_steps=5,
        **tuning,
        dynamic={
            **SELECTION,
            **MIXTURE,
            "keep_ratio": 0.5,
            "repeat": True,
            "weighter": {"name": "loss", "warmup_steps": 1},
        },
    )
    assert len(outcome.series()) == 5
    assert np.isfinite(outcome.series()).all()


def test_workers_serve_the_same_rows_as_none(run):
    settings = {"dataset": "alpha,beta", "max_steps": 6, "dynamic": SELECTION}
    one = run("one", **settings)
    two = run("two", **settings, dataloader_num_workers=2, dataloader_prefetch_factor=3)
    assert one.series() == two.series()


def test_evaluation_best_model_and_save_limit(run):
    outcome = run(
        "out",
        dataset="alpha,beta",
        val_size=0.2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        max_steps=8,
        dynamic=SELECTION,
    )
    left = sorted(path.name for path in outcome.folder.glob("checkpoint-*"))
    assert len(left) == 2
    for name in left:
        assert (outcome.folder / name / "dataflex" / "manifest.json").is_file()
    evaluations = [event for event in outcome.events if event["event"] == "evaluated"]
    assert [event["step"] for event in evaluations] == [2, 4, 6, 8, 8]  # the last one is do_eval's, on the best model
    started = next(event for event in outcome.events if event["event"] == "run_started")
    assert sum(started["row_space"]["sources"].values()) == 61 - 13


def test_validation_split_of_one_source_matches_its_columns(run):
    """The split moves rows; the weights must move with them."""
    from dataflex.llamafactory.datasets import DataLoading

    seen = {}
    original = DataLoading.load

    def remember(self):
        module, seen["space"] = original(self)
        return module, seen["space"]

    DataLoading.load = remember
    try:
        run("out", dataset="alpha", val_size=0.25, max_steps=2, dynamic={"weighter": {"name": "column"}})
    finally:
        DataLoading.load = original
    space = seen["space"]
    from pathlib import Path

    rows = [json.loads(line) for line in (Path(run.base["dataset_dir"]) / "alpha.jsonl").read_text().splitlines()]
    weight_of = {len(row["output"].split()) + 1000 * len(row["instruction"].split()): [] for row in rows}
    for row in rows:
        weight_of[len(row["output"].split()) + 1000 * len(row["instruction"].split())].append(row["sample_weight"])
    for index in range(space.num_rows):
        words = int(space.supervised[index]) - 1  # the answer's words and the end token
        candidates = [w for key, values in weight_of.items() if key % 1000 == words for w in values]
        assert any(abs(space.columns["sample_weight"][index] - w) < 1e-6 for w in candidates)


def test_domains_by_column_and_scalars_in_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    outcome = run(
        "out",
        dataset="alpha,beta",
        max_steps=4,
        report_to="tensorboard",
        logging_dir=str(run.folder / "board"),
        dynamic={**SELECTION, "domain_column": "source"},
    )
    counts = planned(outcome)[0]["domain_counts"]
    assert list(counts) == ["alpha0", "alpha1", "beta0", "beta1"]
    files = [path for path in run.folder.rglob("events.out.tfevents*")]
    assert files
    tags = set()
    for file in files:
        board = EventAccumulator(str(file.parent))
        board.Reload()
        tags |= set(board.Tags()["scalars"])
    assert any("dataflex/interval" in tag for tag in tags)
    assert any("dataflex_mix/alpha0" in tag for tag in tags)


def test_plan_files_hold_what_was_served(run):
    outcome = run("out", dataset="alpha", max_steps=5, dynamic=SELECTION)
    events = planned(outcome)
    assert [(e["start_step"], e["stop_step"], e["kind"]) for e in events] == [
        (0, 1, "warmup"),
        (1, 3, "dynamic"),
        (3, 5, "dynamic"),
    ]
    for event in events:
        stored = load_plan(outcome.folder, event["interval"])
        assert len(stored.rows) == (event["stop_step"] - event["start_step"]) * 2
        assert ((stored.rows >= 0) & (stored.rows < 40)).all()


def test_caps_stop_the_run(run):
    outcome = run(
        "out",
        dataset="alpha,gamma",
        max_steps=50,
        dynamic={"mixer": {"name": "static", "proportions": [0.5, 0.5]}, "max_epochs": 2.0, "at_cap": "stop"},
    )
    assert len(outcome.series()) == 6  # 3 rows of gamma, twice, one of them in each step of 2


def test_whole_run_without_intervals_for_static_methods(run):
    outcome = run("out", dataset="alpha,beta", num_train_epochs=2.0, dynamic=MIXTURE)
    assert len(planned(outcome)) == 1
    assert len(outcome.series()) == 2 * -(-61 // 2)
