"""The commands ``make fuzz`` and ``make kills``: a few of their runs, and what they would do at a finding."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest
from benchmarks.soak import fuzz, growth, kills
from benchmarks.soak.forks import fork, prepare


def test_a_process_that_dies_or_hangs_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "tried", lambda *_, **__: (print("before"), os._exit(3)))
    found = fuzz.one({}, tmp_path, trains=True, limit=30)
    assert found == {"what": "died", "problem": "the process ended with 3:\nbefore\n"}
    monkeypatch.setattr(fuzz, "tried", lambda *_, **__: time.sleep(60))
    assert "did not end within 0 s" in fuzz.one({}, tmp_path, trains=True, limit=0.2)["problem"]


def test_findings_are_kept_and_the_command_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "tiny", lambda folder: (folder / "m", folder / "d"))
    monkeypatch.setattr(fuzz, "prepare", lambda: None)
    tried = []

    def one(mapping, folder, **_):
        tried.append(mapping)
        return {"what": "refused", "problem": "Traceback: wrong" if len(tried) == 2 else ""}

    monkeypatch.setattr(fuzz, "one", one)
    command = ["--seed", "3", "--out", str(tmp_path), "--count"]
    assert fuzz.main([*command, "2"]) == 1
    assert "fuzz: seed 3, 2 configurations: 2 refused; 1 findings" in capsys.readouterr().out
    told = (tmp_path / "finding-1.txt").read_text()
    assert told.startswith("$ python -m benchmarks.soak.fuzz --seed 3 --only 1\n")
    assert told.endswith("Traceback: wrong\n")
    assert fuzz.main([*command, "3"]) == 1, "the finding of before still counts"
    assert len(tried) == 3
    with pytest.raises(SystemExit, match="results of other settings"):
        fuzz.main(["--seed", "4", "--out", str(tmp_path)])


def test_growth_is_seen():
    flat = [(1000.0 + (i < 100) * i, 20, 3) for i in range(300)]
    assert growth.grown(flat) == (0.0, 0.0, 0.0)
    memory, files, threads = growth.grown([(1000.0 + 2 * i, 20 + i // 100, 3) for i in range(300)])
    assert memory == pytest.approx(2.0)
    assert (files, threads) == (1.0, 0.0)


@pytest.mark.slow
def test_three_kills(tmp_path):
    """In a checkpoint, in a pass and in the record; what ends the same is told from what does not."""
    prepare()
    jobs = kills.Jobs(tmp_path, limit=120)
    planned = [kills.Kill(kind, 0, share, 0.0, False) for kind, share in (("save", 0.3), ("pass", 0.4), ("plan", 0.3))]
    hit: list[str] = []
    chain = jobs.killed("one", "loss", [1], planned, tmp_path / "job", hit)
    assert hit == ["save", "pass", "plan"]
    twin = jobs.twin("one", "loss", chain)
    assert [*kills.differences(tmp_path / "job", twin)] == []
    for number, (name, change) in enumerate(
        {
            "trainer_state.json": lambda text: text.replace(b'"loss": ', b'"loss": 1'),
            "adapter_model.safetensors": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
            "dataflex/plans/plan-00001.npz": None,
            "dataflex/chosen.parquet": lambda data: data + b" ",
            "dataflex/run.json": lambda text: json.dumps({"run": "other"}).encode(),
        }.items()
    ):
        changed = tmp_path / f"changed-{number}"
        shutil.copytree(tmp_path / "job", changed)
        if change is None:
            (changed / name).unlink()
        else:
            (changed / name).write_bytes(change((changed / name).read_bytes()))
        assert len([*kills.differences(changed, twin)]) == 1, name


def test_a_rank_that_survives_another_is_told_to_end(tmp_path):
    log = tmp_path / "log.txt"
    jobs = object.__new__(kills.Jobs)
    jobs.limit = 30.0
    dead = fork(lambda: os.kill(os.getpid(), 9), log)
    assert jobs.watch([dead, fork(lambda: time.sleep(60), log)], log, both=False) == "killed"
    failed = fork(lambda: (print("lost"), 1)[1], log)
    assert jobs.watch([failed], log, both=False).startswith("ended with [1]:\nlost")
