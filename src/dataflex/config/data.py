"""What can be said about the data sets from ``dataset_info.json`` and the files, without tokenising anything.

Follows LLaMA-Factory's reading of ``dataset``, ``dataset_dir``, ``max_samples`` and ``val_size``.
Rows are counted only in local .json, .jsonl and .txt files of moderate size; the count is an upper
bound, since rows without an answer are dropped when they are tokenised.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dataflex.config.values import number, truthy
from dataflex.errors import did_you_mean

__all__ = [
    "INFO_FILE",
    "REMOTE_KEYS",
    "Source",
    "count_rows",
    "data_sets",
    "find_sources",
    "packed",
    "tokenized",
    "train_rows",
]

INFO_FILE = "dataset_info.json"

REMOTE_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_ENDINGS = (".arrow", ".csv", ".json", ".jsonl", ".parquet", ".txt")
_MOST_LINES_BYTES = 256 << 20
_MOST_ARRAY_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set of the run.

    Attributes:
        name: Its name in ``dataset_info.json``.
        path: Its local file or folder; None for one from a hub, a script or the cloud.
        num_samples: Number of rows that ``dataset_info.json`` asks to be drawn from it.
    """

    name: str
    path: Path | None = None
    num_samples: int | None = None


def data_sets(value: Any) -> tuple[str, ...]:
    """Return the names in LLaMA-Factory's ``dataset``: a list, or text with commas."""
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list | tuple):
        return ()
    return tuple(str(name).strip() for name in value if str(name).strip())


def find_sources(
    names: Sequence[str], lf: Mapping[str, Any], key: str, base_dir: Path
) -> tuple[list[Source], list[str]]:
    """Return the data sets that could be found, and one line per problem.

    Args:
        names: Names of data sets.
        lf: LLaMA-Factory's keys.
        key: Path of the key that names them, for messages.
        base_dir: Folder of the configuration file, where a misplaced ``dataset_dir`` often is.
    """
    folder = lf.get("dataset_dir", "data")
    if isinstance(folder, Mapping):
        info: Any = folder
        folder = "."
    elif str(folder) == "ONLINE" or str(folder).startswith("REMOTE:"):
        return [Source(name=name) for name in names], []
    else:
        info, problem = _info(Path(str(folder)), base_dir)
        if problem:
            return [], [problem]
    sources, problems = [], []
    for name in names:
        if name not in info:
            problems.append(
                f"{key}: {name!r} is not defined in {Path(str(folder)) / INFO_FILE}{did_you_mean(name, list(info))}"
            )
            continue
        source, problem = _source(name, info[name], Path(str(folder)), key)
        if problem:
            problems.append(problem)
        else:
            sources.append(source)
    return sources, problems


def _info(folder: Path, base_dir: Path) -> tuple[Any, str]:
    file = folder / INFO_FILE
    if not file.is_file():
        elsewhere = base_dir / file
        hint = f"; there is {elsewhere}: write 'dataset_dir: {elsewhere.parent}'" if elsewhere.is_file() else ""
        return {}, f"dataset_dir: no such file: {file} (relative to the working directory {Path.cwd()}){hint}"
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        return {}, f"dataset_dir: {file} is malformed JSON at line {error.lineno}, column {error.colno}: {error.msg}"
    except (UnicodeDecodeError, OSError) as error:
        return {}, f"dataset_dir: {file} cannot be read: {error}"
    if not isinstance(info, dict):
        return {}, f"dataset_dir: {file} must map names of data sets to their description"
    return info, ""


def _source(name: str, entry: Any, folder: Path, key: str) -> tuple[Source, str]:
    source = Source(name=name)
    if not isinstance(entry, Mapping):
        return source, f"{key}: {name!r} in {folder / INFO_FILE} must be a mapping with 'file_name' or a hub's address"
    asked = entry.get("num_samples")
    samples = asked if isinstance(asked, int) and not isinstance(asked, bool) else None
    if any(entry.get(remote) for remote in REMOTE_KEYS):
        return Source(name=name, num_samples=samples), ""
    if not isinstance(entry.get("file_name"), str):
        return source, f"{key}: {name!r} in {folder / INFO_FILE} has neither 'file_name' nor a hub's address"
    path = folder / entry["file_name"]
    if not path.exists():
        return source, f"{key}: the file of {name!r} is missing: {path}"
    files = _files(path)
    if not files:
        return source, f"{key}: the folder of {name!r} is empty: {path}"
    strange = [file for file in files if file.suffix.lower() not in _ENDINGS]
    if strange:
        return source, f"{key}: {name!r} cannot be read from {strange[0]}: its name must end in {', '.join(_ENDINGS)}"
    return Source(name=name, path=path, num_samples=samples), ""


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def count_rows(source: Source, lf: Mapping[str, Any]) -> int | None:
    """Return how many rows a data set gives at most, ``max_samples`` respected, or None when that is not quick."""
    if source.path is None:
        return None
    counts = []
    for file in _files(source.path):
        state = file.stat()
        counts.append(_count(file, state.st_size, state.st_mtime_ns))
    if any(count is None for count in counts):
        return None
    rows = sum(count for count in counts if count is not None)
    if source.num_samples is not None and rows:
        rows = source.num_samples
    most = lf.get("max_samples")
    return min(rows, most) if isinstance(most, int) and not isinstance(most, bool) else rows


@lru_cache(maxsize=256)
def _count(file: Path, size: int, changed: int) -> int | None:
    """Return the rows of one file; ``size`` and ``changed`` keep a stale count from being given."""
    ending = file.suffix.lower()
    if ending not in (".json", ".jsonl", ".txt") or size > _MOST_LINES_BYTES:
        return None
    try:
        if ending == ".txt":
            return sum(1 for _ in _lines(file))
        first = next((line for line in _lines(file) if line.strip()), b"")
        if first.lstrip().startswith(b"["):
            return len(json.loads(file.read_bytes())) if size <= _MOST_ARRAY_BYTES else None
        if first and not isinstance(json.loads(first), dict):
            return None
        return sum(1 for line in _lines(file) if line.strip())
    except (ValueError, OSError):
        return None  # not told here: whether a file can be parsed is the loader's to say


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        yield from stream


def packed(lf: Mapping[str, Any]) -> bool:
    """Whether several samples share a row; pre-training packs unless told otherwise."""
    if truthy(lf, "neat_packing"):
        return True
    return lf.get("stage", "sft") == "pt" if lf.get("packing") is None else truthy(lf, "packing")


def train_rows(counts: Sequence[int | None], lf: Mapping[str, Any]) -> int | None:
    """Return the rows left to train on once ``val_size`` is set aside, or None when a count is unknown."""
    if not counts or any(count is None for count in counts):
        return None
    rows = sum(count for count in counts if count is not None)
    held = number(lf, "val_size", 0.0)
    if held <= 1e-6:
        return rows
    return max(0, rows - (int(held) if held > 1 else math.ceil(rows * held)))


def tokenized(lf: Mapping[str, Any]) -> bool:
    """Whether the run reads a tokenised copy instead of the data sets."""
    path = lf.get("tokenized_path")
    return isinstance(path, str) and os.path.isdir(path) and bool(os.listdir(path))
