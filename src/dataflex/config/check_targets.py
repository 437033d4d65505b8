"""Checks that parameters which are given by target name the method's targets, all of them and no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

from dataflex.config.schema import DynamicConfig
from dataflex.core.parts import Part
from dataflex.errors import did_you_mean

__all__ = ["by_target_problems"]


def by_target_problems(dynamic: DynamicConfig) -> Iterator[str]:
    """Yield what is wrong with the parameters marked ``by_target``, mappings of target names to numbers."""
    for method in dynamic.methods:
        path = f"dynamic.{method.kind}"
        for field in fields(type(method.params)):
            value = getattr(method.params, field.name)
            if isinstance(value, Part):
                yield from _in_part(value, f"{path}.{field.name}")
            if not field.metadata.get("by_target") or not isinstance(value, Mapping):
                continue
            for name in value:
                if name not in method.targets:
                    near, known = did_you_mean(str(name), method.targets), ", ".join(method.targets)
                    yield f"{path}.{field.name}.{name}: no such target{near} (targets: {known})"
            missing = [name for name in method.targets if name not in value]
            if missing:
                yield f"{path}.{field.name}: {', '.join(missing)} missing; name every target"


def _in_part(part: Part, path: str) -> Iterator[str]:
    for field in fields(type(part.params)):
        if field.metadata.get("by_target") and getattr(part.params, field.name) is not None:
            yield f"{path}.{field.name}: {part.name} is asked about one target at a time here; remove the key"
