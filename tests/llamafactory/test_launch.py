"""Launching as LLaMA-Factory does: when torchrun, with which arguments; and our trainer in Ray's workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from dataflex.config import args as args_module
from dataflex.config.args import ray_problems
from dataflex.errors import UnsupportedError
from dataflex.llamafactory import launch
from dataflex.llamafactory.launch import torchrun_command, wants_torchrun
from dataflex.run import train


def options(env, devices=2):
    command = torchrun_command(["train", "run.yaml", "seed=3"], env, devices=devices, free_port=4242)
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert command[-5:] == ["-m", "dataflex", "train", "run.yaml", "seed=3"]
    middle = command[3:-5]
    return dict(zip(middle[::2], middle[1::2], strict=True))


def test_defaults():
    assert options({}) == {
        "--nproc-per-node": "2",
        "--nnodes": "1",
        "--node-rank": "0",
        "--master-addr": "127.0.0.1",
        "--master-port": "4242",
    }
    assert options({}, devices=0)["--nproc-per-node"] == "1"


def test_several_nodes():
    env = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "NPROC_PER_NODE": "8"}
    assert options(env) == {
        "--nproc-per-node": "8",
        "--nnodes": "2",
        "--node-rank": "1",
        "--master-addr": "10.0.0.1",
        "--master-port": "29500",
    }


def test_elastic():
    env = {"RDZV_ID": "job7", "MIN_NNODES": "1", "MAX_NNODES": "3", "MAX_RESTARTS": "2", "MASTER_PORT": "29500"}
    assert options(env) == {
        "--nproc-per-node": "2",
        "--nnodes": "1:3",
        "--rdzv-id": "job7",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "127.0.0.1:29500",
        "--max-restarts": "2",
    }
    assert options({"RDZV_ID": "job7", "NNODES": "2"})["--nnodes"] == "2"


def test_when(monkeypatch):
    monkeypatch.setattr(launch, "device_count", lambda: 1)
    assert not wants_torchrun()
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    assert wants_torchrun()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not wants_torchrun()
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("FORCE_TORCHRUN")
    monkeypatch.setattr(launch, "device_count", lambda: 4)
    assert wants_torchrun()
    monkeypatch.setenv("USE_RAY", "1")
    assert not wants_torchrun()


def test_the_launcher_imports_what_it_starts_only():
    """Ranks import LLaMA-Factory; a launcher that did too would take its ten seconds twice."""
    code = "import sys; from dataflex.llamafactory import launch; launch.wants_torchrun(); sys.exit(%s in sys.modules)"
    env = {**os.environ, "FORCE_TORCHRUN": "1"}
    for module in ("'llamafactory'", "'torch'", "'transformers'"):
        subprocess.run([sys.executable, "-c", code % module], env=env, check=True)


def test_ray_without_an_accelerator_is_told_before_it_waits_for_ever(tmp_path, monkeypatch):
    """LLaMA-Factory asks for ten processors for each processor of the cluster, which no cluster has."""
    monkeypatch.setenv("USE_RAY", "1")
    monkeypatch.setattr(args_module, "_device_is_possible", lambda: False)
    config = tmp_path / "run.json"
    config.write_text(json.dumps({"model_name_or_path": str(tmp_path), "do_train": True, "output_dir": "out"}))
    with pytest.raises(UnsupportedError, match=r"USE_RAY \(environment\).*FORCE_TORCHRUN=1"):
        train([str(config)])
    monkeypatch.setattr(args_module, "_device_is_possible", lambda: True)
    assert ray_problems() == []
    monkeypatch.setattr(args_module.importlib.util, "find_spec", lambda name: None)
    assert [line.partition(":")[0] for line in ray_problems()] == [
        "USE_RAY (environment) needs ray, which is not installed; install the extra"
    ]


@pytest.mark.slow
def test_ray_workers_train_with_our_trainer(tiny_model, data_dir, tmp_path, monkeypatch):
    """What a Ray worker does, without a cluster: the driver's environment is all it gets."""
    from llamafactory.train import tuner

    from dataflex.llamafactory import swap
    from tests.integration.conftest import Outcome, base_settings

    lf = {**base_settings(tiny_model, data_dir), "output_dir": str(tmp_path / "out"), "max_steps": 3}
    mapping = {**lf, "dynamic": {"interval_steps": 2, "selector": "random"}}
    stock = tuner.Worker
    with swap.ray_workers(mapping, tmp_path):
        assert tuner.Worker is swap.RayWorker
        environment = dict(os.environ)
        assert json.loads(environment[swap.ENVIRONMENT_KEY])["mapping"] == mapping
        worker = tuner.Worker.__new__(tuner.Worker)  # its constructor picks a device, which Ray assigns
        worker._training_function({"args": lf, "callbacks": []})
    assert tuner.Worker is stock
    assert swap.ENVIRONMENT_KEY not in os.environ
    assert any(event["event"] == "planned" for event in Outcome(tmp_path / "out").events)


