"""From mappings to the configuration's dataclasses, all problems of the whole told at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from dataflex.config.collect import collect, values
from dataflex.config.convert import shown
from dataflex.config.methods import method_block
from dataflex.config.places import with_places
from dataflex.config.rules import rule_problems
from dataflex.config.schema import DynamicConfig, SignalsConfig
from dataflex.errors import ComponentError, ConfigError
from dataflex.method import Method
from dataflex.registry import KINDS, load_plugin, same_names

T = TypeVar("T")


def build(cls: type[T], mapping: Any, path: str, *, subject: str = "") -> T:
    """Return the dataclass ``cls`` built from ``mapping``; see ``collect`` for the arguments.

    Raises:
        ConfigError: All problems of the mapping.
        ComponentError: A field of ``cls`` has a type that cannot come from a configuration.
    """
    problems: list[str] = []
    built = collect(cls, mapping, path, problems, subject=subject)
    if built is None:
        raise ConfigError(problems)
    return built


def block_keys() -> list[str]:
    """Return the keys of the ``dynamic`` block, in the order of the schema."""
    return [field.name for field in fields(DynamicConfig) if field.metadata.get("user", True)]


def user_keys() -> list[str]:
    """Return the keys of the ``dynamic`` block and those one level below, as dotted paths."""
    return block_keys() + [f"signals.{field.name}" for field in fields(SignalsConfig)]


def parse_dynamic(mapping: Any, base_dir: Path) -> DynamicConfig:
    """Return what a ``dynamic`` block asks for.

    Args:
        mapping: The block as the file gave it. A null value means the default.
        base_dir: Folder of the configuration file; plugins are looked up there, then in the
            working directory.

    Raises:
        ConfigError: All problems of the block.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"dynamic: expected a mapping with a selector, mixer or weighter, found {shown(mapping)}")
    problems: list[str] = []
    mapping = dict(mapping)
    if isinstance(mapping.get("plugins"), str):
        mapping["plugins"] = [mapping["plugins"]]
    given = values(DynamicConfig, mapping, "dynamic", problems, skip=KINDS)
    given["plugins"] = load_plugins(given.get("plugins", ()), base_dir, problems)
    for kind in KINDS:
        if mapping.get(kind) is not None:
            given[kind] = method_block(kind, mapping[kind], f"dynamic.{kind}", problems)
    dynamic = DynamicConfig(**given)
    unread = [key for key, value in mapping.items() if value is not None and given.get(key) is None]
    problems += rule_problems(dynamic, unread)
    if problems:
        raise ConfigError(with_places(problems, mapping))
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
