"""Turns what YAML or JSON gave into what a dataclass field is typed as, or says why it cannot.

Strict on purpose: a number in quotes, a truth value where a count is wanted or a NaN are mistakes,
not things to be guessed at. The one courtesy is that a whole number may stand for a float.
"""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Final, Literal, Union, get_args, get_origin

from dataflex.errors import ComponentError, did_you_mean
from dataflex.parts import Part

BAD: Final = object()
"""What ``convert`` returns after it has noted a problem."""

_MOST_SHOWN = 60

_SINGULAR: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_PLURAL: dict[Any, str] = {bool: "truth values", int: "whole numbers", float: "numbers", str: "texts"}


def shown(value: Any) -> str:
    """Return ``value`` as the user would have written it, shortened."""
    if isinstance(value, str):
        text = repr(value)
    elif isinstance(value, float):
        text = {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan" if math.isnan(value) else repr(value))
    else:
        text = json.dumps(value, default=str)
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."


def describe(hint: Any) -> str:
    """Return what a field of this type takes, in the user's words."""
    members = _members(hint)
    if len(members) > 1:
        return " or ".join(describe(member) for member in members)
    (hint,) = members
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in args)
    if origin in (tuple, list):
        if origin is tuple and args[-1] is not Ellipsis:
            return f"a list of {len(args)} {_plural(args[0])}"
        return f"a list of {_plural(args[0])}"
    if origin is dict:
        return f"a mapping from names to {_plural(args[1])}"
    if isinstance(hint, type) and issubclass(hint, Part):
        return "text, or a mapping with 'name'"
    return _SINGULAR.get(hint) or f"a mapping{_keys(hint)}"


def _plural(hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, Part):
        return "names or mappings with 'name'"
    return _PLURAL.get(hint) or (f"mappings{_keys(hint)}" if is_dataclass(hint) else "values")


def _keys(hint: Any) -> str:
    return f" ({', '.join(field.name for field in fields(hint))})" if is_dataclass(hint) else ""


def convert(
    value: Any,
    hint: Any,
    path: str,
    limits: Mapping[str, Any],
    problems: list[str],
    nested: Callable[[type, Any, str, list[str]], Any],
) -> Any:
    """Return ``value`` as ``hint`` asks, or note in ``problems`` why not and return ``BAD``.

    Args:
        value: What the file said.
        hint: Type of the field: bool, int, float, str, Literal, tuple, list, dict[str, ...], a
            dataclass, or a union of these.
        path: Dotted path of the key, for messages.
        limits: Field metadata; ``choices``, ``pattern``, ``minimum``, ``maximum`` and ``above`` hold for every
            number or text inside ``value``.
        problems: Takes one line per problem.
        nested: Builds a dataclass from a mapping (``cls, mapping, path, problems``).

    Raises:
        ComponentError: The field's own type is none of the supported ones.
    """

    def inner(item: Any, item_hint: Any, item_path: str) -> Any:
        return convert(item, item_hint, item_path, limits, problems, nested)

    if value is None:
        return None if types.NoneType in get_args(hint) else _refuse(problems, path, hint, value)
    members = _members(hint)
    if len(members) > 1:
        fitting = [member for member in members if _same_shape(value, member)]
        if not fitting:
            return _refuse(problems, path, hint, value)
        exact = [member for member in fitting if type(value) is member]
        return inner(value, (exact or fitting)[0], path)
    (hint,) = members
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        return _one_of(value, args, path, problems)
    if hint in _SINGULAR:
        return _scalar(value, hint, path, limits, problems)
    if origin in (tuple, list):
        return _sequence(value, hint, path, problems, inner)
    if origin is dict:
        if not isinstance(value, Mapping):
            return _refuse(problems, path, hint, value)
        items = {str(key): inner(item, args[1], f"{path}.{key}") for key, item in value.items()}
        return BAD if any(item is BAD for item in items.values()) else items
    if isinstance(hint, type) and is_dataclass(hint):
        built = nested(hint, value, path, problems)
        return BAD if built is None else built
    raise ComponentError(f"{path}: fields of type {hint} cannot be read from a configuration")


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union without None."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(member for member in get_args(hint) if member is not types.NoneType)
    return (hint,)


