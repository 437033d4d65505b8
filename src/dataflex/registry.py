"""Finds methods by kind and name: built in, from other packages' entry points, or from a user's file.

Built-in methods are imported when they are asked for, so that ``dataflex --help`` stays quick. Other packages add
methods through the entry point groups ``dataflex.selectors``, ``dataflex.mixers``, ``dataflex.orderers`` and
``dataflex.weighters``; of a user's own file, named in ``dynamic.plugins``, every method class is taken.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from dataflex.contract import class_problems, is_ours, watched, whereabouts
from dataflex.errors import ComponentError, ConfigError, did_you_mean
from dataflex.method import Method
from dataflex.ported import stand_ins, wrapped

KINDS: tuple[str, ...] = ("selector", "mixer", "orderer", "weighter")

_BUILTIN: dict[str, dict[str, str]] = {
    "selector": {
        "baselines": "all random random_balanced longest",
        "losses": "loss delta_loss rho_loss ifd tacs grad_norm el2n",
        "influence": "less icons cluster_less zeroth",
        "nice": "nice",
        "gist": "gist",
        "nearest": "rds_plus near embed tsds",
        "texts": "bm25 dsir",
        "clusters": "s2l coincide",
        "candidates": "greats opus uds",
        "infobatch": "infobatch",
        "preferences": "margin bees selective_dpo",
        "compose": "compose",
        "rollouts": "pass_band pass_schedule mopps greso limr",
    },
    "mixer": {
        "fixed": "static uniform size temperature unimax staged random",
        "online": "odm ado softmax_loss",
        "held_out": "sheared velocity skill_it aioli dynamic_moe",
        "gradient_shares": "doge dga pike dynamix_sft rnb grape",
        "measured": "ledger",
        "loss_weights": "doremi group_dro",
        "bandits": "sec dump_ucb tscl",
    },
    "orderer": {"patterns": "sorting folding zigzag segment stair saw shuffle", "pacing": "pacing"},
    "weighter": {
        "rows": "none column group",
        "loss": "loss slm rho",
        "token": "token focal",
        "answers": "ss_token pear q_tuning",
        "likeness": "adapt joint_update_aware",
        "influence": "meta presence",
        "product": "product",
    },
}
"""By kind: the modules of its package, and the names of the methods in each."""

_MODULES = {
    kind: {name: module for module, listed in modules.items() for name in listed.split()}
    for kind, modules in _BUILTIN.items()
}


def one_of(kind: str) -> str:
    """Return a kind with its article, for messages."""
    return f"an {kind}" if kind == "orderer" else f"a {kind}"


_plugins: dict[str, dict[str, type[Method]]] = {kind: {} for kind in KINDS}
_plugin_files: dict[Path, list[type[Method]]] = {}
_checked: list[tuple[str, type[Method]]] = []


def _entry_points(kind: str) -> dict[str, EntryPoint]:
    return _read_once(entry_points, f"dataflex.{kind}s", tuple(sys.path))


@cache
def _read_once(read: Callable[..., Iterable[EntryPoint]], group: str, _path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Return a group's entry points by name; a look through everything that is installed takes some 30 ms."""
    return {point.name: point for point in read(group=group)}


def names(kind: str) -> list[str]:
    """Return every known name of ``kind``: built-in ones, those of other packages, those of plugins."""
    return list(dict.fromkeys([*_MODULES[kind], *sorted(_entry_points(kind)), *_plugins[kind]]))


def find(kind: str, name: str) -> type[Method]:
    """Return the class of a method.

    Raises:
        ConfigError: Unknown name, with the nearest known spelling.
        ComponentError: The class found is not a ``kind``.
    """
    if name in _plugins[kind]:
        return _plugins[kind][name]
    if name in _MODULES[kind]:
        module = importlib.import_module(f"dataflex.{kind}s.{_MODULES[kind][name]}")
        return next(cls for cls in _methods_of(module) if cls.name == name)
    point = _entry_points(kind).get(name)
    if point is None:
        known, others = names(kind), [other for other in KINDS if name in names(other)]
        near = f"; it is a {others[0]}: write '{others[0]}: {name}'" if others else did_you_mean(name, known)
        raise ConfigError(f"dynamic.{kind}: unknown {kind} {name!r}{near} (known: {', '.join(known)})")
    try:
        cls = point.load()
    except ImportError:
        raise
    except Exception as error:  # the package's own code
        told = f"{point.value} cannot be imported: {type(error).__name__}: {error}"
        raise ComponentError(f"{kind} {name!r}: {told}") from error
    return registered(kind, cls)


