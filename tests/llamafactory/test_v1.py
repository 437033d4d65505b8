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
from dataflex.errors import ConfigError
from dataflex.record.read import load_plan, read_events

pytestmark = pytest.mark.slow
STEPS = 6


def sources(folder, data_dir, *names, **more):
    path = folder / f"{'_'.join(names)}.yaml"
    entry = {"source": "local", "converter": "alpaca", **more}
    path.write_text(yaml.safe_dump({name: {"path": f"{data_dir / name}.jsonl", **entry} for name in names}))
    return str(path)


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


def test_rows_are_those_of_v0_and_losses_those_of_v1_itself(train, tiny_tied, data_dir, tmp_path, monkeypatch):
    from llamafactory.v1.core.utils import batching

    from dataflex.run import train_here

    ours = train("ours", {"selector": "all"}, learning_rate=1e-3)
    v0 = {
        **{
            "model_name_or_path": str(tiny_tied),
            "dataset_dir": str(data_dir),
            "dataset": "alpha,beta,gamma",
            "seed": 3,
        },
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS, "use_cpu": True},
        **{"output_dir": str(tmp_path / "v0"), "save_strategy": "no", "dynamic": {"selector": "all"}, **ROWS_OF_V0},
    }
    (tmp_path / "v0.yaml").write_text(yaml.safe_dump(v0))
    assert train_here([str(tmp_path / "v0.yaml")]) == 0
    rows = served(ours)
    assert rows[: 4 * STEPS].tolist() == served(tmp_path / "v0")[: 4 * STEPS].tolist()

    def in_our_order(self):
        return iter(rows.tolist())

    monkeypatch.setattr(batching.StatefulDistributedSampler, "__iter__", in_our_order)
    assert losses(ours) == losses(train("stock", learning_rate=1e-3))


def test_a_recorded_run_is_the_stock_run(train):
    recorded, stock = train("recorded", {"record": True}), train("stock")
    numbers = [json.loads(line) for line in (recorded / "trainer_log.jsonl").read_text().splitlines()]
    assert losses(recorded) == losses(stock)
    assert len(losses(stock)) == STEPS
    by_domain = {key.rpartition("/")[2] for line in numbers for key in line if key.startswith("dataflex/loss/")}
    assert by_domain == {"alpha", "beta", "gamma"}
    assert not (stock / "dataflex").exists()


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
    weights = [folder / "model.safetensors" for folder in (whole, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    mean = [folder / "averaged" / "model.safetensors" for folder in (whole, again)]
    assert mean[0].read_bytes() == mean[1].read_bytes()
    assert mean[0].read_bytes() != (whole / "model.safetensors").read_bytes()


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
        r"stage: LLaMA-Factory v1 trains sft here, and v1's own trainer of preferences is not written yet",
    ),
    "eval_strategy": ("steps", "eval_strategy: LLaMA-Factory v1 evaluates nothing during training"),
    "dist_config": ({"name": "fsdp2"}, "dist_config: fsdp2 is not tested with a plan"),
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


def test_which_trainers_v1_has_is_told_as_it_is(given, capsys):
    from llamafactory.v1.trainers import dpo_trainer, rm_trainer

    assert hasattr(rm_trainer, "run_rm")
    assert not hasattr(dpo_trainer, "run_dpo")
    code, printed = told(given("refused", dynamic={"selector": "all"}, stage="rm"), capsys)
    assert (code, "v1's trainer of reward models ('llamafactory-cli rm') is not served" in printed) == (2, True)


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
