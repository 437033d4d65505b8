"""A disk that takes no more is told by name, with the checkpoint that is intact; whoever wrapped the error."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
from pathlib import Path

import pytest

from dataflex.cli import main
from dataflex.errors import ConfigError, DataError
from dataflex.storage import StorageError, storage_problem
from tests.ending.conftest import dataflex, environment

BLOCK = {"interval_steps": 2, "selector": "random"}


def raised(error, cause=None):
    try:
        raise error from cause
    except BaseException as caught:  # noqa: BLE001
        return caught


class SafetensorError(Exception):
    """As the package's own, which cannot be made from Python."""


SafetensorError.__module__ = "safetensors_rust"

WRAPPED = {
    "system": OSError(errno.ENOSPC, "No space left on device", "/x/rng_state.pth"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded", "/x/y"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "arrow": OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
    "cause": raised(RuntimeError("cannot go on"), OSError(errno.ENOSPC, "No space left on device")),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_full_disk_is_recognized(name, tmp_path):
    told = storage_problem(WRAPPED[name], tmp_path)
    assert told is not None
    assert told.startswith("the disk is full: ")
    assert "holds no complete checkpoint" in told


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/3: file write failed",
        "basic_ios::clear: iostream error",
    ],
)
def test_torch_does_not_say_why(text, tmp_path, monkeypatch):
    told = storage_problem(RuntimeError(text), tmp_path)
    assert "a full disk, a quota, or a limit on the size of files" in told
    assert re.search(r"[\d,.]+ MB are free on its disk", told)
    monkeypatch.setattr("dataflex.storage.shutil.disk_usage", lambda _: type("usage", (), {"free": 4096}))
    assert storage_problem(RuntimeError(text), tmp_path).startswith("the disk is full: ")


def test_other_reasons_of_the_system():
    assert "Read-only file system" in storage_problem(OSError(errno.EROFS, "Read-only file system", "/x/out"))
    assert "/x/out cannot be written: Permission denied" in storage_problem(
        PermissionError(errno.EACCES, "no", "/x/out")
    )


def test_other_errors_stay_what_they_are():
    for error in (
        RuntimeError("CUDA out of memory"),
        FileNotFoundError(errno.ENOENT, "No such file", "/x"),
        ValueError("No space left in the argument list"),
        raised(ConfigError("output_dir: not writable"), PermissionError(errno.EACCES, "denied", "/x")),
    ):
        assert storage_problem(error) is None


def test_our_own_message_stays_the_first():
    error = raised(DataError("output_dir: cannot write events.jsonl"), OSError(errno.ENOSPC, "No space left", "/x/e"))
    assert storage_problem(error).splitlines()[0] == "output_dir: cannot write events.jsonl"


def test_a_full_disk_under_the_trainers_own_writing(run, monkeypatch):
    """The second checkpoint meets the full disk; the first is named."""
    import torch

    real = torch.save

    def save(what, where, *args, **kwargs):
        if "checkpoint-4" in str(where) and str(where).endswith("optimizer.pt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(where))
        return real(what, where, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(StorageError) as caught:
        run("full", **settings, dynamic=BLOCK)
    folder = run.folder / "full"
    told = str(caught.value)
    assert f"the disk is full: {folder / 'checkpoint-4' / 'optimizer.pt'} cannot be written" in told
    assert f"{folder / 'checkpoint-2'} is complete; not written to the end: checkpoint-4" in told
    assert f"resume_from_checkpoint={folder / 'checkpoint-2'}" in told
    monkeypatch.setattr(torch, "save", real)
    assert run("full", **settings, dynamic=BLOCK, resume_from_checkpoint=True).series()


@pytest.mark.parametrize("dynamic", [BLOCK, None], ids=["dynamic", "stock"])
@pytest.mark.parametrize("kilobytes", [40, 100], ids=["model", "optimizer"])
def test_real_writers_that_may_not_write_more(configure, tiny_model, dynamic, kilobytes):
    """A limit on the size of files stops the writers of safetensors and torch in their native code."""
    size = (Path(tiny_model) / "model.safetensors").stat().st_size
    assert 40 * 1024 < size < 100 * 1024 < 2 * size  # the optimizer's moments are twice the model
    config = configure(dynamic=dynamic, save_strategy="steps", save_steps=1)
    done = subprocess.run(
        dataflex("train", config),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, kilobytes * 1024)),
    )
    told = [line for line in done.stderr.splitlines() if "dataflex: " in line]
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert any("cannot be written" in line for line in told)
    assert any("holds no complete checkpoint; not written to the end: checkpoint-1" in line for line in told)


def test_any_command_tells_it(monkeypatch, capsys, tmp_path):
    import dataflex.record.report

    def report(**_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "plot.png"))

    monkeypatch.setattr(dataflex.record.report, "report", report)
    assert main(["report", str(tmp_path)]) == 2
    assert f"dataflex: the disk is full: {tmp_path / 'plot.png'} cannot be written" in capsys.readouterr().err
