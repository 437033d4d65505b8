"""Builds a dataclass from a mapping, key by key, and notes every problem instead of stopping at the first."""

from __future__ import annotations

import re
import typing
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

from dataflex.config.convert import BAD, convert, describe, shown
from dataflex.config.parts import read_part
from dataflex.contract import is_ours, whereabouts
from dataflex.errors import ComponentError, ConfigError, did_you_mean
from dataflex.parts import Part

T = TypeVar("T")

UNKNOWN_KEY = re.compile(
    r"(?P<path>(?:.*\.)?(?P<key>[^.]+)): unknown key(?P<hint>; did you mean '[^']*'\?)?"
    r"(?P<rest> \(.* (?:accepts: .*|takes no parameters)\))"
)
"""The line that is noted for a key that nothing accepts."""


def collect(
    cls: type[T], mapping: Any, path: str, problems: list[str], *, subject: str = "", extra: Collection[str] = ()
) -> T | None:
    """Return ``cls`` built from ``mapping``, or None after noting why not.

    Args:
        cls: A dataclass; field metadata may hold ``choices``, ``pattern``, ``minimum``, ``maximum``, ``above``.
        mapping: Keys and values as the file gave them. A null value means the default.
        path: Dotted path of the mapping, for messages.
        problems: Takes one line per problem.
        subject: What accepts the keys ("loss selector"); by default the path.
        extra: Further keys that the caller reads itself.

    Raises:
        ComponentError: A field of ``cls`` has a type that cannot come from a configuration.
    """
    if issubclass(cls, Part):
        return read_part(cls, mapping, path, problems, collect)
    before = len(problems)
    given = values(cls, mapping, path, problems, subject=subject, extra=extra)
    if len(problems) > before:
        return None
    try:
        return cls(**given)
    except ConfigError as error:
        problems += [dotted(path, problem) for problem in error.problems]
        return None
    except ValueError as error:
        first = re.match(r"\w*", str(error))
        named = first is not None and first.group() in field_hints(cls)
        problems.append(dotted(path, str(error)) if named else f"{path}: {error}")
        return None
    except Exception as error:
        if is_ours(cls):
            raise
        raise ComponentError(
            f"{path}: parameters raised {type(error).__name__}: {error}: {whereabouts(cls)}"
        ) from error


def values(
    cls: type,
    mapping: Any,
    path: str,
    problems: list[str],
    *,
    subject: str = "",
    extra: Collection[str] = (),
    skip: Collection[str] = (),
) -> dict[str, Any]:
    """Return the converted values of those keys of ``mapping`` that are not null.

    Fields in ``skip`` and those marked ``user=False`` are neither read nor named.
    """
    known = {key_of(f): f for f in fields(cls) if f.init and f.metadata.get("user", True)}
    accepted = [*extra, *known]
    if not isinstance(mapping, Mapping):
        problems.append(f"{path}: expected a mapping of keys, found {shown(mapping)}")
        return {}
    for key in mapping:
        if key not in accepted:
            problems.append(f"{dotted(path, key)}: unknown key{_help(str(key), accepted, subject or path)}")
    types = field_hints(cls)
    hints = {key: types[field.name] for key, field in known.items()}
    result: dict[str, Any] = {}
    for name, field in known.items():
        if name in skip:
            continue
        value = mapping.get(name)
        if value is None:
            if _required(field):
                problems.append(f"{dotted(path, name)}: missing; expected {describe(hints[name])}{_what(field)}")
            continue
        value = convert(value, hints[name], dotted(path, name), field.metadata, problems, _nested)
        if value is not BAD:
            result[field.name] = value
    return result


def key_of(field: Field[Any]) -> str:
    """Return the key of a field in a configuration: its name, unless that is a word of Python's own (``from``)."""
    return str(field.metadata.get("key", field.name))


def dotted(path: str, key: Any) -> str:
    """Return the path of ``key`` below ``path``; an empty path is the top level."""
    return f"{path}.{key}" if path else str(key)


def field_hints(cls: type) -> dict[str, Any]:
    """Return the resolved types of a dataclass's fields.

    Raises:
        ComponentError: A type cannot be resolved (it is imported for type checking only, say).
    """
    try:
        return typing.get_type_hints(cls)
    except NameError as error:
        raise ComponentError(f"{cls.__module__}.{cls.__qualname__}: {error}; import it at run time") from error


def _nested(cls: type, mapping: Any, path: str, problems: list[str]) -> Any:
    return collect(cls, mapping, path, problems)


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _what(field: Field[Any]) -> str:
    return f" ({field.metadata['help']})" if "help" in field.metadata else ""


def _help(key: str, accepted: list[str], subject: str) -> str:
    takes = f"accepts: {', '.join(accepted)}" if accepted else "takes no parameters"
    return f"{did_you_mean(key, accepted)} ({subject} {takes})"
