"""Stored arrays: whole or absent, never stale or foreign; passes that are killed go on, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dataflex import comm
from dataflex.errors import CheckpointError, ComponentError
from dataflex.signals.store import ArrayStore, CacheKey, ResumablePass, package_versions
from dataflex.state import owner
from dataflex.version import __version__
from tests.signals import store_worker

ROOT = Path(__file__).parents[2]


def key(**changes):
    fields = {"model": "m@7", "data": "d1", "method": "Token losses", "parameters": {"el2n": True, "sizes": (1, 2)}}
    return CacheKey(**{**fields, **changes})


def put(store, key, array):
    with store.create(key, shape=array.shape, dtype=array.dtype) as target:
        target[...] = array
    return store.get(key)


@pytest.fixture
def store(tmp_path):
    return ArrayStore(tmp_path / "arrays")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.bool_])
@pytest.mark.parametrize("shape", [(5, 3), (4,), (0, 7), (2, 0)])
def test_round_trip(store, shape, dtype):
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    assert store.get(key()) is None
    stored = put(store, key(), array)
    assert stored.dtype == array.dtype
    np.testing.assert_array_equal(stored, array)
    again = store.get(key())
    np.testing.assert_array_equal(again, array)
    if array.size:
        assert isinstance(again, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            again[...] = 0


def test_what_a_kill_left_of_a_write_is_removed_by_the_next_pass(store):
    gone, alive = owner().replace(str(os.getpid()), str(2**30)), owner().replace(str(os.getpid()), str(os.getppid()))
    left = [f".losses-{'0' * 32}.{gone}.0a0b0c0d.npy", f".losses-{'0' * 32}.{gone}.0a0b0c0d.ready"]
    kept = [f".losses-{'0' * 32}.{alive}.0a0b0c0d.npy", ".gitignore"]
    store.directory.mkdir()
    for name in kept + left:
        (store.directory / name).touch()
    os.utime(store.directory / ".gitignore", (0, 0))
    work = ResumablePass(store, key(), shape=(2,), dtype=np.float32)
    found = sorted(path.name for path in store.directory.iterdir() if path.is_file())
    assert found == sorted(kept)
    work.close()


def test_every_field_of_the_fingerprint_counts(store):
    put(store, key(), np.ones(3))
    others = [
        key(model="m@8"),
        key(data="d2"),
        key(method="token losses 2"),
        key(parameters={"el2n": True, "sizes": (1, 3)}),
        key(versions={**package_versions(), "torch": "0.0"}),
        key(versions={**package_versions(), "dataflex": "0.0.1"}),
    ]
    assert package_versions()["dataflex"] == __version__  # whatever another package of that name has
    assert len({other.name for other in others} | {key().name}) == 7
    assert all(store.get(other) is None for other in others)
    assert store.get(key(parameters={"sizes": [1, 2], "el2n": True})) is not None  # order and tuples do not
    assert key().name.startswith("token-losses-")
    with pytest.raises(ComponentError, match="parameters must be JSON values"):
        key(parameters={"rows": np.arange(3)})


def spoil_header(folder):
    header = json.loads((folder / "header.json").read_text())
    header["fingerprint"]["model"] = "another"
    (folder / "header.json").write_text(json.dumps(header))


def another_array(folder):
    np.save(folder / "array.npy", np.zeros((3, 4), dtype=np.int8))


def pickled(folder):
    np.save(folder / "array.npy", np.array([None] * 4), allow_pickle=True)


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_header,
        another_array,
        pickled,
        lambda folder: (folder / "header.json").unlink(),
        lambda folder: (folder / "array.npy").unlink(),
        lambda folder: os.truncate(folder / "array.npy", 100),
        lambda folder: os.truncate(folder / "array.npy", (folder / "array.npy").stat().st_size - 1),
        lambda folder: (folder / "header.json").write_text("{"),
    ],
)
def test_a_broken_or_foreign_folder_is_never_used(store, spoil, caplog):
    put(store, key(), np.arange(12.0))
    spoil(store.directory / key().name)
    assert store.get(key()) is None
    assert "is not used" in caplog.text
    np.testing.assert_array_equal(put(store, key(), np.arange(5.0)), np.arange(5.0))


def test_a_folder_under_another_name_is_foreign(store):
    put(store, key(), np.arange(12.0))
    shutil.copytree(store.directory / key().name, store.directory / key(data="d2").name)
    assert store.get(key(data="d2")) is None


def test_whole_or_absent(store):
    def fail_halfway():
        with store.create(key(), shape=(4,), dtype=np.float32) as array:
            array[:2] = 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert store.get(key()) is None
    assert list(store.directory.iterdir()) == []
    # Two processes that compute the same array: the second to end leaves the first one's in place.
    with store.create(key(), shape=(2,), dtype=np.float32) as late:
        late[:] = 1
        put(store, key(), np.ones(2, dtype=np.float32))
    assert store.get(key()).tolist() == [1.0, 1.0]
    assert [path.name for path in store.directory.iterdir()] == [key().name]
    blocked = ArrayStore(store.directory / key().name / "array.npy")  # a file where a folder should be
    with pytest.raises(CheckpointError, match="cannot write a stored array"):
        put(blocked, key(), np.ones(2))


def test_a_full_disk_is_an_error_before_the_first_row_and_no_signal_at_one(store, monkeypatch):
    with store.create(key(), shape=(2**20,), dtype=np.float32):
        (scratch,) = store.directory.glob(".*.npy")
        assert scratch.stat().st_blocks * 512 >= 2**22

    def refuse(number):
        def fail(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "posix_fallocate", fail)

    refuse(errno.ENOSPC)
    with (
        pytest.raises(CheckpointError, match="No space left"),
        store.create(key(data="d2"), shape=(4,), dtype=np.int64),
    ):
        pass
    assert [path.name for path in store.directory.iterdir()] == [key().name]
    refuse(errno.EOPNOTSUPP)  # a file system that cannot tell
    assert put(store, key(data="d2"), np.arange(4)).tolist() == [0, 1, 2, 3]


def test_list_size_and_evict(store):
    keys = [key(data=f"d{i}") for i in range(4)]
    for age, one in zip((400, 300, 200, 100), keys, strict=True):
        put(store, one, np.zeros(1000))
        os.utime(store.directory / one.name / "header.json", (time.time() - age,) * 2)
    foreign = store.directory / "holiday-photos"
    foreign.mkdir()
    (foreign / "beach.jpg").write_bytes(b"x" * 100_000)
    store.get(keys[0])  # used just now
    assert [entry.name for entry in store.entries()] == [keys[i].name for i in (1, 2, 3, 0)]
    one = store.entries()[0].size_bytes
    assert 8000 < one < 10_000
    assert store.evict(5 * one) == []
    assert store.evict(3 * one) == [keys[1].name]
    work = ResumablePass(store, key(data="unfinished"), shape=(3,), dtype=np.float32)
    work.record(np.array([0]), np.array([1.0]))
    work.close()
    assert [entry.finished for entry in store.entries()].count(False) == 1
    assert store.evict(0) == [keys[2].name, keys[3].name, keys[0].name]  # not the pass of a minute ago
    old = time.time() - 2 * 24 * 3600
    for path in store.working_folder(key(data="unfinished")).iterdir():
        os.utime(path, (old, old))
    left = store.directory / f".{key().name}.0a1b2c3d.npy"  # of a write that was killed
    left.write_bytes(b"x")
    os.utime(left, (old, old))
    assert len(store.evict(0)) == 1
    assert [path.name for path in store.directory.iterdir()] == ["holiday-photos"]
    assert ArrayStore(store.directory / "nowhere").entries() == []


def as_rank(monkeypatch, rank):
    monkeypatch.setattr(comm, "rank", lambda: rank)


def test_parts_of_several_ranks_and_sessions_are_merged(store, monkeypatch):
    want = np.arange(12, dtype=np.float16).reshape(6, 2)
    work = ResumablePass(store, key(), shape=(6, 2), dtype=np.float16)
    assert not work.done_at_start.any()
    work.record(np.array([4, 1]), want[[4, 1]])
    work.close()
    monkeypatch.setattr(comm, "on_one_rank", lambda _what, do, _told: do())
    as_rank(monkeypatch, 3)
    work = ResumablePass(store, key(), shape=(6, 2), dtype=np.float16)
    assert work.done_at_start.tolist() == [False, True, False, False, True, False]
    work.record(np.array([0]), want[[0]].astype(np.float64))
    work.record(np.array([2]), want[[2]])
    work.close()
    as_rank(monkeypatch, 0)
    parts = sorted(store.working_folder(key()).glob("part-*.bin"))
    assert len(parts) == 2
    with pytest.raises(CheckpointError, match="2 of 6 rows are missing"):
        work.finish()
    assert store.get(key()) is None
    work = ResumablePass(store, key(), shape=(6, 2), dtype=np.float16)
    work.record(np.array([3, 5]), want[[3, 5]])
    np.testing.assert_array_equal(work.finish(), want)
    assert not store.working_folder(key()).exists()
    finished = ResumablePass(store, key(), shape=(6, 2), dtype=np.float16)
    assert finished.complete
    np.testing.assert_array_equal(finished.finish(), want)
    with pytest.raises(CheckpointError, match="does not tell the two apart"):
        ResumablePass(store, key(), shape=(6, 3), dtype=np.float16)
    with pytest.raises(ValueError, match="expected"):
        ResumablePass(store, key(data="x"), shape=(6, 2), dtype=np.float16).record(np.array([1]), np.zeros((1, 3)))


@pytest.mark.parametrize("cut", [1, 10, 28, 40, 47])
def test_a_torn_record_is_left_out(store, cut):
    work = ResumablePass(store, key(), shape=(4,), dtype=np.float32)
    work.record(np.array([2]), np.array([2.5]))
    work.record(np.array([0, 1]), np.array([0.5, 1.5]))
    work.close()
    (part,) = store.working_folder(key()).glob("part-*.bin")
    size = part.stat().st_size
    os.truncate(part, size - cut)
    assert ResumablePass(store, key(), shape=(4,), dtype=np.float32).done_at_start.tolist() == [0, 0, 1, 0]
    content = bytearray(part.read_bytes())
    content[41] ^= 1  # the first record's value
    part.write_bytes(content)
    assert not ResumablePass(store, key(), shape=(4,), dtype=np.float32).done_at_start.any()


def test_parts_of_another_pass_are_removed(store):
    work = ResumablePass(store, key(), shape=(4,), dtype=np.float32)
    work.record(np.array([2]), np.array([2.5]))
    work.close()
    assert not ResumablePass(store, key(), shape=(4,), dtype=np.float64).done_at_start.any()
    assert list(store.working_folder(key()).glob("part-*.bin")) == []


def test_rows_of_unequal_length(store):
    offsets = np.array([0, 2, 2, 5, 6])
    work = ResumablePass(store, key(), shape=(6,), dtype=np.float16, offsets=offsets)
    work.record(np.array([3, 0]), np.array([5.0, 0.0, 1.0]))
    work.record(np.array([1]), np.array([]))
    work.close()
    work = ResumablePass(store, key(), shape=(6,), dtype=np.float16, offsets=offsets)
    assert work.done_at_start.tolist() == [True, True, False, True]
    work.record(np.array([2]), np.array([2.0, 3.0, 4.0]))
    np.testing.assert_array_equal(work.finish(), np.arange(6, dtype=np.float16))
    with pytest.raises(ValueError, match="offsets run from 0 to 6"):
        ResumablePass(store, key(), shape=(7,), dtype=np.float16, offsets=offsets)


def test_a_pass_without_rows(store):
    work = ResumablePass(store, key(), shape=(0, 4), dtype=np.float32)
    assert work.complete
    assert work.finish().shape == (0, 4)


def start(directory, *ranks):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    command = [sys.executable, store_worker.__file__, str(directory), "0.2", *map(str, ranks)]
    return subprocess.Popen(command, env=environment, cwd=ROOT)


@pytest.mark.slow
def test_kill_9_in_the_middle_and_go_on_with_another_number_of_ranks(tmp_path):
    whole, batches = store_worker.run(tmp_path / "whole")
    directory = tmp_path / "killed"
    folder = ArrayStore(directory).working_folder(store_worker.KEY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(directory, rank, 2, port) for rank in range(2)]
    deadline = time.monotonic() + 90
    try:
        while len([part for part in folder.glob("part-*.bin") if part.stat().st_size > 400]) < 2:
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in processes)
            time.sleep(0.02)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
        codes = [process.wait() for process in processes]
    assert codes == [-signal.SIGKILL] * 2
    assert ArrayStore(directory).get(store_worker.KEY) is None
    resumed, rest = store_worker.run(directory)
    assert 0 < rest < batches - 3
    assert resumed.tobytes() == whole.tobytes()
    assert [path.name for path in directory.iterdir()] == [store_worker.KEY.name]
    again, none = store_worker.run(directory)
    assert none == 0
    assert again.tobytes() == whole.tobytes()
