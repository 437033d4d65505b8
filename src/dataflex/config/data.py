"""The data sets of a run, as far as they are known without tokenizing: ``dataset_info.json`` and the files.

Three questions: what a local file holds (rows, columns, why it cannot be read; as the readers of ``datasets`` do),
what LLaMA-Factory's loader would refuse of an entry or make of its rows (as its ``data.parser``, ``data.converter`` and
processors do), and which rows a run gets of it (as it reads ``dataset``, ``dataset_dir``, ``max_samples`` and
``val_size``). Rows are counted in local files only, where that is quick; the count is an upper bound, since rows
without a response are dropped when they are tokenized.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.mappings import shown
from dataflex.errors import did_you_mean
from dataflex.plan.domains import WANTED_WEIGHTS, unusable_weight
from dataflex.state import read_json

_MOST_READ_BYTES = 32 << 20
_MOST_COUNTED_BYTES = 256 << 20
_SPACE = " \t\n\r"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Rows and columns of a file, None where counting would take long; why it cannot be read."""

    rows: int | None = None
    columns: frozenset[str] | None = None
    problem: str = ""


def contents_of(path: Path) -> dict[Path, Contents]:
    """Return the contents of each file of a data set, in the order in which they are read.

    Remembered while size and time of change stay the same. The files are read through only where all of them together
    are of moderate size.
    """
    found: dict[Path, Contents] = {}
    try:
        states = {file: file.stat() for file in files_of(path)}
        through = sum(state.st_size for state in states.values()) <= _MOST_READ_BYTES
        for file, state in states.items():
            found[file] = _contents(file, state.st_size, state.st_mtime_ns, through)
    except OSError as error:
        found[Path(str(error.filename or path))] = Contents(problem=f"cannot be read: {error.strerror}")
    return found


def files_of(path: Path) -> list[Path]:
    """Return the files of a data set: itself, or those of a folder in the order in which LLaMA-Factory reads them.

    That is the order of ``os.listdir``, by no name: rows are known by their place in the files one after the other.
    """
    return [path / name for name in os.listdir(path)] if path.is_dir() else [path]


_NUMBERED = re.compile(r"(.*-)(\d+)(-of-)(\d+)(.*)", re.DOTALL)


def missing_shards(files: Iterable[str]) -> list[str]:
    """Return the shards that are not among files named ``...-00001-of-00003...``, where another of the same is."""
    found: dict[tuple[str, ...], set[int]] = {}
    for file in files:
        if match := _NUMBERED.fullmatch(file):
            head, number, of, total, tail = match.groups()
            found.setdefault((head, of, total, tail), set()).add(int(number))
    return [
        f"{head}{number:0{len(total)}d}{of}{total}{tail}"
        for (head, of, total, tail), there in found.items()
        for number in range(int(total))
        if number not in there and max(there) < int(total)
    ]


@lru_cache(maxsize=256)
def _contents(file: Path, size: int, changed: int, through: bool) -> Contents:
    ending, countable = file.suffix, size <= _MOST_COUNTED_BYTES
    if size == 0:
        return Contents(rows=0, columns=frozenset())
    try:
        if ending == ".parquet":
            return _parquet(file)
        if ending == ".csv":
            return _csv(file)
        if ending == ".txt":
            return Contents(rows=sum(1 for _ in _lines(file)) if countable else None, columns=frozenset({"text"}))
        if ending in (".json", ".jsonl") and through:
            return _json(file.read_bytes().decode("utf-8"))
        if ending in (".json", ".jsonl") and countable:
            first = next((line for line in _lines(file) if line.strip()), b"")
            if isinstance(json.loads(first), dict):
                return Contents(rows=sum(1 for line in _lines(file) if line.strip()))
    except UnicodeDecodeError as error:
        return Contents(problem=f"is not UTF-8 text (byte {error.start:,})")
    except (RecursionError, ValueError):
        pass  # deeper, or of longer numbers, than Python reads: the loader may do better
    return Contents()


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        yield from stream


