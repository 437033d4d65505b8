"""Dataclasses from the mappings of a configuration file, and back.

Types are strict: a number in quotes, a boolean for a count, or a NaN is a problem; only an integer is accepted for a
float. Every problem is noted, and none of them ends the reading.
"""

from __future__ import annotations

import json
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin

from dataflex.config.schema import DynamicConfig, MethodConfig, block_keys
from dataflex.contract import is_ours, whereabouts
from dataflex.errors import ComponentError, ConfigError, did_you_mean
from dataflex.parts import Part
from dataflex.registry import KINDS

T = TypeVar("T")

_BAD: Final = object()
"""What ``_converted`` returns after it has noted a problem."""
UNKNOWN_KEY = re.compile(
    r"(?P<path>(?:.*\.)?(?P<key>[^.]+)): unknown key(?P<hint>; did you mean '[^']*'\?)?"
    r"(?P<rest> \(.* (?:accepts: .*|takes no parameters)\))"
)
"""The problem that is noted for an unknown key."""

_MOST_SHOWN = 60
_LINE = 100
_SINGULAR: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_PLURAL: dict[Any, str] = {bool: "truth values", int: "whole numbers", float: "numbers", str: "texts"}
_LIMITS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "minimum": (operator.lt, "at least"),
    "above": (operator.le, "above"),
    "maximum": (operator.gt, "at most"),
}
_RENAMED_KEYS = {"burn_in_steps": "warmup_steps"}  # a key's former name and its name
# Denominators of weighted losses: a choice's former name and its name.
_RENAMED_CHOICES = {"token": "weight_sum", "count": "num_tokens", "sample": "num_sequences"}


def collect(
    cls: type[T], mapping: Any, path: str, problems: list[str], *, subject: str = "", extra: Collection[str] = ()
) -> T | None:
    """Return the dataclass ``cls`` built from ``mapping``, or None after noting why not in ``problems``.

    Args:
        cls: Its metadata of fields may hold ``choices``, ``pattern``, ``minimum``, ``maximum``, ``above``.
        mapping: Keys and values as the file gave them. A null value means the default.
        path: Dotted path of the mapping, for messages.
        problems: Takes one line per problem.
        subject: What accepts the keys ("loss selector"); by default the path.
        extra: Further keys that the caller reads itself.

    Raises:
        ComponentError: A field of ``cls`` has a type that cannot come from a configuration.
    """
    if issubclass(cls, Part):
        return _part(cls, mapping, path, problems)
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
    takes = f"accepts: {', '.join(accepted)}" if accepted else "takes no parameters"
    for key in mapping:
        if key not in accepted:
            near = did_you_mean(_RENAMED_KEYS.get(str(key), str(key)), accepted)
            problems.append(f"{dotted(path, key)}: unknown key{near} ({subject or path} {takes})")
    types_of = field_hints(cls)
    result: dict[str, Any] = {}
    for name, field in known.items():
        if name in skip:
            continue
        value, hint = mapping.get(name), types_of[field.name]
        if value is None:
            if field.default is MISSING and field.default_factory is MISSING:
                told = f" ({field.metadata['help']})" if "help" in field.metadata else ""
                problems.append(f"{dotted(path, name)}: missing; expected {describe(hint)}{told}")
            continue
        value = _converted(value, hint, dotted(path, name), field.metadata, problems)
        if value is not _BAD:
            result[field.name] = value
    return result


def _part(cls: type[Any], block: Any, path: str, problems: list[str]) -> Any:
    """Return the named part that ``knn_kde`` or ``{name: knn_kde, sigma: 0.1}`` describes, or None."""
    if isinstance(block, str):
        block = {"name": block}
    name = name_in(block, path, problems, describe(cls), "one", cls.known())
    if name is None:
        return None
    try:
        params_class = cls.params_of(name)
    except (ConfigError, ComponentError) as error:
        problems += [f"{path}: {problem}" for problem in str(error).splitlines()]
        return None
    rest = {key: value for key, value in block.items() if key != "name"}
    params = collect(params_class, rest, path, problems, subject=f"{cls.what} {name}")
    return None if params is None else cls(name, params)


def name_in(block: Any, path: str, problems: list[str], expected: str, what: str, known: Sequence[str]) -> str | None:
    """Return the name in the block of a method or a part, or None after noting why there is none."""
    if not isinstance(block, Mapping):
        problems.append(f"{path}: expected {expected}, found {shown(block)}")
        return None
    name = block.get("name")
    if isinstance(name, str):
        return name
    told, near = f"expected text, found {shown(name)}", ""
    if name is None:
        told, near = "missing", did_you_mean("name", [str(key) for key in block])
    near = near.replace("did you mean", "is it spelt")
    problems.append(f"{path}.name: {told}; name {what} (known: {', '.join(known)}){near}")
    return None


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


def parts_in(hint: Any) -> Iterator[type[Part]]:
    """Yield the kinds of named parts that a value of this type may be or hold."""
    for each in (hint, *(inner for arg in get_args(hint) for inner in (arg, *get_args(arg)))):
        if isinstance(each, type) and issubclass(each, Part):
            yield each


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
    """Return in words the values that a field of this type accepts."""
    members = _members(hint)
    if len(members) > 1:
        return " or ".join(describe(member) for member in members)
    (hint,) = members
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return "a value"
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in args)
    if origin in (tuple, list):
        fixed = origin is tuple and args[-1] is not Ellipsis
        return f"a list of {f'{len(args)} ' if fixed else ''}{_plural(args[0])}"
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


