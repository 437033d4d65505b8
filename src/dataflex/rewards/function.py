"""A reward that is a Python function of the user's, called for one answer at a time under a time limit."""

from __future__ import annotations

import importlib
import importlib.util
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex.errors import ConfigError
from dataflex.rewards.base import Candidate, Grades, graded

__all__ = ["FunctionReward", "load_function", "missing_source"]

_MOST_ABANDONED = 8


def missing_source(path: str) -> str:
    """Return what is wrong with ``module:function`` or ``file.py:function`` without running anything, or ""."""
    source, _, name = path.rpartition(":")
    if not source or not name.isidentifier():
        return f"{path!r} is not written as module:function or file.py:function"
    if source.endswith(".py"):
        return "" if Path(source).expanduser().is_file() else f"no such file: {source}"
    try:
        found = importlib.util.find_spec(source)
    except (ImportError, ValueError):
        found = None
    return "" if found is not None else f"no module named {source!r}; a file is written as file.py:function"


def load_function(path: str) -> Callable[..., Any]:
    """Import ``module:function`` or ``file.py:function``.

    Raises:
        ConfigError: It cannot be imported, or there is no such function in it.
    """
    problem = missing_source(path)
    if problem:
        raise ConfigError(f"dynamic.selector.reward: {problem}")
    source, _, name = path.rpartition(":")
    try:
        module = _from_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except Exception as error:  # the user's own code: told as a configuration problem, with its cause
        raise ConfigError(
            f"dynamic.selector.reward: {source} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"dynamic.selector.reward: {source} has no function {name!r}")
    loaded: Callable[..., Any] = function
    return loaded


def _from_file(path: Path) -> Any:
    file = path.expanduser().resolve()
    name = f"dataflex_reward_{file.stem}_{abs(hash(str(file))) % 10**8}"
    if name in sys.modules:  # a configuration's methods are built more than once
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@dataclass(frozen=True, kw_only=True)
class FunctionReward:
    """Calls ``function(prompt=..., answer=..., reference=...)``, which returns a number.

    A call that takes too long is left behind in its thread, since Python cannot end one; after eight of them
    no further answer is graded.

    Attributes:
        function: The user's function.
        timeout_seconds: Longest time of one call.
    """

    function: Callable[..., Any]
    timeout_seconds: float

    def grade(self, candidates: Sequence[Candidate]) -> Grades:
        """Return one reward per candidate."""
        found: list[object] = []
        tasks: queue.SimpleQueue[Candidate | None] = queue.SimpleQueue()
        answers: queue.SimpleQueue[object] = queue.SimpleQueue()
        abandoned, worker = 0, None
        for candidate in candidates:
            if worker is None:
                tasks, answers = queue.SimpleQueue(), queue.SimpleQueue()
                worker = threading.Thread(target=self._work, args=(tasks, answers), name="reward", daemon=True)
                worker.start()
            tasks.put(candidate)
            try:
                found.append(answers.get(timeout=self.timeout_seconds))
            except queue.Empty:
                worker, abandoned = None, abandoned + 1
                tasks.put(None)
                found.append(f"no answer within {self.timeout_seconds:g} s")
                if abandoned == _MOST_ABANDONED:
                    found += [f"not tried: {abandoned} calls took too long"] * (len(candidates) - len(found))
                    break
        if worker is not None:
            tasks.put(None)
        return graded(found)

    def _work(self, tasks: queue.SimpleQueue[Candidate | None], answers: queue.SimpleQueue[object]) -> None:
        while (one := tasks.get()) is not None:
            answer: object = "the function ended its thread"
            try:
                answer = self.function(prompt=one.prompt, answer=one.answer, reference=one.reference)
                if isinstance(answer, str | Exception):
                    answer = f"the reward is {answer!r}, not a number"
            except Exception as error:  # noqa: BLE001 (whatever the user's function raises belongs to this answer)
                answer = error
            finally:
                answers.put(answer)
