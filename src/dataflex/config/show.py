"""Writes a configuration back as the ``dynamic`` block that would give it, defaults included."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from dataflex.config.build import block_keys
from dataflex.config.collect import key_of
from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.parts import Part
from dataflex.registry import KINDS

_LINE = 100


def as_mapping(dynamic: DynamicConfig) -> dict[str, Any]:
    """Return the ``dynamic`` block of a configuration, made of dicts, lists and plain values.

    Read again, it gives an equal configuration, but for the length of a run that flat keys fixed.
    """
    return {key: plain(getattr(dynamic, key)) for key in block_keys()}


def as_yaml(mapping: Mapping[str, Any], indent: int = 0) -> str:
    """Return ``mapping`` as YAML in its own order, a value on one line where it fits."""
    return "\n".join(_lines(mapping, indent)) + "\n"


def _lines(mapping: Mapping[str, Any], indent: int) -> list[str]:
    lines = []
    for key, value in mapping.items():
        head = f"{' ' * indent}{key}:"
        flow = _flow(value)
        if isinstance(value, Mapping) and value and (len(head) + len(flow) > _LINE or _is_outer(value)):
            lines += [head, *_lines(value, indent + 2)]
        elif isinstance(value, list) and len(head) + len(flow) > _LINE:
            lines += [head, *(f"{' ' * (indent + 2)}- {_flow(item)}" for item in value)]
        else:
            lines.append(f"{head} {flow}")
    return lines


def _is_outer(value: Mapping[str, Any]) -> bool:
    """Whether a mapping holds methods, which deserve a line each."""
    return any(kind in value for kind in KINDS)


def _flow(value: Any) -> str:
    import yaml

    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def plain(value: Any) -> Any:
    """Return dataclasses as dicts and tuples as lists, all the way down; a method as its block."""
    if isinstance(value, MethodConfig):
        targets = {"targets": list(value.targets)} if value.targets else {}
        return {"name": value.name, **targets, **plain(value.params)}
    if isinstance(value, Part):
        own = plain(value.params)
        return {"name": value.name, **own} if own else value.name
    if dataclasses.is_dataclass(value):
        return {key_of(field): plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
