"""Two runs into one output folder: the second is refused as long as the first goes on, and no longer."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from dataflex import checkpoints
from dataflex.cli import main
from dataflex.errors import CheckpointError
from tests.ending.test_storage import BLOCK

HOLDER = """
import sys, time
from pathlib import Path
from dataflex import checkpoints
checkpoints.claim(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture
def holder():
    """Function that starts another process which writes a run into a folder."""
    started = []

    def start(folder):
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_folder_is_refused_until_the_other_process_ends(tmp_path, holder):
    checkpoints.refuse_busy(tmp_path)
    assert not list(tmp_path.iterdir())
    other = holder(tmp_path)
    for ask in (checkpoints.refuse_busy, checkpoints.claim):
        with pytest.raises(CheckpointError, match=rf"output_dir: process {other.pid} on .* writes a run into"):
            ask(tmp_path)
    other.kill()
    other.wait()
    checkpoints.claim(tmp_path)
    checkpoints.claim(tmp_path)  # one process may run twice
    checkpoints.refuse_busy(tmp_path)
    checkpoints.release(tmp_path)
    holder(tmp_path)


def test_a_file_system_without_locks_refuses_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", fail)
    checkpoints.claim(tmp_path)
    checkpoints.release(tmp_path)


def test_a_run_refuses_and_lets_go(run, configure, holder, capsys):
    folder = run.folder / "busy"
    other = holder(folder)
    told = f"output_dir: process {other.pid} on "
    with pytest.raises(CheckpointError, match=told):
        run("busy", max_steps=2, dynamic=BLOCK)
    other.kill()
    other.wait()
    run("busy", max_steps=2, dynamic=BLOCK)
    other = holder(folder)  # the run has ended, this process has not
    assert main(["train", str(configure(max_steps=2, dynamic=BLOCK, output_dir=str(folder)))]) == 2
    assert f"dataflex: output_dir: process {other.pid} on " in capsys.readouterr().err
