"""What can be said about the data sets from ``dataset_info.json`` and the files, without tokenizing anything.

Follows LLaMA-Factory's reading of ``dataset``, ``dataset_dir``, ``max_samples`` and ``val_size``.
Rows are counted in local files only, where that is quick; the count is an upper bound, since rows without an
answer are dropped when they are tokenized.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex.config.contents import contents_of
from dataflex.config.convert import shown
from dataflex.config.entries import entry_problems, file_problems
from dataflex.config.values import number, truthy
from dataflex.errors import did_you_mean

__all__ = [
    "INFO_FILE",
    "REMOTE_KEYS",
    "Source",
    "count_bytes",
    "count_rows",
    "data_sets",
    "empty_names",
    "find_sources",
    "packed",
    "target_data_sets",
    "tokenized",
    "train_rows",
]

INFO_FILE = "dataset_info.json"

REMOTE_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_SPLIT = re.compile(r"train\[(-?\d+%?)?:(-?\d+%?)?\]")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set of the run.

    Attributes:
        name: Its name in ``dataset_info.json``.
        path: Its local file or folder; None for one from a hub, a script or the cloud.
        num_samples: Number of rows that ``dataset_info.json`` asks to be drawn from it.
        split: Part of it that ``dataset_info.json`` names, such as "train" or "train[:10%]".
    """

    name: str
    path: Path | None = None
    num_samples: int | None = None
    split: str = "train"


def data_sets(value: Any) -> tuple[str, ...]:
    """Return the names in LLaMA-Factory's ``dataset``: a list, or text with commas."""
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list | tuple):
        return ()
    return tuple(str(name).strip() for name in value if str(name).strip())


def target_data_sets(target: str) -> tuple[str, ...]:
    """Return the data sets of one target: ``"a"`` is one, ``"a + b"`` the rows of both as one target."""
    return tuple(name.strip() for name in target.split(" + "))


def empty_names(value: Any) -> str:
    """Return why a value of ``dataset`` or ``eval_dataset`` cannot be read as names of data sets, or an empty text."""
    given = value.split(",") if isinstance(value, str) else value
    if given is None:
        return ""
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        return f"expected the names of data sets, with commas between them, found {shown(value)}"
    if all(name.strip() for name in given):
        return ""
    return f"a name is empty in {shown(value)}; write one comma between two names"


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
        source, found = _source(name, info[name], Path(str(folder)), key, lf.get("stage", "sft"))
        problems += found
        if not found:
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


def _source(name: str, entry: Any, folder: Path, key: str, stage: str | None) -> tuple[Source, list[str]]:
    source = Source(name=name)
    if not isinstance(entry, Mapping):
        return source, [
            f"{key}: {name!r} in {folder / INFO_FILE} must be a mapping with 'file_name' or a hub's address"
        ]
    asked = entry.get("num_samples")
    samples = asked if isinstance(asked, int) and not isinstance(asked, bool) else None
    if any(entry.get(remote) for remote in REMOTE_KEYS):
        problems = [f"{key}: {name!r} {problem}" for problem in entry_problems(entry, None, stage)]
        return Source(name=name, num_samples=samples), problems
    if not isinstance(entry.get("file_name"), str):
        return source, [f"{key}: {name!r} in {folder / INFO_FILE} has neither 'file_name' nor a hub's address"]
    path = folder / entry["file_name"]
    if not path.exists():
        return source, [f"{key}: the file of {name!r} is missing: {path}"]
    if path.is_dir() and not any(path.iterdir()):
        return source, [f"{key}: the folder of {name!r} is empty: {path}"]
    problems = [*file_problems(path)] or [*entry_problems(entry, path, stage)]
    found = Source(name=name, path=path, num_samples=samples, split=str(entry.get("split") or "train"))
    return found, [f"{key}: {name!r} {problem}" for problem in problems]


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def count_rows(source: Source, lf: Mapping[str, Any]) -> int | None:
    """Return how many rows a data set gives at most, or None when that is not quick.

    Its ``split`` and ``num_samples`` and the run's ``max_samples`` are respected.
    """
    rows = _rows_of_files(source)
    kept = None if rows is None else _kept(source.split, rows)
    if kept is None:
        return None
    if source.num_samples is not None and kept and not truthy(lf, "streaming"):
        kept = source.num_samples
    most = lf.get("max_samples")
    return min(kept, most) if isinstance(most, int) and not isinstance(most, bool) else kept


def count_bytes(source: Source, lf: Mapping[str, Any]) -> int | None:
    """Return the bytes of the rows that ``count_rows`` counts, or None when that is not quick.

    Of a part of one file of lines from its beginning, those bytes; of any other part, its share of all bytes.
    """
    if source.path is None:
        return None
    files = _files(source.path)
    total = sum(file.stat().st_size for file in files)
    if source.split == "train" and source.num_samples is None and lf.get("max_samples") is None:
        return total
    rows, kept = _rows_of_files(source), count_rows(source, lf)
    if rows is None or kept is None:
        return None
    if kept >= rows and source.num_samples is None:
        return total
    head = _head_bytes(files[0], kept) if len(files) == 1 and source.num_samples is None else None
    if head is not None and source.split == "train":
        return head
    return round(total * kept / rows) if rows else 0


def _rows_of_files(source: Source) -> int | None:
    if source.path is None:
        return None
    counts = [found.rows for found in contents_of(source.path).values()]
    return None if any(count is None for count in counts) else sum(count for count in counts if count is not None)


def _kept(split: str, rows: int) -> int | None:
    """Return how many of ``rows`` rows a split such as "train[:10%]" names; None where that cannot be told."""
    if split == "train":
        return rows
    match = _SPLIT.fullmatch(split)
    if match is None:
        return None
    places = [0, rows]
    for at, text in enumerate(match.groups()):
        if text:
            place = round(rows * int(text[:-1]) / 100) if text.endswith("%") else int(text)
            places[at] = min(max(place + rows if text.startswith("-") else place, 0), rows)
    return max(places[1] - places[0], 0)


def _head_bytes(file: Path, rows: int) -> int | None:
    """Return the bytes of the first rows of a file of lines; None where a line is no row."""
    if file.suffix.lower() not in (".jsonl", ".json", ".txt"):
        return None
    text, total = file.suffix.lower() == ".txt", 0
    with file.open("rb") as lines:
        for line in lines:
            if not rows:
                break
            if not total and line.lstrip().startswith(b"[") and not text:
                return None
            total += len(line)
            rows -= bool(text or line.strip())
    return total


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
    """Whether the run reads a tokenized copy instead of the data sets."""
    path = lf.get("tokenized_path")
    return isinstance(path, str) and os.path.isdir(path) and bool(os.listdir(path))
