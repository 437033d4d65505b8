"""The data sets of a run, as far as ``dataset_info.json`` and the files tell without tokenizing anything.

Three questions: what a local file holds (rows, columns, why it cannot be read; as the readers of ``datasets`` do),
what LLaMA-Factory's loader would refuse of an entry (as its ``data.parser`` and ``data.converter`` do), and which rows
a run gets of it (as it reads ``dataset``, ``dataset_dir``, ``max_samples`` and ``val_size``). Rows are counted in local
files only, where that is quick; the count is an upper bound, since rows without a response are dropped when they are
tokenized.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.mappings import shown
from dataflex.errors import did_you_mean

_MOST_READ_BYTES = 32 << 20
_MOST_COUNTED_BYTES = 256 << 20
_SPACE = " \t\n\r"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What was found in a file.

    Attributes:
        rows: Number of rows; None where that is not quick to know.
        columns: Names of the columns; None where they are not known.
        problem: Why it cannot be read, or an empty string.
    """

    rows: int | None = None
    columns: frozenset[str] | None = None
    problem: str = ""


def contents_of(path: Path) -> dict[Path, Contents]:
    """Return what the files of a data set hold, by file, in the order of their names.

    Remembered while size and time of change stay the same. The files are read through only where all of them together
    are of moderate size.
    """
    found: dict[Path, Contents] = {}
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    try:
        states = [file.stat() for file in files]
        through = sum(state.st_size for state in states) <= _MOST_READ_BYTES
        for file, state in zip(files, states, strict=True):
            found[file] = _contents(file, state.st_size, state.st_mtime_ns, through)
    except OSError as error:
        found[Path(str(error.filename or path))] = Contents(problem=f"cannot be read: {error.strerror}")
    return found


@lru_cache(maxsize=256)
def _contents(file: Path, size: int, changed: int, through: bool) -> Contents:
    ending = file.suffix
    if size == 0:
        return Contents(rows=0, columns=frozenset())
    if ending == ".parquet":
        return _parquet(file)
    try:
        if ending == ".csv":
            return _csv(file)
        if ending == ".txt":
            rows = sum(1 for _ in _lines(file)) if size <= _MOST_COUNTED_BYTES else None
            return Contents(rows=rows, columns=frozenset({"text"}))
        if ending not in (".json", ".jsonl"):
            return Contents()
        return _json(file.read_bytes().decode("utf-8-sig")) if through else _large_json(file, size)
    except UnicodeDecodeError as error:
        return Contents(problem=f"is not UTF-8 text (byte {error.start:,})")
    except (RecursionError, ValueError):
        return Contents()  # deeper, or of longer numbers, than Python reads: the loader may do better


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        yield from stream


def _large_json(file: Path, size: int) -> Contents:
    first = next((line for line in _lines(file) if line.strip()), b"")
    if size > _MOST_COUNTED_BYTES or not _is_object(first):
        return Contents()
    return Contents(rows=sum(1 for line in _lines(file) if line.strip()))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _json(text: str) -> Contents:
    """Read an array of objects, or objects one after the other."""
    if text.lstrip(_SPACE).startswith("["):
        try:
            items = json.loads(text, strict=False)
        except json.JSONDecodeError as error:
            return Contents(problem=f"is malformed JSON at line {error.lineno:,}: {error.msg}")
        return _rows([(f"item {i:,}", item) for i, item in enumerate(items, start=1)])
    found: list[tuple[str, Any]] = []
    at, line, spans = 0, 1, False
    decoder = json.JSONDecoder()
    while True:
        while at < len(text) and text[at] in _SPACE:
            line += text[at] == "\n"
            at += 1
        if at == len(text):
            told = _rows(found)  # objects of several lines may be cut where a reader's block ends
            return replace(told, rows=None) if spans else told
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            return Contents(problem=f"is malformed JSON at line {error.lineno:,}: {error.msg}")
        if not isinstance(value, dict):
            return Contents(problem=f"line {line:,} holds {_kind(value)} where an object {{...}} is expected")
        found.append((f"line {line:,}", value))
        lines = text.count("\n", at, end)
        spans, line = spans or lines > 0, line + lines
        at = end


