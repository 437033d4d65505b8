"""Weights of domains from their embeddings, by ridge leverage scores.

Source: Chameleon (Xie et al., ICML 2025, arXiv 2505.24844).

A domain that the others explain well (low score) is general: pre-training weighs it up. One that
they do not (high score) is unique: fine-tuning weighs it up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError, did_you_mean
from dataflex.rng import stream

__all__ = ["PURPOSES", "Purpose", "centred_kernel", "leverage", "read_texts", "leverage_weights", "sample_texts"]

Floats = NDArray[np.float64]
Purpose = Literal["pretraining", "finetuning"]

PURPOSES: tuple[Purpose, ...] = get_args(Purpose)

_LEAST = 1e-9
_RIDGE = 10.0


def centred_kernel(means_KE: Floats) -> Floats:
    """Return the centred linear kernel [K, K] of the domains' mean embeddings [K, E]: H M M' H, H = I - 1/K."""
    centred = means_KE - means_KE.mean(axis=0)
    return centred @ centred.T


def leverage(gram_KK: Floats, ridge: float = _RIDGE) -> Floats:
    """Return S = diag(G (G + ridge K I)^-1), normalized to sum 1 [K].

    Args:
        gram_KK: Kernel of the domains [K, K], symmetric and positive semi-definite.
        ridge: lambda; it is multiplied by the number of domains.

    Raises:
        DataError: The kernel is not finite, or zero: all domains look alike.
    """
    num = len(gram_KK)
    if gram_KK.shape != (num, num) or num < 2 or not np.isfinite(gram_KK).all():
        raise DataError(f"the kernel of the domains must be finite and square, at least 2 x 2, found {gram_KK.shape}")
    raw = np.diag(np.linalg.solve(gram_KK + ridge * num * np.eye(num), gram_KK)).copy()
    raw[raw < 0] = 0.0  # rounding
    if not raw.sum() > _LEAST:
        raise DataError("the domains' mean embeddings are all alike, so that nothing tells the domains apart")
    return raw / raw.sum()


def leverage_weights(scores_K: Floats, purpose: Purpose, names: tuple[str, ...] = ()) -> Floats:
    """Return proportions [K]: softmax((1/S) / 5) for pre-training, softmax(S / 0.2) for fine-tuning.

    Raises:
        DataError: A score is near 0, where 1/S has no meaning: that domain is the mean of all.
    """
    if purpose == "finetuning":
        logits = scores_K / 0.2
    else:
        least = int(scores_K.argmin())
        if scores_K[least] < _LEAST:
            name = names[least] if names else f"number {least}"
            raise DataError(
                f"domain {name} is the mean of all domains up to rounding (score {scores_K[least]:.2g}), so that its "
                "pre-training weight is not defined; use more samples, another model, or --purpose finetuning"
            )
        logits = (1.0 / scores_K) / 5.0
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


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


def sample_texts(texts: Sequence[str], most: int, seed: int, name: str) -> list[str]:
    """Return at most ``most`` texts, drawn without replacement, in their order."""
    if len(texts) <= most:
        return list(texts)
    chosen = stream(seed, f"mixing.texts.{name}").choice(len(texts), size=most, replace=False)
    return [texts[place] for place in sorted(chosen.tolist())]
