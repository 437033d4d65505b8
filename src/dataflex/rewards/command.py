"""A reward that is a command: answers as JSON lines on its standard input, rewards as lines on its standard output."""

from __future__ import annotations

import json
import queue
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import IO

from dataflex.errors import ConfigError
from dataflex.rewards.base import Candidate, Grades, graded

__all__ = ["CommandReward"]

_MOST_FRUITLESS = 3
_MOST_STDERR = 2000


@dataclass(frozen=True, kw_only=True)
class CommandReward:
    """Starts the command once for all answers, without a shell.

    Each answer is a line ``{"prompt": ..., "answer": ..., "reference": ...}``; each line of output, in the same
    order, is a number or ``{"reward": number}``. When the command ends early or falls silent, the answer it was
    at counts as failed and it is started again for the rest, until three starts in a row have brought nothing.

    Attributes:
        command: The command with its arguments, as in a shell but without one.
        timeout_seconds: Longest time without a further line.

    Raises:
        ConfigError: There is no such command.
    """

    command: str
    timeout_seconds: float

    def __post_init__(self) -> None:
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise ConfigError(f"dynamic.selector.command: {self.command!r} cannot be read: {error}") from error
        if not words:
            raise ConfigError("dynamic.selector.command: is empty")
        if shutil.which(words[0]) is None:
            raise ConfigError(
                f"dynamic.selector.command: no such program: {words[0]}; paths are looked up from the working directory"
            )

    def grade(self, candidates: Sequence[Candidate]) -> Grades:
        """Return one reward per candidate."""
        found: list[object] = []
        fruitless = 0
        while len(found) < len(candidates):
            before, problem = len(found), "the command ended early"
            for answer in self._run(candidates[before:]):
                if isinstance(answer, _Ended):
                    problem = answer.reason
                else:
                    found.append(answer)
            if len(found) < len(candidates):
                found.append(problem)
                fruitless = fruitless + 1 if len(found) == before + 1 else 0
                if fruitless == _MOST_FRUITLESS:
                    found += [problem] * (len(candidates) - len(found))
        return graded(found)

    def _run(self, candidates: Sequence[Candidate]) -> Iterator[object]:
        """Yield what is said of candidates, and last why there is no more."""
        try:
            process = subprocess.Popen(
                shlex.split(self.command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                process_group=0,  # SIGTERM to the group of this process, which ends after its step, is not for it
            )
        except OSError as error:
            yield _Ended(f"the command cannot be started: {error}")
            return
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        said: list[str] = []
        threads = [
            threading.Thread(target=_write, args=(process.stdin, candidates), daemon=True),
            threading.Thread(target=_read, args=(process.stdout, lines), daemon=True),
            threading.Thread(target=_keep, args=(process.stderr, said), daemon=True),
        ]
        for thread in threads:
            thread.start()
        silent = False
        try:
            for _ in candidates:
                try:
                    line = lines.get(timeout=self.timeout_seconds)
                except queue.Empty:
                    silent = True
                    break
                if line is None:
                    break
                yield _read_reward(line)
        finally:
            if silent:
                process.kill()
            else:
                _end(process)
            process.wait()
            for thread, stream in zip(threads, (process.stdin, process.stdout, process.stderr), strict=True):
                thread.join(timeout=1.0)
                if not thread.is_alive():  # a child of the command may still hold the other end
                    stream.close()
        if silent:
            yield _Ended(f"no line from the command within {self.timeout_seconds:g} s")
            return
        last = "".join(said).strip().splitlines()
        yield _Ended(f"the command ended with code {process.returncode}" + (f": {last[-1]}" if last else ""))


@dataclass(frozen=True)
class _Ended:
    reason: str


def _end(process: subprocess.Popen[str]) -> None:
    """Wait a moment for a command that has said everything, then end it."""
    try:
        process.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        process.kill()


def _write(stream: IO[str], candidates: Sequence[Candidate]) -> None:
    try:
        for one in candidates:
            stream.write(json.dumps(asdict(one)) + "\n")
        stream.close()
    except OSError:
        return  # it ended early, which the reader tells


def _read(stream: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    for line in stream:
        if line.strip():
            lines.put(line)
    lines.put(None)


def _keep(stream: IO[str], said: list[str]) -> None:
    for line in stream:
        said.append(line)
        while sum(map(len, said)) > _MOST_STDERR and len(said) > 1:
            said.pop(0)


def _read_reward(line: str) -> object:
    try:
        found = json.loads(line)
    except ValueError:
        return f"the command wrote {line.strip()[:80]!r}, not a number or {{'reward': number}}"
    if isinstance(found, dict):
        found = found.get("reward")
    if isinstance(found, bool) or not isinstance(found, int | float):
        return f"the command wrote {line.strip()[:80]!r}, not a number or {{'reward': number}}"
    return found
