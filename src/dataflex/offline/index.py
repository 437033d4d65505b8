"""An index on disk: what 'dataflex score --index' leaves, and 'dataflex query' reads.

A folder with ``rows.parquet`` (the rows, as scores without a column), ``fingerprints.npy`` (a hash of each row's
tokens), ``sample`` (a few of the rows, tokenized), ``store`` (by checkpoint the rows' sketches and what they were
projected by, memory-mapped) and ``index.json``, which is written last: a folder without it is not finished.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.score_table import ScoreTable, read_scores
from dataflex.state import is_unfinished, read_json, refusals, replacing, write_json
from dataflex.storage import place_problem

TOLD, ROWS, FINGERPRINTS, SAMPLE = "index.json", "rows.parquet", "fingerprints.npy", "sample"
STORE, WORK = "store", "work"
_OURS = (TOLD, ROWS, FINGERPRINTS, SAMPLE, STORE, WORK)
_FORMAT = 1
_NORMAL = 1.96
_BEST = 0.1


@dataclass(frozen=True, kw_only=True)
class Part:
    """The arrays of one checkpoint.

    Attributes:
        checkpoint: Folder of the checkpoint; None for the model as the configuration names it.
        rate: Learning rate of its next step, its weight among several.
        model: Identity of the model's weights.
        rows: Folder of the rows' sketches in the store.
        projection: Folder of what wide sketches are projected by.
    """

    checkpoint: str | None
    rate: float
    model: str
    rows: str
    projection: str


@dataclass(frozen=True, kw_only=True)
class Index:
    """An index that is whole.

    Attributes:
        folder: Where it lies.
        lf: LLaMA-Factory's keys that it was made with.
        params: Parameters of the method, as JSON values.
        seed: Seed of sketches and decisions.
        wide: Numbers of a wide sketch.
        parts: Its checkpoints, in order.
        sample: Places of the rows in ``sample`` [n], ascending.
    """

    folder: Path
    lf: Mapping[str, Any]
    params: Mapping[str, Any]
    seed: int
    wide: int
    parts: tuple[Part, ...]
    sample: NDArray[np.int64]

    def table(self) -> ScoreTable:
        """Return the rows, without a column."""
        return read_scores(self.folder / ROWS)

    def rows(self, part: Part) -> NDArray[np.void]:
        """Return the rows' sketches under one checkpoint, memory-mapped; see ``projection.row_type``."""
        return self.array(part.rows)

    def array(self, name: str) -> NDArray[Any]:
        """Return an array of the store, memory-mapped."""
        path = self.folder / STORE / name / "array.npy"
        try:
            found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: is missing or damaged; write the index again: {error}") from error
        return found


def write_told(index: Index) -> None:
    """Write ``index.json``, which makes the folder an index; DataError where it cannot be written."""
    told = {**asdict(index), "format": _FORMAT, "folder": None, "sample": index.sample.tolist()}
    with refusals(index.folder / TOLD, DataError, key="--index"), replacing(index.folder / TOLD, None) as file:
        file.write((json.dumps(told, indent=1, default=str) + "\n").encode())


def read_index(folder: Path) -> Index:
    """Read an index; DataError where there is none, it is not finished, or a part of it is missing."""
    path = folder / TOLD
    if not path.is_file():
        if folder.is_dir() and (folder / STORE).is_dir():
            raise DataError(f"{folder}: the index is not finished; give its 'dataflex score' command again")
        raise DataError(f"{folder}: is no index; one is written by 'dataflex score ... --method less --index {folder}'")
    try:
        told = read_json(path)
        if told["format"] != _FORMAT:
            raise ValueError(f"its format is {told['format']!r}, and this version reads {_FORMAT}")
        parts = tuple(Part(**part) for part in told["parts"])
        index = Index(
            folder=folder,
            lf=dict(told["lf"]),
            params=dict(told["params"]),
            seed=int(told["seed"]),
            wide=int(told["wide"]),
            parts=parts,
            sample=np.array(told["sample"], dtype=np.int64),
        )
        if not parts:
            raise ValueError("it names no checkpoint")
    except Exception as error:  # whatever a damaged file leads to
        raise DataError(f"{path}: cannot be read: {type(error).__name__}: {str(error)[:300]}") from error
    num_rows = index.table().num_rows
    for part in index.parts:
        if len(index.rows(part)) != num_rows or len(index.array(part.projection)) != index.wide:
            raise DataError(f"{folder}: its files are of different sizes; write the index again")
    for name in (SAMPLE, FINGERPRINTS):
        if not (folder / name).exists():
            raise DataError(f"{folder}: {name} is missing; write the index again")
    return index


