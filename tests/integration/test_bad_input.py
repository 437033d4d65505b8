"""Mistakes that only the data or the model can show, each told plainly."""

from __future__ import annotations

import json
import shutil

import pytest

from dataflex.errors import CheckpointError, ComponentError, ConfigError, DataError, UnsupportedError

COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}


@pytest.fixture
def own_data(run, tmp_path):
    """Return a function that registers rows as a data set and points the run at it."""
    folder = tmp_path / "own"
    folder.mkdir()
    info: dict = {}

    def add(name, rows):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        info[name] = {"file_name": f"{name}.jsonl", "columns": COLUMNS}
        (folder / "dataset_info.json").write_text(json.dumps(info))
        run.base.update(dataset_dir=str(folder), max_steps=3)

    return add


def rows(count, **extra):
    return [
        {"instruction": "add two", "input": "", "output": f"sum is {'four ' * (i % 3 + 1)}", **extra}
        for i in range(count)
    ]


def test_fully_masked_labels(run, tmp_path, caplog):
    """Rows without labels: some are told about and never selected, all of them end the run."""
    from datasets import Dataset, DatasetDict

    def tokenized(name, masked):
        count = 8
        ids = [[5, 6, 7, 8, 2]] * count
        columns = {"input_ids": ids, "attention_mask": [[1] * 5] * count}
        columns["labels"] = [[-100] * 5 if i in masked else [-100, -100, 7, 8, 2] for i in range(count)]
        columns.update({media: [None] * count for media in ("images", "videos", "audios")})
        DatasetDict({"train": Dataset.from_dict(columns)}).save_to_disk(tmp_path / name)
        return {"tokenized_path": str(tmp_path / name), "max_steps": 2}

    block = {"interval_steps": 1, "selector": "loss"}
    with pytest.raises(DataError, match="all 8 rows have their labels fully masked"):
        run("out", **tokenized("all", range(8)), dynamic=block)
    outcome = run("some", **tokenized("some", {1, 4}), dynamic=block)
    planned = [event for event in outcome.events if event["event"] == "planned"]
    assert planned[0]["scores"]["scored"] == 6
    from dataflex.record.read import load_plan

    for event in planned:
        assert not {1, 4} & set(load_plan(outcome.folder, event["interval"]).rows.tolist())
    started = next(event for event in outcome.events if event["event"] == "run_started")
    assert started["row_space"]["rows_without_labels"] == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, -2.0, 1.0], "sample_weight"),
        ([1.0, float("nan"), 1.0], "sample_weight"),
        (["one", "two", "three"], "sample_weight"),
    ],
)
def test_weights_that_cannot_be(run, own_data, values, message):
    own_data("weighted", [{**row, "sample_weight": values[i % 3]} for i, row in enumerate(rows(9))])
    with pytest.raises(ConfigError, match=message):
        run("out", dataset="weighted", dynamic={"weighter": "column"})


def test_weights_of_zero_are_a_wish(run, own_data):
    own_data("weighted", [{**row, "sample_weight": 0.0} for row in rows(9)])
    assert run("out", dataset="weighted", dynamic={"weighter": "column"}).series() == [0.0, 0.0, 0.0]


def test_missing_columns(run, own_data):
    own_data("bare", rows(9))
    with pytest.raises((ConfigError, DataError), match=r"'sample_weight'.*instruction"):
        run("out", dataset="bare", dynamic={"weighter": "column"})
    with pytest.raises((ConfigError, DataError), match=r"'sourc'"):
        run("out", dataset="bare", dynamic={"domain_column": "sourc", "mixer": "uniform"})


def test_proportions_for_domains_of_a_column(run, own_data):
    own_data("mixed", [*rows(6, source="a"), *rows(6, source="b")])
    block = {"domain_column": "source", "mixer": {"name": "static", "proportions": {"a": 0.5, "bb": 0.5}}}
    with pytest.raises(ConfigError, match=r"bb.*did you mean 'b'"):
        run("out", dataset="mixed", dynamic=block)
    block["mixer"]["proportions"] = [0.2, 0.3, 0.5]
    with pytest.raises(ConfigError, match="3 numbers for 2 domains"):
        run("out", dataset="mixed", dynamic=block)


def test_too_few_rows_for_an_interval(run, own_data):
    own_data("few", rows(5))
    block = {"interval_steps": 3, "selector": "loss"}
    with pytest.raises((ConfigError, DataError), match=r"repeat: true"):
        run("out", dataset="few", dynamic=block)
    assert len(run("out", dataset="few", dynamic={**block, "repeat": True}).series()) == 3


