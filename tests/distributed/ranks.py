"""Two gloo ranks that run configuration files, started once for all tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

DRIVER = Path(__file__).with_name("driver.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class TwoRanks:
    """One torchrun job, whose ranks import once and then wait for files that name configurations."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.batches = folder, folder / "output.txt", 0
        env = {**os.environ, "ACCELERATE_TORCH_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--nnodes", "1"]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), str(DRIVER), str(folder)]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, cwd=folder)

    def say(self, configs: list[str] | None) -> list[Path]:
        """Give the ranks their next batch (None: end) and return the files that say that each is through."""
        batch = self.folder / f"batch-{self.batches}.json"
        self.batches += 1
        batch.with_suffix(".aside").write_text(json.dumps(configs))
        batch.with_suffix(".aside").rename(batch)
        return [batch.with_suffix(f".done{rank}") for rank in range(2)]

    def kill(self) -> None:
        family = psutil.Process(self.process.pid)
        for member in [*family.children(recursive=True), family]:
            member.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """Return a function that runs configuration files on two ranks and returns what they print."""
    yield from ranks_that_run(tmp_path_factory)


def ranks_that_run(tmp_path_factory):
    """Yield the function of ``two_ranks``, whose job is started at its first call, and end the job."""
    ranks: list[TwoRanks] = []

    def run(configs: list[Path], timeout: int = 600) -> str:
        if not ranks or ranks[-1].process.poll() is not None:
            ranks.append(TwoRanks(tmp_path_factory.mktemp("two-ranks")))
        job, until = ranks[-1], time.monotonic() + timeout
        start = job.log.stat().st_size
        done = job.say([str(config) for config in configs])
        while not all(file.exists() for file in done):
            printed = job.log.read_text(errors="replace")[-4000:]
            assert job.process.poll() is None, f"two ranks ended:\n{printed}"
            if time.monotonic() > until:
                job.kill()
                pytest.fail(f"two ranks did not end within {timeout} s:\n{printed}")
            time.sleep(0.05)
        return job.log.read_bytes()[start:].decode(errors="replace")

    yield run
    for job in ranks:
        if job.process.poll() is None:
            job.say(None)
            try:
                code = job.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                job.kill()
                raise
            printed = job.log.read_text(errors="replace")
            assert code == 0, printed[-4000:]
            assert "terminate called" not in printed  # once in dozens of runs, while a thread of gloo's is left


def errors_of(config: Path) -> list[str]:
    """Return what the ranks that failed said of a file that ``two_ranks`` ran."""
    return [path.read_text() for path in config.parent.glob(f"{config.name}.rank*.error")]
