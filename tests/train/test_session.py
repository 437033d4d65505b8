"""A session serves any loop: a plain one trains, resumes exactly, and runs on two ranks; examples are such loops."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from dataflex.errors import CheckpointError, ConfigError, UnsupportedError
from dataflex.plan.plan import BatchShape
from dataflex.record.curves import tokens_at
from dataflex.record.digest import digest
from dataflex.record.read import load_plan, read_events
from dataflex.train.loader import ROWS
from dataflex.train.row_space import RowSpace
from dataflex.train.session import Loop, Session

ROOT = Path(__file__).resolve().parents[2]
LOOP = Path(__file__).with_name("plain_loop.py")
BLOCKS = {
    "selector": {"selector": {"name": "loss"}, "warmup_steps": 2, "interval_steps": 3},
    "mixer": {"mixer": {"name": "odm"}, "interval_steps": 2},
    "weighter": {"weighter": {"name": "loss", "warmup_steps": 2}},
}
LESS = {"selector": {"name": "less", "targets": ["gsm8k_valid"]}, "warmup_steps": 2, "interval_steps": 3}
TWO_RANKS = """
import importlib.util, json, sys
import torch.distributed as dist
spec = importlib.util.spec_from_file_location("plain_loop", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
dist.init_process_group("gloo")
for name, block in json.loads(sys.argv[3]).items():
    sharding = name if name == "fsdp2" else "none"
    losses = module.train(block, f"{sys.argv[2]}/{name}", model_dir=sys.argv[4], sharding=sharding)
    if dist.get_rank() == 0:
        print("LOSSES " + json.dumps({name: losses}))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def plain_loop():
    spec = importlib.util.spec_from_file_location("plain_loop", LOOP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def served(folder):
    plans = [event["interval"] for event in read_events(folder) if event["event"] == "planned"]
    return np.concatenate([load_plan(folder, interval).rows for interval in plans])


@pytest.mark.parametrize("name", BLOCKS)
def test_a_plain_loop_resumes_exactly(plain_loop, tiny_model, tmp_path, name):
    """With a method of each family the rows and losses are those of the run that was never interrupted."""
    straight = plain_loop.train(BLOCKS[name], tmp_path / "a", model_dir=tiny_model)
    assert len(set(straight)) == len(straight) == 8
    again = plain_loop.train(BLOCKS[name], tmp_path / "b", tmp_path / "a" / "checkpoint-4", model_dir=tiny_model)
    assert again == straight[4:]
    later = [event["digest"] for event in planned(tmp_path / "a") if event["start_step"] >= 4]
    assert [event["digest"] for event in planned(tmp_path / "b")] == later
    events = [event["event"] for event in read_events(tmp_path / "a")]
    assert events[0] == "run_started"
    assert events[-1] == "finished"
    assert events.count("stepped") == 8
    assert events.count("checkpointed") == 2


def planned(folder):
    return [event for event in read_events(folder) if event["event"] == "planned"]


@pytest.mark.gloo
def test_two_ranks_serve_the_same_rows_and_make_the_same_losses(plain_loop, tiny_model, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS)
    blocks = {**BLOCKS, "fsdp2": LESS}  # the last one with parameters that the ranks share
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    command += [str(LOOP), str(tmp_path / "two"), json.dumps(blocks), str(tiny_model)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [json.loads(line[7:]) for line in told.stdout.splitlines() if line.startswith("LOSSES ")]
    assert [name for losses in found for name in losses] == list(blocks)
    for losses in found:
        for name, two in losses.items():
            # Weights are relative to the micro-batch of all ranks: the same four sequences.
            one = plain_loop.train(blocks[name], tmp_path / "one" / name, model_dir=tiny_model, micro=4)
            assert two == pytest.approx(one, rel=1e-4), name
            np.testing.assert_array_equal(served(tmp_path / "two" / name), served(tmp_path / "one" / name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop"])
def test_the_examples_train_and_go_on(tmp_path, name):
    example = ROOT / "examples" / f"{name}.py"
    assert len(example.read_text().splitlines()) < 40
    for folder, more in (("a", []), ("b", [str(tmp_path / "a" / "checkpoint-4")])):
        subprocess.run([sys.executable, str(example), str(tmp_path / folder), *more], capture_output=True, check=True)
    one, two = (tmp_path / each / "checkpoint-8" / "model.safetensors" for each in "ab")
    assert one.read_bytes() == two.read_bytes()
    assert [event["event"] for event in read_events(tmp_path / "b")][-1] == "finished"


@pytest.mark.gloo
def test_a_loop_with_accelerate_runs_on_two_ranks(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(ROOT / "examples" / "accelerate_loop.py"), str(tmp_path)]
    subprocess.run(command, capture_output=True, check=True)
    (started,) = (event for event in read_events(tmp_path) if event["event"] == "run_started")
    assert (started["world"], started["global_batch"]) == (2, 8)
    assert len(set(served(tmp_path).tolist())) > 32  # every rank has rows of its own


@pytest.mark.slow
def test_a_session_needs_no_llamafactory():
    code = "import dataflex.train.session, sys; print([m for m in sys.modules if m.split('.')[0] == 'llamafactory'])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("selector", "most"), [({"name": "less", "targets": ["goal"]}, 2), ({"name": "loss"}, 8)], ids=["less", "loss"]
)
def test_gradients_are_asked_of_no_more_rows_than_a_micro_batch_has(tiny_model, tmp_path, selector, most):
    """Their activations are held, which training has room for; a forward pass holds none."""
    rows = [{"input_ids": [1, 2, 3 + i % 5, 4], "labels": [-100, 2, 3 + i % 5, 4]} for i in range(24)]
    space = RowSpace.of(Dataset.from_list(rows), targets={"goal": Dataset.from_list(rows[:8])})
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    optimizer = torch.optim.AdamW(model.parameters())

    def collate(features):
        return {name: torch.tensor([row[name] for row in features]) for name in ("input_ids", "labels")}

    asked = loop(tmp_path, model=model, optimizer=lambda: optimizer, collate=collate, score_rows=8)
    session = Session.open({"selector": selector, "warmup_steps": 1, "interval_steps": 2}, space, asked)
    session.start()
    sizes = []

    def seen(_module, _args, options):
        sizes.append(len(options["input_ids"]))

    for index in range(2):
        taken = model.register_forward_pre_hook(seen, with_kwargs=True)
        batches = session.step(index).batches
        taken.remove()
        for batch in batches:
            model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
        session.end_step()
        optimizer.step()
        optimizer.zero_grad()
    session.close()
    assert max(sizes) == most


# ---------------------------------------------------------------- what every door is refused


@pytest.fixture
def rows():
    made = [{"input_ids": [1, 2, 3 + i % 5], "labels": [-100, 2, 3 + i % 5]} for i in range(16)]
    return RowSpace.of(Dataset.from_list(made), domains=["a", "b"] * 8)


def loop(tmp_path, **changes):
    shape = {"micro_batch_size": 2, "accumulation": 2, "world": 1, "rank": 0, "drop_last": True, "shuffle": True}
    shape |= changes.pop("shape", {})
    known = {
        "model": torch.nn.Linear(2, 2),
        "optimizer": lambda: None,
        "collate": lambda features: {"labels": torch.tensor([row["labels"] for row in features])},
    }
    return Loop(
        **known | changes,
        learning_rate=lambda: 0.0,
        shape=BatchShape(**shape),
        total_steps=4,
        seed=0,
        device=torch.device("cpu"),
        output_dir=tmp_path / "out",
    )


def test_a_method_of_another_stage_is_refused(rows, tmp_path):
    with pytest.raises(ConfigError, match=r"weighter: reweighting needs .* stage rm"):
        Session.open({"weighter": "loss"}, rows, loop(tmp_path), stage="rm")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"shape": {"world": 2, "rank": 1}}, "rank 1 of 2, and torch.distributed has rank 0 of 1"),
        ({"parallel": {"tensor": 2}}, "tensor parallelism of size 2"),
        ({"devices": 2}, "one process per device"),
        ({"joined": True}, "give it a score_collate that pads rows, or takes single packs"),
    ],
)
def test_ranks_and_shapes_that_cannot_be_served_are_refused(rows, tmp_path, changes, told):
    with pytest.raises(UnsupportedError, match=told):
        Session.open({"selector": "all"}, rows, loop(tmp_path, **changes))


