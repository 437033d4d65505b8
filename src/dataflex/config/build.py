"""Turns a ``dynamic`` block into a ``DynamicConfig`` and reports all problems of the block at once.

A method's block is a bare name, or a mapping of its name, its targets and its parameters. The message about a key in
the wrong place says where it belongs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from dataflex.config.mappings import UNKNOWN_KEY, collect, dotted, field_hints, key_of, name_in, parts_in, shown, values
from dataflex.config.needs import without_targets
from dataflex.config.rules import rule_problems
from dataflex.config.schema import (
    FLAT_KEYS,
    AverageConfig,
    Cadence,
    DynamicConfig,
    LedgerConfig,
    MethodConfig,
    SignalsConfig,
    block_keys,
    decides,
)
from dataflex.config.table import table
from dataflex.errors import ComponentError, ConfigError
from dataflex.method import Method, Requires, RunFacts
from dataflex.registry import KINDS, find, load_plugin, names, one_of, same_names

_MOST_NAMED = 4


def parse_dynamic(mapping: Any, base_dir: Path) -> DynamicConfig:
    """Return the configuration that a ``dynamic`` block describes.

    Args:
        mapping: The block as the file gave it. A null value means the default.
        base_dir: Folder of the configuration file; plugins are looked up there, then in the
            working directory.

    Raises:
        ConfigError: All problems of the block.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(
            f"dynamic: expected a mapping with a selector, mixer, orderer or weighter, found {shown(mapping)}"
        )
    problems: list[str] = []
    mapping = dict(mapping)
    if isinstance(mapping.get("plugins"), str):
        mapping["plugins"] = [mapping["plugins"]]
    ledger = mapping.get("ledger")
    if isinstance(ledger, Mapping) and ledger.get("targets") is not None:
        mapping["ledger"] = {**ledger, "targets": target_list(ledger["targets"], "dynamic.ledger.targets", problems)}
    unnamed = bool(problems)
    given = values(DynamicConfig, mapping, "dynamic", problems, skip=KINDS)
    if unnamed:
        given.pop("ledger", None)  # unread: no rule complains of targets that are told already
    plugins = given.get("plugins", ())
    given["plugins"] = load_plugins(plugins, base_dir, problems)
    for kind in KINDS:
        if mapping.get(kind) is not None:
            found: list[str] = []
            block = mapping[kind] if kind != "weighter" else _after_warmup(mapping[kind], given.get("warmup_steps", 0))
            given[kind] = method_block(kind, block, f"dynamic.{kind}", found)
            # A method that seems unknown is probably the one of the plugin that could not be loaded.
            whole = len(given["plugins"]) == len(plugins)
            problems += [problem for problem in found if whole or f": unknown {kind} " not in problem]
    mixer = given.get("mixer")
    if ledger is None and mixer is not None and mixer.targets and mixer.requires.ledger:
        given["ledger"] = LedgerConfig(targets=mixer.targets)
    dynamic = DynamicConfig(**given)
    unread = [key for key, value in mapping.items() if value is not None and given.get(key) is None]
    problems += rule_problems(dynamic, unread)
    if problems:
        raise ConfigError(_with_places(problems, mapping))
    return dynamic


def load_plugins(paths: tuple[str, ...], base_dir: Path, problems: list[str]) -> tuple[str, ...]:
    """Load the user's files and return their absolute paths, which other processes can load too."""
    loaded: list[str] = []
    classes: list[type[Method]] = []
    for path in paths:
        beside = base_dir / Path(path).expanduser()
        file = beside if beside.is_file() else Path(path).expanduser()
        try:
            classes += load_plugin(file)
        except ConfigError as error:
            problems += error.problems
        except ComponentError as error:
            problems += [f"dynamic.plugins: {line}" for line in str(error).splitlines()]
        else:
            loaded.append(str(file.resolve()))
    problems += [f"dynamic.plugins: {problem}" for problem in same_names(list(dict.fromkeys(classes)))]
    return tuple(loaded)


