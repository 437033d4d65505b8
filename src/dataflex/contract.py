"""The contract with authors of methods: what a class must have, what its calls must give, and who is told.

A class from outside the package is checked when it is registered, and every call of it is watched: what it
raises is told with its own frames and the name of the call, what it gives is checked for its type. What a value
must be beside that (rows of the pool, weights of the right shape) is in ``plan.validate``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.errors import ComponentError, DataFlexError
from dataflex.method import (
    STAGES,
    Card,
    DomainWeighter,
    Method,
    Mix,
    Mixer,
    Params,
    Passes,
    Reference,
    Requires,
    Selection,
    Selector,
    Weighter,
)

__all__ = ["BASES", "class_problems", "is_ours", "refuse_answer", "watched", "whereabouts"]

_MARK = "_dataflex_watched"
_FORMS = {
    "select": "dataflex.Selection(rows=<int64 array>, scores=<array or None>, reason=<text>)",
    "mix": "dataflex.Mix(proportions=<float64 array, one number per domain>, reason=<text>)",
    "weigh": "a torch tensor of floating point, [B] by sequence or [R, T] by token",
    "static_weights": "an array of one number per row, or None",
    "loss_weights": "an array of one number per domain",
    "state_dict": "a dict of JSON values and numpy arrays",
    "requires": "dataflex.Requires(...)",
    "normalizer": "'weight_sum', 'num_tokens' or 'num_sequences'",
    "loss_normalizer": "'weight_sum' or 'domain'",
    "active": "True or False",
    "due": "True or False",
    "default_burn_in": "a whole number of steps",
    "burn_in": "a whole number of steps",
}
_WATCHED = (*_FORMS, "__init__", "load_state_dict", "observe", "outcome", "prepare", "check")


def is_ours(cls: type) -> bool:
    """Whether a class is of this package, whose tests check it."""
    return cls.__module__.partition(".")[0] == "dataflex"


def whereabouts(cls: type, call: str = "") -> str:
    """Return ``class NAME (FILE, line N)`` of a class, with the line of one of its methods where that is known."""
    file, line = None, None
    things: list[Any] = [inspect.getattr_static(cls, call, None), cls] if call else [cls]
    for thing in things:
        thing = getattr(thing, "fget", None) or getattr(thing, "__func__", thing)
        try:
            thing = inspect.unwrap(thing)
            file, line = inspect.getsourcefile(thing), inspect.getsourcelines(thing)[1]
            break
        except (OSError, TypeError, ValueError):
            continue
    place = "" if file is None else f" ({Path(file).name if len(file) > 160 else file}, line {line})"
    return f"class {cls.__qualname__}{place}"


def refuse_answer(method: Method, call: str, value: Any) -> None:
    """Refuse what a call gave where it is of another type than the contract says.

    Raises:
        ComponentError: With the form that is wanted, and where the class is.
    """
    problem = _answer_problem(call, value)
    if problem:
        raise ComponentError(
            f"{method.kind} {method.name!r}: {call} {problem}; it must give {_FORMS[call]}: "
            f"{whereabouts(type(method), call)}"
        )


def _answer_problem(call: str, value: Any) -> str:
    gave = f"gave a value of type {type(value).__name__}"
    if call == "select":
        if not isinstance(value, Selection):
            return gave
        if not isinstance(value.rows, np.ndarray) or value.rows.ndim != 1 or value.rows.dtype != np.int64:
            return f"gave rows as {_described(value.rows)}; expected int64 [n]"
        if value.scores is not None and not _numeric(value.scores, 1):
            return f"gave scores as {_described(value.scores)}"
        return "" if isinstance(value.reason, str) else f"gave a reason of type {type(value.reason).__name__}"
    if call == "mix":
        if not isinstance(value, Mix):
            return gave
        if not _numeric(np.asarray(value.proportions), 1):
            return f"gave proportions as {_described(value.proportions)}"
        return "" if isinstance(value.reason, str) else f"gave a reason of type {type(value.reason).__name__}"
    if call == "weigh":
        tensor = all(hasattr(value, name) for name in ("detach", "dtype", "device"))
        if not tensor:
            return gave
        return "" if value.dtype.is_floating_point else f"gave a tensor of {value.dtype}"
    if call == "static_weights":
        return "" if value is None or _numeric(value, 1) else f"gave {_described(value)}"
    if call == "loss_weights":
        return "" if value is None or _numeric(np.asarray(value), 1) else f"gave {_described(value)}"
    if call == "state_dict":
        return "" if isinstance(value, dict) else gave
    if call == "requires":
        return "; ".join(_requirement_problems(value)) if isinstance(value, Requires) else gave
    if call in ("normalizer", "loss_normalizer"):
        return "" if isinstance(value, str) and f"'{value}'" in _FORMS[call] else f"gave {value!r:.80}"
    if call in ("active", "due"):
        return "" if isinstance(value, bool | np.bool_) else gave
    if call in ("burn_in", "default_burn_in"):
        return "" if isinstance(value, int | np.integer) and not isinstance(value, bool) else gave
    return ""


def _numeric(value: Any, dimensions: int) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == dimensions and value.dtype.kind in "fiu"


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} and shape {value.shape}"
    return f"a value of type {type(value).__name__}"


def watched(cls: type[Method]) -> type[Method]:
    """Make every call of a class from outside the package tell what went wrong in it; return the class."""
    for each in cls.__mro__:
        if is_ours(each) or each is object or not issubclass(each, Method) or _MARK in vars(each):
            continue
        setattr(each, _MARK, True)
        for name in _WATCHED:
            thing = vars(each).get(name)
            if isinstance(thing, property) and thing.fget is not None:
                setattr(each, name, property(_watched(thing.fget, name), doc=thing.__doc__))
            elif isinstance(thing, classmethod):
                setattr(each, name, classmethod(_watched(thing.__func__, name)))
            elif inspect.isfunction(thing):
                setattr(each, name, _watched(thing, name))
    return cls


def _watched(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        cls = self if isinstance(self, type) else type(self)
        try:
            value = function(self, *args, **kwargs)
            if name == "check":
                value = list(value)
        except Exception as error:
            if isinstance(error, DataFlexError | MemoryError) or type(error).__name__ == "OutOfMemoryError":
                raise
            raise _told(cls, name, error) from error
        if name in _FORMS:
            refuse_answer(self, name, value)
        return value

    return call


def _told(cls: type[Method], name: str, error: Exception) -> ComponentError:
    """Return what an author is told: the call, what it raised, and the frames from the author's code on."""
    frames = error.__traceback__.tb_next if error.__traceback__ is not None else None
    trace = "".join(traceback.format_exception(type(error), error, frames)).rstrip() if frames is not None else ""
    said = f"{cls.kind} {cls.name!r}: {name} raised {type(error).__name__}: {error}: {whereabouts(cls, name)}"
    return ComponentError(f"{said}\n{trace}" if trace else said)


