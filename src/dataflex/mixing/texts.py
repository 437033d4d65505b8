"""Reads plain texts from local files: one JSON object a line (or a list), or one text a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dataflex.core.rng import stream
from dataflex.errors import DataError, did_you_mean

__all__ = ["read_texts", "sample"]


def read_texts(path: Path, columns: Sequence[str]) -> list[str]:
    """Return the non-empty texts of a .jsonl, .json or .txt file.

    Args:
        path: The file.
        columns: Keys of each JSON object whose texts are joined by line breaks; unused for .txt.

    Raises:
        DataError: The file cannot be read, a row lacks a column, or no text is there.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if path.suffix == ".txt":
        texts = content.splitlines()
    elif path.suffix in (".jsonl", ".json"):
        texts = [_text(row, columns, f"{path}, row {number}") for number, row in enumerate(_rows(content, path), 1)]
    else:
        raise DataError(f"{path}: must end in .jsonl, .json or .txt")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(f"{path}: holds no text")
    return texts


def _rows(content: str, path: Path) -> Iterator[Any]:
    try:
        if content.lstrip().startswith("["):
            yield from json.loads(content)
        else:
            yield from (json.loads(line) for line in content.split("\n") if line.strip())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: malformed JSON: {error}") from error


def _text(row: Any, columns: Sequence[str], where: str) -> str:
    known = list(row) if isinstance(row, dict) else []
    for column in columns:
        if column not in known or not isinstance(row[column], str):
            raise DataError(f"{where}: no text under {column!r}{did_you_mean(column, known)}; see --column")
    return "\n".join(row[column] for column in columns if row[column])


def sample(texts: Sequence[str], most: int, seed: int, name: str) -> list[str]:
    """Return at most ``most`` texts, drawn without replacement, in their order."""
    if len(texts) <= most:
        return list(texts)
    chosen = stream(seed, f"mixing.texts.{name}").choice(len(texts), size=most, replace=False)
    return [texts[place] for place in sorted(chosen.tolist())]