def _json(text: str) -> Contents:
    """Read an array of objects, or objects one after the other."""
    marked, text = text.startswith("\ufeff"), text.removeprefix("\ufeff")
    if text.lstrip(_SPACE).startswith("["):
        if marked:  # pyarrow skips it, but only before lines
            return Contents(
                problem="begins with a byte order mark and holds an array; save it as UTF-8 without the mark"
            )
        try:
            items = json.loads(text, strict=False)
        except json.JSONDecodeError as error:
            return Contents(problem=f"is malformed JSON at line {error.lineno:,}: {error.msg}")
        return _rows([(f"item {i:,}", item) for i, item in enumerate(items, start=1)])
    found: list[tuple[str, Any]] = []
    at, line, spans = 0, 1, False
    decoder = json.JSONDecoder(object_pairs_hook=_once)
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
        except _Twice as error:
            return Contents(problem=f"line {line:,} holds {error.args[0]!r} twice in one object")
        if not isinstance(value, dict):
            return Contents(problem=f"line {line:,} holds {_kind(value)} where an object {{...}} is expected")
        found.append((f"line {line:,}", value))
        lines = text.count("\n", at, end)
        spans, line = spans or lines > 0, line + lines
        at = end


class _Twice(Exception):
    """A key that an object holds twice, which pyarrow's reader of objects refuses; arrays have another reader."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for key in keys if keys.count(key) > 1))
    return found


def _rows(items: list[tuple[str, Any]]) -> Contents:
    """Return the columns of rows with their places (``line 3``); every column must have one type."""
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
    if isinstance(value, bool):
        return "true or false"
    kinds = {type(None): "null", int: "a number", float: "a number", str: "text", dict: "a mapping", list: "a list"}
    return kinds.get(type(value), f"a {type(value).__name__}")


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


def _records(file: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and these columns at least of each row; ValueError for a file that is not read here."""
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        rows = pq.read_table(file, columns=columns).to_pylist()
        yield from ((f"row {number:,}", row) for number, row in enumerate(rows, start=1))
    elif file.suffix in (".json", ".jsonl"):
        text = file.read_bytes().decode("utf-8-sig")
        if text.lstrip(_SPACE).startswith("["):
            yield from ((f"item {number:,}", row) for number, row in enumerate(json.loads(text, strict=False), start=1))
        else:
            lines = enumerate(text.split("\n"), start=1)
            yield from ((f"line {number:,}", json.loads(line, strict=False)) for number, line in lines if line.strip())
    else:
        raise ValueError(file.suffix)


ENDINGS = (".arrow", ".csv", ".json", ".jsonl", ".parquet", ".txt")
_FORMATS = ("alpaca", "sharegpt", "openai")
_KINDS = {".jsonl": ".json"}
_MARKS_OF_SAVED = ("state.json", "dataset_dict.json")
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_CHAT = {"messages": "conversations"}
_ANY = ("system", "tools", "images", "videos", "audios")
_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_LENIENT = ("system", "tools")
"""Columns that are optional in the openai format."""


def _file_problem(path: Path) -> str:
    """Return the first reason why the file or the folder of a data set is none that is read, as a predicate."""
    files = files_of(path)
    if path.is_dir() and any((path / mark).is_file() for mark in _MARKS_OF_SAVED):
        return (
            f"lies in {path}, which 'save_to_disk' wrote and LLaMA-Factory does not read as a data set; write its rows "
            "to a .jsonl or .parquet file"
        )
    for file in files:
        if file.is_dir():
            return f"lies in {path}, which holds a folder, {file.name}; name the folder of the files itself"
        if file.suffix not in ENDINGS:
            low = " (in small letters)" if file.suffix.lower() in ENDINGS else ""
            return f"cannot be read from {file}: its name must end in {', '.join(ENDINGS)}{low}"
    kinds = {_KINDS.get(file.suffix, file.suffix): file.name for file in files}
    if len(kinds) > 1:
        return f"lies in {path}, which holds files of several types ({', '.join(sorted(kinds.values()))}); keep one"
    return ""