def test_methods_that_break_their_contract(run, tmp_path):
    plugin = tmp_path / "bad.py"
    plugin.write_text(
        """
import numpy as np
from dataflex import Card, Mix, Mixer, Requires, Selection, Selector, Weighter

card = Card(summary="Breaks a rule.", paper="none", cost="0")


class Outside(Selector):
    name, card = "outside", card
    def requires(self):
        return Requires(needs_interval=True)
    def select(self, pool, budget, ctx):
        return Selection(rows=pool[:budget] + 1000)


class Empty(Selector):
    name, card = "empty", card
    def requires(self):
        return Requires(needs_interval=True)
    def select(self, pool, budget, ctx):
        return Selection(rows=pool[:0], reason="nothing was good enough")


class Negative(Mixer):
    name, card = "negative", card
    def requires(self):
        return Requires(needs_interval=True)
    def mix(self, ctx):
        return Mix(proportions=np.array([1.5, -0.5]))


class NotANumber(Weighter):
    name, card = "notanumber", card
    def weigh(self, batch):
        return batch.loss_B * float("nan")


class WrongShape(Weighter):
    name, card = "wrongshape", card
    def weigh(self, batch):
        return batch.loss_B[:1].repeat(7)
"""
    )
    base = {"plugins": [str(plugin)], "interval_steps": 2}
    cases = [
        ({"selector": "outside"}, ComponentError, "'outside' returned .* rows that are not in the pool, such as 1000"),
        ({"selector": "empty"}, DataError, r"'empty' kept no row at all \(nothing was good enough\)"),
        ({"weighter": "notanumber"}, ComponentError, "'notanumber' returned negative or non-finite weights"),
        ({"weighter": "wrongshape"}, ComponentError, r"'wrongshape' returned weights of shape \(7,\)"),
    ]
    for block, error, message in cases:
        with pytest.raises(error, match=message):
            run("out", max_steps=4, dynamic={**base, **block})
    with pytest.raises(ComponentError, match=r"'negative' returned \[1.5, -0.5\]"):
        run("out", dataset="alpha,beta", max_steps=4, dynamic={**base, "mixer": "negative"})


def test_broken_checkpoints(run):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    block = {"interval_steps": 2, "selector": "loss"}
    done = run("done", **settings, dynamic=block)
    checkpoint = done.folder / "checkpoint-2"
    plan = checkpoint / "dataflex" / "plan.npz"
    content = plan.read_bytes()
    plan.write_bytes(content[:-7])
    with pytest.raises(CheckpointError, match=r"plan\.npz"):
        run("again", **settings, dynamic=block, resume_from_checkpoint=str(checkpoint))
    plan.write_bytes(content)
    (checkpoint / "trainer_state.json").write_text('{"global_step": ')
    with pytest.raises(CheckpointError, match="not written to the end"):
        run("again", **settings, dynamic=block, resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ConfigError, match="no checkpoint"):
        run("nothing", **settings, dynamic=block, resume_from_checkpoint=True)


def test_frozen_gates_need_a_router(run):
    with pytest.raises(UnsupportedError, match="router"):
        run("out", dataset="alpha,beta", max_steps=2, dynamic={"mixer": "uniform", "freeze_gate": True})


def test_nan_losses_end_a_loss_weighted_run(run, tiny_model, tmp_path):
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = load_file(broken / "model.safetensors")
    name = next(key for key in weights if key.endswith("lm_head.weight"))
    weights[name] = torch.full_like(weights[name], float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ComponentError, match="rows 0, 1 at step 0 is not finite"):
        run(
            "out",
            model_name_or_path=str(broken),
            max_steps=2,
            dynamic={"weighter": {"name": "loss", "warmup_steps": 0}},
        )
    with pytest.raises(DataError, match="no finite loss"):
        run("out", model_name_or_path=str(broken), max_steps=2, dynamic={"interval_steps": 1, "selector": "loss"})


@pytest.mark.parametrize("block", [{"selector": "random"}, None])
@pytest.mark.parametrize(("broken", "told"), [("model.safetensors", "cannot be loaded"), ("tokenizer.json", "cannot")])
def test_a_model_that_cannot_be_loaded_is_told_by_its_key(run, tiny_model, tmp_path, block, broken, told):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    (folder / broken).write_bytes((folder / broken).read_bytes()[:100])
    with pytest.raises(ConfigError, match=rf"model_name_or_path: .*broken {told}"):
        run("out", model_name_or_path=str(folder), max_steps=1, dynamic=block)


def test_a_finished_model_without_checkpoints_is_told_before_anything_is_loaded(run, tmp_path):
    from dataflex.run import refuse_finished

    run("out", max_steps=1)
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(ConfigError, match=r"output_dir: .*out holds the model of an earlier run \(model.safetensors\)"):
        run("out", max_steps=1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    given = run.mapping("out")
    for change in (
        {"overwrite_output_dir": True},
        {"do_train": False},
        {"resume_from_checkpoint": "x"},
        {"stage": "rm"},
    ):
        refuse_finished({**given, **change})
    (tmp_path / "out" / "checkpoint-1").mkdir()
    refuse_finished(given)