@pytest.mark.parametrize("sharding", ["none", "zero"])
def test_a_loop_says_by_what_its_parameters_are_partitioned(rows, tmp_path, sharding):
    model = torch.nn.Linear(2, 2)
    model.weight.ds_shape = model.weight.shape  # as DeepSpeed leaves it on what ZeRO-3 partitions
    with pytest.raises(UnsupportedError, match=rf"one of zero3, fsdp and fsdp2 \(found {sharding}\)"):
        Session.open({"selector": "all"}, rows, loop(tmp_path, model=model, sharding=sharding))
    Session.open({"selector": "all"}, rows, loop(tmp_path, model=model, sharding="zero3")).close()


def test_rows_of_a_step_without_their_batches(rows, tmp_path):
    session = Session.open({"selector": "all"}, rows, loop(tmp_path))
    assert session.start() == 0
    ids = session.rows(1)
    assert [batch.tolist() for batch in ids] == [batch[ROWS].tolist() for batch in session.step(1).batches]
    assert session.rows(4) is None
    assert session.step(4) is None


def test_a_checkpoint_that_was_not_written_to_the_end_is_refused(rows, tmp_path):
    session = Session.open({"selector": "all"}, rows, loop(tmp_path))
    session.start()
    session.step(0)
    folder = tmp_path / "checkpoint-1"
    with pytest.raises(KeyboardInterrupt), session.checkpoint(folder, 1):
        raise KeyboardInterrupt
    with pytest.raises(CheckpointError, match="not written to the end"):
        Session.open({"selector": "all"}, rows, loop(tmp_path)).start(folder)
    with session.checkpoint(folder, 1):
        (folder / "model.bin").write_bytes(b"weights")
    assert Session.open({"selector": "all"}, rows, loop(tmp_path)).start(folder) == 1
    (folder / "model.bin").write_bytes(b"wei")
    with pytest.raises(CheckpointError, match=r"model\.bin is broken"):
        Session.open({"selector": "all"}, rows, loop(tmp_path)).start(folder)


