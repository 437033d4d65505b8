"""Weights of domains whose proxies together explain a target best (MixMin, Thudi et al., ICML 2025, arXiv 2502.10510).

F(w) = -mean_x [ log sum_d w_d p_d(x) / len(x) ] is convex in w. Minimized by exponentiated gradient
from equal weights: w <- w exp(-lr grad F), renormalized.
"""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.rng import stream
from dataflex.state import replacing

__all__ = [
    "Weights",
    "check_matrix",
    "objective",
    "read_embeddings",
    "read_matrix",
    "solve",
    "split_rows",
    "write_embeddings",
    "write_matrix",
]

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What ``solve`` found.

    Attributes:
        weights: float64 [K] on the simplex.
        value: F there, in nats per token.
        gap: Most by which F exceeds its minimum.
        steps: Steps taken.
    """

    weights: Floats
    value: float
    gap: float
    steps: int


def check_matrix(loglik_NK: Floats, lengths_N: Floats) -> None:
    """Raise unless the numbers are log-likelihoods of texts.

    Raises:
        DataError: Wrong shapes, NaN, a positive log-likelihood of discrete text, or an empty text.
    """
    if loglik_NK.ndim != 2 or loglik_NK.shape[1] < 2 or len(loglik_NK) < 1:
        raise DataError(f"log-likelihoods: expected [texts, domains >= 2], found shape {list(loglik_NK.shape)}")
    if lengths_N.shape != loglik_NK.shape[:1]:
        raise DataError(f"lengths: expected one per text ({len(loglik_NK)}), found shape {list(lengths_N.shape)}")
    bad = ~np.isfinite(loglik_NK)
    if bad.any():
        row, column = map(int, np.argwhere(bad)[0])
        raise DataError(f"log-likelihoods: {int(bad.sum())} are not finite, the first of text {row}, domain {column}")
    if not (np.isfinite(lengths_N) & (lengths_N > 0)).all():
        raise DataError("lengths: every text needs a length in tokens above 0")


def objective(weights_K: Floats, loglik_NK: Floats, lengths_N: Floats) -> tuple[float, Floats]:
    """Return F in nats per token, and its gradient [K].

    Args:
        weights_K: Weights >= 0, sum 1 [K].
        loglik_NK: Log-likelihood of each text under each domain's proxy [N, K], in nats.
        lengths_N: Tokens of each text [N].
    """
    top_N = loglik_NK.max(axis=1, keepdims=True)
    ratio_NK = np.exp(loglik_NK - top_N)
    mixed_N = ratio_NK @ weights_K
    with np.errstate(divide="ignore"):
        value = -float(((np.log(mixed_N) + top_N[:, 0]) / lengths_N).mean())
    with np.errstate(divide="ignore", invalid="ignore"):
        gradient = -(ratio_NK / (mixed_N * lengths_N)[:, None]).mean(axis=0)
    return value, gradient


def solve(
    loglik_NK: Floats, lengths_N: Floats, *, rate: float = 1.0, most_steps: int = 100, tolerance: float = 1e-4
) -> Weights:
    """Minimize F.

    Args:
        loglik_NK: Log-likelihoods [N, K].
        lengths_N: Tokens of each text [N].
        rate: Step size.
        most_steps: Steps after which to stop.
        tolerance: Gap (in nats per token) at which to stop. By convexity F - min F <= <grad, w> - min grad.
    """
    weights = np.full(loglik_NK.shape[1], 1.0 / loglik_NK.shape[1])
    steps = 0
    while True:
        value, gradient = objective(weights, loglik_NK, lengths_N)
        gap = float(weights @ gradient - gradient.min())
        if gap <= tolerance or steps == most_steps:
            return Weights(weights=weights, value=value, gap=max(gap, 0.0), steps=steps)
        logs = -rate * (gradient - gradient.min())
        weights = weights * np.exp(logs)
        weights /= weights.sum()
        steps += 1


def split_rows(num_rows: int, test_share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return row numbers to fit and to test on, disjoint; 0.2 is the paper's share of the latter."""
    order = stream(seed, "mixing.mixmin").permutation(num_rows)
    num_test = round(test_share * num_rows)
    return np.sort(order[num_test:]), np.sort(order[:num_test])


