"""Checkpoints that count: every file of one is named, with size and hash, in a manifest that is written last.

A checkpoint is begun by taking away the manifest and ``trainer_state.json`` of what lay in its place, on the
disk, and then the rest; it is sealed by the manifest when everything else is there, the Trainer's state and
what callbacks change included. Killed in between, it has no manifest, and an older one counts.

The manifest also names the run. ``<output_dir>/dataflex/run.json`` says which run the folder belongs to now:
checkpoints of an older run that lie there are not gone on from unless they are named.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import xxhash

from dataflex.errors import CheckpointError
from dataflex.state import fsync, replacing

FOLDER = "dataflex"
"""Ours, in a checkpoint and in the output folder."""
TRAINER_STATE = "trainer_state.json"
HASHED_BYTES = 2**30
"""Larger files are compared by size alone unless a hash of them was asked for."""

_MANIFEST = f"{FOLDER}/manifest.json"
_RUN = "run.json"
_FORMAT = 2
_HASH = "xxh3_128"


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def unmark(folder: Path) -> None:
    """Take away what makes a folder count as complete, on the disk."""
    for name in (_MANIFEST, TRAINER_STATE):
        path = Path(folder) / name
        if path.exists():
            path.unlink()
            fsync(path.parent)


def begin(checkpoint: Path) -> None:
    """Make an empty checkpoint in the place of what lies there, its marks first.

    Raises:
        CheckpointError: The operating system refused, with its reason.
    """
    checkpoint = Path(checkpoint)
    try:
        if checkpoint.is_dir():
            unmark(checkpoint)
            for path in checkpoint.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        (checkpoint / FOLDER).mkdir(parents=True)  # tells that it is ours, whenever it is looked at
        fsync(checkpoint)
    except OSError as error:
        raise CheckpointError(f"cannot write {checkpoint}: {error.strerror or error}") from error


def seal(checkpoint: Path, *, run: str, every_hash: bool = False) -> None:
    """Name every file in the manifest, which makes the checkpoint count.

    Args:
        checkpoint: The folder, with everything that belongs there.
        run: The run's id.
        every_hash: Whether files above ``HASHED_BYTES`` are hashed too.

    Raises:
        CheckpointError: The operating system refused, with its reason.
    """
    checkpoint = Path(checkpoint)
    files: dict[str, dict[str, Any]] = {}
    try:
        for path in sorted(checkpoint.rglob("*")):
            if path.is_file():
                entry: dict[str, Any] = {"size": path.stat().st_size}
                if every_hash or entry["size"] <= HASHED_BYTES:
                    entry[_HASH] = _hash(path)
                files[path.relative_to(checkpoint).as_posix()] = entry
        manifest = {"format": _FORMAT, "run": run, "files": files}
        (checkpoint / FOLDER).mkdir(exist_ok=True)
        with replacing(checkpoint / _MANIFEST, None) as file:
            file.write((json.dumps(manifest, indent=1) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"cannot write {checkpoint}: {error.strerror or error}") from error


def run_of(checkpoint: Path) -> str | None:
    """Return the id of the run that a checkpoint belongs to, or None if it tells none."""
    try:
        run = json.loads((Path(checkpoint) / _MANIFEST).read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return run if isinstance(run, str) else None


def broken_reason(checkpoint: Path) -> str | None:
    """Say why a checkpoint cannot be gone on from, or None if it can.

    One without our folder, as LLaMA-Factory alone writes it, has no manifest: its trainer state must be readable.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        int(json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))["global_step"])
    except FileNotFoundError:
        return f"{TRAINER_STATE} is missing: it was not written to the end"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{TRAINER_STATE} cannot be read: it was not written to the end"
    return manifest_reason(checkpoint) if (checkpoint / FOLDER).exists() else None


def manifest_reason(checkpoint: Path) -> str | None:
    """Say in what a checkpoint's files differ from its manifest, or None."""
    name = _MANIFEST
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            return f"{_MANIFEST} has format {manifest['format']!r}; this version reads {_FORMAT}"
        for name, entry in manifest["files"].items():
            path = checkpoint / name
            size = path.stat().st_size
            if size != entry["size"]:
                return f"{name} is broken: {size:,} bytes, {entry['size']:,} were written"
            if _HASH in entry and _hash(path) != entry[_HASH]:
                return f"{name} is broken: its content is not what was written"
    except FileNotFoundError:
        why = "it was not written to the end" if name == _MANIFEST else "it was removed"
        return f"{name} is missing: {why}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{name} cannot be read: {type(error).__name__}: {error}"
    return None


def new_run() -> str:
    """Return the id of a run that begins."""
    return secrets.token_hex(8)


def begin_run(output_dir: Path, run: str) -> None:
    """Note which run an output folder belongs to from now on.

    Raises:
        CheckpointError: The operating system refused, with its reason.
    """
    folder = Path(output_dir) / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if current_run(output_dir) != run:
            with replacing(folder / _RUN, None) as file:
                file.write((json.dumps({"run": run}) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"output_dir: cannot write {folder}: {error.strerror or error}") from error


def current_run(output_dir: Path) -> str | None:
    """Return the id of the run that an output folder belongs to, or None if it does not tell."""
    try:
        run = json.loads((Path(output_dir) / FOLDER / _RUN).read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return run if isinstance(run, str) else None


def find_resumable(output_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint of the run in a folder, and why newer ones were passed over.

    A folder that does not tell its run, as one that checkpoints were copied into, is searched for any.
    """
    output_dir = Path(output_dir)
    found = []
    if output_dir.is_dir():
        for entry in output_dir.iterdir():
            match = re.fullmatch(r"checkpoint-(\d+)", entry.name)
            if match and entry.is_dir():
                found.append((int(match[1]), entry))
    run = current_run(output_dir)
    passed_over: list[str] = []
    for _, checkpoint in sorted(found, reverse=True):
        reason = _foreign_reason(checkpoint, run) or broken_reason(checkpoint)
        if reason is None:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint.name}: {reason}")
    return None, passed_over


def _foreign_reason(checkpoint: Path, run: str | None) -> str | None:
    theirs = run_of(checkpoint)
    if run is None or theirs == run or (theirs is None and (checkpoint / FOLDER).exists()):
        return None
    whose = "a run without a dynamic block" if theirs is None else f"another run ({theirs}; this one is {run})"
    return f"it was written by {whose} in this folder; name it in resume_from_checkpoint to go on from it"
