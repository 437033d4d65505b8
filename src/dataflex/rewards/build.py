"""Rewards by the name in a configuration: metrics, functions, commands, and the judge."""

from __future__ import annotations

import importlib.util
import json
import queue
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dataflex.errors import ConfigError, did_you_mean
from dataflex.registry import load_function
from dataflex.rewards.base import Candidate, Grades, Reward, graded
from dataflex.rewards.judge import Judge, JudgeConfig
from dataflex.select.words import cut_words, signs_within_words, spaced
from dataflex.version import install

METRICS: tuple[str, ...] = ("exact_match", "f1", "rouge1", "rouge2", "rougeL")
"""Names of metrics; all are between 0 and 1."""

_OTHERS = ("command", "judge")


def reward_problem(reward: str, command: str | None, judge: JudgeConfig | None) -> str:
    """Return what is wrong with a reward's configuration, beginning with the key, or ""; nothing is imported."""
    for name, given in (("command", command), ("judge", judge)):
        if reward == name and given is None:
            return f"{name}: missing; 'reward: {name}' needs it"
        if reward != name and given is not None:
            return f"{name}: has no effect with 'reward: {reward}'; write 'reward: {name}' or remove it"
    known = [*METRICS, *_OTHERS]
    if reward in known:
        return ""
    if ":" in reward:
        problem = _missing_source(reward)
        return f"reward: {problem}" if problem else ""
    return (
        f"reward: unknown {reward!r}{did_you_mean(reward, known)} (known: {', '.join(known)}, or a function as "
        "module:function or file.py:function)"
    )


def build_reward(reward: str, command: str | None, judge: JudgeConfig | None, timeout_seconds: float) -> Reward:
    """Return the reward.

    Args:
        reward: Name of a metric, ``command``, ``judge``, or ``module:function`` or ``file.py:function``.
        command: The command with its arguments, for ``command``.
        judge: Settings of the judge, for ``judge``.
        timeout_seconds: Longest time of one call of a function, or until the next line of a command.

    Raises:
        ConfigError: The function or command does not exist, or a library is not installed.
    """
    if reward in METRICS:
        compare = metric(reward)
        return lambda candidates: graded([compare(one.answer, one.reference) for one in candidates])
    if reward == "command":
        assert command is not None
        return command_reward(command, timeout_seconds)
    if reward == "judge":
        assert judge is not None
        return Judge(judge)
    try:
        return function_reward(load_function(reward, "reward"), timeout_seconds)
    except ValueError as error:
        raise ConfigError(f"dynamic.selector.reward: {error}") from error


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_OTHER = r"[^\W\u0000-\u02af\u1e00-\u1eff]"  # letters beyond the Latin ones, which rouge-score drops


def normalized(text: str) -> str:
    """Return a text as SQuAD compares it: lower case, no punctuation, no English articles, single spaces.

    Characters of scripts without spaces are words of their own.
    """
    return " ".join(_ARTICLES.sub(" ", " ".join(cut_words(text))).split())


def exact_match(answer: str, reference: str) -> float:
    """Return 1 if the normalized texts are equal, else 0."""
    return float(normalized(answer) == normalized(reference))