def _bad_files(path: Path) -> list[str]:
    """Return what is wrong with each file of a data set that cannot be read, or is missing, as predicates."""
    missing = [f"is missing: {file}" for file in missing_shards(map(str, files_of(path)))]
    return missing + [
        f"cannot be read: {file} {found.problem}" for file, found in contents_of(path).items() if found.problem
    ]


def _entry_problems(entry: Mapping[str, Any], path: Path | None, stage: str | None) -> Iterator[str]:
    """Yield problems of an entry of ``dataset_info.json``, as predicates.

    ``path`` is its file or folder, None for one that is not in local files; ``stage`` None where it is wrong itself.
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
    names = sorted(known)
    found = f"(columns found: {', '.join(names) or 'none'})"
    for key, column in _needed(entry, formatting, ranking is True):
        if column is None:
            yield f"does not say in 'columns' which one holds the {key} {found}"
        elif column not in names:
            yield f"has no column {column!r} for the {key}{did_you_mean(str(column), names)} {found}"


def columns_of(path: Path) -> frozenset[str] | None:
    """Return the columns of all files of a data set; None where they are unknown or there may be no rows."""
    columns = [found.columns for found in contents_of(path).values()]
    if not any(columns) or None in columns:
        return None
    return frozenset().union(*(each for each in columns if each is not None))


def _needed(entry: Mapping[str, Any], formatting: str, ranking: bool) -> Iterator[tuple[str, Any]]:
    """Yield key and column of every value that is read from each row."""
    given = entry.get("columns")
    names: Mapping[str, Any] = given if given is not None else {**_ALPACA, **_CHAT}
    alpaca = formatting == "alpaca"
    if not alpaca and names.get("messages") is None:
        yield "messages", None
    keys = [*(("prompt", "query", "history") if alpaca else ("messages",)), "kto_tag"]
    keys += ["chosen", "rejected"] if ranking else ["response"] if alpaca else []
    keys += [key for key in _ANY if not (formatting == "openai" and key in _LENIENT)]
    yield from ((key, names[key]) for key in keys if names.get(key))


_Texts = list[tuple[str, Any]]


class _Fatal(Exception):
    """A row that ends the conversion of all rows."""


class _Row:
    """What LLaMA-Factory's converters and a stage make of one row, by an entry of ``dataset_info.json``."""

    def __init__(self, entry: Mapping[str, Any], stage: str) -> None:
        self.format, self.stage = str(entry.get("formatting") or "alpaca"), stage
        self.of_v1 = "converter" in entry  # its converters drop nothing
        given = entry.get("columns")
        self.names: Mapping[str, Any] = {**_ALPACA, **_CHAT} if given is None else given
        self.tags = {key: (entry.get("tags") or _TAGS).get(key) for key in _TAGS}
        self.answers = ("chosen", "rejected") if entry.get("ranking") is True else ("response",)
        self.roles = [
            [self.tags[tag] for tag in tags]
            for tags in (("user_tag", "observation_tag"), ("assistant_tag", "function_tag"))
        ]

    @property
    def columns(self) -> list[str]:
        keys = ("prompt", "query") if self.format == "alpaca" else ("messages",)
        return [str(self.names[key]) for key in (*keys, *self.answers, "kto_tag") if self.names.get(key)]

    def fault(self, row: Mapping[str, Any]) -> str:
        """Return why a row is dropped, or an empty text; _Fatal for one that ends the conversion."""
        if self.of_v1:
            return ""
        prompt, answers, told = (self._of_texts if self.format == "alpaca" else self._of_messages)(row)
        if self.stage == "pt":  # takes the first message alone
            if told and self.format != "alpaca":
                raise _Fatal(told)
            prompt, answers, told = prompt[:1], [], ""
        if not told and self._tagged(row) != (self.stage == "kto") and self.stage in ("sft", "kto"):
            wanted = "true or false" if self.stage == "kto" else f"left out of 'columns' in stage {self.stage}"
            told = self._wanted(row, "kto_tag", wanted)
        if told:
            return told
        for where, text in [*prompt, *answers]:
            if not isinstance(text, str | list):  # parts of LLaMA-Factory v1 are joined, or told, when they are loaded
                raise _Fatal(f"has {_kind(text)} in {where}, where text is expected")
        return ""

    def _value(self, row: Mapping[str, Any], key: str) -> Any:
        return row.get(self.names[key]) if self.names.get(key) else None

    def _tagged(self, row: Mapping[str, Any]) -> bool:
        return isinstance(self._value(row, "kto_tag"), bool)

    def _wanted(self, row: Mapping[str, Any], key: str, wanted: str) -> str:
        return f"has {_kind(self._value(row, key))} in {self.names.get(key)!r}; the {key} must be {wanted}"

    def _of_texts(self, row: Mapping[str, Any]) -> tuple[_Texts, _Texts, str]:
        """Return places and texts of prompt and answers, and why the row is dropped."""
        for key in ("prompt", "query"):
            if self._value(row, key) and not isinstance(self._value(row, key), str):
                raise _Fatal(self._wanted(row, key, "text"))
        answers = [(repr(self.names.get(key)), self._value(row, key)) for key in self.answers]
        bad = next((key for key in self.answers if not isinstance(self._value(row, key), str)), None)
        if bad is None or self._tagged(row):  # an answer with a tag is taken as it is
            return [], answers, ""
        return [], [], self._wanted(row, bad, "text")

    def _of_messages(self, row: Mapping[str, Any]) -> tuple[_Texts, _Texts, str]:
        turns, pairs = self._turns(row), len(self.answers) == 2
        prompt = [(f"{self.tags['content_tag']!r} of message {place}", text) for place, _, text in turns]
        for index, (place, role, _) in enumerate(turns):
            if role not in self.roles[index % 2]:
                wanted = " or ".join(map(repr, self.roles[index % 2]))
                found = f"{self.tags['role_tag']!r}: {shown(role)}"
                return prompt, [], f"has {found} in message {place}, where {wanted} is expected"
        if not turns or len(turns) % 2 != pairs:
            kind = "odd" if pairs else "even"
            return prompt, [], f"has {len(turns)} messages of the two sides in turn; the number must be {kind}"
        answers = [(key, self._value(row, key)) for key in self.answers] if pairs else []
        for key, message in answers:
            if not isinstance(message, dict):
                return prompt, [], self._wanted(row, key, "a message")
        for key, message in answers:
            role = message.get(self.tags["role_tag"])
            if role not in [*self.tags.values()][2:]:
                raise _Fatal(f"has {self.tags['role_tag']!r}: {shown(role)} in {key}")
        return prompt, [(key, message.get(self.tags["content_tag"])) for key, message in answers], ""

    def _turns(self, row: Mapping[str, Any]) -> list[tuple[int, Any, Any]]:
        """Return place, role and text of each message after that of the system."""
        messages = self._value(row, "messages")
        if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
            raise _Fatal(self._wanted(row, "messages", "a list of messages"))
        found = [
            (place, each.get(self.tags["role_tag"]), each.get(self.tags["content_tag"]))
            for place, each in enumerate(messages, start=1)
        ]
        if found and self.tags["system_tag"] and found[0][1] == self.tags["system_tag"]:
            found = found[1:]
        if self.format != "openai":
            return found
        turns: list[tuple[int, Any, Any]] = []
        pending: list[Any] = []  # answers of tools in a row: one message, where another comes after them
        for place, role, text in found:
            if messages[place - 1].get("tool_calls") and role in self.roles[1]:
                role, text = self.tags["function_tag"], "[]"
            if role == self.tags["observation_tag"]:
                pending.append(text)
                continue
            if role not in [*self.tags.values()][2:]:
                raise _Fatal(f"has {self.tags['role_tag']!r}: {shown(role)} in message {place}")
            if pending:
                if not all(isinstance(each, str) for each in pending):
                    raise _Fatal(f"has an answer of a tool before message {place} that is no text")
                turns.append((place - 1, self.tags["observation_tag"], ""))
                pending = []
            turns.append((place, role, text))
        return turns


