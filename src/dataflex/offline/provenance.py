"""Whether what a file of scores says of itself can be relied on: it may be damaged, or come from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["provenance_problem"]

_DEPTH = 32


def provenance_problem(provenance: Mapping[str, Any], datasets: Sequence[str]) -> str:
    """Return what is wrong with it, or an empty text.

    Args:
        provenance: The JSON object in the file.
        datasets: Data sets that rows are of.
    """
    if _deep(provenance):
        return "what it says of the scores is nested without end"
    methods, config = provenance.get("methods"), provenance.get("config")
    if not _list_of(methods, name=str) or not methods:
        return "it does not name the methods that gave the scores"
    if not isinstance(config, Mapping):
        return "it does not hold the configuration that was scored with"
    data = provenance.get("data")
    sources = data.get("sources") if isinstance(data, Mapping) else None
    if not _list_of(sources, name=str, rows_read=int):
        return "it does not say which data sets the rows are of"
    assert isinstance(sources, list)
    names = [source["name"] for source in sources]
    if len(set(names)) < len(names) or not set(datasets) <= set(names):
        return "rows are of data sets that it does not describe, or describes twice"
    for source in sources:
        entry = source.get("entry")
        if not (entry is None or isinstance(entry, Mapping)):
            return "the entry of a data set is no mapping"
        if not _list_of(source.get("files"), path=str, size=int, blake2b=str):
            return "it does not say which files the rows are from"
    return ""


def _list_of(value: Any, **keys: type) -> bool:
    """Whether a value is a list of objects with such keys."""
    return isinstance(value, list) and all(
        isinstance(item, Mapping) and all(type(item.get(key)) is kind for key, kind in keys.items()) for item in value
    )


def _deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, Mapping | list)
            for inner in (item.values() if isinstance(item, Mapping) else item)
        ]
    return bool(level)
