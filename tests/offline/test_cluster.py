"""``dataflex score --engine ray``: which batches workers are given, and the scores of a cluster with a death in it."""

from __future__ import annotations

import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from types import SimpleNamespace

import numpy as np
import pytest

from dataflex.offline.cluster import WAIT, Queue, shared
from dataflex.score_table import read_scores
from dataflex.signals.store import ArrayStore, CacheKey, ResumablePass
from tests.offline.conftest import rows_of
from tests.offline.test_score import start


def test_batches_are_handed_out_once_and_merged_at_the_end():
    queue = Queue()
    assert queue.next("pass", [0, 2], 3, "a", None) == 0
    assert queue.next("pass", [0, 2], 3, "b", None) == 2
    assert queue.next("pass", [0, 2], 3, "b", 2) == WAIT  # a has not finished, and may die
    assert queue.next("other", [], 5, "b", None) == 5
    assert queue.next("pass", [0, 2], 3, "a", 0) == 3
    assert queue.next("pass", [0, 2], 3, "b", None) == WAIT
    assert queue.next("pass", [0, 2], 3, "a", 3) is None
    assert queue.next("pass", [0, 2], 3, "b", None) is None
    assert queue.next("pass", [], 3, "late", None) is None


def test_batches_of_a_lost_worker_are_handed_out_again():
    queue = Queue()
    assert queue.next("pass", [0, 1], 2, "a", None) == 0
    assert queue.next("pass", [0, 1], 2, "b", None) == 1
    queue.lost("a")
    assert queue.next("pass", [0, 1], 2, "b", 1) == 0
    assert queue.next("pass", [0, 1], 2, "b", 0) == 2
    queue.lost("b")  # while it brought the parts together
    assert queue.next("pass", [0, 1], 2, "c", None) == 2
    assert queue.next("pass", [0, 1], 2, "c", 2) is None


def test_workers_write_one_array(tmp_path):
    """Two take turns, one stops with a batch in hand, and one that starts late takes that."""
    key = CacheKey(model="m", data="d", method="losses")
    queue, one_at_a_time = Queue(), Lock()

    def asked(*args):
        with one_at_a_time:
            return queue.next(*args)

    remote = SimpleNamespace(next=SimpleNamespace(remote=asked))
    batches = [np.array([4, 1]), np.array([0]), np.array([2, 3]), np.array([5])]

    def worker(name):
        work = ResumablePass(ArrayStore(tmp_path), key, shape=(6,), dtype=np.float32)
        for rows in shared(remote, name, lambda answer: answer)(work)(batches):
            yield
            work.record(rows, rows.astype(np.float32))
            took[name] += len(rows)

    took = dict.fromkeys("abc", 0)
    first, second = worker("a"), worker("b")
    for _ in range(2):
        next(first)
        next(second)
    first.close()
    queue.lost("a")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(list, (worker("c"), second)))
    np.testing.assert_array_equal(ArrayStore(tmp_path).get(key), np.arange(6))
    assert sum(took.values()) == 6
    assert took["a"] == 2


@pytest.mark.slow
@pytest.mark.trains
def test_a_cluster_of_two_of_which_one_is_killed_scores_as_one_process(scoring, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    scoring.write("pool", rows_of(4000))
    command = ["score", scoring.config(dataset="pool", per_device_train_batch_size=1, per_device_eval_batch_size=1)]
    command += ["--method", "loss"]
    process = start([*command, "--out", "ray.parquet", "--engine", "ray", "--workers", "2"])
    store, told, deadline = scoring.folder / "ray.parquet.work/store", "", time.monotonic() + 400
    while len(re.findall(r"worker \d: .*, process", told)) < 2:
        told += process.stdout.readline()
        assert process.poll() is None, told
    while sum(part.stat().st_size > 10_000 for part in store.glob("*.unfinished/part-*.bin")) < 2:  # both have written
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(int(re.search(r"worker 0: .*, process (\d+)", told)[1]), signal.SIGKILL)
    told = process.communicate(timeout=400)[0]
    assert process.returncode == 0, told
    assert "worker 0 died" in told
    assert not (scoring.folder / "ray.parquet.work").exists()
    assert scoring.run(*command, "--out", "one.parquet") == 0
    one, ray = (read_scores(scoring.folder / f"{name}.parquet") for name in ("one", "ray"))
    assert np.isfinite(one.columns["loss"]).all()
    for name, values in one.columns.items():
        np.testing.assert_array_equal(ray.columns[name], values)
    assert ray.provenance == one.provenance
