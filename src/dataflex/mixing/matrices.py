"""Files of numbers that ``mixmin`` and ``chameleon`` read and write instead of asking models again."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError

__all__ = ["read_embeddings", "read_matrix", "write_embeddings", "write_matrix"]

Floats = NDArray[np.float64]

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
    from dataflex.record.values import replacing

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
