"""Classes that were written for existing DataFlex, in a user's own file, as methods.

A file registers them there by ``@register_selector('name')`` and the like, on base classes that stand in here. What
their calls give becomes what our methods give: ``select`` rows, ``mix`` proportions, ``next_indices`` of a reorder
rows in order, and ``get_weighted_loss`` weights, which are its derivatives by the losses. A class that uses what only
their Trainer has is refused.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import logging
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import make_dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from dataflex.errors import ComponentError
from dataflex.method import (
    BatchView,
    Card,
    Context,
    Method,
    Mix,
    Mixer,
    Requires,
    Rows,
    Selection,
    Selector,
    Weighter,
    WeighterParams,
    param,
)
from dataflex.parts import Params
from dataflex.rng import stream
from dataflex.state import State, refuse_state

logger = logging.getLogger(__name__)

TABLE = "docs/writing-a-method.md has a table of the calls"
_CALLS = {"selector": "select", "mixer": "mix", "weighter": "get_weighted_loss", "reorder": "next_indices"}
_GIVEN = ("dataset", "accelerator", "data_collator", "mixture_manager")  # to their constructors
_NOT_GIVEN = ("eval_dataset", "output_dir")
_OF_ACCELERATOR = ("is_main_process", "process_index", "num_processes", "device", "wait_for_everyone", "unwrap_model")
_OF_MANAGER = ("names", "k", "sizes")
_OF_TRAINER = ("state.global_step", "state.max_steps")
_HOOKS = ("training_step", "update_batch_info", "get_current_doremi_weights", "save_average_weights")  # of the Trainer


class _Base:
    """What stands in for their base classes."""

    seed = 42
    _pool: Rows | None = None

    def __init__(self, **named: Any) -> None:
        vars(self).update(named)

    def candidate_positions(self) -> list[int]:
        """Return the rows that may be chosen."""
        return list(range(len(self.dataset))) if self._pool is None else self._pool.tolist()  # type: ignore[attr-defined]


class _SelectorBase(_Base):
    def __init__(self, dataset: Any, accelerator: Any, data_collator: Any, cache_dir: Any) -> None:
        super().__init__(dataset=dataset, accelerator=accelerator, data_collator=data_collator, cache_dir=cache_dir)


class _MixerBase(_Base):
    def __init__(self, mixture_manager: Any) -> None:
        super().__init__(mixture_manager=mixture_manager)


def _registering(kind: str) -> Callable[[str], Callable[[type], type]]:
    def register(name: str) -> Callable[[type], type]:
        def mark(cls: type) -> type:
            cls._registered = (kind, name)  # type: ignore[attr-defined]
            return cls

        return mark

    return register


@contextmanager
def stand_ins(file: Path) -> Iterator[str]:
    """Let a file import what it would there; gives the package that it would lie in, empty for any other file."""
    kinds = [kind for kind in _CALLS if f"register_{kind}" in file.read_text(encoding="utf-8", errors="replace")]
    if not kinds:
        yield ""
        return
    bases = {kind.capitalize(): {"selector": _SelectorBase, "mixer": _MixerBase}.get(kind, _Base) for kind in _CALLS}
    content: dict[str, dict[str, Any]] = {
        "core": {},
        "core.registry": {f"register_{kind}": _registering(kind) for kind in _CALLS},
        "utils": {},
        "utils.logging": {"logger": logger},
    }
    for kind, other in itertools.product(_CALLS, repeat=2):  # one file may hold classes of several kinds
        base = {other.capitalize(): bases[other.capitalize()]}
        content |= {f"train.{kind}": {"__path__": [], **bases}, f"train.{kind}.base_{other}": base}
    names = {f"dataflex.{name}": named for name, named in content.items()}
    for name, named in names.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(named)
    try:
        yield f"dataflex.train.{kinds[0]}"
    except ImportError as error:
        raise ImportError(
            f"{error} (of existing DataFlex: only registry, logging and base classes; {TABLE})"
        ) from error
    finally:
        for name in names:
            del sys.modules[name]


def wrapped(module: ModuleType) -> list[type[Method]]:
    """Return methods for the classes that a module registers.

    Raises:
        ComponentError: A class uses what there is not here.
    """
    found, problems = [], []
    for cls in vars(module).values():
        if isinstance(cls, type) and "_registered" in vars(cls) and cls.__module__ == module.__name__:
            problems += [f"class {cls.__name__}: {problem}; port it: {TABLE}" for problem in _problems(cls)]
            found.append(cls)
    if problems:
        raise ComponentError("\n".join(problems))
    return [_wrapper(cls) for cls in found]


def _problems(cls: Any) -> Iterator[str]:
    """Yield what a class uses that is not given here."""
    kind, name = cls._registered[0], _CALLS[cls._registered[0]]
    own = [each for each in cls.__mro__ if each.__module__ == cls.__module__]
    call = getattr(cls, name, None)
    if not inspect.isfunction(call):
        yield f"{name} is missing"
        return
    trees = [node for each in own for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(each))))]
    uses = {text for node in trees if isinstance(node, ast.Attribute) for text in [_dotted(node)] if text}
    known = {node.attr for node in trees if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    known |= {each for one in (*own, _Base) for each in vars(one)} | {*_GIVEN, "cache_dir"}
    for text in sorted(uses):
        owner, _, rest = text.partition(".")
        part = rest.partition(".")[0]
        if owner == "self" and part not in known:
            yield f"self.{part} is of their base class, and is not given here"
        for holder, given in (("accelerator", _OF_ACCELERATOR), ("mixture_manager", _OF_MANAGER)):
            for prefix in (f"self.{holder}.", f"{holder}."):
                if text.startswith(prefix) and text.removeprefix(prefix).partition(".")[0] not in given:
                    yield f"{text} is of their Trainer, and is not given here (of it there are {', '.join(given)})"
        if kind == "weighter" and owner == "ctx" and not any(f"{rest}.".startswith(f"{one}.") for one in _OF_TRAINER):
            if not any(one.startswith(f"{rest}.") for one in _OF_TRAINER):
                yield f"{text} is of their Trainer, and is not given here (of it there are {', '.join(_OF_TRAINER)})"
    parameters = list(inspect.signature(cls.__init__).parameters)
    for each in (*_NOT_GIVEN, *(_GIVEN if kind == "weighter" else ())):
        if each in parameters:
            yield f"__init__ takes {each}, which is not given here"
    for hook in _HOOKS:
        if any(hook in vars(each) for each in own):
            yield f"{hook} is called by their Trainer, and by none here"
    yield from _call_problems(kind, call)


def _call_problems(kind: str, call: Callable[..., Any]) -> Iterator[str]:
    signature = inspect.signature(call)
    given: dict[str, Any] = {"model": 0, "step_id": 0, "num_samples": 0, "tokenizer": 0}
    if kind == "mixer":
        given = {"model": 0, "step_id": 0}
    if kind == "weighter":
        given = {"losses": 0, "ctx": 0, "model": 0, "inputs": 0}
    extra = any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values())
    named = {name: value for name, value in given.items() if extra or name in signature.parameters}
    try:
        signature.bind(None, **named)
    except TypeError as error:
        yield f"{call.__name__}{signature} cannot be called with {', '.join(given)} ({error})"
    tree = ast.parse(textwrap.dedent(inspect.getsource(call)))
    loads = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    for name in ("model", "inputs"):
        if kind == "weighter" and any(node.id == name for node in loads):
            yield f"{call.__name__} looks at {name}, and is given the losses alone"
    rest = next((each.name for each in signature.parameters.values() if each.kind is each.VAR_KEYWORD), None)
    if rest is not None and kind != "weighter" and any(node.id == rest for node in loads):
        yield f"{call.__name__} looks into **{rest}, of which only the tokenizer is given here"


def _dotted(node: ast.Attribute) -> str:
    """Return ``self.a.b`` of a chain of names that is read, or an empty text."""
    parts, at = [node.attr], node.value
    while isinstance(at, ast.Attribute):
        parts.append(at.attr)
        at = at.value
    return ".".join([at.id, *reversed(parts)]) if isinstance(at, ast.Name) and isinstance(node.ctx, ast.Load) else ""


def _wrapper(cls: Any) -> type[Method]:
    kind, name = cls._registered
    base: type[_Ported] = {"selector": _Select, "reorder": _Reorder, "mixer": _Mix, "weighter": _Weigh}[kind]
    fields = []
    for each in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        if each.name not in _GIVEN and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            given = {} if each.default is each.empty else {"default": each.default}
            if isinstance(given.get("default"), list | dict | set):
                raise ComponentError(f"class {cls.__name__}: the default of {each.name} can be changed; write None")
            fields.append((each.name, Any, param(help=f"as {cls.__name__} has it", **given)))
    bases = (WeighterParams if kind == "weighter" else Params,)
    content = {
        "name": name,
        "theirs": cls,
        "card": Card(summary=f"{cls.__name__}, a {kind} of existing DataFlex.", paper="baseline", cost="its own"),
        "Params": make_dataclass("Params", fields, bases=bases, frozen=True, kw_only=True),
        "__module__": cls.__module__.rpartition(".")[2],
    }
    call = {"mixer": "mix", "weighter": "weigh"}.get(kind, "select")
    content[call] = _as_theirs(getattr(base, call), getattr(cls, _CALLS[kind]))
    return type(cls.__name__, (base,), content)


def _as_theirs(function: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Return a call of ours of which errors tell the place of theirs."""

    def call(*args: Any, **named: Any) -> Any:
        return function(*args, **named)

    vars(call).update(__wrapped__=theirs, __signature__=inspect.signature(function))
    return call