INFO_FILE = "dataset_info.json"

REMOTE_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_SPLIT = re.compile(r"train\[(-?\d+%?)?:(-?\d+%?)?\]")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set of the run."""

    name: str
    path: Path | None = None  # its local file or folder; None for one from a hub, a script or the cloud
    num_samples: int | None = None  # rows that dataset_info.json asks to be drawn from it
    split: str = "train"  # part of it that dataset_info.json names, such as "train[:10%]"
    entry: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # what dataset_info.json says
    bad: tuple[str, ...] = ()  # what is wrong with shards that are left out


def target_data_sets(*targets: str) -> tuple[str, ...]:
    """Return the data sets of targets: ``"a"`` is one, ``"a + b"`` the rows of both as one target."""
    return tuple(name.strip() for target in targets for name in target.split(" + "))


def find_sources(
    names: Sequence[str], lf: LlamaFactoryArgs, key: str, base_dir: Path, *, skip: bool = False
) -> tuple[list[Source], list[str]]:
    """Return the data sets of these names that could be found, and one line per problem.

    ``key`` is told in messages; ``base_dir`` is the configuration's folder, where a misplaced ``dataset_dir`` may be;
    ``skip``: whether shards that cannot be read are left out, and no problem.
    """
    folder: Any = lf.dataset_dir
    if str(folder) == "ONLINE" or str(folder).startswith("REMOTE:"):
        return [Source(name=name) for name in names], []
    given = isinstance(folder, Mapping)
    file = Path(INFO_FILE) if given else Path(str(folder)) / INFO_FILE
    info, problem = (folder, "") if given else _info(file, base_dir)
    if problem:
        return [], [problem]
    sources, problems = [], []
    for name in names:
        found: Source | list[str] = [f"{name!r} is not defined in {file}{did_you_mean(name, list(info))}"]
        if name in info:
            found = _source(name, info[name], file, lf.stage or None, skip)
        if isinstance(found, Source):
            sources.append(found)
        else:
            problems += [f"{key}: {problem}" for problem in found]
    return sources, problems


def find_entries(names: Sequence[str], lf: LlamaFactoryArgs) -> dict[str, Any]:
    """Return what ``dataset_info.json`` says about data sets, by name; nothing of those that it does not know."""
    folder: Any = lf.dataset_dir
    info = folder if isinstance(folder, Mapping) else _info(Path(str(folder)) / INFO_FILE, Path())[0]
    return {name: dict(info[name]) for name in names if isinstance(info.get(name), Mapping)}


def _info(file: Path, base_dir: Path) -> tuple[Any, str]:
    if not file.is_file():
        elsewhere = base_dir / file
        hint = f"; there is {elsewhere}: write 'dataset_dir: {elsewhere.parent}'" if elsewhere.is_file() else ""
        return {}, f"dataset_dir: no such file: {file} (relative to the working directory {Path.cwd()}){hint}"
    try:
        info = read_json(file)
    except json.JSONDecodeError as error:
        return {}, f"dataset_dir: {file} is malformed JSON at line {error.lineno}, column {error.colno}: {error.msg}"
    except (OSError, ValueError) as error:
        return {}, f"dataset_dir: {file} cannot be read: {error}"
    if not isinstance(info, dict):
        return {}, f"dataset_dir: {file} must map names of data sets to their description"
    return info, ""


def _source(name: str, entry: Any, file: Path, stage: str | None, skip: bool) -> Source | list[str]:
    """Return the data set that an entry of ``file`` describes, or its problems."""
    if not isinstance(entry, Mapping):
        return [f"{name!r} in {file} must be a mapping with 'file_name' or a hub's address"]
    asked = entry.get("num_samples")
    made = partial(Source, name=name, entry=entry)
    samples = asked if isinstance(asked, int) and not isinstance(asked, bool) else None
    if any(entry.get(remote) for remote in REMOTE_KEYS):
        found, problems = made(num_samples=samples), [*_entry_problems(entry, None, stage)]
    elif not isinstance(entry.get("file_name"), str):
        return [f"{name!r} in {file} has neither 'file_name' nor a hub's address"]
    else:
        path = file.parent / entry["file_name"]
        if not path.exists():
            return [f"the file of {name!r} is missing: {path}"]
        if not files_of(path):
            return [f"the folder of {name!r} is empty: {path}"]
        split, unreadable = str(entry.get("split") or "train"), _file_problem(path)
        bad = [] if unreadable else _bad_files(path)
        some = path.is_dir() and len(files_of(path)) > sum(each.startswith("cannot") for each in bad)
        found = made(path=path, num_samples=samples, split=split, bad=tuple(bad) if skip and some else ())
        if bad and not found.bad:
            way = "; repair it, or set 'dynamic.on_bad_shard: skip' to train without" if some else ""
            unreadable = f"{bad[0]}{way}"
        problems = [unreadable] if unreadable else [*_entry_problems(entry, path, stage)]
    return [f"{name!r} {problem}" for problem in problems] or found


def count_rows(source: Source, lf: LlamaFactoryArgs) -> int | None:
    """Return the largest number of rows that a data set can have, or None where counting would take long.

    Its ``split`` and ``num_samples`` and the run's ``max_samples`` are respected.
    """
    rows = _rows_of_files(source)
    kept = None if rows is None else _kept(source.split, rows)
    if kept is None and source.path is None and not lf.streaming:
        kept = source.num_samples  # this number is drawn, some twice if there are fewer
    if kept is None:
        return None
    if source.num_samples is not None and kept and not lf.streaming:
        kept = source.num_samples
    return kept if lf.max_samples is None else min(kept, lf.max_samples)


def count_bytes(source: Source, lf: LlamaFactoryArgs) -> int | None:
    """Return the bytes of the rows that ``count_rows`` counts, or None where counting would take long.

    Of a part of one file of lines from its beginning, those bytes; of any other part, its share of all bytes.
    """
    if source.path is None:
        return None
    files = files_of(source.path)
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
    return _total([found.rows for found in contents_of(source.path).values()])


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _kept(split: str, rows: int) -> int | None:
    """Return the number of rows, of ``rows``, in a split such as "train[:10%]"; None where it is not understood."""
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


class _Read(NamedTuple):
    """One row of a file."""

    place: str  # "line 3"
    file: Path
    value: Any  # of the column that was asked for
    told: str  # why it is dropped, or ends the conversion
    fatal: bool


def _rows_of(source: Source, stage: str, column: str | None = None) -> Sequence[_Read] | None:
    """Return the rows of a data set, None where it is not in local files of moderate size, or of another form.

    Remembered while size and time of change of the files stay the same.
    """
    if source.path is None or source.bad:
        return None
    states = [(file, file.stat()) for file in files_of(source.path)]
    if sum(state.st_size for _, state in states) > _MOST_READ_BYTES:
        return None
    known = tuple((file, state.st_size, state.st_mtime_ns) for file, state in states)
    return _read_rows(known, json.dumps(dict(source.entry), sort_keys=True, default=str), stage, column)


@lru_cache(maxsize=8)
def _read_rows(
    files: tuple[tuple[Path, int, int], ...], entry: str, stage: str, column: str | None
) -> Sequence[_Read] | None:
    row, found = _Row(json.loads(entry), stage), list[_Read]()
    columns = [*row.columns, *([column] if column is not None else [])]
    try:
        for file, _, _ in files:
            for place, each in _records(file, columns):
                try:
                    told, fatal = row.fault(each), False
                except _Fatal as error:
                    told, fatal = str(error), True
                value = None if column is None else each.get(column)
                found.append(_Read(place, file, value, told, fatal))
    except (AttributeError, RecursionError, ValueError):
        return None
    return found


def loaded_values(source: Source, lf: LlamaFactoryArgs, name: str) -> list[tuple[str, Any]] | None:
    """Return place ("line 3 of a.jsonl") and value of a column in each row that is loaded, those of ``val_size`` too.

    A value that is missing is None. None for all where that is not quick to tell.
    """
    if source.num_samples is not None or source.split != "train" or lf.tokenized:
        return None
    rows = _rows_of(source, lf.stage, name)
    if rows is None or any(row.fatal for row in rows[: lf.max_samples]):
        return None
    return [(f"{row.place} of {row.file}", row.value) for row in rows[: lf.max_samples] if not row.told]


def rows_problem(source: Source, stage: str | None, *, every: bool) -> str:
    """Return why a data set leaves no row to a stage, or which row ends its conversion; a predicate, or an empty text.

    ``every``: whether all of its rows are read by the run. Only local files of moderate size are looked at.
    """
    if stage not in ("pt", "sft", "rm", "dpo", "kto"):
        return ""
    rows = _rows_of(source, stage) or ()
    fatal = next((row for row in rows if row.fatal), None)
    if every and fatal is not None:
        return f"cannot be loaded: {fatal.place} of {fatal.file} {fatal.told}"
    if not rows or any(not row.told for row in rows):
        return ""
    return f"has no row that stage {stage} can use: {rows[0].place} of {rows[0].file} {rows[0].told}"


def train_rows(counts: Sequence[int | None], lf: LlamaFactoryArgs) -> int | None:
    """Return the number of rows to train on, without ``val_size``, or None where a count is unknown."""
    rows = _total(counts) if counts else None
    if rows is None:
        return None
    held = lf.val_size
    if held <= 1e-6:
        return rows
    return max(0, rows - (int(held) if held > 1 else math.ceil(rows * held)))


WANTED_PART = "of the parts of LLaMA-Factory v1 text alone is read; write others as its former formats have them"


def _other_part(message: Mapping[str, Any]) -> str | None:
    """Return the type of the first part of a message's content that is no text."""
    parts = [part for value in message.values() if isinstance(value, list) for part in value if isinstance(part, dict)]
    return next((str(part["type"]) for part in parts if "value" in part and part.get("type", "text") != "text"), None)


def turn_weights(source: Source, name: str) -> tuple[bool | None, str]:
    """Return whether messages of a local JSON Lines data set have weights ``name``, and where one cannot be used.

    None where that is not quick to read, or the data set is of another kind.
    """
    if source.path is None or source.bad:
        return None, ""
    there = False
    for file in files_of(source.path):
        if file.suffix.lower() != ".jsonl" or file.stat().st_size > _MOST_READ_BYTES:
            return None, ""
        for number, line in enumerate(_lines(file), start=1):
            try:
                row = json.loads(line) if line.strip() else {}
            except (RecursionError, ValueError):
                return None, ""
            for messages in row.values():
                turns = [each for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []
                for place, message in enumerate(turns, start=1):
                    where = f"data set {source.name!r}, line {number:,} of {file}, message {place},"
                    value = message.get(name)
                    there = there or value is not None
                    if value is not None and unusable_weight(value):
                        return there, f"{where} has {name} = {shown(value)}; {WANTED_WEIGHTS}"
                    if (kind := _other_part(message)) is not None:
                        return there, f"{where} has a part of type {kind!r}; {WANTED_PART}"
    return there, ""
