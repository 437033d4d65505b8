"""Questions with an answer that the model has to write: read from files, and how a generated answer is compared.

A file is JSON lines (``question``, ``answer``). Texts are equal if they are after ``normalized``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex.config.mappings import shown
from dataflex.offline.choices import read_lines

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One question and its answer."""

    text: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a model wrote; ``finished``: it ended by itself."""

    text: str
    finished: bool


def read_tasks(path: Path, problems: list[str]) -> list[Task]:
    """Return the questions of a file; each unusable line is a problem, told with file and line."""
    return read_lines(path, "--answers", _task, problems)


def _task(found: Mapping[str, Any]) -> Task | str:
    for key in ("question", "answer"):
        if key not in found:
            return f"has no {key} (found: {', '.join(map(str, found)) or 'nothing'})"
        value = found[key]
        if not isinstance(value, str) or not value.strip():
            return f"{key}: expected a text, found {shown(value)}"
    return Task(text=found["question"], answer=found["answer"])


def normalized(text: str, after: str = "") -> str:
    """Return what is compared: what follows the last ``after`` ("" where it is missing), in lower case.

    White space becomes single spaces, commas between thousands and a full stop (a Chinese one too) at the end are
    removed.
    """
    if after:
        text = text.rpartition(after)[2] if after in text else ""
    return _THOUSANDS.sub("", " ".join(text.lower().split())).rstrip(". \u3002")


def matches(tasks: Sequence[Task], written: Sequence[Written | None], after: str = "") -> dict[str, Any]:
    """Return the share of equal answers, and of those that the model ended; None are left out and counted.

    An expected answer without the mark ``after`` is compared whole; a written one that comes to nothing is not equal.
    """
    pairs = [(task, found) for task, found in zip(tasks, written, strict=True) if found is not None]
    if not pairs:
        return {"questions": 0, "left_out": len(tasks)}
    expected = [normalized(task.answer, after if after in task.answer else "") for task, _ in pairs]
    texts = [normalized(found.text, after) for _, found in pairs]
    equal = [text == answer and text != "" for text, answer in zip(texts, expected, strict=True)]
    return {
        "questions": len(pairs),
        "exact_match": sum(equal) / len(pairs),
        "finished": sum(found.finished for _, found in pairs) / len(pairs),
        "left_out": len(tasks) - len(pairs),
    }