def _methods_of(module: ModuleType) -> list[type[Method]]:
    """Return the method classes that a module defines."""
    methods = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, Method)]
    return [cls for cls in dict.fromkeys(methods) if cls.__module__ == module.__name__]


def registered(kind: str, cls: Any) -> type[Method]:
    """Return a class with every call watched; ComponentError with all problems where it does not keep the contract."""
    if not (isinstance(cls, type) and is_ours(cls)) and (kind, cls) not in _checked:
        problems = class_problems(kind, cls)
        if problems:
            raise ComponentError("\n".join(problems))
        _checked.append((kind, watched(cls)))
    found: type[Method] = cls
    return found


def import_file(file: Path, what: str, package: str = "") -> ModuleType:
    """Run a user's Python file as a module whose name holds ``what``, in a package if one is named.

    Raises:
        ImportError: Nothing can be imported from a file of this name.
        BaseException: Anything that its code raises; the module is removed again.
    """
    name = f"{package and f'{package}.'}dataflex_{what}_{file.stem}_{abs(hash(str(file))) % 10**8}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError("it is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


_imported = cache(import_file)


def load_function(path: str, what: str) -> Callable[..., Any]:
    """Import ``module:function`` or ``file.py:function``; a file is run once, as a module whose name holds ``what``.

    Raises:
        ValueError: It cannot be imported, or has no such function.
    """
    source, _, name = path.rpartition(":")
    file = Path(source).expanduser().resolve() if source.endswith(".py") else None
    if file is not None and not file.is_file():
        raise ValueError(f"no such file: {source}")
    try:
        module = importlib.import_module(source) if file is None else _imported(file, what)
    except Exception as error:  # the user's own code: told with its cause
        raise ValueError(f"{source} cannot be imported: {type(error).__name__}: {error}") from error
    function: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{source} has no function {name!r}")
    return function


def load_plugin(path: str | Path) -> list[type[Method]]:
    """Import a user's Python file and register every method class defined in it.

    Raises:
        ConfigError: The file is missing, cannot be imported, or defines no method.
        ComponentError: A class does not keep the contract, or its name is taken.
    """
    file = Path(path).expanduser().resolve()
    if file in _plugin_files:
        return _plugin_files[file]
    if not file.is_file():
        raise ConfigError(f"dynamic.plugins: no such file: {path}")
    try:
        with stand_ins(file) as package:
            module = import_file(file, "plugin", package)
    except (Exception, SystemExit) as error:  # the user's own code
        # The text of a SyntaxError names the line.
        frames = () if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file)]
        told = f"{type(error).__name__}: {error}{f' (line {lines[-1]})' if lines else ''}"
        raise ConfigError(f"dynamic.plugins: {path} cannot be imported: {told}") from error
    classes = _methods_of(module)
    found = [cls for cls in classes if cls.name and not inspect.isabstract(cls)] + wrapped(module)
    if not found:
        nameless = f"; {whereabouts(classes[0])} has no name" if classes else ""
        raise ConfigError(
            f"dynamic.plugins: {path} defines no method (a Selector, Mixer, Orderer or Weighter with a name){nameless}"
        )
    problems = [line for cls in found for line in _problems(cls)] + same_names(found)
    if problems:
        raise ComponentError("\n".join(problems))
    for cls in found:
        _plugins[cls.kind][cls.name] = cls
    _plugin_files[file] = found
    return found


def _problems(cls: type[Method]) -> list[str]:
    if cls.kind not in KINDS:
        return [
            f"{whereabouts(cls)} must be a subclass of dataflex.Selector, Mixer, Orderer or Weighter, not of Method"
        ]
    try:
        registered(cls.kind, cls)
    except ComponentError as error:
        return str(error).splitlines()
    if cls.name in _MODULES[cls.kind]:
        return [f"{cls.kind} {cls.name!r} is the name of a built-in method; rename yours: {whereabouts(cls)}"]
    return []


def same_names(classes: Sequence[type[Method]]) -> list[str]:
    """Return a problem for each class whose kind and name an earlier one has."""
    problems: list[str] = []
    known: dict[tuple[str, str], type[Method]] = {}
    for cls in classes:
        before = known.setdefault((cls.kind, cls.name), cls)
        if before is not cls:
            places = f"{whereabouts(before)} and {whereabouts(cls)}"
            problems.append(f"{cls.kind} {cls.name!r} is there twice: {places}; rename one")
    return problems