def f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over normalized words; 1 for two empty texts."""
    ours, theirs = normalized(answer).split(), normalized(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2.0 * common / (len(ours) + len(theirs))


def metric(name: str) -> Callable[[str, str], float]:
    """Return a metric by name: a function of answer and reference.

    Raises:
        ConfigError: ROUGE, and rouge-score is not installed.
    """
    if name in ("exact_match", "f1"):
        return exact_match if name == "exact_match" else f1
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer, Tokenizer
    except ImportError as error:
        raise ConfigError(
            f"dynamic.selector.reward: {name} needs rouge-score, which is not installed; install the extra: "
            f"{install('rewards')}"
        ) from error
    latin = DefaultTokenizer(use_stemmer=True)
    words = re.compile(rf"[a-z0-9]+|{_OTHER}(?:{_OTHER}|[{signs_within_words()}])*")

    class Words(Tokenizer):
        """Its own tokens, and between them the words of other scripts."""

        def tokenize(self, text: str) -> list[str]:
            found = words.findall(spaced(text.lower()))
            return [token for word in found for token in latin.tokenize(word) or [word]]

    scorer = RougeScorer([name], tokenizer=Words())
    return lambda answer, reference: float(scorer.score(reference, answer)[name].fmeasure)


def _missing_source(path: str) -> str:
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


_MOST_HANGING = 8


def function_reward(function: Callable[..., Any], timeout_seconds: float) -> Reward:
    """Return the reward that calls ``function(prompt=..., answer=..., reference=...)``, which returns a number.

    A call that takes longer than ``timeout_seconds`` is left running in its thread, since Python cannot end a
    thread; while eight of them run no further answer is graded.
    """

    def grade(candidates: Sequence[Candidate]) -> Grades:
        found: list[object] = []
        hanging: list[threading.Thread] = []
        for candidate in candidates:
            hanging = [thread for thread in hanging if thread.is_alive()]
            if len(hanging) == _MOST_HANGING:
                found.append(f"not tried: {len(hanging)} calls that took too long still run")
                continue
            results: queue.SimpleQueue[object] = queue.SimpleQueue()
            called = threading.Thread(target=_call, args=(function, candidate, results), name="reward", daemon=True)
            called.start()
            try:
                found.append(results.get(timeout=timeout_seconds))
            except queue.Empty:
                hanging.append(called)
                found.append(f"no answer within {timeout_seconds:g} s")
        return graded(found)

    return grade


def _call(function: Callable[..., Any], candidate: Candidate, results: queue.SimpleQueue[object]) -> None:
    result: object = "the function ended its thread"
    try:
        result = function(**asdict(candidate))
        if isinstance(result, str | Exception):
            result = f"the reward is {result!r}, not a number"
    except Exception as error:  # noqa: BLE001 (whatever the user's function raises belongs to this answer)
        result = error
    finally:
        results.put(result)


_MOST_FRUITLESS = 3
_MOST_STDERR = 2000


def command_reward(command: str, timeout_seconds: float) -> Reward:
    """Return the reward that starts ``command`` once for all answers, without a shell.

    Each answer is a line ``{"prompt": ..., "answer": ..., "reference": ...}`` of its input; each line of its output,
    in the same order, is a number or ``{"reward": number}``. When the command ends early, writes anything else, or
    no line for ``timeout_seconds``, the answer it was at counts as failed and it is started again for the rest. After
    three starts in a row without a reward the other answers to that prompt count as failed too, and after such starts
    at three prompts all. Lines left over leave no answer of their start with a reward: nobody knows whose is whose.

    Raises:
        ConfigError: The command cannot be parsed, or there is no such program.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"dynamic.selector.command: {command!r} cannot be read: {error}") from error
    if not words:
        raise ConfigError("dynamic.selector.command: is empty")
    if shutil.which(words[0]) is None:
        raise ConfigError(
            f"dynamic.selector.command: no such program: {words[0]}; paths are looked up from the working directory"
        )

    def grade(candidates: Sequence[Candidate]) -> Grades:
        found: list[object] = []
        fruitless: Counter[str] = Counter()  # starts in a row by prompt, since answers to one may all fail alike
        while len(found) < len(candidates):
            rewards, problem = _run(words, timeout_seconds, candidates[len(found) :])
            found += rewards
            left = [one.prompt for one in candidates[len(found) :]]
            if rewards or not left:
                fruitless.clear()
            else:
                fruitless[left[0]] += 1
            failed = min(len(left), 1)
            if len(fruitless) == _MOST_FRUITLESS:
                failed = len(left)
            elif failed and fruitless[left[0]] == _MOST_FRUITLESS:
                failed = next((n for n, prompt in enumerate(left) if prompt != left[0]), len(left))
            found += [problem] * failed
        return graded(found)

    return grade


def _run(words: list[str], timeout_seconds: float, candidates: Sequence[Candidate]) -> tuple[list[object], str]:
    """Start the command; return the rewards of the first candidates, and why there are no more."""
    rewards: list[object] = []
    silent, stray = False, ""
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as errors:
        asked.writelines(json.dumps(asdict(one)).encode() + b"\n" for one in candidates)
        asked.seek(0)
        try:
            process = subprocess.Popen(
                words,
                stdin=asked,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                errors="replace",
                process_group=0,  # SIGTERM to the group of this process, which ends after its step, is not for it
            )
        except OSError as error:
            return [], f"the command cannot be started: {error}"
        assert process.stdout is not None
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            while len(rewards) < len(candidates) and (line := lines.get(timeout=timeout_seconds)) is not None:
                reward = _read_reward(line)
                if reward is None:
                    stray = line
                    break
                rewards.append(reward)
        except queue.Empty:
            silent = True
        finally:
            _end(process, at_once=silent or bool(stray))
            reader.join(timeout=1.0)
            if not reader.is_alive():  # a child of the command may still hold the other end
                process.stdout.close()
        over = lines.get() if len(rewards) == len(candidates) and not lines.empty() else None
        if over is not None:
            return [_stray(over)] * len(rewards), ""
        if stray:
            return rewards, _stray(stray)
        if silent:
            return rewards, f"no line from the command within {timeout_seconds:g} s"
        errors.seek(max(errors.seek(0, 2) - _MOST_STDERR, 0))
        last = errors.read().decode("utf-8", "replace").strip().splitlines()
    return rewards, f"the command ended with code {process.returncode}" + (f": {last[-1]}" if last else "")


def _end(process: subprocess.Popen[str], at_once: bool) -> None:
    """End a command; one that has written every line is given a moment to end by itself."""
    try:
        process.wait(timeout=0.0 if at_once else 1.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _read(stream: Iterable[str], lines: queue.SimpleQueue[str | None]) -> None:
    for line in stream:
        if line.strip():
            lines.put(line)
    lines.put(None)


def _read_reward(line: str) -> object:
    """Return the reward that a line holds, whatever is written as such; None for another line."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    keyed = isinstance(found, dict) and "reward" in found
    value = found["reward"] if keyed else found
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return f"the reward is {value!r}, not a number" if keyed else None


def _stray(line: str) -> str:
    return (
        f"the command wrote {line.strip()[:80]!r}; it must write one line for each answer, a number or "
        "{'reward': number}, and all else to stderr"
    )
