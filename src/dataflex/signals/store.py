"""Arrays on disk, named by what they were computed from: whole or absent, memory-mapped, without pickle.

An array is a folder ``<method>-<digest>`` with ``array.npy`` and ``header.json`` (the complete fingerprint, shape and
type), written aside and renamed. Before an array is used, its header is compared with the fingerprint asked for, field
by field; a file that is stale, foreign or broken is never used, it is computed anew.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import shutil
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dataflex import comm
from dataflex.errors import CheckpointError, ComponentError
from dataflex.state import blake2b, fsync, is_left, is_unfinished, owner, read_json, refusals, replacing
from dataflex.version import version_of

logger = logging.getLogger(__name__)

_ARRAY, _HEADER = "array.npy", "header.json"
_FORMAT = 1
_OURS = re.compile(r"[a-z0-9-]+-[0-9a-f]{32}(\.unfinished)?")
_ABANDONED_SECONDS = 24 * 3600.0
_MAGIC = b"DFR1"
_RECORD = struct.Struct("<4sIQ16s")  # magic, number of rows, bytes of values, hash of rows and values
_SYNC_SECONDS = 10.0
_PACKAGES = (
    "accelerate bitsandbytes dataflex flash-attn kernels liger-kernel llamafactory numpy peft sentence-transformers "
    "tokenizers torch transformers"
)


@cache
def package_versions() -> dict[str, str]:
    """Return the versions of the packages that computed numbers depend on."""
    return {name: version_of(name) or "absent" for name in _PACKAGES.split()}


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """Everything that an array's numbers depend on; ComponentError for parameters that are not JSON."""

    model: str  # identity of the model (values, architecture, adapters)
    data: str  # identity of the rows (row space fingerprint, which rows, tokenizer and template)
    method: str  # what was computed, as in ``embeddings``
    parameters: Mapping[str, Any] = field(default_factory=dict)  # how: JSON values
    versions: Mapping[str, str] = field(default_factory=package_versions)  # packages that computed it

    def __post_init__(self) -> None:
        try:
            plain = json.loads(json.dumps(dict(self.parameters), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ComponentError(f"fingerprint of {self.method!r}: parameters must be JSON values: {error}") from error
        object.__setattr__(self, "parameters", plain)

    @property
    def name(self) -> str:
        """Folder name: the method and 32 hex digits."""
        digest = blake2b(json.dumps(asdict(self), sort_keys=True).encode()).hex()
        return f"{re.sub(r'[^a-z0-9]+', '-', self.method.lower()).strip('-') or 'array'}-{digest}"


class Entry(NamedTuple):
    """A stored array: its folder's name, bytes on disk, time of last use (epoch), and whether its pass was finished."""

    name: str
    size_bytes: int
    used: float
    finished: bool


class ArrayStore:
    """A folder of arrays, made when something is first written. One rank may write an array; all may read."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def get(self, key: CacheKey) -> NDArray[Any] | None:
        """Return the array, memory-mapped and read-only, or None if it is not there or cannot be trusted."""
        folder = self.directory / key.name
        if not folder.is_dir():
            return None
        try:
            header = read_json(folder / _HEADER)
            if header["format"] != _FORMAT or header["fingerprint"] != asdict(key):
                raise ValueError("it was computed from something else")
            array = np.load(folder / _ARRAY, mmap_mode="r", allow_pickle=False)
            if list(array.shape) != header["shape"] or array.dtype.str != header["dtype"]:
                raise ValueError("its shape or type is not what was written")
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("stored array %s is not used: %s: %s", folder, type(error).__name__, error)
            return None
        if os.access(folder / _HEADER, os.W_OK):  # a shared cache may be read-only
            os.utime(folder / _HEADER)
        return array

    @contextmanager
    def create(self, key: CacheKey, *, shape: tuple[int, ...], dtype: DTypeLike) -> Iterator[NDArray[Any]]:
        """Give a memory-mapped array to fill; it is stored when the block ends, and dropped if the block raises."""
        token = f".{key.name}.{owner()}.{secrets.token_hex(4)}"
        final, scratch, ready = (self.directory / name for name in (key.name, f"{token}.npy", f"{token}.ready"))

        try:
            with refusals(f"a stored array into {self.directory}"):
                self.directory.mkdir(parents=True, exist_ok=True)
                array = np.lib.format.open_memmap(scratch, mode="w+", dtype=np.dtype(dtype), shape=shape)
                _reserve(scratch)
            yield array
            with refusals(f"a stored array into {self.directory}"):
                array.flush()
                ready.mkdir()
                os.replace(scratch, ready / _ARRAY)
                header = {"format": _FORMAT, "fingerprint": asdict(key), "shape": list(shape), "dtype": array.dtype.str}
                (ready / _HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
                for path in (ready / _ARRAY, ready / _HEADER, ready):
                    fsync(path)
                if final.exists() and self.get(key) is None:
                    shutil.rmtree(final)
                try:
                    os.rename(ready, final)
                except OSError:
                    if self.get(key) is None:  # not the same array, finished by another process in the meantime
                        raise
        finally:
            with suppress(OSError):  # moved, or never written
                scratch.unlink()
            shutil.rmtree(ready, ignore_errors=True)

    def working_folder(self, key: CacheKey) -> Path:
        """Return where a pass keeps its finished rows."""
        return self.directory / f"{key.name}.unfinished"

    def entries(self) -> list[Entry]:
        """Return finished arrays and unfinished passes, least recently used first; foreign folders are left out."""
        found = []
        for folder in self.directory.glob("*/"):
            files = [path for path in folder.iterdir() if path.is_file()] if _OURS.fullmatch(folder.name) else []
            if files:
                finished = (folder / _ARRAY).is_file()  # its header is touched when it is read
                marks = [path for path in files if not finished or path.name == _HEADER]
                used = max((path.stat().st_mtime for path in marks), default=0.0)
                found.append(Entry(folder.name, sum(path.stat().st_size for path in files), used, finished))
        return sorted(found, key=lambda entry: (entry.used, entry.name))

    def clear_left(self) -> None:
        """Remove what killed writes left: those of a process that is gone, or from more than a day ago."""
        for left in self.directory.glob(".*"):
            with suppress(FileNotFoundError):  # another process was first
                old = is_unfinished(left.name) and time.time() - left.stat().st_mtime > _ABANDONED_SECONDS
                if old or is_left(left.name):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()

    def evict(self, max_bytes: int) -> list[str]:
        """Remove the least recently used entries until at most ``max_bytes`` are left, and return their names.

        Arrays that are memory-mapped stay readable on POSIX systems. Passes that wrote within the last day are not
        touched.
        """
        self.clear_left()
        entries = self.entries()
        total = sum(entry.size_bytes for entry in entries)
        removed = []
        for entry in entries:
            if total <= max_bytes:
                break
            if entry.finished or time.time() - entry.used >= _ABANDONED_SECONDS:
                shutil.rmtree(self.directory / entry.name)
                total -= entry.size_bytes
                removed.append(entry.name)
        return removed


def _reserve(path: Path) -> None:
    """Take the room of a file that is written through memory: there, a full disk ends the process (SIGBUS)."""
    if not hasattr(os, "posix_fallocate"):
        return
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot
                raise


class ResumablePass:
    """Collects the rows of one array from all ranks. Opening and ``finish`` are collective.

    Args:
        store: Where the array ends up; on a file system that all ranks share.
        key: What the array is computed from.
        shape: Shape of the array; axis 0 counts the rows.
        dtype: Its type; values are converted to it when they are recorded.
        offsets: int64 [n + 1] for rows of unequal length: row i is ``[offsets[i]:offsets[i + 1]]`` along axis 0.

    Raises:
        CheckpointError: The operating system refused to write.
    """

    def __init__(
        self,
        store: ArrayStore,
        key: CacheKey,
        *,
        shape: tuple[int, ...],
        dtype: DTypeLike,
        offsets: NDArray[np.int64] | None = None,
    ) -> None:
        self._store, self._key, self._shape, self._dtype = store, key, tuple(shape), np.dtype(dtype)
        self._offsets = np.arange(shape[0] + 1, dtype=np.int64) if offsets is None else offsets
        self.num_rows = len(self._offsets) - 1
        if self._offsets[0] != 0 or self._offsets[-1] != shape[0]:
            raise ValueError(
                f"offsets run from {self._offsets[0]} to {self._offsets[-1]}, the array has {shape[0]} entries"
            )
        self._folder = store.working_folder(key)
        self._file: IO[bytes] | None = None
        self._synced = 0.0
        opened = comm.on_one_rank(f"stored array {key.name}", self._open, CheckpointError)
        self._session: str = opened[0]
        self.done_at_start: NDArray[np.bool_] = opened[1]
        """Rows that earlier tries finished [n], equal on every rank."""

    @property
    def name(self) -> str:
        """Name of the array, which says what it is computed from."""
        return self._key.name

    @property
    def complete(self) -> bool:
        """Whether nothing is left to compute."""
        return bool(self.done_at_start.all())

    def record(self, rows: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Write the values of finished rows [b, ...] to this rank's part; they survive a kill from here on.

        With ``offsets``, values are the rows' entries one after the other.
        """
        ids = np.ascontiguousarray(rows, dtype="<i8")
        data = np.ascontiguousarray(values, dtype=self._dtype)
        expected = (len(self._places(ids)), *self._shape[1:])
        if data.shape != expected:
            raise ValueError(f"values of {len(ids)} rows have shape {data.shape}, expected {expected}")
        head = _RECORD.pack(_MAGIC, len(ids), data.nbytes, blake2b(ids.tobytes(), data.tobytes()))
        with refusals(f"a stored array into {self._folder}"):
            if self._file is None:
                self._file = open(self._folder / f"part-{self._session}-{comm.rank():05d}.bin", "wb")
            self._file.write(head + ids.tobytes() + data.tobytes())
            self._file.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def finish(self) -> NDArray[Any]:
        """Merge all parts and return the stored array, memory-mapped, on every rank.

        Raises:
            CheckpointError: Rows are missing, or a rank does not see the folder; on every rank.
        """
        self.close()
        comm.barrier()
        comm.on_one_rank(f"stored array {self._key.name}", self._merge, CheckpointError)
        array = self._store.get(self._key)
        seen = comm.gather_objects(array is not None)
        if array is None or not all(seen):
            raise CheckpointError(
                f"{self._store.directory}: {sum(seen)} of {len(seen)} ranks see the finished array; "
                "the folder must be on a file system that all ranks share"
            )
        return array

    def close(self) -> None:
        """Close this rank's part; what it holds stays for the next try."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _places(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the entries of rows are in the array, one row after the other."""
        starts = self._offsets[ids]
        sizes = self._offsets[ids + 1] - starts
        before = np.cumsum(sizes) - sizes
        return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()), dtype=np.int64)

    def _open(self) -> tuple[str, NDArray[np.bool_]]:
        """Return a new session's name and which rows are finished; on rank 0 only."""
        done = np.zeros(self.num_rows, dtype=bool)
        self._store.clear_left()
        stored = self._store.get(self._key)
        if stored is not None:
            if stored.shape != self._shape or stored.dtype != self._dtype:
                raise CheckpointError(
                    f"{self._key.name} holds {stored.dtype} {stored.shape}, asked for {self._dtype} {self._shape}: "
                    "its fingerprint does not tell the two apart"
                )
            return "", ~done
        header = json.dumps(
            {
                "format": _FORMAT,
                "fingerprint": asdict(self._key),
                "shape": self._shape,
                "dtype": self._dtype.str,
                "offsets": blake2b(self._offsets.astype("<i8").tobytes()).hex(),
            },
            indent=1,
        )
        with refusals(f"a stored array into {self._folder}"):
            file = self._folder / _HEADER
            if self._folder.exists() and not (file.is_file() and file.read_bytes() == header.encode()):
                logger.warning("%s belongs to another pass and is removed", self._folder)
                shutil.rmtree(self._folder)
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(file, None) as out:
                out.write(header.encode())
            for ids, _ in self._records():
                done[ids] = True
        if done.any():
            logger.info("%s: going on after %d of %d rows", self._key.method, done.sum(), self.num_rows)
        return secrets.token_hex(4), done

    def _records(self) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """Read the whole records of all parts; the torn end of a part is left out."""
        largest = self._dtype.itemsize * int(np.prod(self._shape))
        for path in sorted(self._folder.glob("part-*.bin")):
            with open(path, "rb") as file:
                while len(head := file.read(_RECORD.size)) == _RECORD.size:
                    magic, count, size, digest = _RECORD.unpack(head)
                    if magic != _MAGIC or size > largest:
                        break
                    ids, data = file.read(8 * count), file.read(size)
                    if len(data) < size or blake2b(ids, data) != digest:
                        break
                    yield np.frombuffer(ids, "<i8"), np.frombuffer(data, self._dtype).reshape(-1, *self._shape[1:])

    def _merge(self) -> None:
        if self._store.get(self._key) is not None:
            return
        missing = np.ones(self.num_rows, dtype=bool)
        with self._store.create(self._key, shape=self._shape, dtype=self._dtype) as array:
            for ids, values in self._records():
                array[self._places(ids)] = values
                missing[ids] = False
            if missing.any():
                raise CheckpointError(
                    f"{self._folder}: {int(missing.sum()):,} of {self.num_rows:,} rows are missing after the pass; "
                    "the folder must be on a file system that all ranks share"
                )
        shutil.rmtree(self._folder, ignore_errors=True)