BASES: Mapping[str, type[Method]] = {"selector": Selector, "mixer": Mixer, "weighter": Weighter}


_SIGNALS = frozenset({"losses", "embeddings", "gradients", "logits", "generate", "gates", "texts"})
_NAME = re.compile(r"\w+(-\w+)*")
# Call -> arguments that it is given.
_CALLS: dict[str, tuple[str, ...]] = {
    "__init__": ("params",),
    "select": ("pool", "budget", "ctx"),
    "mix": ("ctx",),
    "observe": ("stats",),
    "loss_weights": (),
    "outcome": (),
    "weigh": ("batch",),
    "static_weights": ("rows", "columns"),
    "prepare": ("ctx", "rows"),
    "due": ("step",),
    "active": ("step", "total_steps"),
    "requires": (),
    "check": ("run",),
    "state_dict": (),
    "load_state_dict": ("state",),
}
_MUST = {"selector": ("select",), "mixer": ("mix",), "weighter": ("weigh", "static_weights")}
_PROPERTIES = ("normalizer", "loss_normalizer")
_SWITCHES = ("selects_subset", "observes", "neutral", "by_token")
# What earlier plugins stated elsewhere -> the argument of Requires that states it now.
_NOW_REQUIRED: dict[str, str] = {
    "needs": "signals=..., targets=..., domains=..., stages=..., whole_parameters=...",
    "adaptive": "needs_interval=...",
    "online": "within_batch=...",
    "within_batch": "within_batch=...",
    "columns": "columns=(...)",
    "reference": "reference=Reference(folder)",
    "reference_cached": "reference=Reference(folder, cached=...)",
    "embedding": "embedding=...",
    "entropy": "entropy=...",
    "pure_micro_batches": "pure_micro_batches=...",
    "variant": "..., made from self.params",
    "pool_passes": "passes=Passes(pool=(F, B))",
    "target_passes": "passes=Passes(targets=(F, B))",
}


def class_problems(kind: str, cls: Any) -> list[str]:
    """Return what a class lacks of the contract, one line each; none for a good one."""
    if not (isinstance(cls, type) and issubclass(cls, BASES[kind])):
        what = whereabouts(cls) if isinstance(cls, type) else repr(cls)[:80]
        return [f"{what} is not a subclass of dataflex.{kind.capitalize()}"]
    where = whereabouts(cls)
    found = [*_labels(cls), *_former(cls), *_calls(kind, cls), *_parameters(cls)]
    return [f"{kind} {str(cls.name)[:80]!r}: {problem}: {where}" for problem in found]


def _labels(cls: type[Method]) -> Iterator[str]:
    if not isinstance(cls.name, str) or not _NAME.fullmatch(cls.name) or len(cls.name) > 100:
        yield f"'name' must be a word of letters, digits and underscores, found {cls.name!r:.80}"
    card = getattr(cls, "card", None)
    if not isinstance(card, Card):
        found = "it has none" if card is None else f"found a value of type {type(card).__name__}"
        yield f"'card' must be dataflex.Card(summary=..., paper=..., cost=...); {found}"
    else:
        for field in dataclasses.fields(Card):
            value = getattr(card, field.name)
            if not isinstance(value, str) or not (value.strip() or field.name == "note"):
                yield f"card.{field.name} must be text, found {value!r:.80}"
    for switch in _SWITCHES:
        value = getattr(cls, switch, False)
        if not isinstance(value, bool | property):
            yield f"{switch!r} must be True or False, found {value!r:.80}"


