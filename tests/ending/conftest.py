"""Configurations and processes for tests of how a run ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.ranks import free_port
from tests.integration.conftest import Runner, base_settings


@pytest.fixture(autouse=True)
def _signals_as_at_a_terminal():
    """Hear, and let children hear, signals that a shell ignores for its background jobs (SIGINT) and nohup (SIGHUP)."""
    hear = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    ignored = [number for number in hear if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, hear[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


SLOW_STEPS = """
import time

import numpy as np

from dataflex import Card, Mix, Mixer, Requires


class Slow(Mixer):
    name = "slow"
    card = Card(summary="Equal shares, after a while.", paper="test", cost="none")

    def requires(self):
        return Requires(needs_interval=True)

    def mix(self, ctx):
        time.sleep({seconds})
        n = len(ctx.domains.names)
        return Mix(proportions=np.full(n, 1 / n))
"""


@pytest.fixture
def run(tiny_model, data_dir, tmp_path) -> Runner:
    return Runner(base_settings(tiny_model, data_dir), tmp_path)


@pytest.fixture
def configure(tiny_model, data_dir, tmp_path):
    """Return a function that writes a configuration and returns its path."""

    def write(name="run", **changes):
        ours = {"output_dir": str(tmp_path / name), "max_steps": 2, "dataset": "alpha,beta"}
        ours["ddp_find_unused_parameters"] = False
        mapping = {**base_settings(tiny_model, data_dir), **ours, **changes}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({key: value for key, value in mapping.items() if value is not None}))
        return path

    return write


@pytest.fixture
def slow_block(tmp_path):
    """Return a dynamic block that decides in every step and takes its time."""

    def block(seconds=0.3, **more):
        plugin = tmp_path / "slow.py"
        plugin.write_text(SLOW_STEPS.format(seconds=seconds))
        return {"plugins": [str(plugin)], "interval_steps": 1, "mixer": "slow", **more}

    return block


def environment(ranks=1):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_TORCH_DEVICE": "cpu"}
    return env if ranks == 1 else {**env, "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(ranks)}


def start(command, log: Path, env) -> subprocess.Popen:
    with log.open("w") as output:
        return subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)


def dataflex(*arguments) -> list[str]:
    return [sys.executable, "-m", "dataflex", *map(str, arguments)]


def torchrun(*arguments) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--nnodes", "1"]
    return [*command, "--master-addr", "127.0.0.1", "--master-port", str(free_port()), *map(str, arguments)]


def wait_for(condition, process, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.02)