def _rows(items: list[tuple[str, Any]]) -> Contents:
    """Return the columns of rows that are told as ``line 3`` and the like; every column must be of one type."""
    if any(not isinstance(item, dict) for _, item in items):
        return Contents(rows=len(items))
    seen: dict[str, tuple[str, str]] = {}
    columns: set[str] = set()
    for place, row in items:
        columns.update(row)
        for name, value in row.items():
            kind = _kind(value)
            if value is None or seen.setdefault(name, (kind, place))[0] == kind:
                continue
            before, first = seen[name]
            return Contents(problem=f"{name!r} is {before} in {first} and {kind} in {place}; a column has one type")
    return Contents(rows=len(items), columns=frozenset(columns))


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else "a mapping" if isinstance(value, Mapping) else "a list"


def _csv(file: Path) -> Contents:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream)
        try:
            head, second = next(reader, []), next(reader, None)
        except csv.Error as error:
            return Contents(problem=f"is malformed CSV: {error}")
    return Contents(rows=0 if second is None else None, columns=frozenset(head))


def _parquet(file: Path) -> Contents:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(os.fspath(file)) as opened:
            return Contents(rows=opened.metadata.num_rows, columns=frozenset(opened.schema_arrow.names))
    except (pa.ArrowException, OSError) as error:
        return Contents(problem=f"is no readable Parquet: {str(error).splitlines()[0]}")


ENDINGS = (".arrow", ".csv", ".json", ".jsonl", ".parquet", ".txt")
_FORMATS = ("alpaca", "sharegpt", "openai")
_KINDS = {".jsonl": ".json"}
_MARKS_OF_SAVED = ("state.json", "dataset_dict.json")
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_CHAT = {"messages": "conversations"}
_ANY = ("system", "tools", "images", "videos", "audios")
_LENIENT = ("system", "tools")
"""Columns that the openai format does without."""


def file_problems(path: Path) -> Iterator[str]:
    """Yield why the file or the folder of a data set cannot be read; the first reason only, as what it does or is."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if path.is_dir() and any((path / mark).is_file() for mark in _MARKS_OF_SAVED):
        yield (
            f"lies in {path}, which 'save_to_disk' wrote and LLaMA-Factory does not read as a data set; write its rows "
            "to a .jsonl or .parquet file"
        )
        return
    for file in files:
        if file.is_dir():
            yield f"lies in {path}, which holds a folder, {file.name}; name the folder of the files itself"
            return
        if file.suffix not in ENDINGS:
            low = " (in small letters)" if file.suffix.lower() in ENDINGS else ""
            yield f"cannot be read from {file}: its name must end in {', '.join(ENDINGS)}{low}"
            return
    kinds = {_KINDS.get(file.suffix, file.suffix): file.name for file in files}
    if len(kinds) > 1:
        yield f"lies in {path}, which holds files of several types ({', '.join(sorted(kinds.values()))}); keep one"
        return
    for file, found in contents_of(path).items():
        if found.problem:
            yield f"cannot be read: {file} {found.problem}"
            return


def entry_problems(entry: Mapping[str, Any], path: Path | None, stage: str | None) -> Iterator[str]:
    """Yield what is wrong with an entry, as what it does or is: format, stage, columns that its rows do not have.

    Args:
        entry: What ``dataset_info.json`` says of the data set.
        path: Its file or folder; None for one that is not in local files.
        stage: LLaMA-Factory's stage; None where something else is wrong with it.
    """
    formatting, ranking = entry.get("formatting") or "alpaca", entry.get("ranking", False)
    if formatting not in _FORMATS:
        near = did_you_mean(str(formatting), _FORMATS)
        yield f"has 'formatting': {formatting!r}, which is not a format{near} (choices: {', '.join(_FORMATS)})"
        return
    if stage in ("rm", "dpo") and ranking is False:
        yield f"is not marked 'ranking: true', and stage {stage} takes pairs of answers"
    elif stage not in ("rm", "dpo", None) and ranking is True:
        yield f"holds pairs of answers ('ranking: true'), which stage {stage} does not take"
    number = entry.get("num_samples")
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
        yield f"has 'num_samples': expected a whole number of at least 1, found {number!r}"
    for key in ("columns", "tags"):
        if key in entry and not isinstance(entry[key], Mapping):
            yield f"has {key!r}: expected a mapping, found {entry[key]!r}"
            return
    if path is None:
        return
    split = str(entry.get("split") or "train")
    if re.split(r"[\[+]", split)[0] != "train":
        yield f"has 'split': {split!r}, and rows of local files are all of the split train"
    known = columns_of(path)
    if known is None:
        return
    for key, column in _needed(entry, formatting, ranking is True):
        if column is None:
            yield f"does not say in 'columns' which one holds the {key} (columns found: {_listed(known)})"
        elif column not in known:
            near = did_you_mean(str(column), sorted(known))
            yield f"has no column {column!r} for the {key}{near} (columns found: {_listed(known)})"


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def columns_of(path: Path) -> frozenset[str] | None:
    """Return the columns of a data set's files together; None where they, or whether it has rows, are not known."""
    found = contents_of(path).values()
    if not any(each.columns for each in found):
        return None
    columns: frozenset[str] = frozenset()
    for each in found:
        if each.columns is None:
            return None
        columns |= each.columns
    return columns


