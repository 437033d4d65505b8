"""A killed run goes on from its newest complete checkpoint and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from dataflex.record.chosen import CHOSEN, chosen_notes, chosen_table

BLOCK = {"warmup_steps": 2, "interval_steps": 3, "selector": "loss"}
SETTINGS = {
    "max_steps": 40,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 3,
    "finetuning_type": "lora",
    "lora_dropout": 0.1,
    "dataset": "alpha,beta",
}


@pytest.mark.slow
def test_kill_and_resume(run):
    straight = run("straight", **SETTINGS, dynamic=BLOCK)
    config = run.folder / "killed.json"
    config.write_text(json.dumps({**run.mapping("killed", **SETTINGS), "dynamic": BLOCK}))
    folder = run.folder / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "dataflex", "train", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        start_new_session=True,
    )
    deadline = time.monotonic() + 150
    while not (folder / "checkpoint-6").exists():  # the folder appears first, its content after
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "trainer_state.json").exists(), "the run ended before it was killed"
    left = pq.read_table(folder / "dataflex" / CHOSEN)
    assert sum(left.column("times_served").to_pylist()) == 2 * chosen_notes(left)["step"]
    assert chosen_notes(chosen_table(folder))["step"] >= chosen_notes(left)["step"]
    resumed = run("killed", **SETTINGS, dynamic=BLOCK, resume_from_checkpoint=True)
    written = [(each.folder / "dataflex" / CHOSEN).read_bytes() for each in (resumed, straight)]
    assert written[0] == written[1]
    assert resumed.series() == straight.series()
    assert resumed.series("grad_norm") == straight.series("grad_norm")
    steps = [event["step"] for event in resumed.events if event["event"] == "resumed"]
    assert len(steps) == 1
    assert steps[0] in {4, 6, 8, 10}


def test_read_only_output_folder(run, monkeypatch):
    """Told in the first second, by name; root may write anywhere, so permissions are faked."""
    from dataflex.errors import ConfigError

    locked = run.folder / "locked"
    locked.mkdir()
    real = os.access

    def access(path, mode, **kwargs):
        return False if str(path).startswith(str(locked)) and mode & os.W_OK else real(path, mode, **kwargs)

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(ConfigError, match="output_dir"):
        run("x", output_dir=str(locked / "out"), max_steps=2, dynamic={"selector": "all"})
