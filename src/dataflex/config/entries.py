"""One entry of ``dataset_info.json`` against its files: what LLaMA-Factory's loader would refuse.

Follows LLaMA-Factory's ``data.parser`` (keys, default columns) and ``data.converter`` (columns that each format looks
up in every row).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dataflex.config.contents import contents_of
from dataflex.errors import did_you_mean

__all__ = ["ENDINGS", "columns_of", "entry_problems", "file_problems"]

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
