"""Shards of a data set that cannot be read: which they are, why, and the data set without them.

``datasets.load_dataset`` ends at the first file that it cannot read, without its name. Only then the files are read one
by one, each through once, to find all that are at fault. It is given the files of a folder in the hub's layout by name:
where a card lists them, it would take what it prepared of another folder so named, or before a change. Names relied
upon: ``load_dataset_builder`` and its ``config.data_files``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import load_dataset, load_dataset_builder

from dataflex.config.data import missing_shards

_ROWS = 10_000
_OF_READING = ("num_proc", "streaming")
"""Arguments of ``load_dataset`` that say how files are read, not which."""


@dataclass(frozen=True)
class BadShard:
    """A file, and why it cannot be read."""

    path: str
    reason: str

    def tell(self) -> str:
        """Return it as one line."""
        return f"shard {self.path} {self.reason}"


class BadShards(Exception):
    """Shards that cannot be read, where none is to be left out, or nothing would be left."""

    def __init__(self, shards: Sequence[BadShard], *, all_of_them: bool = False) -> None:
        way = "repair one of them" if all_of_them else "repair it, or set 'dynamic.on_bad_shard: skip' to train without"
        super().__init__("; ".join([*(shard.tell() for shard in shards), way]))


def load_sound(load: Callable[..., Any], *, skip: bool, **named: Any) -> tuple[Any, list[BadShard]]:
    """Load a data set whose shards are all sound, or, with ``skip``, those that are; return the others too.

    Args:
        load: Loads it, as ``datasets.load_dataset`` does.
        skip: Whether shards that cannot be read are left out.
        named: What LLaMA-Factory calls ``load_dataset`` with.

    Raises:
        BadShards: A shard is missing or cannot be read and is not left out, or none can be read.
        Exception: What ``load`` raises where every single file can be read.
    """
    split, given = re.split(r"[\[+]", str(named.get("split") or "train"))[0], named.get("data_files")
    if isinstance(given, list):
        files = {split: [str(file) for file in given]}
    elif os.path.isdir(str(named.get("path"))):
        files = _files(named)
        if files:
            named["data_files"] = files
    else:
        files = {}
    bad = [BadShard(path, "is missing") for path in missing_shards(files.get(split, ()))]
    if bad and not skip:
        raise BadShards(bad)
    if bad:
        named["verification_mode"] = "no_checks"  # a card may count the rows of all
    try:
        return load(**named), bad
    except Exception:
        files = files or _files(named)
        own = files.get(split, [])
        reasons = {file: reason for file in own if (reason := _reason_of(file, split, named))} if len(own) > 1 else {}
        if not reasons:
            raise
        bad += [BadShard(file, f"cannot be read: {reason}") for file, reason in reasons.items()]
        good = [file for file in own if file not in reasons]
        if not skip or not good:
            raise BadShards(bad, all_of_them=not good) from None
    data_files = good if isinstance(given, list) else {**files, split: good}
    return load(**{**named, "data_files": data_files, "verification_mode": "no_checks"}), bad


def _files(named: dict[str, Any]) -> dict[str, list[str]]:
    """Return the files of each split of a data set in the order in which they are read; none where not known."""
    given = {key: value for key, value in named.items() if key not in (*_OF_READING, "split")}
    try:
        found = load_dataset_builder(**given).config.data_files
    except Exception:  # noqa: BLE001 - what is wrong is told when it is loaded
        return {}
    return {str(split): [str(file) for file in files] for split, files in (found or {}).items()}


def _reason_of(file: str, split: str, named: dict[str, Any]) -> str:
    """Return why a file cannot be read, or an empty text; it is read through without a copy on disk."""
    given = {key: value for key, value in named.items() if key not in _OF_READING}
    try:
        rows = load_dataset(**{**given, "data_files": {split: [file]}, "split": split}, streaming=True)
        for _ in rows.with_format("arrow").iter(batch_size=_ROWS):
            pass
    except Exception as error:  # noqa: BLE001 - each format has kinds of its own
        return told(bottom(error))
    return ""


def bottom(error: BaseException) -> BaseException:
    """Return the error at the bottom of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def told(error: BaseException) -> str:
    """Return an error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
