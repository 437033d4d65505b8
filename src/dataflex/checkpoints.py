"""Complete checkpoints: every file of one is named, with size and hash, in a manifest that is written last.

``begin`` removes the manifest and ``trainer_state.json`` of what lies in a checkpoint's place before anything else;
``seal`` writes the manifest when all other files are there. A run that is killed in between leaves no manifest.
The manifest also names the run. ``<output_dir>/dataflex/run.json`` names the run that the folder belongs to now:
its checkpoints of an older run are resumed from only if they are named in the configuration.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
from pathlib import Path
from typing import IO, Any

import xxhash

from dataflex.errors import CheckpointError
from dataflex.state import fsync, read_json, refusals, remove, replacing

FOLDER = "dataflex"
"""Our folder, in a checkpoint and in the output folder."""
TRAINER_STATE = "trainer_state.json"
HASHED_BYTES = 2**30
"""Larger files are compared by size alone unless their hashes were asked for."""

_MANIFEST = f"{FOLDER}/manifest.json"
_RUN = f"{FOLDER}/run.json"
_LOCK = f"{FOLDER}/run.lock"
_FORMAT = 2
_HASH = "xxh3_128"
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def hash_of(path: Path) -> str:
    """Return the XXH3 hash of a file's bytes, 32 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def unmark(folder: Path) -> None:
    """Remove what makes a folder count as a complete checkpoint, on the disk."""
    for name in (_MANIFEST, TRAINER_STATE):
        path = folder / name
        if path.exists():
            path.unlink()
            fsync(path.parent)


def begin(checkpoint: Path) -> None:
    """Make an empty checkpoint in the place of what lies there, which stops counting first (or CheckpointError)."""
    with refusals(checkpoint):
        if checkpoint.is_dir():
            unmark(checkpoint)
            for path in checkpoint.iterdir():
                remove(path)
        (checkpoint / FOLDER).mkdir(parents=True)  # marks it as ours from the beginning
        fsync(checkpoint)


def seal(checkpoint: Path, *, run: str, every_hash: bool = False) -> None:
    """Write the manifest of all files in a checkpoint, which makes it count (or CheckpointError).

    ``every_hash``: whether files above ``HASHED_BYTES`` are hashed too.
    """
    files: dict[str, dict[str, Any]] = {}
    with refusals(checkpoint):
        for path in sorted(checkpoint.rglob("*")):
            if path.is_file():
                entry: dict[str, Any] = {"size": path.stat().st_size}
                if every_hash or entry["size"] <= HASHED_BYTES:
                    entry[_HASH] = hash_of(path)
                files[path.relative_to(checkpoint).as_posix()] = entry
        manifest = {"format": _FORMAT, "run": run, "files": files}
        with replacing(checkpoint / _MANIFEST, None) as file:
            file.write((json.dumps(manifest, indent=1) + "\n").encode())


def _run_in(file: Path) -> str | None:
    try:
        run = read_json(file)["run"]
    except _UNREADABLE:
        return None
    return run if isinstance(run, str) else None


def run_of(checkpoint: Path) -> str | None:
    """Return the id of the run that a checkpoint belongs to, or None if it names none."""
    return _run_in(checkpoint / _MANIFEST)


def current_run(output_dir: Path) -> str | None:
    """Return the id of the run that an output folder belongs to, or None if it names none."""
    return _run_in(output_dir / _RUN)


def begin_run(output_dir: Path, run: str | None = None) -> str:
    """Write down which run an output folder belongs to from now on, by default a new one, and return its id."""
    run = run or secrets.token_hex(8)
    with refusals(output_dir / FOLDER, key="output_dir"):
        (output_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        if current_run(output_dir) != run:
            with replacing(output_dir / _RUN, None) as file:
                file.write((json.dumps({"run": run}) + "\n").encode())
    return run


_held: dict[Path, IO[str]] = {}


def refuse_busy(output_dir: Path) -> None:
    """Raise CheckpointError where a run of another process writes into an output folder."""
    path = (output_dir / _LOCK).resolve()
    if path not in _held and os.access(path, os.W_OK):
        with path.open("r+", encoding="utf-8") as file:
            _lock(file, output_dir)


def claim(output_dir: Path) -> None:
    """Refuse an output folder to runs of other processes, until ``release`` or, however it ends, the process's end.

    Raises:
        CheckpointError: A run of another process writes into it, or the lock cannot be written.
    """
    path = (output_dir / _LOCK).resolve()
    if path in _held:
        return
    with refusals(path, key="output_dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    _lock(file, output_dir)
    with refusals(path, key="output_dir"):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    _held[path] = file


def release(output_dir: Path) -> None:
    """Let other processes have a folder that was claimed, if it was."""
    file = _held.pop((output_dir / _LOCK).resolve(), None)
    if file is not None:
        file.close()


def _lock(file: IO[str], output_dir: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: a second run in it is not refused
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise CheckpointError(
            f"output_dir: {holder} writes a run into {output_dir}; wait until it has ended, or name another folder"
        ) from error


def broken_reason(checkpoint: Path) -> str | None:
    """Return why a checkpoint cannot be resumed from, or None if it can.

    One without our folder, as LLaMA-Factory alone writes it, has no manifest: its trainer state must be readable.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        int(read_json(checkpoint / TRAINER_STATE)["global_step"])
    except _UNREADABLE as error:
        how = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
        return f"{TRAINER_STATE} {how}: it was not written to the end"
    return manifest_reason(checkpoint) if (checkpoint / FOLDER).exists() else None


def manifest_reason(checkpoint: Path) -> str | None:
    """Return how a checkpoint's files differ from its manifest, or None if they do not."""
    name = _MANIFEST
    try:
        manifest = read_json(checkpoint / _MANIFEST)
        if manifest["format"] != _FORMAT:
            return f"{_MANIFEST} has format {manifest['format']!r}; this version reads {_FORMAT}"
        for name, entry in manifest["files"].items():
            path = checkpoint / name
            size = path.stat().st_size
            if size != entry["size"]:
                return f"{name} is broken: {size:,} bytes, {entry['size']:,} were written"
            if _HASH in entry and hash_of(path) != entry[_HASH]:
                return f"{name} is broken: its content is not what was written"
    except FileNotFoundError:
        why = "it was not written to the end" if name == _MANIFEST else "it was removed"
        return f"{name} is missing: {why}"
    except _UNREADABLE as error:
        return f"{name} cannot be read: {type(error).__name__}: {error}"
    return None


def find_resumable(output_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint of the run in a folder, and why newer ones were passed over.

    In a folder that names no run, as one into which checkpoints were copied, those of any run count.
    """
    found = []
    for entry in output_dir.iterdir() if output_dir.is_dir() else ():
        match = re.fullmatch(r"checkpoint-(\d+)", entry.name)
        if match and entry.is_dir():
            found.append((int(match[1]), entry))
    run = current_run(output_dir)
    passed_over: list[str] = []
    for _, checkpoint in sorted(found, reverse=True):
        theirs = run_of(checkpoint)
        stock = theirs is None and not (checkpoint / FOLDER).exists()
        if run is not None and (stock or theirs not in (None, run)):
            whose = "a run without a dynamic block" if stock else f"another run ({theirs}; this one is {run})"
            told = "name it in resume_from_checkpoint to go on from it"
            reason: str | None = f"it was written by {whose} in this folder; {told}"
        else:
            reason = broken_reason(checkpoint)
        if reason is None:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint.name}: {reason}")
    return None, passed_over