@pytest.mark.gloo
def test_the_command_on_two_ranks(tiny_model, data_dir, tmp_path):
    """``FORCE_TORCHRUN=1 NPROC_PER_NODE=2 dataflex train``, as a user types it; a mistake ends it at once."""
    from tests.integration.conftest import Outcome, base_settings

    config = tmp_path / "run.json"
    mapping = {**base_settings(tiny_model, data_dir), "output_dir": str(tmp_path / "out"), "max_steps": 3}
    config.write_text(json.dumps({**mapping, "dynamic": {"interval_steps": 2, "selector": "random"}}))
    env = {**os.environ, "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}

    def train(*overrides):
        command = [sys.executable, "-m", "dataflex", "train", str(config), *overrides]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)

    done = train("ddp_find_unused_parameters=false")
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = Outcome(tmp_path / "out")
    started = next(event for event in outcome.events if event["event"] == "run_started")
    assert (started["world"], started["global_batch"]) == (2, 4)
    wrong = train("dynamic.selector=randon")
    assert wrong.returncode == 2
    assert "did you mean 'random'?" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.gloo
def test_one_rank_that_fails_ends_them_all(tiny_model, data_dir, tmp_path):
    """A rank that fails alone, in the middle of deciding, is told and ends the job; the others do not wait for it."""
    from tests.integration.conftest import base_settings

    plugin = tmp_path / "fragile.py"
    plugin.write_text(
        """
import os

from dataflex import Card, Requires, Selection, Selector
from dataflex.signals.kinds import TokenLoss


class Fragile(Selector):
    name = "fragile"
    card = Card(summary="Fails on rank 1.", paper="test", cost="1F")

    def requires(self):
        return Requires(signals=frozenset({"losses"}), needs_interval=True)

    def select(self, pool, budget, ctx):
        if os.environ["RANK"] == "1":
            raise RuntimeError("rank 1 lost its mind")
        ctx.signals(TokenLoss(), pool)
        return Selection(rows=pool[:budget])
"""
    )
    config = tmp_path / "run.json"
    mapping = {**base_settings(tiny_model, data_dir), "output_dir": str(tmp_path / "out"), "max_steps": 3}
    block = {"plugins": [str(plugin)], "interval_steps": 2, "selector": "fragile"}
    config.write_text(json.dumps({**mapping, "ddp_find_unused_parameters": False, "dynamic": block}))
    env = {**os.environ, "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    command = [sys.executable, "-m", "dataflex", "train", str(config)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 1
    assert "rank 1 lost its mind" in done.stderr + done.stdout


def test_deepspeed_without_torchrun_is_refused_before_llamafactory_is_imported(
    tiny_model, data_dir, tmp_path, monkeypatch
):
    """Its parser would say so after its imports."""
    for name in ("LOCAL_RANK", "WORLD_SIZE", "FORCE_TORCHRUN", "USE_RAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "device_count", lambda: 0)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    mapping = {
        "model_name_or_path": str(tiny_model),
        "do_train": True,
        "template": "default",
        "dataset_dir": str(data_dir),
        "dataset": "alpha",
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "deepspeed": str(tmp_path / "ds.json"),
        "dynamic": {"selector": "loss", "interval_steps": 2},
    }
    (tmp_path / "run.json").write_text(json.dumps(mapping))
    with pytest.raises(UnsupportedError, match="deepspeed: LLaMA-Factory runs it under torchrun only"):
        train([str(tmp_path / "run.json")])
