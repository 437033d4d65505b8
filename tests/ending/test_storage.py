"""A disk that takes no more is told by name, with the checkpoint that is intact; whoever wrapped the error."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from dataflex.cli import main
from dataflex.errors import ConfigError, DataError
from dataflex.record.read import read_events
from dataflex.record.recorder import RunRecorder
from dataflex.state import aside, write_json
from dataflex.storage import StorageError, storage_problem
from tests.ending.conftest import dataflex, environment
from tests.record.synthetic import Spent, intervals, record_plan, started

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


def test_the_file_that_was_refused_is_named_and_not_the_runs_folder_or_a_temporary_one(tmp_path):
    cache = OSError(errno.EROFS, "Read-only file system", "/x/cache")
    told = storage_problem(raised(DataError("dataset: 'a': [Errno 30] Read-only file system"), cache), tmp_path)
    assert told.splitlines()[1].startswith("/x/cache cannot be written: Read-only file system")
    path = aside(tmp_path / "subset.jsonl")
    told = storage_problem(OSError(errno.EROFS, "Read-only file system", str(path)))
    assert told.startswith(f"{tmp_path / 'subset.jsonl'} cannot be written")


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


@contextmanager
def most(size):
    """Let the kernel refuse whatever makes a file longer than ``size`` bytes, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_plan_that_cannot_be_written_leaves_the_record_whole(tmp_path):
    sources = {"web": 40_000, "code": 20_000}
    recorder = RunRecorder(tmp_path, clock=Spent(startup=1.0))
    started(recorder, dynamic={}, sources=sources, schedule={"total_steps": 3000})
    first, second = intervals(3000, 1000, 2000)
    record_plan(recorder, first, sources, scored=False, mixed=False, total_steps=3000)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with most(8 * 1024), pytest.raises(DataError) as caught:
        record_plan(recorder, second, sources, scored=True, mixed=False, total_steps=3000)
    told = storage_problem(caught.value, tmp_path)
    assert told is not None
    assert "File too large" in told
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    record_plan(recorder, second, sources, scored=True, mixed=False, total_steps=3000)
    recorder.finished(3000, {}, {})
    assert [event["interval"] for event in read_events(tmp_path) if event["event"] == "planned"] == [0, 1]


def test_a_line_that_is_cut_is_left_out_and_the_run_goes_on(tmp_path):
    recorder = RunRecorder(tmp_path, clock=Spent(startup=1.0))
    started(recorder, dynamic={}, sources={"web": 10}, schedule={"total_steps": 9})
    recorder.stepped(1, {"loss": 2.0})
    size = (tmp_path / "events.jsonl").stat().st_size
    with most(size + 20), pytest.raises(DataError, match=r"output_dir: cannot write .*events.jsonl"):
        recorder.stepped(2, {"loss": 1.5})
    assert (tmp_path / "events.jsonl").stat().st_size == size + 20
    assert [event["event"] for event in read_events(tmp_path)] == ["run_started", "stepped"]
    resumed = RunRecorder(tmp_path, 1, clock=Spent(startup=1.0))
    resumed.resumed(1, "out/checkpoint-1")
    resumed.stepped(2, {"loss": 1.4})
    assert [event["loss"] for event in read_events(tmp_path) if event["event"] == "stepped"] == [2.0, 1.4]


def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with most(100), pytest.raises(DataError, match="cannot write"):
        write_json(tmp_path / "a.json", {"x": "long" * 100})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
