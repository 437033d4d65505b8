"""Parameters of methods, and named parts with their own: ``rule: {name: knn_kde, sigma: 0.1}`` or ``rule: top_k``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar, Self

from dataflex.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Params:
    """Base of the parameters of a method: a frozen, keyword-only dataclass in its class, with fields made by ``param``.

    ``__post_init__`` may raise ``ValueError("field: ...")`` for rules between fields.
    """

    def __post_init__(self) -> None:
        """Check rules between fields."""


def param(default: Any = MISSING, help: str = "", **limits: Any) -> Any:
    """Return a parameter: a dataclass field with one line of ``help``, with the unit; without a default it is required.

    ``limits`` are ``choices``, ``minimum``, ``maximum``, ``above`` (exclusive minimum), ``pattern`` (True for a regular
    expression), and marks such as ``model``.
    """
    return field(default=default, metadata={"help": help, **limits})


def refuse_idle(params: Params, keys: Iterable[str], where: str) -> None:
    """Raise ValueError for the first of ``keys`` that is given other than by default, as it has no effect ``where``."""
    for key in keys:
        if getattr(params, key) != getattr(type(params), key):
            raise ValueError(f"{key}: has no effect {where}; remove it")


@dataclass(frozen=True)
class Part:
    """One choice out of a table, with the parameters of the choice.

    A subclass says which choices there are; the configuration reads a bare name, or a mapping with ``name`` and the
    parameters beside it.
    """

    name: str  # name in the table
    params: Params = field(default_factory=Params)  # parameters of that choice

    what: ClassVar[str] = "part"  # what the table holds, in the singular, for messages
    table: ClassVar[
        Mapping[str, type[Params]]
    ] = {}  # parameters by choice; a subclass may give ``known`` and ``listed``

    @classmethod
    def known(cls) -> list[str]:
        """Return every name that may be chosen."""
        return list(cls.table)

    @classmethod
    def listed(cls, name: str) -> type[Params]:
        """Return the parameter dataclass of a known name; ComponentError where its choice cannot be used."""
        return cls.table[name]

    @classmethod
    def params_of(cls, name: str) -> type[Params]:
        """Return the parameter dataclass of a choice; ConfigError where ``name`` is not in the table."""
        known = cls.known()
        if name not in known:
            near = did_you_mean(name, known)
            raise ConfigError(f"unknown {cls.what} {name!r}{near} (known: {', '.join(known)})")
        return cls.listed(name)

    @classmethod
    def of(cls, name: str, **params: Any) -> Self:
        """Return a choice with parameters given as Python values."""
        return cls(name, cls.params_of(name)(**params))
