"""Starts two gloo ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

DRIVER = Path(__file__).with_name("driver.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def two_ranks():
    """Return a function that runs configuration files on two ranks, in one torchrun job."""

    def start(configs: list[Path], folder: Path, timeout: int = 600) -> str:
        jobs = folder / "jobs.json"
        jobs.write_text(json.dumps([str(config) for config in configs]))
        env = {**os.environ, "ACCELERATE_TORCH_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--nnodes", "1"]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), str(DRIVER), str(jobs)]
        log = folder / "output.txt"
        with log.open("w") as output:
            process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        try:
            process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            family = psutil.Process(process.pid)
            for member in [*family.children(recursive=True), family]:
                member.kill()
            pytest.fail(f"two ranks did not end within {timeout} s:\n{log.read_text()[-4000:]}")
        assert process.returncode == 0, log.read_text()[-4000:]
        return log.read_text()

    return start
