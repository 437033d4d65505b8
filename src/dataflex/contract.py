"""The contract with authors of methods: what a class must have, what its calls must give, and who is told.

A class from outside the package is checked when it is registered, and every call of it is watched: what it
raises is told with its own frames and the name of the call, what it gives is checked for its type. What a value
must be beside that (rows of the pool, weights of the right shape) is in ``validate``.
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
    Card,
    DomainNormalizer,
    DomainWeighter,
    Method,
    Mix,
    Mixer,
    Normalizer,
    Orderer,
    Params,
    Requires,
    Selection,
    Selector,
    Weighter,
)

_MARK = "_dataflex_watched"


def _numeric(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "fiu"


def _switch(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


# Call -> the form of its answer, and whether a value has that type.
_ANSWERS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "select": (
        "dataflex.Selection(rows=<int64 array>, scores=<array or None>, reason=<text>)",
        lambda value: isinstance(value, Selection),
    ),
    "mix": (
        "dataflex.Mix(proportions=<float64 array, one number per domain>, reason=<text>)",
        lambda value: isinstance(value, Mix),
    ),
    "weigh": (
        "a torch tensor of floating point, [B] by sequence or [R, T] by token",
        lambda value: all(hasattr(value, name) for name in ("detach", "dtype", "device")),
    ),
    "static_weights": (  # its shape is checked beside the rows
        "an array of one number per row, or None",
        lambda value: value is None or _numeric(value.reshape(-1) if isinstance(value, np.ndarray) else value),
    ),
    "keeps": (
        "an array of one switch per group",
        lambda value: isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind == "b",
    ),
    "loss_weights": ("an array of one number per domain", lambda value: _numeric(np.asarray(value))),
    "sort_keys": ("an array of one number per row", _numeric),
    "ranks": (
        "an int64 array, a permutation of 0 to count - 1",
        lambda value: bool(_numeric(value) and value.dtype.kind in "iu"),
    ),
    "available": ("a share, above 0", lambda value: isinstance(value, int | float) and value > 0),
    "reason": ("text", lambda value: isinstance(value, str)),
    "state_dict": ("a dict of JSON values and numpy arrays", lambda value: isinstance(value, dict)),
    "requires": ("dataflex.Requires(...)", lambda value: isinstance(value, Requires)),
    "normalizer": ("'weight_sum', 'num_tokens' or 'num_sequences'", lambda value: value in typing.get_args(Normalizer)),
    "loss_normalizer": ("'weight_sum' or 'domain'", lambda value: value in typing.get_args(DomainNormalizer)),
    "undoes_sampling": ("True or False", _switch),
    "active": ("True or False", _switch),
    "due": ("True or False", _switch),
    "warmup": (
        "a whole number of steps",
        lambda value: isinstance(value, int | np.integer) and not isinstance(value, bool),
    ),
}
_WATCHED = (*_ANSWERS, "__init__", "load_state_dict", "observe", "observe_rollouts", "outcome", "prepare", "check")


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
    form, possible = _ANSWERS[call]
    problem = _part_problem(call, value) if possible(value) else f"gave {_described(value)}"
    if problem:
        where = whereabouts(type(method), call)
        raise ComponentError(f"{method.kind} {method.name!r}: {call} {problem}; it must give {form}: {where}")


def _part_problem(call: str, value: Any) -> str:
    """Return what is wrong with the type of a part of an answer, or an empty text."""
    if call == "weigh":
        return "" if value.dtype.is_floating_point else f"gave a tensor of {value.dtype}"
    if call == "select":
        rows, scores = value.rows, value.scores
        if not isinstance(rows, np.ndarray) or rows.ndim != 1 or rows.dtype != np.int64:
            return f"gave rows as {_described(rows)}; expected int64 [n]"
        if scores is not None and not _numeric(scores):
            return f"gave scores as {_described(scores)}"
        if value.weights is not None and not _numeric(value.weights):
            return f"gave weights as {_described(value.weights)}"
    elif call == "mix" and not _numeric(np.asarray(value.proportions)):
        return f"gave proportions as {_described(value.proportions)}"
    if call in ("select", "mix") and not isinstance(value.reason, str):
        return f"gave a reason of type {type(value.reason).__name__}"
    return ""


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} and shape {value.shape}"
    return f"{value!r:.80}" if isinstance(value, str) else f"a value of type {type(value).__name__}"


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
        if name in _ANSWERS:
            refuse_answer(self, name, value)
        return value

    return call


def _told(cls: type[Method], name: str, error: Exception) -> ComponentError:
    """Return what an author is told: the call, what it raised, and the frames from the author's code on."""
    frames = error.__traceback__.tb_next if error.__traceback__ is not None else None
    trace = "".join(traceback.format_exception(type(error), error, frames)).rstrip() if frames is not None else ""
    said = f"{cls.kind} {cls.name!r}: {name} raised {type(error).__name__}: {error}: {whereabouts(cls, name)}"
    return ComponentError(f"{said}\n{trace}" if trace else said)


BASES: Mapping[str, type[Method]] = {"selector": Selector, "mixer": Mixer, "orderer": Orderer, "weighter": Weighter}

_NAME = re.compile(r"\w+(-\w+)*")
_MUST = {
    "selector": ("select",),
    "mixer": ("mix",),
    "orderer": ("sort_keys", "ranks"),
    "weighter": ("weigh", "static_weights"),
}
_SWITCHES = ("selects_subset", "gives_scores", "observes", "paced", "neutral", "by_token", "undoes_sampling")


def class_problems(kind: str, cls: Any) -> list[str]:
    """Return what a class lacks of the contract, one line each; none for a good one."""
    if not (isinstance(cls, type) and issubclass(cls, BASES[kind])):
        what = whereabouts(cls) if isinstance(cls, type) else repr(cls)[:80]
        return [f"{what} is not a subclass of dataflex.{kind.capitalize()}"]
    where = whereabouts(cls)
    found = [*_labels(cls), *_calls(kind, cls), *_parameters(cls)]
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


def _calls(kind: str, cls: type[Method]) -> Iterator[str]:
    base = DomainWeighter if issubclass(cls, DomainWeighter) else BASES[kind]
    calls = {
        name: ", ".join(inspect.signature(thing).parameters)
        for name, thing in inspect.getmembers_static(base, inspect.isfunction)
        if name == "__init__" or not name.startswith("_")
    }
    if all(getattr(cls, call) is getattr(base, call) for call in _MUST[kind]):
        yield " or ".join(f"{call}({calls[call].removeprefix('self, ')})" for call in _MUST[kind]) + " is missing"
    for call, given in calls.items():
        thing = inspect.getattr_static(cls, call)
        if not inspect.isfunction(thing):
            yield f"{call} must be a method: def {call}({given})"
            continue
        try:
            inspect.signature(thing).bind(*given.split(", "))
        except TypeError:
            found = inspect.signature(thing)
            yield f"{call}{found} cannot be called as {call}({given})"
    for name in ("normalizer", "loss_normalizer"):
        if inspect.isfunction(inspect.getattr_static(cls, name, None)):
            yield f"{name} must be a property: write @property above it"
    if (cls.state_dict is Method.state_dict) != (cls.load_state_dict is Method.load_state_dict):
        yield "state_dict and load_state_dict go together, and it has only one of them"
    if getattr(cls, "observes", False) is True and getattr(cls, "observe", None) is Mixer.observe:
        yield "observes is True, and observe(stats) is missing"
    if kind == "mixer" and getattr(cls, "observes", True) is False and cls.observe is not Mixer.observe:  # type: ignore[attr-defined]
        yield "observe(stats) is never called: write observes = True"
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