def _same_shape(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (tuple, list):
        return isinstance(value, list | tuple)
    if isinstance(hint, type) and issubclass(hint, Part):
        return isinstance(value, str | Mapping)
    if origin is dict or is_dataclass(hint):
        return isinstance(value, Mapping)
    if origin is Literal:
        return value in get_args(hint)
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    return isinstance(value, str) if hint is str else isinstance(value, int | float)


def _refuse(problems: list[str], path: str, hint: Any, value: Any) -> Any:
    expected = describe(hint)
    if isinstance(value, str) and expected != "text" and is_number(value):
        problems.append(f"{path}: expected {expected}, found the text {shown(value)}; write it without quotes")
    elif expected == "text" and isinstance(value, int | float):
        problems.append(f"{path}: expected text, found {shown(value)}; write it in quotes")
    else:
        problems.append(f"{path}: expected {expected}, found {shown(value)}")
    return BAD


def is_number(text: str) -> bool:
    """Return whether a text could be read as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _scalar(value: Any, hint: type, path: str, limits: Mapping[str, Any], problems: list[str]) -> Any:
    accepted: Any = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}[hint]
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):  # True is an int
        return _refuse(problems, path, hint, value)
    given = value
    if hint is float:
        try:
            value = float(value)
        except OverflowError:
            problems.append(f"{path}: expected a number, found {shown(given)}, which is too large")
            return BAD
        if math.isnan(value):
            problems.append(f"{path}: expected a number, found .nan")
            return BAD
    if limits.get("pattern") and hint is str:
        try:
            re.compile(value)
        except re.error as error:
            problems.append(f"{path}: {shown(value)} is not a regular expression: {error}")
            return BAD
    if "choices" in limits:
        return _one_of(value, limits["choices"], path, problems)
    if hint in (int, float):
        wrong = _out_of_range(value, limits)
        if wrong:
            problems.append(f"{path}: {wrong}, found {shown(given)}")
            return BAD
    return value


def _out_of_range(value: float, limits: Mapping[str, Any]) -> str:
    if "minimum" in limits and value < limits["minimum"]:
        return f"must be at least {limits['minimum']:g}"
    if "above" in limits and value <= limits["above"]:
        return f"must be above {limits['above']:g}"
    if "maximum" in limits and value > limits["maximum"]:
        return f"must be at most {limits['maximum']:g}"
    return ""


# Denominators of weighted losses: a choice's former name and its name.
_RENAMED_CHOICES = {"token": "weight_sum", "count": "num_tokens", "sample": "num_sequences"}


def _one_of(value: Any, choices: Sequence[Any], path: str, problems: list[str]) -> Any:
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return choice
    known = [str(choice) for choice in choices]
    hint = did_you_mean(value, known) if isinstance(value, str) else ""
    if (now := _RENAMED_CHOICES.get(str(value))) in known:
        hint = f"; it is called {now} now"
    problems.append(f"{path}: {shown(value)} is not a choice{hint} (choices: {', '.join(known)})")
    return BAD


def _sequence(value: Any, hint: Any, path: str, problems: list[str], inner: Callable[[Any, Any, str], Any]) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if not isinstance(value, list | tuple):
        return _refuse(problems, path, hint, value)
    open_ended = origin is list or args[-1] is Ellipsis
    if not open_ended and len(value) != len(args):
        problems.append(f"{path}: expected {len(args)} values, found {len(value)}")
        return BAD
    hints = [args[0]] * len(value) if open_ended else list(args)
    items = [inner(item, h, f"{path}[{i}]") for i, (item, h) in enumerate(zip(value, hints, strict=True))]
    if any(item is BAD for item in items):
        return BAD
    return tuple(items) if origin is tuple else items
