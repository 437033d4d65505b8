"""Gradients, moments and training afterwards are the same under DDP, FSDP2 and DeepSpeed's stages (two gloo ranks)."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import free_port

WORKER = Path(__file__).with_name("sharded_worker.py")
ENGINES = ["ddp", "fsdp2"]
if importlib.util.find_spec("deepspeed") is not None:
    ENGINES += ["zero0", "zero1", "zero2", "zero3"]


@pytest.mark.gloo
def test_every_engine_agrees_with_an_unwrapped_copy(tmp_path):
    root = str(WORKER.parents[3])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--nnodes", "1"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), str(WORKER)]
    command += [str(tmp_path / "results"), ",".join(ENGINES)]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"two ranks did not end: {process.communicate()[0][-4000:]}")
    assert process.returncode == 0, output[-4000:]
    lines = [line for rank in (0, 1) for line in (tmp_path / f"results.{rank}").read_text().splitlines()]
    assert len(lines) == 2 * 2 * len(ENGINES)
    for found in map(json.loads, lines):
        where = f"{found['kind']} {found['model']} rank {found['rank']}"
        assert not found["differences"], (where, found["differences"])
        assert found["nan"], where
        assert found["step"] == 2, where
        assert "torch.func" not in found["layers"], where
        for key in ("first", "second", "scores", "afterwards"):
            assert found[key] <= 1e-5, (where, key, found[key])
