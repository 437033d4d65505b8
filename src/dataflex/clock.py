"""Where the seconds of a run go: one clock that is always in some phase, so that none is left out or counted twice.

``spent`` adds up to the time since the clock began; what no phase claims is ``other``. Only the time is read, so
timing changes nothing of a run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

OTHER = "other"

PHASES = {
    "startup": "imports, launching, arguments, up to the first data",
    "data": "loading and tokenizing training, evaluation and target rows, and reading them once for the row space",
    "leakage": "looking for target rows in the training pool",
    "model": "loading the model",
    "prepare": "optimizer, engine and, on a resumed run, reading the checkpoint",
    "reference": "scoring rows with a reference model when they are first served; losses not kept are part of `train`",
    "train": "optimizer steps, waiting for batches included",
    "signals": "passes over the data that methods ask for",
    "decide": "the rest of deciding",
    "ledger": "looking at the targets of the ledger",
    "evaluate": "evaluation",
    "predict": "prediction",
    "checkpoint": "writing checkpoints",
    "record": "writing where the rows come from, and the table of chosen rows",
    "save": "writing the final model",
    OTHER: "whatever is in none of them",
}
"""Every phase of a run, in the order in which they begin, and what it is."""

LAUNCHED = "DATAFLEX_LAUNCHED"
"""Environment variable that tells a rank when the command that started it began, in Unix seconds."""


def launch_time() -> float | None:
    """Return the Unix seconds at which the launcher began, once: processes started by this one get none.

    Nor does a rank that torchrun started again, since the time before belongs to another process of the run.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return None
    try:
        return float(os.environ.pop(LAUNCHED))
    except (KeyError, ValueError):
        return None


class PhaseClock:
    """Adds up seconds by phase; phases nest, and a second counts in the innermost one.

    Args:
        began: Unix seconds at which the time to be accounted for began; None: now.
    """

    def __init__(self, began: float | None = None) -> None:
        late = 0.0 if began is None else max(time.time() - began, 0.0)
        self._mark = time.perf_counter() - late
        self._own: dict[str, float] = {}
        self._inside = ["startup"]
        self.before: dict[str, float] = {}
        """Seconds by phase of earlier processes of the same run, up to the checkpoint."""

    @property
    def now(self) -> str:
        """The phase that the present moment counts in."""
        return self._inside[-1]

    def _count(self) -> None:
        now = time.perf_counter()
        self._own[self.now] = self._own.get(self.now, 0.0) + now - self._mark
        self._mark = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as ``name``, save for phases within it."""
        self._count()
        depth = len(self._inside)
        self._inside.append(name)
        try:
            yield
        finally:
            self._count()
            del self._inside[depth:]

    def switch(self, name: str) -> None:
        """Count as ``name`` from here on, up to the end of the present phase."""
        self._count()
        self._inside[-1] = name

    def move(self, seconds: float, name: str) -> None:
        """Count ``seconds`` of those of the present phase as ``name`` instead."""
        self._count()
        seconds = min(max(seconds, 0.0), self._own[self.now])
        self._own[self.now] -= seconds
        self._own[name] = self._own.get(name, 0.0) + seconds

    def spent(self) -> dict[str, float]:
        """Return the seconds of this process by phase; they add up to the time since the clock began."""
        self._count()
        return _ordered(self._own)

    def totals(self) -> dict[str, float]:
        """Return the seconds by phase of this process and of those before it."""
        own = self.spent()
        return _ordered({name: own.get(name, 0.0) + self.before.get(name, 0.0) for name in {**self.before, **own}})


def _ordered(seconds: Mapping[str, float]) -> dict[str, float]:
    names = dict.fromkeys(name for name in (*PHASES, *sorted(seconds)) if name in seconds)
    return {name: seconds[name] for name in names}
