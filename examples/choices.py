"""Turns rows of questions and answers into questions with four choices, for ``dataflex eval --choices``.

The choices of a question are its answer and those of the rows beside it, the right one at each place in turn.
By hand: python examples/choices.py ROWS.jsonl CHOICES.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

CHOICES = 4


def main(source: str, out: str) -> int:
    """Write one line for each row of the alpaca format."""
    rows = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines()]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with Path(out).open("w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            answer = i % CHOICES
            choices = [rows[(i + k - answer) % len(rows)]["output"] for k in range(CHOICES)]
            file.write(json.dumps({"question": row["instruction"], "choices": choices, "answer": answer}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
