"""LLaMA-Factory v1: its trainer of sft with a dynamic block, on one rank in this process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from dataflex.cli import main
from dataflex.config.split import resolve
from dataflex.errors import ConfigError, DataError
from dataflex.record.read import load_plan, read_ending, read_events

pytestmark = pytest.mark.slow
STEPS = 6


RM = {"stage": "rm", "cutoff_len": 80}


def sources(folder, data_dir, *names, **more):
    path = folder / f"{'_'.join(names)}.yaml"
    entry = {"source": "local", "converter": "alpaca", **more}
    path.write_text(yaml.safe_dump({name: {"path": f"{data_dir / name}.jsonl", **entry} for name in names}))
    return str(path)


def pairs(folder, data_dir, *names, **more):
    """Write pairs of answers as v1's converter reads them, and return the file that names them."""
    for name in names:
        rows = [json.loads(line) for line in (data_dir / f"{name}.jsonl").read_text().splitlines()]
        made = [{side: [_message(row["conversations"][0]), _message(row[side])] for side in SIDES} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({**row, "source": name}) + "\n" for row in made))
    return sources(folder, folder, *names, converter="pair", **more)


SIDES = ("chosen", "rejected")


def _message(turn):
    return {"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]}


@pytest.fixture
def given(tiny_tied, data_dir, tmp_path):
    """Return a function that gives a v1 configuration with some keys changed."""

    def give(name, **changes):
        keys = {
            **{"model": str(tiny_tied), "template": "chatml", "cutoff_len": 40, "batching_workers": 0, "seed": 3},
            **{"micro_batch_size": 2, "global_batch_size": 4, "learning_rate": 2e-3, "max_steps": STEPS},
            "train_dataset": sources(tmp_path, data_dir, "alpha", "beta", "gamma"),
            "output_dir": str(tmp_path / name),
            **changes,
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
        return file

    return give


@pytest.fixture
def train(given):
    def run(name, block=None, **changes):
        from dataflex.run import train_here

        file = given(name, dynamic=block, **changes)
        assert train_here([str(file)]) == 0
        return file.with_suffix("")

    return run


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "trainer_log.jsonl").read_text().splitlines()]


def served(folder):
    numbers = [event["interval"] for event in read_events(folder) if event["event"] == "planned"]
    return np.concatenate([load_plan(folder, number).rows for number in numbers])


def told(file, capsys):
    """Return what ``plan`` says of a configuration, and its exit code."""
    code = main(["plan", str(file)])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


ROWS_OF_V0 = {"stage": "sft", "do_train": True, "finetuning_type": "full", "template": "default", "report_to": "none"}


@pytest.fixture
def rows_of_v0(tiny_model, data_dir, tmp_path):
    """Return a function that gives the rows that v0 serves, of a model that is not tied: v0 saves no other in rm."""

    def give(names, block, **more):
        from dataflex.run import train_here

        v0 = {
            **{"model_name_or_path": str(tiny_model), "dataset_dir": str(data_dir), "dataset": names, "seed": 3},
            **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS, "use_cpu": True},
            **{"output_dir": str(tmp_path / "v0"), "save_strategy": "no", "dynamic": block, **ROWS_OF_V0, **more},
        }
        (tmp_path / "v0.yaml").write_text(yaml.safe_dump(v0))
        assert train_here([str(tmp_path / "v0.yaml")]) == 0
        return served(tmp_path / "v0")[: 4 * STEPS].tolist()

    return give


def in_the_order_of(rows, monkeypatch):
    """Make v1's own trainer serve these rows."""
    from llamafactory.v1.core.utils import batching

    monkeypatch.setattr(batching.StatefulDistributedSampler, "__iter__", lambda self: iter(rows.tolist()))


def test_rows_are_those_of_v0_and_losses_those_of_v1_itself(train, rows_of_v0, monkeypatch):
    ours = train("ours", {"selector": "all"}, learning_rate=1e-3)
    rows = served(ours)
    assert rows[: 4 * STEPS].tolist() == rows_of_v0("alpha,beta,gamma", {"selector": "all"})
    in_the_order_of(rows, monkeypatch)
    assert losses(ours) == losses(train("stock", learning_rate=1e-3))


CHOSEN = {
    **{"selector": {"name": "random_balanced"}, "mixer": {"name": "static", "proportions": {"pairs": 1, "pairs2": 1}}},
    **{"interval_steps": 2, "keep_ratio": 0.5, "repeat": True},
}