def method_block(kind: str, block: Any, path: str, problems: list[str]) -> MethodConfig | None:
    """Return the method that a block such as ``{name: loss, focus: high}`` describes, or None after noting why not."""
    before = len(problems)
    block = _spelt_out(kind, block, path, problems)
    one = one_of(kind)
    name = name_in(block, path, problems, f"the name of {one} or a mapping with 'name'", one, names(kind))
    cls = None if name is None else method_class(kind, name, path, problems)
    if name is None or cls is None:
        return None
    rest = {key: value for key, value in block.items() if key not in ("name", "targets")}
    needs = half_read(cls, block)
    also = ("targets",) if needs is None or needs.targets else ()
    found: list[str] = []
    keys = cadence_keys(cls)
    cadence = values(Cadence, {key: rest.pop(key) for key in keys if key in rest}, path, found)
    params = collect(cls.Params, rest, path, found, subject=f"{name} {kind}", extra=(*also, *keys))
    method: MethodConfig | None = None
    if params is not None:
        method = MethodConfig(kind=kind, name=name, params=params, **cadence)
        try:
            needs = method.requires
            found += [f"{path}.{problem.key}: {problem.text}" for problem in method.build().check(RunFacts())]
        except (ConfigError, ComponentError) as error:
            found += [f"{path}: {line}" for line in str(error).splitlines()]
    targets: tuple[str, ...] = ()
    if needs is not None and needs.targets:
        if block.get("targets") in (None, [], (), ""):
            problems.append(f"{path}: {without_targets(cls)}")
        else:
            targets = target_list(block["targets"], f"{path}.targets", problems)
    elif needs is not None and "targets" in block:
        problems.append(f"{path}.targets: the {cls.name} {kind} takes no targets; remove the key")
    problems += found
    return None if method is None or len(problems) > before else replace(method, targets=targets)


def cadence_keys(cls: type[Method]) -> tuple[str, ...]:
    """Return the keys that say when a method decides: only what decides which rows are served has them.

    A parameter of the method's own that has the same name comes first.
    """
    own = {key_of(each) for each in fields(cls.Params)}
    return tuple(each.name for each in fields(Cadence) if decides(cls) and each.name not in own)


def _after_warmup(block: Any, steps: int) -> Any:
    """Return a weighter's block, or a list of them, with the ``dynamic`` block's ``warmup_steps`` if it has none."""
    if steps == 0:
        return block
    if isinstance(block, list | tuple):
        return [_after_warmup(each, steps) for each in block]
    block = {"name": block} if isinstance(block, str) else block
    if not isinstance(block, Mapping):
        return block
    if block.get("name") == "product":
        return {**block, "of": _after_warmup(block.get("of"), steps)}
    try:
        cls = find("weighter", str(block.get("name")))
    except (ConfigError, ComponentError, ImportError):
        return block  # told when it is read
    takes = any(each.name == "warmup_steps" for each in fields(cls.Params))
    return {"warmup_steps": steps, **block} if takes else block


def _spelt_out(kind: str, block: Any, path: str, problems: list[str]) -> Any:
    """Return a method's block as a mapping with its name where it is written in a shorter form."""
    if isinstance(block, str):
        return {"name": block}
    if isinstance(block, list | tuple) and kind == "weighter":
        # Targets of the factors become those of the whole product.
        given = [each["targets"] for each in block if isinstance(each, Mapping) and "targets" in each]
        if len({target_list(each, f"{path}.targets", problems) for each in given}) > 1:
            problems.append(f"{path}: the weighters of a product share their targets, but name different ones")
        factors = [
            {key: value for key, value in each.items() if key != "targets"} if isinstance(each, Mapping) else each
            for each in block
        ]
        return {"name": "product", "of": factors, **({"targets": given[0]} if given else {})}
    if isinstance(block, Mapping) and block.get("name") is None and kind == "selector" and "represent" in block:
        return {**block, "name": "compose"}
    return block


def takes_targets(cls: type[Method], block: Mapping[str, Any]) -> bool:
    """Whether a method takes targets, given those of its parameters that can be read."""
    needs = half_read(cls, block)
    return needs is not None and needs.targets


def half_read(cls: type[Method], block: Mapping[str, Any]) -> Requires | None:
    """Return what a method requires, given those of its parameters that can be read; None where that is unknown.

    Parameters that are missing or wrong have their defaults, or None; neither Params nor the method is checked.
    """
    known = {key: block[key] for each in fields(cls.Params) if (key := key_of(each)) in block}
    given, hints = values(cls.Params, known, "", []), field_hints(cls.Params)
    params = object.__new__(cls.Params)
    for each in fields(cls.Params):
        if each.name not in given and key_of(each) in known and any(parts_in(hints[each.name])):
            return None  # what it requires is what its parts require
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


