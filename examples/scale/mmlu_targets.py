"""Writes MMLU's development questions as rows of an instruction data set, the targets of the recipes in this folder.

    python examples/scale/mmlu_targets.py DIR

DIR holds MMLU's tables as its authors give them: SUBJECT_dev.csv without a head, with question, choices and the letter
of the answer.
"""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path

from dataflex.offline.choices import Question, read_questions

OUT = Path(__file__).with_name("mmlu_dev.jsonl")


def row_of(question: Question) -> dict[str, str]:
    """Return a question with its choices as instruction, and the letter of the right one as output."""
    choices = [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, question.choices, strict=False)]
    about = (question.subject or "").replace("_", " ")
    head = f"The following is a multiple choice question (with answer) about {about}."
    text = "\n".join([head, "", question.text, *choices, "Answer:"])
    return {"instruction": text, "output": string.ascii_uppercase[question.answer]}


def main(folder: str) -> int:
    """Write the questions of all tables of a folder; nothing if one cannot be read."""
    problems: list[str] = []
    tables = sorted(Path(folder).glob("*_dev.csv"))
    rows = [row_of(question) for table in tables for question in read_questions(table, problems)]
    if problems or not rows:
        sys.stderr.write("\n".join(problems or [f"no tables SUBJECT_dev.csv in {folder}"]) + "\n")
        return 1
    OUT.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sys.stdout.write(f"{len(rows)} questions of {len(tables)} subjects in {OUT}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) == 2 else f"usage: python {sys.argv[0]} DIR")
