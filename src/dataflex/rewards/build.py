"""Rewards by what a configuration names: metrics, functions, commands and judges."""

from __future__ import annotations

import importlib
import json
import queue
import re
import shlex
import shutil
import string
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from dataflex.errors import ConfigError, did_you_mean
from dataflex.registry import import_file
from dataflex.rewards.base import Candidate, Grades, Reward, graded
from dataflex.signals.endpoint import EndpointClient, EndpointConfig, EndpointError

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


@cache
def _from_file(file: Path) -> ModuleType:
    return import_file(file, "reward")  # once: a configuration's methods are built more than once


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
        own_file = Path(source).expanduser().resolve() if source.endswith(".py") else None
        module = importlib.import_module(source) if own_file is None else _from_file(own_file)
    except Exception as error:  # the user's own code: told as a configuration problem, with its cause
        raise ConfigError(
            f"dynamic.selector.reward: {source} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"dynamic.selector.reward: {source} has no function {name!r}")
    loaded: Callable[..., Any] = function
    return loaded


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


_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_MOST_IN_A_ROW = 3
_INSTRUCTION = (
    "Grade the answer to the task below against the reference. Reply with one number from 0 (wrong or useless) to "
    "{best:g} (as good as the reference), and nothing else.\n\n[Task]\n{prompt}\n\n[Reference]\n{reference}\n\n"
    "[Answer]\n{answer}\n\n[Grade]\n"
)


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Where the judge is and how it is asked.

    Attributes:
        url: Base address with the version, as in ``http://127.0.0.1:8000/v1``.
        model: Name of the model at the server.
        api_key_env: Environment variable that holds the key.
        instruction: What is asked; ``{prompt}``, ``{answer}``, ``{reference}`` and ``{best}`` are filled in.
        best: The highest grade; the reward is the first number of the reply divided by it.
        max_tokens: Tokens of a reply at most.
        timeout_seconds: Without any byte from the server.
        max_retries: Further tries of a request.
        concurrency: Requests under way at once.
    """

    url: str = field(metadata={"help": "base address of the server with the version, as http://127.0.0.1:8000/v1"})
    model: str = field(metadata={"help": "name of the model at the server"})
    api_key_env: str | None = field(default=None, metadata={"help": "environment variable that holds the key"})
    instruction: str = field(
        default=_INSTRUCTION, metadata={"help": "what is asked, with {prompt}, {answer}, {reference} and {best}"}
    )
    best: float = field(
        default=10.0, metadata={"help": "highest grade; rewards are grades divided by it", "above": 0.0}
    )
    max_tokens: int = field(default=16, metadata={"help": "tokens of a reply at most", "minimum": 1})
    timeout_seconds: float = field(default=60.0, metadata={"help": "seconds without any byte", "above": 0.0})
    max_retries: int = field(default=4, metadata={"help": "further tries of a request", "minimum": 0})
    concurrency: int = field(default=8, metadata={"help": "requests under way at once", "minimum": 1})

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url: must be an http:// or https:// address, found {self.url!r}")
        if not self.model:
            raise ValueError("model: must be the name of a model")
        try:
            asked = self.ask(Candidate(prompt="\0", answer="\1", reference="\2"))
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"instruction: cannot be filled in ({type(error).__name__}: {error}); write braces as {{{{ and }}}}"
            ) from error
        if "\1" not in asked:
            raise ValueError("instruction: does not hold {answer}, so that all answers would get the same grade")

    def ask(self, candidate: Candidate) -> str:
        """Return the request for one candidate."""
        return self.instruction.format(
            prompt=candidate.prompt, answer=candidate.answer, reference=candidate.reference, best=self.best
        )


class Judge:
    """Asks for a grade of each answer.

    Args:
        config: Where and how.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config

    @cached_property
    def _client(self) -> EndpointClient:
        """Opened by the first grade, so that a configuration can be read where the key is not at hand."""
        config = self._config
        return EndpointClient(
            config=EndpointConfig(
                url=config.url,
                model=config.model,
                api_key_env=config.api_key_env,
                max_tokens=config.max_tokens,
                temperature=0.0,
                timeout_seconds=config.timeout_seconds,
                max_retries=config.max_retries,
                concurrency=config.concurrency,
            )
        )

    def grade(self, candidates: Sequence[Candidate]) -> Grades:
        """Return one reward per candidate.

        All are asked at once. If a request fails for good, they are asked one by one, so that only those that
        fail have no grade; three failures in a row end that.

        Raises:
            ConfigError: The environment variable of the key is not set.
        """
        asked = [self._config.ask(one) for one in candidates]
        try:
            return graded([self._read(replies[0].text) for replies in self._client.complete(asked)])
        except EndpointError:
            pass  # told below, for the requests that it belongs to
        found: list[object] = []
        in_a_row = 0
        for request in asked:
            if in_a_row == _MOST_IN_A_ROW:
                found.append(found[-1])
                continue
            try:
                found.append(self._read(self._client.complete([request])[0][0].text))
                in_a_row = 0
            except EndpointError as error:
                found.append(str(error))
                in_a_row += 1
        return graded(found)

    def _read(self, reply: str) -> object:
        found = _NUMBER.search(reply)
        if found is None:
            return f"the judge replied {reply.strip()[:80]!r} without a number"
        grade = float(found.group())
        if not 0 <= grade <= self._config.best:
            return f"the judge's grade {grade:g} is not between 0 and {self._config.best:g}"
        return grade / self._config.best


METRICS: tuple[str, ...] = ("exact_match", "f1", "rouge1", "rouge2", "rougeL")
"""Names of metrics; all are between 0 and 1."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Return a text as SQuAD compares them: lower case, no punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, reference: str) -> float:
    """Return 1 if the normalized texts are equal, else 0."""
    return float(normalized(answer) == normalized(reference))


def f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over normalized words; two empty texts agree."""
    ours, theirs = normalized(answer).split(), normalized(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2.0 * common / (len(ours) + len(theirs))


def metric(name: str) -> Metric:
    """Return a metric by name.

    Raises:
        ConfigError: ROUGE, and rouge-score is not installed.
    """
    if name == "exact_match":
        return Metric(compare=exact_match)
    if name == "f1":
        return Metric(compare=f1)
    assert name in METRICS, name
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError(
            f"dynamic.selector.reward: {name} needs rouge-score, which is not installed; install the extra: "
            "pip install 'dataflex[rewards]'"
        ) from error
    scorer = RougeScorer([name], use_stemmer=True)
    return Metric(compare=lambda answer, reference: float(scorer.score(reference, answer)[name].fmeasure))


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A reward that compares an answer with its reference.

    Attributes:
        compare: Answer and reference to a number.
    """

    compare: Callable[[str, str], float]

    def grade(self, candidates: Sequence[Candidate]) -> Grades:
        """Return one number per candidate."""
        return graded([self.compare(one.answer, one.reference) for one in candidates])


_OTHERS = ("command", "judge")


def reward_problem(reward: str, command: str | None, judge: JudgeConfig | None) -> str:
    """Return what is wrong with a reward's configuration, beginning with the key, or ""; nothing is imported."""
    for name, given in (("command", command), ("judge", judge)):
        if reward == name and given is None:
            return f"{name}: missing; 'reward: {name}' needs it"
        if reward != name and given is not None:
            return f"{name}: has no effect with 'reward: {reward}'; write 'reward: {name}' or remove it"
    if reward in METRICS or reward in _OTHERS:
        return ""
    if ":" in reward:
        problem = missing_source(reward)
        return f"reward: {problem}" if problem else ""
    known = [*METRICS, *_OTHERS]
    return (
        f"reward: unknown {reward!r}{did_you_mean(reward, known)} (known: {', '.join(known)}, or a function as "
        "module:function or file.py:function)"
    )


def build_reward(reward: str, command: str | None, judge: JudgeConfig | None, timeout_seconds: float) -> Reward:
    """Return the reward.

    Args:
        reward: Name of a metric, ``command``, ``judge``, or ``module:function`` or ``file.py:function``.
        command: For ``command``.
        judge: For ``judge``.
        timeout_seconds: Of a function's call, or a command's silence.

    Raises:
        ConfigError: A function or command cannot be had, a library or the judge's key is missing.
    """
    if reward in METRICS:
        return metric(reward)
    if reward == "command":
        assert command is not None
        return CommandReward(command=command, timeout_seconds=timeout_seconds)
    if reward == "judge":
        assert judge is not None
        return Judge(judge)
    return FunctionReward(function=load_function(reward), timeout_seconds=timeout_seconds)
