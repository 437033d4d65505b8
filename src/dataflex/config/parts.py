"""Reads a named part of a method: a bare name, or a mapping of its name and its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from dataflex.config.convert import describe, shown
from dataflex.errors import ComponentError, ConfigError
from dataflex.parts import Part

P = TypeVar("P", bound=Part)


def read_part(cls: type[P], block: Any, path: str, problems: list[str], collect: Callable[..., Any]) -> P | None:
    """Return what a block such as ``{name: knn_kde, sigma: 0.1}`` asks for, or None after noting why not.

    Args:
        cls: Which kind of part.
        block: What the file gave.
        path: Dotted path of the block, for messages.
        problems: Takes one line per problem.
        collect: ``config.collect.collect``.
    """
    if isinstance(block, str):
        block = {"name": block}
    if not isinstance(block, Mapping):
        problems.append(f"{path}: expected {describe(cls)}, found {shown(block)}")
        return None
    name = block.get("name")
    if not isinstance(name, str):
        told = "missing" if name is None else f"expected text, found {shown(name)}"
        problems.append(f"{path}.name: {told}; name one (known: {', '.join(cls.known())})")
        return None
    try:
        params_class = cls.params_of(name)
    except ConfigError as error:
        problems += [f"{path}: {problem}" for problem in error.problems]
        return None
    except ComponentError as error:
        problems.append(f"{path}: {error}")
        return None
    rest = {key: value for key, value in block.items() if key != "name"}
    params = collect(params_class, rest, path, problems, subject=f"{cls.what} {name}")
    return None if params is None else cls(name, params)