def write_bergson(folder: Path, rows: Iterable[NDArray[np.float32]], count: int, size: int) -> None:
    """Write ``count`` rows of gradients, given as blocks [b, size], as the gradient store of EleutherAI's bergson.

    ``gradients.bin`` has the numbers row after row, and ``info.json`` their shape: ``base_dtype`` for bergson 2,
    ``dtype`` for versions before, which map a structure of the parts in ``grad_sizes``.
    """
    told = {
        "attribute_tokens": False,
        "num_items": count,
        "num_grads": count,
        "grad_sizes": {"gradients": size},
        "base_dtype": "float32",
        "dtype": {"names": ["gradients"], "formats": [f"({size},)<f4"], "itemsize": 4 * size},
    }
    with refusals(folder, DataError, key="--bergson"):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "gradients.bin", None) as file:
            for block in rows:
                file.write(block.astype("<f4").tobytes())
    write_json(folder / "info.json", told)


def index_problems(folder: Path) -> list[str]:
    """Return why an index could not be written there."""
    if folder.suffix == ".parquet":
        return [f"--index: {folder} is to be a folder; scores in a file are written with --out"]
    if folder.exists() and not folder.is_dir():
        return [f"--index: {folder} is a file, not a folder"]
    foreign = [path.name for path in folder.iterdir() if not _is_ours(path.name)] if folder.is_dir() else []
    if foreign:
        return [f"--index: {folder} holds {sorted(foreign)[0]}, which is no part of an index; name another folder"]
    told = place_problem(folder / TOLD)
    return [f"--index: {told}"] if told else []


def _is_ours(name: str) -> bool:
    return name in _OURS or is_unfinished(name)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well scores of an index agree with exact ones on a sample of n rows.

    Attributes:
        rows: Rows compared, those with both scores.
        correlation: Spearman's rank correlation.
        overlap: Share of the exact best tenth that is in the index's best tenth.
        low: Lower end of the overlap's 95 % interval (Wilson 1927).
        high: Its upper end.
    """

    rows: int
    correlation: float
    overlap: float
    low: float
    high: float

    def tell(self) -> str:
        """Return it as one line."""
        return (
            f"on {self.rows} rows of the sample: rank correlation {self.correlation:.3f}, best tenth "
            f"{100 * self.overlap:.0f} % the same (95 % interval {100 * self.low:.0f} to {100 * self.high:.0f} %)"
        )


def agreement(exact: NDArray[np.floating], found: NDArray[np.floating]) -> Agreement | None:
    """Compare scores of the same rows [n]; None where fewer than ten have both."""
    there = np.isfinite(exact) & np.isfinite(found)
    count = int(there.sum())
    if count < 10:
        return None
    exact, found = exact[there].astype(np.float64), found[there].astype(np.float64)
    wanted = round(_BEST * count)
    same = len(np.intersect1d(_best(exact, wanted), _best(found, wanted)))
    share, spread = same / wanted, _NORMAL**2 / wanted
    middle = (share + spread / 2) / (1 + spread)
    half = (spread * share * (1 - share) + spread**2 / 4) ** 0.5 / (1 + spread)
    return Agreement(
        rows=count,
        correlation=_correlation(_ranks(exact), _ranks(found)),
        overlap=share,
        low=max(0.0, middle - half),
        high=min(1.0, middle + half),
    )


def _best(scores: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    return np.argsort(-scores, kind="stable")[:count]


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b) / max((float(a @ a) * float(b @ b)) ** 0.5, 1e-30)


def _ranks(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return ranks [n]; equal scores share the mean of theirs."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: NDArray[np.float64] = ((ends - counts + ends - 1) / 2.0)[inverse]
    return means


def told_agreement(found: Mapping[str, Agreement | None], names: Sequence[str]) -> dict[str, Any]:
    """Return agreements by target as JSON values."""
    return {name: None if (one := found.get(name)) is None else asdict(one) for name in names}
