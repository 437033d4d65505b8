"""What the soak commands share: a tiny model and data, processes that are forked after the imports, findings.

Imports of torch and LLaMA-Factory take longer than a tiny run, so they are paid once: each run is a forked process,
with its own log and time limit, and whatever it breaks or leaks ends with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TUNED = {
    "OMP_NUM_THREADS": "1",  # a forked process has no threads of its parent's, and twins need the same number
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "LLAMAFACTORY_VERBOSITY": "WARN",
    "TRANSFORMERS_VERBOSITY": "error",
}


def prepare() -> None:
    """Set the environment and import what a run imports; call it once, before the first fork."""
    for key, value in TUNED.items():
        os.environ.setdefault(key, value)
    import llamafactory.train.sft.workflow
    import llamafactory.train.tuner  # noqa: F401

    import dataflex.huggingface.trainer
    import dataflex.llamafactory.swap
    import dataflex.run  # noqa: F401


def tiny(folder: Path) -> tuple[Path, Path]:
    """Make the tests' tiny model and data sets in a folder, once, and return both folders."""
    from tests import conftest

    model, data = folder / "tiny-model", folder / "data"
    for path, fixture in ((model, conftest.tiny_model), (data, conftest.data_dir)):
        if not path.exists():
            aside = path.with_name(f"{path.name}.aside{os.getpid()}")
            aside.mkdir(parents=True)
            fixture.__wrapped__(SimpleNamespace(mktemp=lambda _, aside=aside: aside))
            aside.rename(path)
    return model, data


@dataclass
class Forked:
    """A process that was forked; ``wait`` gives how it ended."""

    pid: int
    log: Path
    began: float = field(default_factory=time.monotonic)
    code: int | None = None  # exit code, negative: the signal

    def poll(self) -> int | None:
        """Return the exit code (negative: the signal that ended it), or None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send the process and its children a signal, if it has not ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def wait(self, limit: float) -> int | None:
        """Wait for the end and return the exit code; after ``limit`` seconds kill it and return None."""
        until = time.monotonic() + limit
        while self.poll() is None:
            if time.monotonic() > until:
                self.kill()
                while self.poll() is None:
                    time.sleep(0.01)
                return None
            time.sleep(0.01)
        return self.code


def fork(job: Callable[[], Any], log: Path, env: Mapping[str, str] | None = None) -> Forked:
    """Run a function in a forked process of its own group, with its output in ``log``."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # it may have ended; whoever is first, its group is there on return
            os.setpgid(pid, pid)
        return Forked(pid, log)
    code = 1
    try:
        os.setpgid(0, 0)
        os.environ.update(env or {})
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))  # whatever they were
        code = job() or 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class Ledger:
    """Results of one command by number, kept in a file, so that a command that was stopped goes on."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._file = folder, folder / "results.jsonl"
        self.known: dict[int, dict[str, Any]] = {}
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        if lines and json.loads(lines[0]) != dict(settings):
            raise SystemExit(f"{folder} holds results of other settings ({lines[0]}): name another --out")
        for line in lines[1:]:
            with contextlib.suppress(ValueError):  # the last line of a command that was killed
                entry = json.loads(line)
                self.known[entry["number"]] = entry
        if not lines:
            self._append(dict(settings))

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def add(self, number: int, entry: Mapping[str, Any]) -> None:
        """Keep the result of one number."""
        self.known[number] = {"number": number, **entry}
        self._append(self.known[number])

    def finding(self, number: int, command: list[str], problem: str) -> None:
        """Write a finding with the command that shows it again, and say so."""
        told = f"$ {shlex.join(command)}\n\n{problem}\n"
        (self.folder / f"finding-{number}.txt").write_text(told, errors="backslashreplace")
        sys.stdout.write(f"FINDING {self.folder / f'finding-{number}.txt'}\n{problem[-1500:]}\n")
        sys.stdout.flush()
