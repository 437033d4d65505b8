"""Tells where a key belongs that was written in the wrong place of a configuration."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from dataflex.config.collect import UNKNOWN_KEY, dotted, field_hints, key_of
from dataflex.config.flat import FLAT_KEYS
from dataflex.config.methods import method_class, takes_targets
from dataflex.config.schema import DynamicConfig, SignalsConfig
from dataflex.config.table import table
from dataflex.errors import ConfigError
from dataflex.parts import Part
from dataflex.registry import KINDS, names

_MOST_NAMED = 4


def with_places(problems: Sequence[str], block: Mapping[str, Any]) -> list[str]:
    """Return the problems of a ``dynamic`` block, unknown keys with the place where they would be known.

    Args:
        problems: One line per problem.
        block: The block as the file gave it.
    """
    found = [UNKNOWN_KEY.fullmatch(line) for line in problems]
    if not any(found):
        return list(problems)
    places = _places(block)
    return [
        line if match is None else _placed(match, line, places) for line, match in zip(problems, found, strict=True)
    ]


def misplaced_keys(mapping: Mapping[str, Any]) -> list[str]:
    """Return a problem per top-level key that belongs into the ``dynamic`` block.

    Keys of methods are looked for only where the block names the method, and it is one of ours.
    """
    block = mapping.get("dynamic")
    places = _places(block if isinstance(block, Mapping) else {}, ours=True)
    keys = [key for key in mapping if key in places and key not in table() and key not in FLAT_KEYS]
    return [f"{key}: unknown key; it belongs under {_told(places[key])}" for key in keys]


def _placed(match: re.Match[str], line: str, places: Mapping[str, list[str]]) -> str:
    key = match["key"]
    if key in places:
        return f"{match['path']}: unknown key; it belongs under {_told(places[key])}{match['rest']}"
    if key in table():
        hint = match["hint"] or ""
        return f"{match['path']}: unknown key{hint}; it is LLaMA-Factory's: write it at the top level{match['rest']}"
    takers = [f"{kind}/{name}" for kind in KINDS for name in names(kind) if key in _keys_of_method(kind, name)]
    if not takers or match["hint"]:
        return line
    more = f" and {len(takers) - _MOST_NAMED} more" if len(takers) > _MOST_NAMED else ""
    return f"{line}; it is a key of {', '.join(takers[:_MOST_NAMED])}{more}"


def _told(places: Sequence[str]) -> str:
    above = [place.rpartition(".")[0].removeprefix("dynamic.") for place in places]
    return " or ".join(f"'{parent}': {place}" for parent, place in zip(above, places, strict=True))


def _keys_of_method(kind: str, name: str) -> list[str]:
    cls = method_class(kind, name, "", [])
    return [] if cls is None else [key_of(field) for field in fields(cls.Params)]


def _places(block: Mapping[str, Any], ours: bool = False) -> dict[str, list[str]]:
    """Return, for each key that may stand in this block, the dotted paths at which it may."""
    found: dict[str, list[str]] = {}
    for path in _paths(block, ours):
        key = path.rpartition(".")[2]
        if path not in found.setdefault(key, []):
            found[key].append(path)
    return found


def _paths(block: Mapping[str, Any], ours: bool) -> Iterator[str]:
    yield from (f"dynamic.{field.name}" for field in fields(DynamicConfig) if field.metadata.get("user", True))
    yield from (f"dynamic.signals.{field.name}" for field in fields(SignalsConfig))
    for kind in KINDS:
        given = block.get(kind)
        if isinstance(given, list | tuple):
            given = {"name": "product", "of": given}
        elif not isinstance(given, Mapping):
            given = {"name": given}
        name = given.get("name") or ("compose" if "represent" in given else None)
        cls = method_class(kind, name, "", []) if isinstance(name, str) else None
        if cls is not None and (not ours or cls.__module__.startswith("dataflex.")):
            path = f"dynamic.{kind}"
            yield from [f"{path}.targets"] if takes_targets(cls, given) else []
            yield from _paths_below(cls.Params, given, path)


def _paths_below(cls: type, given: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yield the paths of a dataclass's keys, and those of the parts that ``given`` names."""
    hints = field_hints(cls)
    for field in fields(cls):
        key = key_of(field)
        yield dotted(path, key)
        value = given.get(key)
        many = value if isinstance(value, list | tuple) else [value]
        for number, item in enumerate(many):
            below = dotted(path, key) if many is not value else f"{dotted(path, key)}[{number}]"
            yield from _paths_of_part(hints[field.name], item, below)


def _paths_of_part(hint: Any, item: Any, path: str) -> Iterator[str]:
    given = item if isinstance(item, Mapping) else {"name": item}
    for cls in (hint, *(inner for each in typing.get_args(hint) for inner in (each, *typing.get_args(each)))):
        if not (isinstance(cls, type) and issubclass(cls, Part)) or not isinstance(given.get("name"), str):
            continue
        try:
            params = cls.params_of(given["name"])
        except ConfigError:
            continue
        yield from _paths_below(params, given, path)
