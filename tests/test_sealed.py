"""A checkpoint counts when every file of it is as it was written, and belongs to the run of its folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from dataflex import checkpoints
from dataflex.errors import CheckpointError
from dataflex.run import resume

FILES = {
    "adapter_model.safetensors": b"a" * 90,
    "config.json": b"{}",
    "dataflex/plan.npz": b"p" * 30,
    "dataflex/run.json": b'{"step": 4}',
    "global_step4/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt": b"z" * 50,
    "model-00001-of-00002.safetensors": b"m" * 200,
    "optimizer.pt": b"o" * 70,
    "rng_state_0.pth": b"r" * 20,
    "rng_state_1.pth": b"s" * 20,
    "scheduler.pt": b"c" * 10,
    "trainer_state.json": b'{"global_step": 4, "best_metric": null}',
}
MANIFEST = "dataflex/manifest.json"


def written(folder: Path, step: int, run: str = "mine", **options) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoints.begin(checkpoint)
    for name, content in FILES.items():
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(content.replace(b'"global_step": 4', b'"global_step": %d' % step))
    checkpoints.seal(checkpoint, run=run, **options)
    return checkpoint


def damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (name, how)
        for name in (*FILES, MANIFEST)
        for how in ("missing", "cut", "empty", "flipped")
        if (name, how) != (MANIFEST, "flipped")
    ],
)
def test_a_damaged_file_passes_the_checkpoint_over_and_refuses_it_by_name(tmp_path, name, how):
    older, newer = written(tmp_path, 4), written(tmp_path, 8)
    assert checkpoints.find_resumable(tmp_path) == (newer, [])
    damaged(newer / name, how)
    found, passed_over = checkpoints.find_resumable(tmp_path)
    assert found == older
    assert len(passed_over) == 1
    assert passed_over[0].startswith(f"checkpoint-8: {name} ")
    asked = {"output_dir": str(tmp_path), "resume_from_checkpoint": True}
    resume(asked)
    assert asked["resume_from_checkpoint"] == str(older)
    with pytest.raises(CheckpointError, match=f"checkpoint-8 cannot be resumed from: {name} "):
        resume({"output_dir": str(tmp_path), "resume_from_checkpoint": str(newer)})


def test_a_manifest_with_a_flipped_bit_never_counts_as_whole(tmp_path):
    newer = written(tmp_path, 8)
    damaged(newer / MANIFEST, "flipped")  # the id or a size may be what changed
    assert checkpoints.find_resumable(tmp_path)[1] or checkpoints.run_of(newer) != "mine"


def test_large_files_are_compared_by_size_unless_a_hash_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "HASHED_BYTES", 100)
    large = "model-00001-of-00002.safetensors"
    by_size, by_hash = written(tmp_path / "a", 4), written(tmp_path / "b", 4, every_hash=True)
    for checkpoint in (by_size, by_hash):
        damaged(checkpoint / large, "flipped")
    assert checkpoints.broken_reason(by_size) is None
    assert checkpoints.broken_reason(by_hash) == f"{large} is broken: its content is not what was written"
    damaged(by_size / large, "cut")
    assert checkpoints.broken_reason(by_size) == f"{large} is broken: 100 bytes, 200 were written"
    damaged(by_size / "optimizer.pt", "flipped")
    (by_size / large).write_bytes(FILES[large])
    assert checkpoints.broken_reason(by_size) == "optimizer.pt is broken: its content is not what was written"


def test_a_checkpoint_in_an_old_ones_place_never_counts_until_it_is_sealed(tmp_path, monkeypatch):
    """Killed at any removal, the old files that are left do not count; nor do new files without a manifest."""

    class Killed(BaseException):
        pass

    whole = written(tmp_path / "whole", 4)
    real, left = os.unlink, [0]

    def unlink(*args, **kwargs):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        real(*args, **kwargs)

    for survived in range(1, len(FILES) + 1):
        checkpoint = tmp_path / f"{survived}" / "checkpoint-4"
        shutil.copytree(whole, checkpoint)
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", unlink)
            left[0] = survived
            with pytest.raises(Killed):
                checkpoints.begin(checkpoint)
        assert checkpoints.broken_reason(checkpoint) is not None, survived
        checkpoints.begin(checkpoint)
        assert [path.name for path in checkpoint.rglob("*")] == ["dataflex"], "nothing old is left"
        for name, content in FILES.items():
            (checkpoint / name).parent.mkdir(exist_ok=True)
            (checkpoint / name).write_bytes(content)
            assert checkpoints.broken_reason(checkpoint) is not None, name
        checkpoints.seal(checkpoint, run="mine")
        assert checkpoints.broken_reason(checkpoint) is None


def test_the_marks_are_gone_from_the_disk_before_anything_else(tmp_path, monkeypatch):
    checkpoint, done = written(tmp_path, 4), []
    real = os.unlink
    monkeypatch.setattr(checkpoints, "fsync", lambda path: done.append(f"fsync {path.name}"))
    monkeypatch.setattr(
        os, "unlink", lambda path, **kwargs: (done.append(f"unlink {Path(path).name}"), real(path, **kwargs))[1]
    )
    checkpoints.begin(checkpoint)
    assert done[:4] == ["unlink manifest.json", "fsync dataflex", "unlink trainer_state.json", "fsync checkpoint-4"]


def test_checkpoints_of_an_older_run_are_passed_over(tmp_path):
    written(tmp_path, 8, run="older")
    checkpoints.begin_run(tmp_path, "mine")
    mine = written(tmp_path, 4)
    stock = tmp_path / "checkpoint-9"
    stock.mkdir()
    (stock / "trainer_state.json").write_text('{"global_step": 9}')
    found, passed_over = checkpoints.find_resumable(tmp_path)
    assert found == mine
    assert passed_over[0].startswith("checkpoint-9: it was written by a run without a dynamic block in this folder")
    assert passed_over[1].startswith("checkpoint-8: it was written by another run (older; this one is mine)")
    named = {"output_dir": str(tmp_path), "resume_from_checkpoint": str(tmp_path / "checkpoint-8")}
    resume(named)  # allowed by name
    (tmp_path / "dataflex" / "run.json").unlink()  # a folder that does not tell: any is taken
    assert checkpoints.find_resumable(tmp_path)[0] == stock


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run": 3}', '{"run": null}'])
def test_a_broken_note_of_the_run_tells_none(tmp_path, content):
    (tmp_path / "dataflex").mkdir()
    (tmp_path / "dataflex" / "run.json").write_text(content)
    assert checkpoints.current_run(tmp_path) is None


def test_a_fresh_start_takes_the_folder_over_at_once(tmp_path, monkeypatch):
    written(tmp_path, 8, run="older")
    checkpoints.begin_run(tmp_path, "older")
    monkeypatch.setenv("RANK", "1")
    resume({"output_dir": str(tmp_path), "overwrite_output_dir": True})
    assert checkpoints.current_run(tmp_path) == "older", "rank 0 alone writes"
    monkeypatch.delenv("RANK")
    resume({"output_dir": str(tmp_path), "overwrite_output_dir": True})
    assert checkpoints.current_run(tmp_path) not in ("older", None)
    with pytest.raises(CheckpointError, match=r"no complete checkpoint of this run. Remove the key(.|\n)*another run"):
        resume({"output_dir": str(tmp_path), "resume_from_checkpoint": True})
    again = {"output_dir": str(tmp_path)}
    resume(again)  # killed before its first checkpoint: it begins afresh, and LLaMA-Factory does not look by itself
    assert again == {"output_dir": str(tmp_path), "overwrite_output_dir": True}


@pytest.mark.parametrize("asked", [True, "true", "True"])
def test_nothing_to_resume_from_names_the_way_out(tmp_path, asked):
    with pytest.raises(CheckpointError, match="Remove the key to start afresh"):
        resume({"output_dir": str(tmp_path), "resume_from_checkpoint": asked})


@pytest.mark.parametrize("asked", [None, "none", "", False, "false"])
def test_nothing_is_asked_for(tmp_path, asked):
    given = {"output_dir": str(tmp_path), "resume_from_checkpoint": asked}
    resume(given)
    assert given == {"output_dir": str(tmp_path), "resume_from_checkpoint": asked}


def test_the_manifest_names_every_file(tmp_path):
    checkpoint = written(tmp_path, 4)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    assert sorted(manifest["files"]) == sorted(FILES)
    assert all(entry["size"] == len(FILES[name]) for name, entry in manifest["files"].items())
    assert checkpoints.run_of(checkpoint) == "mine"
