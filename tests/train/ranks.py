"""Several ranks in one process: threads that meet in the collectives of ``dataflex.comm``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from dataflex import comm

_SECONDS = 20.0  # a rank that does not come is an error, not a wait for ever


class Ranks:
    """Patches the collectives.

    Args:
        monkeypatch: pytest's.
        world: Number of ranks.
    """

    def __init__(self, monkeypatch: Any, world: int) -> None:
        self._world, self._mine = world, threading.local()
        self._met = threading.Barrier(world)
        self._box: list[Any] = [None] * world
        monkeypatch.setattr(comm, "world", lambda: world)
        monkeypatch.setattr(comm, "rank", lambda: self._mine.rank)
        monkeypatch.setattr(comm, "gather_rows", self._rows)
        monkeypatch.setattr(comm, "gather_sum", lambda values: torch.stack(self._all("sum", values)).sum(dim=0))

    def _all(self, what: str, value: Any) -> list[Any]:
        """Return what every rank gave; all ranks must be in the same collective."""
        self._box[self._mine.rank] = (what, value)
        self._met.wait(_SECONDS)
        found = list(self._box)
        self._met.wait(_SECONDS)
        assert {name for name, _ in found} == {what}, "ranks are in different collectives"
        return [given for _, given in found]

    def _rows(self, local: torch.Tensor, *, equal: bool = False) -> tuple[torch.Tensor, slice]:
        parts = self._all("rows", local)
        assert not equal or len({len(part) for part in parts}) == 1, "ranks differ in length, and were said not to"
        start = sum(len(part) for part in parts[: self._mine.rank])
        return torch.cat(parts), slice(start, start + len(local))

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """Return ``work(rank)`` of every rank."""

        def one(rank: int) -> Any:
            self._mine.rank = rank
            try:
                return work(rank)
            except BaseException:
                self._met.abort()
                raise

        with ThreadPoolExecutor(self._world) as pool:
            futures = [pool.submit(one, rank) for rank in range(self._world)]
            errors = [error for future in futures if (error := future.exception()) is not None]
            for error in errors:
                if not isinstance(error, threading.BrokenBarrierError):
                    raise error
            return [future.result() for future in futures]