def test_a_resumed_loop_keeps_the_losses_since_its_last_log(rows, tmp_path):
    def trained(session, steps):
        for index in steps:
            for batch in session.step(index).batches:
                session.loss(batch, logits[batch[ROWS]])
            session.end_step()

    logits, block = torch.randn(16, 3, 8), {"weighter": {"name": "focal", "warmup_steps": 0}}
    whole = Session.open(block, rows, loop(tmp_path))
    whole.start()
    trained(whole, [0])
    with whole.checkpoint(tmp_path / "checkpoint-1", 1):
        pass
    trained(whole, [1])
    rest = Session.open(block, rows, loop(tmp_path))
    trained(rest, range(rest.start(tmp_path / "checkpoint-1"), 2))
    found = {name: value for name, value in whole.log(2, {}).items() if "loss" in name or "weight" in name}
    assert {"dataflex/loss/a", "dataflex/plain_loss", "dataflex/weight_max"} <= found.keys()
    assert rest.log(2, {}).items() >= found.items()


def test_what_was_served_since_the_last_log_is_in_the_record(rows, tmp_path):
    session = Session.open({"selector": "all"}, rows, loop(tmp_path))
    session.start()
    for index in range(4):
        for batch in session.step(index).batches:
            session.loss(batch, torch.zeros(2, 3, 8))
        session.end_step()
        if index == 2:
            session.log(3, {"loss": 2.0})
    session.finish(4, {})
    run = digest(read_events(tmp_path / "out"))
    assert tokens_at(run) == [(3, 3 * 4 * 3), (4, 4 * 4 * 3)]
    assert [event["event"] for event in read_events(tmp_path / "out")][-2:] == ["stepped", "finished"]
    assert run.logged("loss") == [(3, 2.0)]