def _former(cls: type[Method]) -> Iterator[str]:
    """Yield what is stated in a way that nothing reads any more."""
    for name, now in _NOW_REQUIRED.items():
        if hasattr(cls, name):
            yield f"{name!r} is not read any more: write 'def requires(self): return dataflex.Requires({now})'"


def _requirement_problems(needs: Requires) -> Iterator[str]:
    """Yield what a statement holds that it cannot."""
    for switch in (field.name for field in dataclasses.fields(Requires) if field.default is False):
        if not isinstance(getattr(needs, switch), bool):
            yield f"gave {switch}={getattr(needs, switch)!r:.80}, which must be True or False"
    if not isinstance(needs.signals, frozenset | set) or not needs.signals <= _SIGNALS:
        yield f"gave signals={needs.signals!r:.80}, which must be a frozenset of {', '.join(sorted(_SIGNALS))}"
    if not isinstance(needs.stages, tuple) or not needs.stages or not set(needs.stages) <= set(STAGES):
        yield f"gave stages={needs.stages!r:.80}, which must be a tuple of {', '.join(STAGES)}"
    if isinstance(needs.domains, bool) or not isinstance(needs.domains, int) or needs.domains < 1:
        yield f"gave domains={needs.domains!r:.80}, which must be a whole number of at least 1"
    if not isinstance(needs.columns, tuple) or not all(isinstance(name, str) and name for name in needs.columns):
        yield f"gave columns={needs.columns!r:.80}, which must be a tuple of names of columns"
    if needs.reference is not None and not isinstance(needs.reference, Reference):
        yield f"gave reference={needs.reference!r:.80}, which must be a dataflex.Reference, or None"
    for name in ("models", "preconditions", "by_target"):
        if not isinstance(getattr(needs, name), Mapping):
            yield f"gave {name}={getattr(needs, name)!r:.80}, which must be a mapping by parameter"
    if not isinstance(needs.passes, Passes) or any(number < 0 for number in _numbers(needs.passes)):
        yield f"gave passes={needs.passes!r:.80}, which must be a dataflex.Passes of numbers of at least 0"


def _numbers(passes: Passes) -> list[float]:
    pairs = (passes.pool, passes.pool_by_target, passes.targets, passes.served)
    return [passes.pool_once, *(number for pair in pairs for number in pair)]


def _calls(kind: str, cls: type[Method]) -> Iterator[str]:
    base = BASES[kind]
    if all(getattr(cls, call) is getattr(base, call) for call in _MUST[kind]):
        yield " or ".join(f"{call}({', '.join(_CALLS[call])})" for call in _MUST[kind]) + " is missing"
    for call, given in _CALLS.items():
        thing = inspect.getattr_static(cls, call, None)
        if thing is None or thing is inspect.getattr_static(base, call, None):
            continue
        if not inspect.isfunction(thing):
            yield f"{call} must be a method: def {call}({', '.join(('self', *given))})"
            continue
        try:
            inspect.signature(thing).bind("self", *given)
        except TypeError:
            found = inspect.signature(thing)
            yield f"{call}{found} cannot be called as {call}({', '.join(('self', *given))})"
    for name in _PROPERTIES:
        thing = inspect.getattr_static(cls, name, None)
        if inspect.isfunction(thing):
            yield f"{name} must be a property: write @property above it"
    if (cls.state_dict is Method.state_dict) != (cls.load_state_dict is Method.load_state_dict):
        yield "state_dict and load_state_dict go together, and it has only one of them"
    if getattr(cls, "observes", False) is True and getattr(cls, "observe", None) is Mixer.observe:
        yield "observes is True, and observe(stats) is missing"
    if getattr(cls, "loss_weights", None) is DomainWeighter.loss_weights:
        yield "loss_weights() is missing"


def _parameters(cls: type[Method]) -> Iterator[str]:
    params = cls.Params
    if not (isinstance(params, type) and issubclass(params, Params)):
        yield "'Params' must be a dataclass that is a subclass of dataflex.Params"
        return
    if "__dataclass_fields__" not in vars(params) and inspect.get_annotations(params):
        yield "'Params' must be a dataclass: write @dataclass(frozen=True, kw_only=True) above it"
        return
    try:
        typing.get_type_hints(params)
    except Exception as error:  # noqa: BLE001 (whatever the annotations evaluate to)
        yield f"the types of 'Params' cannot be read ({error}); import them at run time"
    for field in dataclasses.fields(params):
        told = field.metadata.get("help")
        if field.metadata.get("user", True) and (not isinstance(told, str) or not told.strip()):
            wanted = f'{field.name}: ... = field(default=..., metadata={{"help": "what it is, with its unit"}})'
            yield f"parameter {field.name!r} has no help; write {wanted}"
