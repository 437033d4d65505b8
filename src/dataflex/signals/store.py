"""Arrays on disk, named by what they were computed from: whole or absent, memory-mapped, without pickle.

An array is a folder ``<method>-<digest>`` with ``array.npy``, ``header.json`` (the complete
fingerprint, shape and type) and ``manifest.json``, written aside and renamed. Before an array is used
its header is compared with the fingerprint asked for, field by field; a file that is stale, foreign or
broken is never used, it is computed anew.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dataflex.errors import CheckpointError, ComponentError
from dataflex.signals.fingerprint import Fingerprint
from dataflex.state import MANIFEST, is_left, is_unfinished, owner, verify_directory, write_directory

__all__ = ["ArrayStore", "Entry"]

logger = logging.getLogger(__name__)

_ARRAY, _HEADER = "array.npy", "header.json"
_FORMAT = 1
_OURS = re.compile(r"[a-z0-9-]+-[0-9a-f]{32}(\.unfinished)?")
_ABANDONED_SECONDS = 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One stored array, as listed.

    Attributes:
        name: Folder name.
        fingerprint: What it was, or is being, computed from.
        size_bytes: On disk.
        used: Time of last use, seconds since the epoch.
        finished: False for the parts of a pass that was interrupted.
    """

    name: str
    fingerprint: Mapping[str, Any]
    size_bytes: int
    used: float
    finished: bool


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Tell the operating system's refusals as ours."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write a stored array into {directory}: {error}") from error


class ArrayStore:
    """A folder of arrays. Only one rank may write an array; all may read.

    Args:
        directory: Made when something is first written.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def get(self, key: Fingerprint, *, verify: bool = False) -> NDArray[Any] | None:
        """Return the array, memory-mapped and read-only, or None if it is not there or not to be trusted.

        Args:
            key: What it must have been computed from.
            verify: Also compare every byte with the hash taken when it was written.
        """
        folder = self.directory / key.name
        if not folder.is_dir():
            return None
        try:
            if verify:
                verify_directory(folder)
            header = json.loads((folder / _HEADER).read_text(encoding="utf-8"))
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if header["format"] != _FORMAT or header["fingerprint"] != key.to_json():
                raise ValueError("it was computed from something else")
            if (folder / _ARRAY).stat().st_size != manifest["files"][_ARRAY]["size"]:
                raise ValueError("its size is not what was written")
            array = np.load(folder / _ARRAY, mmap_mode="r", allow_pickle=False)
            if list(array.shape) != header["shape"] or array.dtype.str != header["dtype"]:
                raise ValueError("its shape or type is not what was written")
        except (OSError, ValueError, KeyError, TypeError, CheckpointError) as error:
            logger.warning("stored array %s is not used: %s: %s", folder, type(error).__name__, error)
            return None
        if os.access(folder / MANIFEST, os.W_OK):  # a shared cache may be read-only
            os.utime(folder / MANIFEST)
        return array

    def put(self, key: Fingerprint, array: NDArray[Any]) -> NDArray[Any]:
        """Store an array and return it memory-mapped."""
        with self.create(key, shape=array.shape, dtype=array.dtype) as target:
            target[...] = array
        stored = self.get(key)
        assert stored is not None
        return stored

    @contextmanager
    def create(self, key: Fingerprint, *, shape: tuple[int, ...], dtype: DTypeLike) -> Iterator[NDArray[Any]]:
        """Give a memory-mapped array to fill; it is stored when the block ends, and dropped if the block raises.

        Raises:
            CheckpointError: The operating system refused (read-only, full disk), with its reason.
            ComponentError: A type that cannot be stored without pickle.
        """
        kind = np.dtype(dtype)
        if kind.hasobject:
            raise ComponentError(f"stored array {key.name}: type {kind} cannot be stored without pickle")
        token = f".{key.name}.{owner()}.{secrets.token_hex(4)}"
        scratch, ready = self.directory / f"{token}.npy", self.directory / f"{token}.ready"
        header = {"format": _FORMAT, "fingerprint": key.to_json(), "shape": list(shape), "dtype": kind.str}

        def fill(folder: Path) -> None:
            os.replace(scratch, folder / _ARRAY)
            (folder / _HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")

        try:
            with _writing(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
                array = np.lib.format.open_memmap(scratch, mode="w+", dtype=kind, shape=tuple(shape))
            yield array
            with _writing(self.directory):
                array.flush()
                write_directory(ready, fill)
                self._install(key, ready)
        finally:
            with suppress(OSError):  # moved, or never written
                scratch.unlink()
            shutil.rmtree(ready, ignore_errors=True)

    def _install(self, key: Fingerprint, ready: Path) -> None:
        """Rename a finished folder to its name; another process may have been there first."""
        final = self.directory / key.name
        if final.exists() and self.get(key) is None:
            shutil.rmtree(final)
        try:
            os.rename(ready, final)
        except OSError:
            if self.get(key) is None:  # not the same array, finished by another process in the meantime
                raise

    def working_folder(self, key: Fingerprint) -> Path:
        """Where a pass keeps what it has so far."""
        return self.directory / f"{key.name}.unfinished"

    def entries(self) -> list[Entry]:
        """Return finished arrays and unfinished passes, least recently used first; foreign folders are left out."""
        found = []
        for folder in self.directory.glob("*/"):
            files = [path for path in folder.iterdir() if path.is_file()] if _OURS.fullmatch(folder.name) else []
            if not files:
                continue
            finished = (folder / MANIFEST).is_file()
            newest = (folder / MANIFEST).stat().st_mtime if finished else max(p.stat().st_mtime for p in files)
            header = json.loads((folder / _HEADER).read_text(encoding="utf-8"))
            found.append(
                Entry(
                    name=folder.name,
                    fingerprint=header["fingerprint"],
                    size_bytes=sum(path.stat().st_size for path in files),
                    used=newest,
                    finished=finished,
                )
            )
        return sorted(found, key=lambda entry: (entry.used, entry.name))

    def size_bytes(self) -> int:
        """Return the bytes of everything listed."""
        return sum(entry.size_bytes for entry in self.entries())

    def clear_left(self) -> None:
        """Remove what writes left that were killed: by a process that is gone, or so long ago that it must be."""
        for left in self.directory.glob(".*"):
            with suppress(FileNotFoundError):  # another process was first
                old = is_unfinished(left.name) and time.time() - left.stat().st_mtime > _ABANDONED_SECONDS
                if old or is_left(left.name):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()

    def evict(self, max_bytes: int, *, keep: Collection[str] = ()) -> list[str]:
        """Remove the least recently used entries until at most ``max_bytes`` are left.

        Arrays that are memory-mapped right now stay readable on POSIX systems. Passes that wrote
        something within the last day are not touched, nor are the names in ``keep``.

        Returns:
            Names of what was removed.
        """
        self.clear_left()
        now = time.time()
        entries = self.entries()
        total = sum(entry.size_bytes for entry in entries)
        removed = []
        for entry in entries:
            if total <= max_bytes:
                break
            if entry.name in keep or (not entry.finished and now - entry.used < _ABANDONED_SECONDS):
                continue
            shutil.rmtree(self.directory / entry.name)
            total -= entry.size_bytes
            removed.append(entry.name)
        return removed
