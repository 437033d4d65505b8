"""The contract with authors of methods: what a class must have, what its calls must give, and who is told.

A class from outside the package is checked when it is registered, and every call of it is watched: what it
raises is told with its own frames and the name of the call, what it gives is checked for its type. What a value
must be beside that (rows of the pool, weights of the right shape) is in ``train.answers``.
"""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.core.protocols import Method, Mix, Mixer, Selection, Selector, Weighter
from dataflex.errors import ComponentError, DataFlexError

__all__ = ["BASES", "is_ours", "refuse_answer", "variant_problem", "watched", "whereabouts"]

_MARK = "_dataflex_watched"
_FORMS = {
    "select": "dataflex.Selection(rows=<int64 array>, scores=<array or None>, reason=<text>)",
    "mix": "dataflex.Mix(proportions=<float64 array, one number per domain>, reason=<text>)",
    "weigh": "a torch tensor of floating point, [B] by sequence or [R, T] by token",
    "static_weights": "an array of one number per row, or None",
    "loss_weights": "an array of one number per domain",
    "state_dict": "a dict of JSON values and numpy arrays",
    "columns": "a tuple of names of columns",
    "reference": "a folder or hub id as text, or None",
    "normaliser": "'token', 'count' or 'sample'",
    "loss_normaliser": "'token' or 'domain'",
    "active": "True or False",
    "due": "True or False",
    "default_burn_in": "a whole number of steps",
    "burn_in": "a whole number of steps",
}
_WATCHED = (
    *_FORMS,
    "__init__",
    "load_state_dict",
    "observe",
    "outcome",
    "prepare",
    "refuse_idle",
    "variant",
    "pure_micro_batches",
    "reference_cached",
    "embedding",
    "entropy",
)


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
    if call == "columns":
        good = isinstance(value, tuple | list) and all(isinstance(name, str) and name for name in value)
        return "" if good else f"gave {value!r:.80}"
    if call == "reference":
        return "" if value is None or isinstance(value, str) else gave
    if call in ("normaliser", "loss_normaliser"):
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


def variant_problem(cls: type[Method], found: Any) -> str:
    """Return what is wrong with what ``variant`` gave, or an empty text."""
    if isinstance(found, type) and issubclass(found, Method) and found.kind == cls.kind:
        return ""
    return f"{cls.kind} {cls.name!r}: variant gave {found!r:.80}; it must give a class of its kind: {whereabouts(cls)}"


BASES: Mapping[str, type[Method]] = {"selector": Selector, "mixer": Mixer, "weighter": Weighter}
