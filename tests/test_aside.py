"""What a kill leaves of files that are written aside is taken away, and nothing of a process that still runs."""

from __future__ import annotations

import os
import subprocess
import sys

from dataflex.state import clear_left, owner, replacing

KILLED = """
import os, signal, sys
from pathlib import Path
from dataflex.state import replacing
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with replacing(Path(sys.argv[1])) as file:
    file.write(b"half")
"""


def test_the_next_writer_of_a_file_removes_what_a_kill_left(tmp_path):
    path = tmp_path / "proportions.json"
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    other = tmp_path / f".proportions.json.{owner()}.tmp"  # of this process, which is alive
    other.write_bytes(b"mine")
    with replacing(path) as file:
        file.write(b"whole")
    assert [entry.name for entry in tmp_path.iterdir()] == ["proportions.json"]


def test_other_processes_and_other_files_are_left_alone(tmp_path):
    alive = owner().replace(str(os.getpid()), str(os.getppid()))
    gone = owner().replace(str(os.getpid()), str(2**30))
    kept = [f".a.json.{alive}.tmp", f".a.json.00000000-{2**30}.tmp", f".b.json.{gone}.tmp", ".a.json.swp", "a.json"]
    for name in [*kept, f".a.json.{gone}.tmp"]:
        (tmp_path / name).touch()
    with replacing(tmp_path / "a.json"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_runs_own_folder_is_cleared_of_all_of_them(tmp_path):
    (tmp_path / "plans").mkdir()
    (tmp_path / "reference").mkdir()
    left = [".events.jsonl.77.tmp", "plans/.plan-00003.npz.0a0b0c0d-77.tmp", "reference/.x.0a0b0c0d-7.0a0b0c0d.npy"]
    kept = ["events.jsonl", "plans/plan-00003.npz", ".keep", "reference/.x.npz"]
    for name in left + kept:
        (tmp_path / name).touch()
    (tmp_path / "reference" / ".x.0a0b0c0d.ready").mkdir()
    (tmp_path / "reference" / ".x.0a0b0c0d.ready" / "array.npy").touch()
    clear_left(tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == sorted(
        kept
    )
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["plans", "reference"]