class _Ported(Method):
    """Holds an object of their class, made when it is first asked."""

    theirs: type

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.object: Any = None
        self._state: State = {}
        self._before: set[int] = set()
        self._told = False

    def made(self, **given: Any) -> Any:
        """Return the object, with the state of a checkpoint; ``given`` is what their Trainer gives."""
        if self.object is None:
            accepted = inspect.signature(self.theirs).parameters
            named = {**deepcopy(vars(self.params)), **given}
            self.object = self.theirs(**{key: value for key, value in named.items() if key in accepted})
            self._before = {id(value) for value in given.values()}
            vars(self.object).update(self._state)
        return self.object

    def asked(self, ctx: Context, call: str, **named: Any) -> Any:
        """Return what a call gives, with draws that are those of the interval; parameters keep their gradients."""
        import random

        import torch

        from dataflex.signals.sweep import preserve_state

        access = ctx.signals.access  # type: ignore[attr-defined]
        parameters = list(access.model.parameters())
        gradients = [each.grad for each in parameters]
        seed = int(stream(ctx.seed, f"ported {self.name}", ctx.interval.index).integers(2**32))
        function = getattr(self.object, call)
        taken = inspect.signature(function).parameters
        extra = any(each.kind is each.VAR_KEYWORD for each in taken.values())
        named = {"model": access.model, "step_id": ctx.interval.start_step, **named}
        with preserve_state(access.model):  # a class may leave the model in another mode
            for seeded in (random.seed, np.random.seed, torch.manual_seed):
                seeded(seed)
            found = function(**{key: value for key, value in named.items() if extra or key in taken})
        for each, gradient in zip(parameters, gradients, strict=True):
            each.grad = gradient
        return found

    def state_dict(self) -> State:
        """Return the attributes that can be saved without pickle, and tell the others once."""
        if self.object is None:
            return dict(self._state)
        state, left = {}, []
        for name, value in vars(self.object).items():
            if id(value) in self._before or name == "_pool":
                continue
            try:
                refuse_state({name: value}, "")
                state[name] = value
            except ComponentError:
                left.append(name)
        if left and not self._told:
            self._told = True
            told = "%s: not in checkpoints: %s; a resumed run begins with new ones"
            logger.warning(told, self.name, ", ".join(left))
        return state

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self._state = dict(state)
        if self.object is not None:
            vars(self.object).update(state)