def method_class(kind: str, name: str, path: str, problems: list[str]) -> type[Method] | None:
    """Return the class of a method, or None after noting why it cannot be found."""
    try:
        return find(kind, name)
    except ConfigError as error:
        problems += [problem.replace(f"dynamic.{kind}:", f"{path}:", 1) for problem in error.problems]
    except ComponentError as error:
        problems += [f"{path}: {line}" for line in str(error).splitlines()]
    except ImportError as error:
        problems.append(f"{path}: the package that offers {kind} {name!r} cannot be imported: {error}")
    return None


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


def misplaced_keys(mapping: Mapping[str, Any]) -> list[str]:
    """Return a problem for each top-level key that belongs in the ``dynamic`` block.

    Keys of methods are looked for only where the block names the method, and it is one of ours.
    """
    block = mapping.get("dynamic")
    places = _places(block if isinstance(block, Mapping) else {}, ours=True)
    keys = [key for key in mapping if key in places and key not in table() and key not in FLAT_KEYS]
    return [f"{key}: unknown key; it belongs under {_told(places[key])}" for key in keys]


def _with_places(problems: Sequence[str], block: Mapping[str, Any]) -> list[str]:
    """Return the problems of a ``dynamic`` block; for unknown keys, add the place where they belong."""
    found = [UNKNOWN_KEY.fullmatch(line) for line in problems]
    places = _places(block) if any(found) else {}
    return [
        line if match is None else _placed(match, line, places) for line, match in zip(problems, found, strict=True)
    ]


def _placed(match: re.Match[str], line: str, places: Mapping[str, list[str]]) -> str:
    key = match["key"]
    if key in places:
        return f"{match['path']}: unknown key; it belongs under {_told(places[key])}{match['rest']}"
    if key in table():
        hint = match["hint"] or ""
        return f"{match['path']}: unknown key{hint}; it is LLaMA-Factory's: write it at the top level{match['rest']}"
    takers = [
        f"{kind}/{name}"
        for kind in KINDS
        for name in names(kind)
        if (cls := method_class(kind, name, "", [])) is not None and key in map(key_of, fields(cls.Params))
    ]
    if not takers or match["hint"]:
        return line
    more = f" and {len(takers) - _MOST_NAMED} more" if len(takers) > _MOST_NAMED else ""
    return f"{line}; it is a key of {', '.join(takers[:_MOST_NAMED])}{more}"


def _told(places: Sequence[str]) -> str:
    above = [place.rpartition(".")[0].removeprefix("dynamic.") for place in places]
    return " or ".join(f"'{parent}': {place}" for parent, place in zip(above, places, strict=True))


def _places(block: Mapping[str, Any], ours: bool = False) -> dict[str, list[str]]:
    """Return, for each key that may stand in this block, the dotted paths at which it may."""
    found: dict[str, list[str]] = {}
    for path in dict.fromkeys(_paths(block, ours)):
        found.setdefault(path.rpartition(".")[2], []).append(path)
    return found


def _paths(block: Mapping[str, Any], ours: bool) -> Iterator[str]:
    yield from (f"dynamic.{key}" for key in block_keys())
    yield from (f"dynamic.signals.{field.name}" for field in fields(SignalsConfig))
    yield from (f"dynamic.ledger.{field.name}" for field in fields(LedgerConfig))
    yield from (f"dynamic.average_weights.{field.name}" for field in fields(AverageConfig))
    for kind in KINDS:
        given = _spelt_out(kind, block.get(kind), "", [])
        name = given.get("name") if isinstance(given, Mapping) else None
        cls = method_class(kind, name, "", []) if isinstance(name, str) else None
        if cls is not None and (not ours or cls.__module__.startswith("dataflex.")):
            path = f"dynamic.{kind}"
            yield from (f"{path}.{key}" for key in cadence_keys(cls))
            yield from [f"{path}.targets"] if takes_targets(cls, given) else []
            yield from _paths_below(cls.Params, given, path)


def _paths_below(cls: type, given: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yield the paths of a dataclass's keys, and those of the parts that ``given`` names."""
    hints = field_hints(cls)
    for field in fields(cls):
        place = dotted(path, key_of(field))
        yield place
        value = given.get(key_of(field))
        several = isinstance(value, list | tuple)
        for number, item in enumerate(value if isinstance(value, list | tuple) else [value]):
            part = item if isinstance(item, Mapping) else {"name": item}
            for kind in parts_in(hints[field.name]) if isinstance(part.get("name"), str) else ():
                try:
                    params = kind.params_of(part["name"])
                except ConfigError:
                    continue
                yield from _paths_below(params, part, f"{place}[{number}]" if several else place)
