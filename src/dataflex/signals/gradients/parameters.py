"""Which parameters are differentiated, and which module answers for each of them.

A unit is a module together with those of its parameters that count. It is either of a registered layer kind, or it is
run again under ``torch.func``. A unit that cannot answer (its calls do not keep samples apart, or its parameters are
used without calling it) hands its parameters to the module around it, in the end to the whole model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dataflex.errors import ConfigError, UnsupportedError
from dataflex.signals.gradients.layers import LayerKind, kind_of

logger = logging.getLogger(__name__)

_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_CONTAINERS = (nn.ParameterDict, nn.ParameterList, nn.ModuleDict, nn.ModuleList)


def shape_of(parameter: Any) -> torch.Size:
    """Return a parameter's full shape, also where DeepSpeed ZeRO-3 keeps only a part of it here."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def choose_parameters(
    model: nn.Module, *, pattern: str | None = None, last_blocks: int | None = None
) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of the inner module by name, or a part of them; ConfigError where none is left.

    ``pattern`` is a regular expression searched for in the names, ``last_blocks`` a number of blocks at its end.
    """
    chosen = {_WRAPPERS.sub("", name): p for name, p in model.named_parameters() if p.requires_grad}
    if not chosen:
        raise ConfigError("gradients: the model has no trainable parameters")
    if last_blocks is not None:
        lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        if not lists:
            raise ConfigError(f"gradients: last_blocks is {last_blocks}, but the model has no list of blocks")
        stack, blocks = max(lists, key=lambda item: (sum(1 for _ in item[1].parameters()), len(item[1])))
        kept = range(max(len(blocks) - last_blocks, 0), len(blocks))
        prefixes = tuple(_WRAPPERS.sub("", f"{stack}.{i}.") for i in kept)
        chosen = {name: p for name, p in chosen.items() if name.startswith(prefixes)}
    if pattern is not None:
        chosen = {name: p for name, p in chosen.items() if re.search(pattern, name)}
    if not chosen:
        raise ConfigError(f"gradients: no trainable parameter is left (pattern {pattern!r}, last blocks {last_blocks})")
    return chosen


@dataclass(eq=False, kw_only=True)
class Unit:
    """A module that answers for parameters, {name relative to the module: name in the model}.

    ``kind`` is None where ``torch.func`` is used; ``checked`` says whether the kind's formula was compared with a call.
    """

    name: str
    module: nn.Module
    kind: LayerKind | None
    parameters: dict[str, str]
    checked: bool = False

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({type(self.module).__name__})"


@dataclass(eq=False)
class Units:
    """All units of a model, for the ``chosen`` parameters by name."""

    model: nn.Module
    chosen: Mapping[str, nn.Parameter]
    shapes: dict[str, torch.Size] = field(init=False)
    _units: dict[str, Unit] = field(init=False, default_factory=dict)
    _reasons: dict[str, list[str]] = field(init=False, default_factory=dict)
    _failed: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.shapes = {name: shape_of(parameter) for name, parameter in self.chosen.items()}
        names = {id(parameter): name for name, parameter in self.chosen.items()}
        for path, module in self.model.named_modules():
            own = {
                local: names[id(parameter)]
                for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
                if id(parameter) in names
            }
            if not own:
                continue
            kind = kind_of(module)
            if kind is not None and set(own) <= set(kind.parameters) and "experts" not in path.split("."):
                self._units[path] = Unit(name=path, module=module, kind=kind, parameters=own)
            else:
                self._make_local(path, own, "no formula for this layer")

    def __iter__(self) -> Any:
        return iter(list(self._units.values()))

    def distrust(self, unit: Unit, reason: str) -> None:
        """Let ``torch.func`` answer for a layer whose formula does not hold."""
        del self._units[unit.name]
        self._make_local(unit.name, unit.parameters, reason)

    def hand_up(self, unit: Unit, reason: str) -> None:
        """Let the module around a unit answer for it; the model's own parameters have failed for good."""
        del self._units[unit.name]
        if not unit.name:
            for name in unit.parameters.values():
                self._failed[name] = "; ".join(dict.fromkeys([*self._reasons[name], reason]))
            return
        parent, _, last = unit.name.rpartition(".")
        self._make_local(parent, {f"{last}.{local}": name for local, name in unit.parameters.items()}, reason)

    def require_all(self) -> None:
        """Raise UnsupportedError with every parameter that has no unit, and what was tried."""
        if self._failed:
            lines = [f"  {name}: {reason}" for name, reason in self._failed.items()]
            raise UnsupportedError("\n".join(["no per-sample gradients for:", *lines]))

    def _make_local(self, path: str, parameters: Mapping[str, str], reason: str) -> None:
        for name in parameters.values():
            self._reasons.setdefault(name, []).append(reason)
        module = self.model.get_submodule(path)
        # Containers are never called themselves, experts are called with the tokens of all samples.
        while path and (isinstance(module, _CONTAINERS) or "experts" in path.split(".")):
            path, _, last = path.rpartition(".")
            parameters = {f"{last}.{local}": name for local, name in parameters.items()}
            module = self.model.get_submodule(path)
        known = self._units.get(path)
        if known is not None and known.kind is None:
            known.parameters.update(parameters)
        else:
            kept = {} if known is None else known.parameters
            known = Unit(name=path, module=module, kind=None, parameters={**kept, **parameters})
            self._units[path] = known
        logger.info("gradients of %s: through torch.func on %s (%s)", ", ".join(parameters.values()), known, reason)