def _accelerator(ctx: Context) -> Any:
    from dataflex import comm

    rank = comm.rank()
    return SimpleNamespace(
        is_main_process=rank == 0,
        process_index=rank,
        num_processes=comm.world(),
        device=ctx.signals.access.device,  # type: ignore[attr-defined]
        wait_for_everyone=comm.barrier,
        unwrap_model=lambda model: model,
    )


def _runtime(ctx: Context) -> dict[str, Any]:
    access = ctx.signals.access  # type: ignore[attr-defined]
    return {"dataset": access.train.dataset, "accelerator": _accelerator(ctx), "data_collator": access.collate}


class _Select(_Ported, Selector):
    call = "select"

    def requires(self) -> Requires:
        return Requires(whole_parameters=True, needs_interval=True)

    @property
    def gives_scores(self) -> bool:
        return False

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        every = len(ctx.domains.domain_of)
        self.made(**_runtime(ctx))._pool = pool if len(pool) < every else None
        tokenizer = ctx.signals.access.tokenizer  # type: ignore[attr-defined]
        rows = np.asarray(self.asked(ctx, self.call, num_samples=budget, tokenizer=tokenizer))
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or (rows.size and not 0 <= rows.min() <= rows.max() < every):
            raise ComponentError(f"{self.name}: {self.call} gave {rows!r:.80}; expected rows from 0 to {every - 1:,}")
        rows = rows.astype(np.int64)
        return Selection(rows=rows[np.isin(rows, pool)], reason=f"by {self.theirs.__name__}", ordered=True)


class _Reorder(_Select):
    call = "next_indices"


class _Mix(_Ported, Mixer):
    def requires(self) -> Requires:
        return Requires(whole_parameters=True, needs_interval=True)

    def mix(self, ctx: Context) -> Mix:
        names, rows = list(ctx.domains.names), ctx.domains.num_rows.tolist()
        manager = SimpleNamespace(names=names, k=len(names), sizes=dict(zip(names, rows, strict=True)))
        self.made(mixture_manager=manager, **_runtime(ctx))
        return Mix(
            proportions=np.asarray(self.asked(ctx, "mix"), dtype=np.float64), reason=f"by {self.theirs.__name__}"
        )


class _Weigh(_Ported, Weighter):
    normalizer = "num_sequences"

    def weigh(self, batch: BatchView) -> Any:
        import torch

        losses = batch.loss_B.detach().clone().requires_grad_()
        state = SimpleNamespace(global_step=batch.step, max_steps=batch.total_steps)
        with torch.enable_grad():
            given = {"losses": losses, "ctx": SimpleNamespace(state=state), "model": None, "inputs": None}
            call = self.made().get_weighted_loss
            total = call(**{key: value for key, value in given.items() if key in inspect.signature(call).parameters})
            if not isinstance(total, torch.Tensor) or total.numel() != 1 or not total.requires_grad:
                raise ComponentError(
                    f"{self.name}: get_weighted_loss gave {total!r:.80}; expected a loss of the losses"
                )
            weights = torch.autograd.grad(total.reshape(()), losses)[0]
        return weights * (len(losses) / len(batch.loss_M))
