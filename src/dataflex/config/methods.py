"""One method's block: a bare name, or a mapping of its name, its targets and its parameters."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

from dataflex.config.collect import collect, field_hints, key_of, values
from dataflex.config.convert import shown
from dataflex.config.schema import MethodConfig
from dataflex.errors import ComponentError, ConfigError, did_you_mean
from dataflex.method import Method, Requires, RunFacts
from dataflex.parts import Part
from dataflex.registry import find, names


def method_block(kind: str, block: Any, path: str, problems: list[str]) -> MethodConfig | None:
    """Return what a block such as ``selector: {name: loss, focus: high}`` asks for, or None after noting why not."""
    before = len(problems)
    if isinstance(block, str):
        block = {"name": block}
    if isinstance(block, list | tuple) and kind == "weighter":
        block = _product(block, path, problems)
    if not isinstance(block, Mapping):
        problems.append(f"{path}: expected the name of a {kind} or a mapping with 'name', found {shown(block)}")
        return None
    name = block.get("name")
    if name is None and kind == "selector" and "represent" in block:
        name = "compose"
    if name is None:
        near = did_you_mean("name", [str(key) for key in block]).replace("did you mean", "is it spelt")
        problems.append(f"{path}.name: missing; name a {kind} (known: {', '.join(names(kind))}){near}")
        return None
    if not isinstance(name, str):
        problems.append(f"{path}.name: expected text, found {shown(name)}")
        return None
    cls = method_class(kind, name, path, problems)
    if cls is None:
        return None
    rest = {key: value for key, value in block.items() if key not in ("name", "targets")}
    needs = half_read(cls, block)
    also = ("targets",) if needs is None or needs.targets else ()
    found: list[str] = []
    params = collect(cls.Params, rest, path, found, subject=f"{name} {kind}", extra=also)
    method: MethodConfig | None = None
    if params is not None:
        method = MethodConfig(kind=kind, name=name, params=params)
        try:
            needs = method.requires
            found += [f"{path}.{problem.key}: {problem.text}" for problem in method.build().check(RunFacts())]
        except ConfigError as error:
            found += [f"{path}: {problem}" for problem in error.problems]
        except ComponentError as error:
            found += [f"{path}: {line}" for line in str(error).splitlines()]
    targets = () if needs is None else _targets(cls, needs.targets, block, path, problems)
    problems += found
    return None if method is None or len(problems) > before else replace(method, targets=targets)


def _product(blocks: Sequence[Any], path: str, problems: list[str]) -> dict[str, Any]:
    """Return the block of a product of weighters; targets of its factors become those of the whole."""
    given = [block["targets"] for block in blocks if isinstance(block, Mapping) and "targets" in block]
    targets = {target_list(each, f"{path}.targets", problems) for each in given}
    if len(targets) > 1:
        problems.append(f"{path}: the weighters of a product share their targets, but name different ones")
    factors = [
        {key: value for key, value in block.items() if key != "targets"} if isinstance(block, Mapping) else block
        for block in blocks
    ]
    return {"name": "product", "of": factors, **({"targets": given[0]} if given else {})}


def takes_targets(cls: type[Method], block: Mapping[str, Any]) -> bool:
    """Whether a method takes targets under those of its parameters that can be read."""
    needs = half_read(cls, block)
    return needs is not None and needs.targets


def half_read(cls: type[Method], block: Mapping[str, Any]) -> Requires | None:
    """Return what a method requires under those of its parameters that can be read; None where that cannot be told.

    Parameters that are missing or wrong have their defaults, or None; neither Params nor the method is checked.
    """
    known = {key: block[key] for each in fields(cls.Params) if (key := key_of(each)) in block}
    given, hints = values(cls.Params, known, "", []), field_hints(cls.Params)
    if any(
        each.name not in given and key_of(each) in known and names_parts(hints[each.name])
        for each in fields(cls.Params)
    ):
        return None  # what it requires is what its parts require
    params = object.__new__(cls.Params)
    for each in fields(cls.Params):
        default = None if each.default is MISSING else each.default
        if each.default_factory is not MISSING:
            default = each.default_factory()
        object.__setattr__(params, each.name, given.get(each.name, default))
    try:
        method = object.__new__(cls)
        method.params = params
        return method.requires()
    except Exception:  # noqa: BLE001 (the author's code, with parameters that may be None)
        return None


def names_parts(hint: Any) -> bool:
    """Whether values of a type are named parts, which are methods or come with parameters of their own."""
    inside = [inner for each in typing.get_args(hint) for inner in (each, *typing.get_args(each))]
    return any(isinstance(each, type) and issubclass(each, Part) for each in (hint, *inside))


def method_class(kind: str, name: str, path: str, problems: list[str]) -> type[Method] | None:
    """Return the class of a method, or None after noting why there is none."""
    try:
        return find(kind, name)
    except ConfigError as error:
        problems += [problem.replace(f"dynamic.{kind}:", f"{path}:", 1) for problem in error.problems]
    except ComponentError as error:
        problems += [f"{path}: {line}" for line in str(error).splitlines()]
    except ImportError as error:
        problems.append(f"{path}: the package that offers {kind} {name!r} cannot be imported: {error}")
    return None


def needs_target(cls: type[Method]) -> str:
    """Return what to tell someone who named no target for a method that needs one."""
    summary = cls.card.summary.rstrip(".")
    return f"{cls.name} needs a target: add 'targets: [<data set>]' (it {summary[:1].lower()}{summary[1:]})"


def target_list(value: Any, path: str, problems: list[str]) -> tuple[str, ...]:
    """Return data set names given as a list, or as text with commas as LLaMA-Factory's ``dataset`` is."""
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",")]
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) and item for item in value):
        problems.append(f"{path}: expected the names of data sets, found {shown(value)}")
        return ()
    if len(set(value)) < len(value):
        problems.append(f"{path}: names a data set twice: {', '.join(value)}")
    return tuple(value)


def _targets(
    cls: type[Method], wanted: bool, block: Mapping[str, Any], path: str, problems: list[str]
) -> tuple[str, ...]:
    value = block.get("targets")
    if not wanted:
        if "targets" in block:
            problems.append(f"{path}.targets: the {cls.name} {cls.kind} takes no targets; remove the key")
        return ()
    if value is None or value in ([], (), ""):
        problems.append(f"{path}: {needs_target(cls)}")
        return ()
    return target_list(value, f"{path}.targets", problems)
