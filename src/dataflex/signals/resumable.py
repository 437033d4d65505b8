"""Passes that survive a kill: finished rows are on disk at once, and the next try goes on from there.

While a pass runs, each rank appends what it has to a part file of its own: records of row numbers and
values, each with a hash, so that a record torn by a kill is noticed and left out. The next try, by any
number of ranks, reads all parts, knows which rows are done, and writes into new parts. When every row
is done, rank 0 merges them into the stored array and removes the parts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from dataflex import comm
from dataflex.errors import CheckpointError
from dataflex.signals.fingerprint import Fingerprint
from dataflex.signals.store import ArrayStore
from dataflex.state import atomic_write_text

__all__ = ["ResumablePass"]

logger = logging.getLogger(__name__)

_HEADER = "header.json"
_FORMAT = 1
_MAGIC = b"DFR1"
_RECORD = struct.Struct("<4sIQ16s")  # magic, rows, bytes of values, hash of rows and values
_SYNC_SECONDS = 10.0


class ResumablePass:
    """Collects the rows of one array from all ranks. Opening and ``finish`` are collective.

    Args:
        store: Where the array ends up; on a file system that all ranks share.
        key: What the array is computed from.
        shape: Shape of the array; axis 0 counts the rows.
        dtype: Its type; values are converted to it when they are recorded.
        offsets: int64 [n + 1] for rows of unequal length in a flat array: row i is
            ``[offsets[i]:offsets[i + 1]]`` along axis 0. None where every row is one entry.
        device: Where ranks can exchange tensors: the accelerator under NCCL, else the CPU.

    Raises:
        CheckpointError: The operating system refused to write.
    """

    def __init__(
        self,
        store: ArrayStore,
        key: Fingerprint,
        *,
        shape: tuple[int, ...],
        dtype: DTypeLike,
        offsets: NDArray[np.int64] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._store, self._key, self._device = store, key, device
        self._shape, self._dtype, self._offsets = tuple(shape), np.dtype(dtype), offsets
        self.num_rows = shape[0] if offsets is None else len(offsets) - 1
        if offsets is not None and (offsets[0] != 0 or offsets[-1] != shape[0]):
            raise ValueError(f"offsets run from {offsets[0]} to {offsets[-1]}, the array has {shape[0]} entries")
        self._folder = store.working_folder(key)
        self._file: IO[bytes] | None = None
        self._synced = 0.0
        opened: tuple[str, bytes] = _on_rank_0(self._open)
        self._session = opened[0]
        self.done_at_start: NDArray[np.bool_] = np.unpackbits(
            np.frombuffer(opened[1], dtype=np.uint8), count=self.num_rows
        ).astype(bool)
        """Rows that earlier tries finished [n], equal on every rank."""

    @property
    def complete(self) -> bool:
        """Whether nothing is left to compute."""
        return bool(self.done_at_start.all())

    def record(self, rows: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Write finished rows to this rank's part; they survive a kill from here on.

        Args:
            rows: Row numbers [b].
            values: [b, ...], or the rows' entries one after the other when ``offsets`` were given.
        """
        ids = np.ascontiguousarray(rows, dtype="<i8")
        data = np.ascontiguousarray(values, dtype=self._dtype)
        expected = (int(self._sizes(ids).sum()), *self._shape[1:])
        if data.shape != expected:
            raise ValueError(f"values of {len(ids)} rows have shape {data.shape}, expected {expected}")
        head = _RECORD.pack(_MAGIC, len(ids), data.nbytes, _hash(ids.tobytes(), data.tobytes()))
        try:
            if self._file is None:
                self._file = open(self._folder / f"part-{self._session}-{comm.rank():05d}.bin", "wb")
            self._file.write(head + ids.tobytes() + data.tobytes())
            self._file.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            raise CheckpointError(f"cannot write finished rows into {self._folder}: {error}") from error

    def finish(self) -> NDArray[Any]:
        """Merge all parts and return the stored array, memory-mapped, on every rank.

        Raises:
            CheckpointError: Rows are missing, or a rank does not see the folder; on every rank.
        """
        self.close()
        comm.barrier()
        _on_rank_0(self._merge)
        array = self._store.get(self._key)
        seen = comm.gather_sum(torch.tensor(int(array is not None), device=self._device))
        if array is None or int(seen) < comm.world():
            raise CheckpointError(
                f"{self._store.directory}: {int(seen)} of {comm.world()} ranks see the finished array; "
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

    def _sizes(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.ones(len(ids), dtype=np.int64) if self._offsets is None else np.diff(self._offsets)[ids]

    def _header(self) -> dict[str, Any]:
        offsets = "" if self._offsets is None else _hash(self._offsets.astype("<i8").tobytes()).hex()
        return {
            "format": _FORMAT,
            "fingerprint": self._key.to_json(),
            "shape": list(self._shape),
            "dtype": self._dtype.str,
            "offsets": offsets,
        }

    def _open(self) -> tuple[str, bytes]:
        """Return a new session's name and the packed bits of finished rows; on rank 0 only."""
        done = np.zeros(self.num_rows, dtype=bool)
        self._store.clear_left()
        stored = self._store.get(self._key)
        if stored is not None:
            if stored.shape != self._shape or stored.dtype != self._dtype:
                raise CheckpointError(
                    f"{self._key.name} holds {stored.dtype} {stored.shape}, asked for {self._dtype} {self._shape}: "
                    "its fingerprint does not tell the two apart"
                )
            done[:] = True
            return "", np.packbits(done).tobytes()
        if self._folder.exists() and not self._ours():
            logger.warning("%s belongs to another pass and is removed", self._folder)
            shutil.rmtree(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self._folder / _HEADER, json.dumps(self._header(), indent=1) + "\n")
        for ids, _ in self._records():
            done[ids] = True
        if done.any():
            logger.info("%s: going on after %d of %d rows", self._key.method, done.sum(), self.num_rows)
        return secrets.token_hex(4), np.packbits(done).tobytes()

    def _ours(self) -> bool:
        try:
            return bool(json.loads((self._folder / _HEADER).read_text(encoding="utf-8")) == self._header())
        except (OSError, ValueError):
            return False

    def _records(self) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """Read the whole records of all parts; the torn end of a part is left out."""
        for path in sorted(self._folder.glob("part-*.bin")):
            with open(path, "rb") as file:
                while (record := self._read(file)) is not None:
                    yield record

    def _read(self, file: IO[bytes]) -> tuple[NDArray[np.int64], NDArray[Any]] | None:
        head = file.read(_RECORD.size)
        if len(head) < _RECORD.size:
            return None
        magic, count, size, digest = _RECORD.unpack(head)
        if magic != _MAGIC or size > self._dtype.itemsize * int(np.prod(self._shape)):
            return None
        ids_bytes, data = file.read(8 * count), file.read(size)
        if len(data) < size or _hash(ids_bytes, data) != digest:
            return None
        return np.frombuffer(ids_bytes, dtype="<i8"), np.frombuffer(data, self._dtype).reshape(-1, *self._shape[1:])

    def _merge(self) -> None:
        if self._store.get(self._key) is not None:
            return
        missing = np.ones(self.num_rows, dtype=bool)
        with self._store.create(self._key, shape=self._shape, dtype=self._dtype) as array:
            for ids, values in self._records():
                if self._offsets is None:
                    array[ids] = values
                else:
                    array[_ranges(self._offsets[ids], self._sizes(ids))] = values
                missing[ids] = False
            if missing.any():
                raise CheckpointError(
                    f"{self._folder}: {int(missing.sum()):,} of {self.num_rows:,} rows are missing after the pass; "
                    "the folder must be on a file system that all ranks share"
                )
        shutil.rmtree(self._folder, ignore_errors=True)


def _hash(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _ranges(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Concatenate ``range(start, start + size)`` of each pair."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()), dtype=np.int64)


def _on_rank_0(work: Callable[[], Any]) -> Any:
    """Return what rank 0's ``work`` gives, on every rank; its error is raised on every rank too."""
    outcome: tuple[Any, str | None] = (None, None)
    if comm.rank() == 0:
        try:
            outcome = (work(), None)
        except (CheckpointError, OSError) as error:
            outcome = (None, str(error))
    result, problem = comm.broadcast_object(outcome)
    if problem is not None:
        raise CheckpointError(problem)
    return result
