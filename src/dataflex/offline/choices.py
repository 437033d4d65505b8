"""Questions with choices, one of them right: read from files, and what log-likelihoods of the choices say about them.

A file is JSON lines (``question``, ``choices``, ``answer``, optionally ``subject``) or a table of MMLU's (``.csv``
without a head: question, choices, letter of the answer; the subject is the file's name).
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from dataflex.config.mappings import shown

Found = TypeVar("Found")
Length = Literal["mean", "sum"]
LENGTHS: tuple[Length, ...] = ("mean", "sum")
_MOST_TOLD = 5
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question; ``answer`` is the index of the right choice."""

    text: str
    choices: tuple[str, ...]
    answer: int
    subject: str | None = None


def read_questions(path: Path, problems: list[str]) -> list[Question]:
    """Return the questions of a file; each unusable line is a problem, told with file and line."""
    return read_lines(path, "--choices", _question, problems)


def read_lines(
    path: Path, option: str, parse: Callable[[Mapping[str, Any]], Found | str], problems: list[str]
) -> list[Found]:
    """Return what ``parse`` makes of each line of a file; what it says of a line, as text, is a problem of it."""
    parsed: list[Found] = []
    told: list[str] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, found in _lines(file, path):
                one = found if isinstance(found, str) else parse(found)
                if isinstance(one, str):
                    told.append(f"{option}: {path}, line {line:,}: {one}")
                else:
                    parsed.append(one)
    except UnicodeDecodeError as error:
        told.append(f"{option}: {path} is not UTF-8 text (byte {error.start:,})")
    except OSError as error:
        told.append(f"{option}: {path} cannot be read: {error.strerror}")
    except csv.Error as error:
        told.append(f"{option}: {path} is malformed CSV: {error}")
    if not parsed and not told:
        told.append(f"{option}: {path} holds no questions")
    problems += told[:_MOST_TOLD]
    if len(told) > _MOST_TOLD:
        problems.append(f"{option}: {path}: {len(told) - _MOST_TOLD:,} more lines like these")
    return parsed


def _lines(file: Any, path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Yield the line and the fields of each question, or why they cannot be read."""
    if path.suffix == ".csv":
        subject = re.sub(r"_(test|val|dev)$", "", path.stem)
        reader = csv.reader(file)
        for row in reader:
            if row:
                fields = dict(question=row[0], choices=row[1:-1], answer=row[-1].strip(), subject=subject)
                yield reader.line_num, fields
        return
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield line, f"is no JSON: {getattr(error, 'msg', error)}"
            continue
        yield line, found if isinstance(found, dict) else "expected an object {...} with its question and answer"


def _question(found: Mapping[str, Any]) -> Question | str:
    """Return the question, or what is wrong with its fields."""
    lacking = [key for key in ("question", "choices", "answer") if key not in found]
    if lacking:
        return f"has no {', '.join(lacking)} (found: {', '.join(map(str, found)) or 'nothing'})"
    text, choices, answer, subject = (found.get(key) for key in ("question", "choices", "answer", "subject"))
    if not isinstance(text, str) or not text.strip():
        return f"question: expected a text, found {shown(text)}"
    if not isinstance(choices, list) or len(choices) < 2:
        return f"choices: expected a list of two or more texts, found {shown(choices)}"
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            return f"choices: expected texts, found {shown(choice)}"
    if subject is not None and (not isinstance(subject, str) or not subject.strip()):
        return f"subject: expected a text, found {shown(subject)}"
    last = len(choices) - 1
    wanted = (
        f"expected an index from 0 to {last} or a letter from A to {_LETTERS[min(last, 25)]}, found {shown(answer)}"
    )
    if isinstance(answer, str):
        index = _LETTERS.find(answer) if len(answer) == 1 else -1
    elif isinstance(answer, int) and not isinstance(answer, bool):
        index = answer
    else:
        index = -1
    if not 0 <= index <= last:
        return f"answer: {wanted}"
    return Question(text=text, choices=tuple(choices), answer=index, subject=subject)


def as_rows(questions: Sequence[Question]) -> list[dict[str, str]]:
    """Return one row of the alpaca format for each (question, choice), in order."""
    return [{"instruction": each.text, "input": "", "output": choice} for each in questions for choice in each.choices]


def outcomes(questions: Sequence[Question], loss: NDArray[Any], tokens: NDArray[Any], length: Length) -> Any:
    """Return accuracy, margin and bits of the right answer per byte of each question, float64 [Q, 3].

    Rows are those of ``as_rows``: token-mean losses in nats [R], NaN where a choice has none, and numbers of their
    tokens [R]. A choice counts by its log-likelihood, or by its mean over tokens. A tie of n best counts 1/n if the
    answer is among them. The margin is the answer's value minus the best other's. A question with a choice without a
    loss is NaN.
    """
    likelihood = -np.asarray(loss, dtype=np.float64) * tokens
    values = likelihood if length == "sum" else -np.asarray(loss, dtype=np.float64)
    results = np.full((len(questions), 3), np.nan)
    start = 0
    for q, question in enumerate(questions):
        stop, right = start + len(question.choices), start + question.answer
        here = values[start:stop]
        if np.isfinite(here).all():
            best = here == here.max()
            others = np.delete(here, question.answer)
            size = len(question.choices[question.answer].encode(errors="surrogatepass"))
            bits = -likelihood[right] / (math.log(2) * size)
            results[q] = best[question.answer] / best.sum(), values[right] - others.max(), bits
        start = stop
    return results


def summary(questions: Sequence[Question], results: NDArray[np.float64]) -> dict[str, Any]:
    """Return means over questions, and over subjects where there are any; questions that are NaN are left out."""
    kept = np.isfinite(results[:, 0])
    chances = np.array([1 / len(question.choices) for question in questions])
    subjects = np.array([question.subject or "" for question in questions], dtype=object)

    def means(mask: NDArray[np.bool_]) -> dict[str, Any]:
        accuracy, margin, bits = (float(value) for value in results[mask].mean(axis=0))
        told = {"accuracy": accuracy, "margin": margin, "bits_per_byte": bits, "chance": float(chances[mask].mean())}
        return {"questions": int(mask.sum()), **told}

    if not kept.any():
        return {"questions": 0, "left_out": len(questions)}
    found: dict[str, Any] = {**means(kept), "left_out": int((~kept).sum())}
    if any(subjects):
        by = {name: means(kept & (subjects == name)) for name in dict.fromkeys(subjects[kept])}
        keys = ("accuracy", "margin", "bits_per_byte", "chance")
        found["subjects"] = {name or "(none)": values for name, values in by.items()}
        found["macro"] = {key: float(np.mean([values[key] for values in by.values()])) for key in keys}
    return found
