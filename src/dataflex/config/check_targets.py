"""Checks that parameters which are given by target name the method's targets, all of them and no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from dataflex.config.needs import parameters
from dataflex.config.schema import DynamicConfig
from dataflex.errors import did_you_mean

__all__ = ["by_target_problems"]


def by_target_problems(dynamic: DynamicConfig) -> Iterator[str]:
    """Yield what is wrong with the parameters marked ``by_target``, mappings of target names to numbers."""
    for method in dynamic.methods:
        for path, name, params in parameters(method):
            alone = params is not method.params and method.kind == "selector"
            for field in fields(type(params)):
                value = getattr(params, field.name)
                if not field.metadata.get("by_target") or not isinstance(value, Mapping):
                    continue
                if alone:
                    yield f"{path}.{field.name}: {name} is asked about one target at a time here; remove the key"
                else:
                    yield from _misnamed(value, method.targets, f"{path}.{field.name}")


def _misnamed(value: Mapping[str, Any], targets: tuple[str, ...], path: str) -> Iterator[str]:
    for name in value:
        if name not in targets:
            yield f"{path}.{name}: no such target{did_you_mean(str(name), targets)} (targets: {', '.join(targets)})"
    missing = [name for name in targets if name not in value]
    if missing:
        yield f"{path}: {', '.join(missing)} missing; name every target"