@pytest.mark.parametrize("block", [{"selector": "all"}, CHOSEN], ids=["all", "chosen"])
def test_pairs_are_those_of_v0_and_losses_those_of_v1_itself(block, train, rows_of_v0, data_dir, tmp_path, monkeypatch):
    data = {"train_dataset": pairs(tmp_path, data_dir, "pairs", "pairs2"), **RM}
    ours = train("ours", block, **data)
    rows = served(ours)
    assert rows[: 4 * STEPS].tolist() == rows_of_v0("pairs,pairs2", block, stage="rm")
    in_the_order_of(rows, monkeypatch)
    assert losses(ours) == losses(train("stock", **data))


def test_a_recorded_run_is_the_stock_run(train):
    recorded, stock = train("recorded", {"record": True}), train("stock", stage="sft")
    numbers = [json.loads(line) for line in (recorded / "trainer_log.jsonl").read_text().splitlines()]
    assert losses(recorded) == losses(stock)
    assert len(losses(stock)) == STEPS
    by_domain = {key.rpartition("/")[2] for line in numbers for key in line if key.startswith("dataflex/loss/")}
    assert by_domain == {"alpha", "beta", "gamma"}
    assert not (stock / "dataflex").exists()


def test_a_recorded_run_of_pairs_is_the_stock_run(train, data_dir, tmp_path):
    data = {**RM, "train_dataset": pairs(tmp_path, data_dir, "pairs", "pairs2")}
    recorded, stock = train("recorded", {"record": True}, **data), train("stock", **data)
    assert losses(recorded) == losses(stock)
    last = json.loads((recorded / "trainer_log.jsonl").read_text().splitlines()[-1])
    assert last["dataflex/sequences/pairs"] + last["dataflex/sequences/pairs2"] == 4 * STEPS


RESUMED = {
    **{"selector": {"name": "loss", "focus": "high"}, "mixer": {"name": "odm"}, "weighter": {"name": "focal"}},
    **{"interval_steps": 4, "keep_ratio": 0.8, "repeat": True},
    **{"average_weights": {"last_steps": 2}, "orderer": {"name": "sorting", "by": "length"}},
}


