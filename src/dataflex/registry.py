"""Finds methods by kind and name: built in, from other packages' entry points, or from a user's file.

Built-in methods are imported when they are asked for, so that ``dataflex --help`` stays quick. Other packages add
methods through the entry point groups ``dataflex.selectors``, ``dataflex.mixers`` and ``dataflex.weighters``; of a
user's own file, named in ``dynamic.plugins``, every method class is taken.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from dataflex.contract import class_problems, is_ours, watched, whereabouts
from dataflex.errors import ComponentError, ConfigError, did_you_mean
from dataflex.method import Method

KINDS: tuple[str, ...] = ("selector", "mixer", "weighter")

_BUILTIN: dict[str, dict[str, str]] = {
    "selector": {
        "all": "dataflex.selectors.baselines:AllRows",
        "random": "dataflex.selectors.baselines:RandomRows",
        "loss": "dataflex.selectors.losses:LossSelector",
        "tacs": "dataflex.selectors.losses:Tacs",
        "less": "dataflex.selectors.influence:Less",
        "grad_norm": "dataflex.selectors.losses:GradNorm",
        "el2n": "dataflex.selectors.losses:El2n",
        "rds_plus": "dataflex.selectors.nearest:RdsPlus",
        "near": "dataflex.selectors.nearest:Near",
        "tsds": "dataflex.selectors.nearest:Tsds",
        "delta_loss": "dataflex.selectors.losses:DeltaLoss",
        "longest": "dataflex.selectors.baselines:Longest",
        "random_balanced": "dataflex.selectors.baselines:RandomBalanced",
        "compose": "dataflex.selectors.compose:Compose",
        "bm25": "dataflex.selectors.texts:Bm25",
        "dsir": "dataflex.selectors.texts:Dsir",
        "embed": "dataflex.selectors.nearest:Embed",
        "ifd": "dataflex.selectors.losses:Ifd",
        "s2l": "dataflex.selectors.clusters:S2l",
        "rho_loss": "dataflex.selectors.losses:RhoLoss",
        "icons": "dataflex.selectors.influence:Icons",
        "cluster_less": "dataflex.selectors.influence:ClusterLess",
        "coincide": "dataflex.selectors.clusters:Coincide",
        "zeroth": "dataflex.selectors.influence:Zeroth",
        "nice": "dataflex.selectors.nice:Nice",
        "greats": "dataflex.selectors.candidates:Greats",
        "opus": "dataflex.selectors.candidates:Opus",
        "uds": "dataflex.selectors.candidates:Uds",
    },
    "mixer": {
        "static": "dataflex.mixers.fixed:Static",
        "uniform": "dataflex.mixers.fixed:Uniform",
        "size": "dataflex.mixers.fixed:Size",
        "temperature": "dataflex.mixers.fixed:Temperature",
        "unimax": "dataflex.mixers.fixed:UniMax",
        "staged": "dataflex.mixers.fixed:Staged",
        "random": "dataflex.mixers.fixed:RandomShares",
        "odm": "dataflex.mixers.online:Odm",
        "sheared": "dataflex.mixers.held_out:Sheared",
        "velocity": "dataflex.mixers.held_out:Velocity",
        "dynamic_moe": "dataflex.mixers.held_out:DynamicMoe",
        "ado": "dataflex.mixers.online:Ado",
        "doge": "dataflex.mixers.gradient_shares:Doge",
        "dga": "dataflex.mixers.gradient_shares:Dga",
        "pike": "dataflex.mixers.gradient_shares:Pike",
        "ledger": "dataflex.mixers.measured:ByLedger",
        "skill_it": "dataflex.mixers.held_out:SkillIt",
        "aioli": "dataflex.mixers.held_out:Aioli",
        "doremi": "dataflex.mixers.loss_weights:DoReMi",
        "group_dro": "dataflex.mixers.loss_weights:GroupDro",
    },
    "weighter": {
        "none": "dataflex.weighters.rows:NoWeights",
        "column": "dataflex.weighters.rows:Column",
        "loss": "dataflex.weighters.loss:LossWeighter",
        "adapt": "dataflex.weighters.likeness:Adapt",
        "joint_update_aware": "dataflex.weighters.likeness:JointUpdateAware",
        "slm": "dataflex.weighters.loss:SelectiveLanguageModelling",
        "rho": "dataflex.weighters.loss:Rho",
        "group": "dataflex.weighters.rows:GroupWeighter",
        "focal": "dataflex.weighters.token:Focal",
        "token": "dataflex.weighters.token:TokenWeighter",
        "meta": "dataflex.weighters.influence:Meta",
        "presence": "dataflex.weighters.influence:Presence",
        "product": "dataflex.weighters.product:Product",
    },
}

_plugins: dict[str, dict[str, type[Method]]] = {kind: {} for kind in KINDS}
_plugin_files: dict[Path, list[type[Method]]] = {}
_checked: list[tuple[str, type[Method]]] = []


def _entry_points(kind: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"dataflex.{kind}s")}


def names(kind: str) -> list[str]:
    """Return every known name of ``kind``: built-in ones, those of other packages, those of plugins."""
    return list(dict.fromkeys([*_BUILTIN[kind], *sorted(_entry_points(kind)), *_plugins[kind]]))


def find(kind: str, name: str) -> type[Method]:
    """Return the class of a method.

    Raises:
        ConfigError: Unknown name, with the nearest known spelling.
        ComponentError: The class found is not a ``kind``.
    """
    if name in _plugins[kind]:
        return _plugins[kind][name]
    if name in _BUILTIN[kind]:
        module, _, attribute = _BUILTIN[kind][name].partition(":")
        builtin: type[Method] = getattr(importlib.import_module(module), attribute)
        return builtin
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


def registered(kind: str, cls: Any) -> type[Method]:
    """Return a class with every call watched; ComponentError with all problems where it does not keep the contract."""
    if not (isinstance(cls, type) and is_ours(cls)) and (kind, cls) not in _checked:
        problems = class_problems(kind, cls)
        if problems:
            raise ComponentError("\n".join(problems))
        _checked.append((kind, watched(cls)))
    found: type[Method] = cls
    return found


def import_file(file: Path, what: str) -> ModuleType:
    """Run a user's Python file as a module whose name holds ``what``.

    Raises:
        ImportError: Nothing can be imported from a file of this name.
        BaseException: Anything that its code raises; the module is removed again.
    """
    name = f"dataflex_{what}_{file.stem}_{abs(hash(str(file))) % 10**8}"
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
        module = import_file(file, "plugin")
    except (Exception, SystemExit) as error:  # the user's own code
        # The text of a SyntaxError names the line.
        frames = () if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file)]
        told = f"{type(error).__name__}: {error}{f' (line {lines[-1]})' if lines else ''}"
        raise ConfigError(f"dynamic.plugins: {path} cannot be imported: {told}") from error
    methods = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, Method)]
    classes = [cls for cls in dict.fromkeys(methods) if cls.__module__ == module.__name__]
    found = [cls for cls in classes if cls.name and not inspect.isabstract(cls)]
    if not found:
        nameless = f"; {whereabouts(classes[0])} has no name" if classes else ""
        raise ConfigError(
            f"dynamic.plugins: {path} defines no method (a Selector, Mixer or Weighter with a name){nameless}"
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
        return [f"{whereabouts(cls)} must be a subclass of dataflex.Selector, Mixer or Weighter, not of Method itself"]
    try:
        registered(cls.kind, cls)
    except ComponentError as error:
        return str(error).splitlines()
    if cls.name in _BUILTIN[cls.kind]:
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
