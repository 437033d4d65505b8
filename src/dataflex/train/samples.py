"""Rows of the training set described for a reader: where they are from, and the beginning of their text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dataflex.plan.domains import Domains
from dataflex.signals.texts import row_texts
from dataflex.train.weight_stats import WeighedRow

__all__ = ["SAMPLES", "describe_rows"]

SAMPLES = 10
"""How many rows the record holds of each kind."""

_CHARACTERS = 400


def describe_rows(
    weighed: Sequence[WeighedRow], dataset: Any, tokenizer: Any, domains: Domains
) -> list[dict[str, Any]]:
    """Return ``row``, ``weight``, ``times``, ``domain`` and ``text`` of each row.

    Args:
        weighed: Rows and their mean weights.
        dataset: The tokenized training set.
        tokenizer: Turns tokens into text.
        domains: Domains of the training rows.
    """
    rows = np.array([item.row for item in weighed], dtype=np.int64)
    prompts = row_texts(dataset, rows, tokenizer, "prompt") if len(rows) else []
    answers = row_texts(dataset, rows, tokenizer, "completion") if len(rows) else []
    described = []
    for item, prompt, answer in zip(weighed, prompts, answers, strict=True):
        half = _CHARACTERS // 2 if prompt else 0  # a long prompt must not hide the answer, which is weighed
        text = f"{_cut(prompt, half)} => {_cut(answer, half)}" if prompt else _cut(answer, _CHARACTERS)
        name = domains.names[int(domains.domain_of[item.row])]
        described.append({"row": item.row, "weight": item.weight, "times": item.times, "domain": name, "text": text})
    return described


def _cut(text: str, characters: int) -> str:
    words = " ".join(text.split())
    return words if len(words) <= characters else words[: characters - 3] + "..."