_LENGTH = "length"


def read_matrix(path: Path) -> tuple[tuple[str, ...], Floats, Floats]:
    """Return the domains [K], log-likelihoods [N, K] and lengths in tokens [N] of a saved matrix.

    Args:
        path: An .npz with ``names``, ``log_likelihoods``, ``lengths``; or a .csv with a column per domain and one
            called ``length``.

    Raises:
        DataError: The file is missing, malformed, or its shapes do not fit.
    """
    if path.suffix == ".npz":
        arrays = _arrays(path)
        missing = [key for key in ("names", "log_likelihoods", "lengths") if key not in arrays]
        if missing:
            raise DataError(f"{path}: lacks {', '.join(missing)}")
        names = tuple(str(name) for name in arrays["names"])
        loglik, lengths = _numbers(path, arrays["log_likelihoods"]), _numbers(path, arrays["lengths"])
    elif path.suffix == ".csv":
        names, loglik, lengths = _from_csv(path)
    else:
        raise DataError(f"{path}: must end in .npz or .csv")
    if len(set(names)) < len(names):
        raise DataError(f"{path}: names a domain twice: {', '.join(names)}")
    if loglik.ndim != 2 or loglik.shape[1] != len(names):
        raise DataError(f"{path}: {len(names)} names, but log-likelihoods of shape {list(loglik.shape)}")
    return names, loglik, lengths


def _from_csv(path: Path) -> tuple[tuple[str, ...], Floats, Floats]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if line]
        head = [cell.strip() for cell in lines[0]] if lines else []
        if _LENGTH not in head:
            raise DataError(f"{path}: lacks a column {_LENGTH!r} with the tokens of each text")
        table = np.asarray([[float(cell) for cell in line] for line in lines[1:]], dtype=np.float64)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a table of numbers: {error}") from error
    if table.ndim != 2 or table.shape[1] != len(head):
        raise DataError(f"{path}: {len(head)} columns named, but rows of other lengths, or none")
    place = head.index(_LENGTH)
    names = tuple(name for name in head if name != _LENGTH)
    return names, np.delete(table, place, axis=1), table[:, place]


def write_matrix(path: Path, names: tuple[str, ...], loglik_NK: Floats, lengths_N: Floats) -> None:
    """Write what ``read_matrix`` reads, as .npz."""
    _write(path, {"names": np.asarray(names), "log_likelihoods": loglik_NK, "lengths": lengths_N})


def read_embeddings(path: Path) -> tuple[tuple[str, ...], Floats]:
    """Return domains [K] and mean embeddings [K, E] of an .npz with an array per domain: [E], or [samples, E].

    Raises:
        DataError: The file is missing or malformed, or embeddings are not finite or of different widths.
    """
    if path.suffix != ".npz":
        raise DataError(f"{path}: must end in .npz")
    means = {}
    for name, array in _arrays(path).items():
        numbers = _numbers(path, array)
        if numbers.ndim not in (1, 2) or not numbers.size:
            raise DataError(f"{path}: {name} has shape {list(numbers.shape)}, expected [width] or [samples, width]")
        means[name] = numbers if numbers.ndim == 1 else numbers.mean(axis=0)
        if not np.isfinite(means[name]).all():
            raise DataError(f"{path}: {name} holds numbers that are not finite")
    widths = {len(mean) for mean in means.values()}
    if len(means) < 2 or len(widths) != 1:
        raise DataError(f"{path}: needs two domains or more with embeddings of one width, found {len(means)}")
    return tuple(means), np.stack(list(means.values()))


def write_embeddings(path: Path, names: tuple[str, ...], means_KE: Floats) -> None:
    """Write what ``read_embeddings`` reads."""
    _write(path, dict(zip(names, means_KE, strict=True)))


def _write(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    if path.suffix != ".npz":
        raise DataError(f"{path}: must end in .npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:  # np.savez takes no name such as "file"
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def _arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _numbers(path: Path, array: NDArray[np.generic]) -> Floats:
    try:
        return np.asarray(array, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: holds what are not numbers: {error}") from error