def _needed(entry: Mapping[str, Any], formatting: str, ranking: bool) -> Iterator[tuple[str, Any]]:
    """Yield key and column of everything that is looked up in each row."""
    given = entry.get("columns")
    names: Mapping[str, Any] = given if given is not None else {**_ALPACA, **_CHAT}
    if formatting == "alpaca":
        keys = ["prompt", "query", "history"]
    else:
        keys = ["messages"]
        if names.get("messages") is None:
            yield "messages", None
    if names.get("kto_tag"):
        keys.append("kto_tag")
    if ranking:
        keys += ["chosen", "rejected"]
    elif formatting == "alpaca":
        keys.append("response")
    keys += [key for key in _ANY if not (formatting == "openai" and key in _LENIENT)]
    for key in keys:
        if names.get(key):
            yield key, names[key]


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
    names: Sequence[str], lf: LlamaFactoryArgs, key: str, base_dir: Path
) -> tuple[list[Source], list[str]]:
    """Return the data sets that could be found, and one line per problem.

    Args:
        names: Names of data sets.
        lf: LLaMA-Factory's keys.
        key: Path of the key that names them, for messages.
        base_dir: Folder of the configuration file, where a misplaced ``dataset_dir`` often is.
    """
    folder: Any = lf.dataset_dir
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
        source, found = _source(name, info[name], Path(str(folder)), key, lf.stage or None)
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


def count_rows(source: Source, lf: LlamaFactoryArgs) -> int | None:
    """Return how many rows a data set gives at most, or None when that is not quick.

    Its ``split`` and ``num_samples`` and the run's ``max_samples`` are respected.
    """
    rows = _rows_of_files(source)
    kept = None if rows is None else _kept(source.split, rows)
    if kept is None:
        return None
    if source.num_samples is not None and kept and not lf.streaming:
        kept = source.num_samples
    return kept if lf.max_samples is None else min(kept, lf.max_samples)


def count_bytes(source: Source, lf: LlamaFactoryArgs) -> int | None:
    """Return the bytes of the rows that ``count_rows`` counts, or None when that is not quick.

    Of a part of one file of lines from its beginning, those bytes; of any other part, its share of all bytes.
    """
    if source.path is None:
        return None
    files = _files(source.path)
    total = sum(file.stat().st_size for file in files)
    if source.split == "train" and source.num_samples is None and lf.max_samples is None:
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


def train_rows(counts: Sequence[int | None], lf: LlamaFactoryArgs) -> int | None:
    """Return the rows left to train on once ``val_size`` is set aside, or None when a count is unknown."""
    if not counts or any(count is None for count in counts):
        return None
    rows = sum(count for count in counts if count is not None)
    held = lf.val_size
    if held <= 1e-6:
        return rows
    return max(0, rows - (int(held) if held > 1 else math.ceil(rows * held)))
