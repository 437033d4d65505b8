"""What goes into the record as a value: JSON-safe numbers, summaries of score arrays, whole files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.plan.domains import Rows
from dataflex.state import aside

__all__ = ["plain", "replacing", "scores_of", "summarize_scores"]

_QUANTILES = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file beside ``path`` that takes its place when the block ends well, and vanishes otherwise.

    Raises:
        DataError: The place cannot be written.
    """
    temporary: Path | None = None
    try:
        temporary = aside(path)
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # never through a link that lies there
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def plain(value: Any, path: str = "", nonfinite: list[str] | None = None) -> Any:
    """Turn a value into what JSON can hold; the dotted keys of NaN and infinities go to ``nonfinite``.

    Numpy and torch scalars and arrays become numbers and lists, sets become sorted lists, and
    whatever JSON has no word for (paths, dtypes, objects of a configuration) becomes its text.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        if nonfinite is not None:
            nonfinite.append(path)
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{path}.{key}" if path else str(key), nonfinite) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if isinstance(value, list | tuple):
        return [plain(item, f"{path}.{number}", nonfinite) for number, item in enumerate(value)]
    as_list = getattr(value, "tolist", None)  # numpy's and torch's own way; torch itself is not imported here
    if callable(as_list):
        return plain(as_list(), path, nonfinite)
    return str(value)


def summarize_scores(scores: NDArray[np.floating]) -> dict[str, float | int | None]:
    """Summarize scores [n]: count, scored (finite ones), mean, std, min, p05 p25 p50 p75 p95, max.

    NaN and infinities count as not scored. Statistics of no score at all are None.
    """
    values = np.asarray(scores, dtype=np.float64).ravel()
    finite = values[np.isfinite(values)]
    known: dict[str, float | int | None] = {"count": int(values.size), "scored": int(finite.size)}
    names = ("mean", "std", "min", *_QUANTILES, "max")
    if not finite.size:
        return {**known, **dict.fromkeys(names)}
    quantiles = np.quantile(finite, list(_QUANTILES.values()))
    numbers = (finite.mean(), finite.std(), finite.min(), *quantiles, finite.max())
    return {**known, **{name: float(number) for name, number in zip(names, numbers, strict=True)}}


def scores_of(rows: Rows, pool: Rows | None, scores: NDArray[np.floating]) -> NDArray[np.floating]:
    """Scores of ``rows`` [m], given the scores [n] of the rows of ``pool`` [n]; rows outside the pool are left out.

    A pool of None is every row, in order.
    """
    if pool is None:
        return scores[rows]
    order = np.argsort(pool, kind="stable")
    place = np.minimum(np.searchsorted(pool, rows, sorter=order), max(len(pool) - 1, 0))
    found = order[place] if len(pool) else np.zeros(0, dtype=np.int64)
    return scores[found[pool[found] == rows]] if len(pool) else scores[:0]