def _converted(value: Any, hint: Any, path: str, limits: Mapping[str, Any], problems: list[str]) -> Any:
    """Return ``value`` converted to the type ``hint``, or ``_BAD`` after noting why not.

    ``limits`` is the metadata of the field; they hold for every number or text inside ``value``.
    """

    def refused(problem: str) -> Any:
        problems.append(f"{path}: {problem}")
        return _BAD

    if value is None:
        return None if types.NoneType in get_args(hint) else refused(_expected(hint, value))
    members = _members(hint)
    if len(members) > 1:
        fitting = [member for member in members if _same_shape(value, member)]
        exact = [member for member in fitting if type(value) is member]
        if not fitting:
            return refused(_expected(hint, value))
        return _converted(value, (exact or fitting)[0], path, limits, problems)
    (hint,) = members
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal or hint in _SINGULAR:
        value, problem = (value, _no_choice(value, args)) if origin is Literal else _scalar(value, hint, limits)
        return refused(problem) if problem else value
    if origin in (tuple, list):
        open_ended = origin is list or args[-1] is Ellipsis
        if not isinstance(value, list | tuple):
            return refused(_expected(hint, value))
        if not open_ended and len(value) != len(args):
            return refused(f"expected {len(args)} values, found {len(value)}")
        hints = [args[0]] * len(value) if open_ended else args
        items = [
            _converted(item, each, f"{path}[{i}]", limits, problems)
            for i, (item, each) in enumerate(zip(value, hints, strict=True))
        ]
        return _BAD if any(item is _BAD for item in items) else origin(items)
    if origin is dict:
        if not isinstance(value, Mapping):
            return refused(_expected(hint, value))
        named = {str(key): _converted(item, args[1], f"{path}.{key}", limits, problems) for key, item in value.items()}
        return _BAD if any(item is _BAD for item in named.values()) else named
    if isinstance(hint, type) and is_dataclass(hint):
        built = collect(hint, value, path, problems)
        return _BAD if built is None else built
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


def _expected(hint: Any, value: Any) -> str:
    expected = describe(hint)
    if isinstance(value, str) and expected != "text" and is_number(value):
        return f"expected {expected}, found the text {shown(value)}; write it without quotes"
    if expected == "text" and isinstance(value, int | float):
        return f"expected text, found {shown(value)}; write it in quotes"
    return f"expected {expected}, found {shown(value)}"


def is_number(text: str) -> bool:
    """Return whether a text could be read as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _scalar(value: Any, hint: type, limits: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the value as ``hint``, and what is wrong with it or an empty text."""
    accepted: Any = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}[hint]
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):  # True is an int
        return value, _expected(hint, value)
    found = shown(value)
    if hint is float:
        try:
            value = float(value)
        except OverflowError:
            return value, f"expected a number, found {found}, which is too large"
        if math.isnan(value):
            return value, "expected a number, found .nan"
    if limits.get("pattern") and hint is str:
        try:
            re.compile(value)
        except re.error as error:
            return value, f"{found} is not a regular expression: {error}"
    if "choices" in limits:
        return value, _no_choice(value, limits["choices"])
    for key, (passes, told) in _LIMITS.items() if hint in (int, float) else ():
        if key in limits and passes(value, limits[key]):
            return value, f"must be {told} {limits[key]:g}, found {found}"
    return value, ""


def _no_choice(value: Any, choices: Sequence[Any]) -> str:
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return ""
    known = [str(choice) for choice in choices]
    hint = did_you_mean(value, known) if isinstance(value, str) else ""
    if (now := _RENAMED_CHOICES.get(str(value))) in known:
        hint = f"; it is called {now} now"
    return f"{shown(value)} is not a choice{hint} (choices: {', '.join(known)})"


def plain(value: Any) -> Any:
    """Return dataclasses as dicts and tuples as lists, all the way down; a method as its block."""
    if isinstance(value, MethodConfig):
        targets = {"targets": list(value.targets)} if value.targets else {}
        own = {"every": value.every, "warmup_steps": value.warmup_steps} if value.decides else {}
        cadence = {key: steps for key, steps in own.items() if steps is not None}
        return {"name": value.name, **targets, **cadence, **plain(value.params)}
    if isinstance(value, Part):
        own = plain(value.params)
        return {"name": value.name, **own} if own else value.name
    if is_dataclass(value):
        return {key_of(field): plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def as_mapping(dynamic: DynamicConfig) -> dict[str, Any]:
    """Return the ``dynamic`` block of a configuration, defaults included, made of dicts, lists and plain values.

    Read again, it gives an equal configuration, but for the length of a run that flat keys fixed.
    """
    return {key: plain(getattr(dynamic, key)) for key in block_keys()}


def as_yaml(mapping: Mapping[str, Any], indent: int = 0) -> str:
    """Return ``mapping`` as YAML in its own order; a value is on one line where it fits, a method on its own lines."""
    text = ""
    for key, value in mapping.items():
        head, flow = f"{' ' * indent}{key}:", _flow(value)
        long = len(head) + len(flow) > _LINE
        if isinstance(value, Mapping) and value and (long or any(kind in value for kind in KINDS)):
            text += f"{head}\n{as_yaml(value, indent + 2)}"
        elif isinstance(value, list) and long:
            text += "\n".join([head, *(f"{' ' * (indent + 2)}- {_flow(item)}" for item in value)]) + "\n"
        else:
            text += f"{head} {flow}\n"
    return text


def _flow(value: Any) -> str:
    import yaml

    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")
