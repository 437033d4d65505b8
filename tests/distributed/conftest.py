"""Starts two gloo ranks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("driver.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def two_ranks():
    """Return a function that runs configuration files on two ranks, in one torchrun job."""

    def start(configs: list[Path], folder: Path, timeout: int = 240) -> str:
        jobs = folder / "jobs.json"
        jobs.write_text(json.dumps([str(config) for config in configs]))
        env = {**os.environ, "ACCELERATE_TORCH_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--nnodes", "1"]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), str(DRIVER), str(jobs)]
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # torchrun's children too
            output, _ = process.communicate()
            pytest.fail(f"two ranks did not end within {timeout} s:\n{output[-4000:]}")
        assert process.returncode == 0, output[-4000:]
        return output

    return start