def test_a_resumed_run_goes_on_exactly(train, data_dir, tmp_path):
    data = {"train_dataset": sources(tmp_path, data_dir, "alpha", "beta")}
    whole = train("whole", RESUMED, save_steps=2, save_total_limit=2, **data)
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert "lm_head.weight" not in load_file(whole / "checkpoint-4" / "model" / "model.safetensors")  # it is tied
    again = train("again", RESUMED, resume_from_checkpoint=str(whole / "checkpoint-4"), **data)
    assert losses(again) == losses(whole)[4:]
    assert read_events(whole)[0]["config"]["v1"]["train_dataset"] == data["train_dataset"]
    assert [event["event"] for event in read_ending(whole)] == ["ended"]
    weights = [folder / "model.safetensors" for folder in (whole, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    mean = [folder / "averaged" / "model.safetensors" for folder in (whole, again)]
    assert mean[0].read_bytes() == mean[1].read_bytes()
    assert mean[0].read_bytes() != (whole / "model.safetensors").read_bytes()


def test_a_resumed_run_of_pairs_goes_on_exactly(train, data_dir, tmp_path):
    block = {
        "selector": {"name": "dsir", "targets": ["pairs2"]},
        **{"orderer": {"name": "sorting", "by": "length"}, "domain_column": "source"},
        **{"interval_steps": 4, "keep_ratio": 0.5, "repeat": True},
    }
    held = pairs(tmp_path, data_dir, "pairs2")
    data = {"train_dataset": pairs(tmp_path, data_dir, "pairs"), "eval_dataset": held, **RM}
    whole = train("whole", block, save_steps=3, **data)
    again = train("again", block, resume_from_checkpoint=str(whole / "checkpoint-3"), **data)
    assert losses(again) == losses(whole)[3:]
    weights = [folder / "model.safetensors" for folder in (whole, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert "score.weight" in load_file(whole / "model.safetensors")


def test_pairs_that_are_cut_to_one_answer_are_refused(train, data_dir, tmp_path):
    data = {**RM, "train_dataset": pairs(tmp_path, data_dir, "pairs"), "cutoff_len": 6}
    with pytest.raises(DataError, match=r"cutoff_len: 6 leaves 16 of 16 pairs no token of the rejected answer"):
        train("cut", {"selector": "all"}, **data)


def test_a_broken_checkpoint_is_refused(train, given):
    from dataflex.errors import CheckpointError

    folder = train("whole", {"selector": "all"}, save_steps=3, max_steps=3)
    (folder / "checkpoint-3" / "scheduler.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"scheduler.pt is broken: 0 bytes"):
        train("again", {"selector": "all"}, resume_from_checkpoint=str(folder / "checkpoint-3"))


def test_unit_weights_change_nothing_and_others_do(train):
    plain = losses(train("plain", {"selector": "all"}))
    unit = losses(train("unit", {"weighter": {"name": "focal", "gamma": 0.0}}))
    focal = losses(train("focal", {"weighter": {"name": "focal", "gamma": 4.0}}))
    np.testing.assert_allclose(unit, plain, rtol=2e-6)
    assert np.abs(np.array(focal) / plain - 1).max() > 0.01


def test_targets_and_the_ledger(train, data_dir, tmp_path):
    block = {"ledger": {"targets": ["goal"]}, "selector": {"name": "less", "targets": ["goal"]}, "interval_steps": 3}
    held = sources(tmp_path, data_dir, "goal", size=8)
    folder = train("less", {**block, "signals": {"pool_fraction": 0.5}}, eval_dataset=held, num_train_epochs=1)
    events = read_events(folder)
    assert {"credited", "planned", "finished"} <= {event["event"] for event in events}
    assert events[-1]["event"] == "finished"


def test_epochs_are_those_of_v0(train, data_dir, tmp_path):
    data = sources(tmp_path, data_dir, "ones")
    whole = {"micro_batch_size": 8, "global_batch_size": 16, "max_steps": None, "num_train_epochs": 2}
    folder = train("epochs", {"selector": "all"}, train_dataset=data, **whole)
    assert len(losses(folder)) == 6
    rows = served(folder)
    assert [sorted(part[part >= 0].tolist()) for part in np.split(rows, 2)] == [[*range(37)]] * 2


REFUSED = {
    "stage": (
        "dpo",
        "stage: LLaMA-Factory v1 trains sft and rm, and v1's own trainer of preferences is not written yet",
    ),
    "eval_strategy": ("steps", "eval_strategy: LLaMA-Factory v1 evaluates nothing during training"),
    "dist_config": ({"name": "fsdp2", "cp_size": 2}, "dist_config: cp_size: 2 is not served"),
    "batching_strategy": ("padding_free", "batching_strategy: 'padding_free' is not served"),
    "micro_batchsize": (2, "micro_batchsize: LLaMA-Factory v1 has no such key; did you mean 'micro_batch_size'"),
    "per_device_train_batch_size": (2, "LLaMA-Factory v1 has no such key; in v1 it is 'micro_batch_size'"),
    "global_batch_size": (5, "global_batch_size: must be a multiple of micro_batch_size x processes"),
    "micro_batch_size": (0, "micro_batch_size: must be at least 1"),
    "train_dataset": ("./none.yaml", "train_dataset: no such file: ./none.yaml"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_v1_cannot_do_is_refused(key, given, capsys):
    value, wanted = REFUSED[key]
    code, printed = told(given("refused", dynamic={"selector": "all"}, **{key: value}), capsys)
    assert code == 2
    assert wanted in printed


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"name": "fsdp3"}, "dist_config: LLaMA-Factory v1 has fsdp2 and deepspeed, not fsdp3"),
        ({"name": "deepspeed"}, "dist_config: deepspeed needs a 'config_file'"),
        ({"name": "deepspeed", "config_file": "none"}, "dist_config: no such file: none"),
        ({"name": "deepspeed", "config_file": "deep.json"}, "deep.json cannot be read: it is nested too deeply"),
        ({"name": "deepspeed", "config_file": "list.json"}, "list.json must hold a mapping"),
    ],
)
def test_settings_of_shards_that_cannot_be_read_are_refused(config, wanted, given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "list.json").write_text("[]")
    code, printed = told(given("refused", dynamic={"selector": "all"}, dist_config=config), capsys)
    assert (code, wanted in printed) == (2, True), printed


REFUSED_OF_PAIRS = {
    "weighter": ({"dynamic": {"weighter": "focal"}}, "dynamic.weighter: "),
    "selector": ({"dynamic": {"selector": "loss", "interval_steps": 2}}, "dynamic.selector: "),
    "mixer": ({"dynamic": {"mixer": "odm", "interval_steps": 2}}, "dynamic.mixer: "),
    "peft_config": ({"dynamic": {"selector": "all"}, "peft_config": {"name": "lora"}}, "peft_config: LLaMA-Factory v1"),
}


@pytest.mark.parametrize("key", REFUSED_OF_PAIRS)
def test_what_v0_or_v1_cannot_do_with_pairs_is_refused(key, given, data_dir, tmp_path, capsys):
    changes, wanted = REFUSED_OF_PAIRS[key]
    code, printed = told(given("refused", **RM, train_dataset=pairs(tmp_path, data_dir, "pairs"), **changes), capsys)
    assert (code, wanted in printed) == (2, True)


def test_rows_and_stage_must_fit(given, data_dir, tmp_path, capsys):
    block = {"selector": "all"}
    code, printed = told(given("answers", dynamic=block, **RM), capsys)
    wanted = (
        "train_dataset: 'alpha' has the converter 'alpaca', whose rows are not pairs of answers, which stage rm takes"
    )
    assert (code, f"{wanted} (known: pair)" in printed) == (2, True)
    of_pairs = pairs(tmp_path, data_dir, "pairs")
    code, printed = told(given("sft", dynamic=block, train_dataset=of_pairs), capsys)
    wanted = "'pairs' has the converter 'pair', whose rows are not answers to train on"
    assert (code, wanted in printed) == (2, True)
    other = sources(tmp_path, data_dir, "pairs2", converter="pair")
    code, printed = told(given("columns", dynamic=block, **RM, train_dataset=other), capsys)
    assert (code, "columns found" in printed) == (0, False)
    unconverted = sources(tmp_path, tmp_path, "pairs", converter=None)
    code, printed = told(given("lacking", dynamic=block, **RM, train_dataset=unconverted), capsys)
    assert (code, "'pairs' has no column 'chosen_messages' for the chosen" in printed) == (2, True)


def test_which_trainers_v1_has_is_told_as_it_is(given, train, tiny_tied, data_dir, tmp_path, capsys):
    """A stage is refused, and a fault told, as long as it is v1's."""
    import torch
    from llamafactory.v1.trainers import dpo_trainer
    from transformers import AutoModelForTokenClassification

    assert not hasattr(dpo_trainer, "run_dpo")
    model = AutoModelForTokenClassification.from_pretrained(tiny_tied, num_labels=1).eval()
    rejected = [5, 6, 7]
    scores = []
    for chosen in ([8, 9], [10, 11]):
        found = model(
            input_ids=torch.tensor([chosen + rejected]),
            attention_mask=torch.tensor([[1, 1, 2, 2, 2]]),
            position_ids=torch.tensor([[0, 1, 0, 1, 2]]),
            use_cache=False,
        )
        scores.append(found.logits[0, -1, 0].item())
    assert scores[0] != scores[1]
    file = given("rm", dynamic={"selector": "all"}, **RM, train_dataset=pairs(tmp_path, data_dir, "pairs"))
    code, printed = told(file, capsys)
    assert (code, "a rejected answer sees the chosen one before it" in printed) == (0, True)
    with pytest.raises(AttributeError, match="prepare_inputs_for_generation"):
        train("lora", peft_config={"name": "lora"}, **RM, train_dataset=pairs(tmp_path, data_dir, "pairs"))


def test_several_mistakes_are_told_at_once(given, data_dir, tmp_path, capsys):
    held = sources(tmp_path, data_dir, "goal")
    block = {
        "selector": {"name": "less", "targets": ["gaol"]},
        "interval_steps": 2,
        "eval_by_domain": True,
        "domain_column": "sauce",
    }
    code, printed = told(given("several", dynamic=block, eval_dataset=held), capsys)
    assert code == 2
    assert "dynamic.eval_by_domain: has no effect under LLaMA-Factory v1" in printed
    assert "'gaol' is not defined in the data sets of train_dataset and eval_dataset; did you mean 'goal'" in printed
    assert "'sauce'" in printed
    assert "no method names a target" not in printed
    code, printed = told(given("idle", dynamic={"selector": "all"}, eval_dataset=held), capsys)
    assert (code, "eval_dataset: LLaMA-Factory v1 evaluates nothing" in printed) == (2, True)


def test_the_environment_names_v1(monkeypatch):
    monkeypatch.setenv("USE_V1", "1")
    with pytest.raises(ConfigError, match="dataset: LLaMA-Factory v1 has no such key; in v1 it is 'train_dataset'"):
        resolve({"dataset": "x", "dynamic": {"selector": "all"}}, Path(), check_stock=True)


def test_planning_imports_neither_torch_nor_llamafactory(given):
    import subprocess
    import sys

    file = given("light", dynamic={"selector": "loss", "interval_steps": 2})
    heavy = "print({'torch', 'llamafactory', 'transformers'} & {*sys.modules})"
    script = f"import sys; from dataflex.cli import main; main(sys.argv[1:]); {heavy}"
    done = subprocess.run([sys.executable, "-c", script, "plan", str(file)], capture_output=True, text=True, check=True)
    assert "global batch         4 sequences (2 per device x 2 accumulated x 1 process)" in done.stdout
    assert "rows                 64 (alpha 40, beta 21, gamma 3)" in done.stdout
    assert done.stdout.endswith("set()\n")
