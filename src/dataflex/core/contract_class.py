"""What a class of a method must have, told all at once, with the class and its file."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any

from dataflex.core.contract import BASES, whereabouts
from dataflex.core.protocols import STAGES, Card, Method, Needs, Params

__all__ = ["class_problems"]

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
    "columns": (),
    "state_dict": (),
    "load_state_dict": ("state",),
}
_MUST = {"selector": ("select",), "mixer": ("mix",), "weighter": ("weigh", "static_weights")}
_PROPERTIES = ("reference", "normaliser", "loss_normaliser", "embedding", "entropy", "pure_micro_batches")
_SWITCHES = ("adaptive", "narrows", "online", "observes", "weighs_loss", "neutral", "by_token")


def class_problems(kind: str, cls: Any) -> list[str]:
    """Return what a class lacks of the contract, one line each; none for a good one."""
    if not (isinstance(cls, type) and issubclass(cls, BASES[kind])):
        what = whereabouts(cls) if isinstance(cls, type) else repr(cls)[:80]
        return [f"{what} is not a subclass of dataflex.{kind.capitalize()}"]
    where = whereabouts(cls)
    found = [*_labels(cls), *_needs(cls), *_calls(kind, cls), *_parameters(cls)]
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
            if field.name in ("summary", "paper", "cost", "note"):
                if not isinstance(value, str) or not (value.strip() or field.name == "note"):
                    yield f"card.{field.name} must be text, found {value!r:.80}"
            elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                yield f"card.{field.name} must be a number of at least 0, found {value!r:.80}"
    for switch in _SWITCHES:
        value = getattr(cls, switch, False)
        if not isinstance(value, bool | property):
            yield f"{switch!r} must be True or False, found {value!r:.80}"


def _needs(cls: type[Method]) -> Iterator[str]:
    needs = cls.needs
    if not isinstance(needs, Needs):
        yield f"'needs' must be dataflex.Needs(...), found a value of type {type(needs).__name__}"
        return
    signals = needs.signals if isinstance(needs.signals, frozenset | set) else None
    if signals is None or not signals <= _SIGNALS:
        yield f"needs.signals must be a frozenset of {', '.join(sorted(_SIGNALS))}, found {needs.signals!r:.80}"
    if not isinstance(needs.stages, tuple) or not needs.stages or not set(needs.stages) <= set(STAGES):
        yield f"needs.stages must be a tuple of {', '.join(STAGES)}, found {needs.stages!r:.80}"
    if isinstance(needs.domains, bool) or not isinstance(needs.domains, int) or needs.domains < 1:
        yield f"needs.domains must be a whole number of at least 1, found {needs.domains!r:.80}"
    for switch in ("targets", "zero3"):
        if not isinstance(getattr(needs, switch), bool):
            yield f"needs.{switch} must be True or False, found {getattr(needs, switch)!r:.80}"


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
    for switch, call in (("observes", "observe"), ("weighs_loss", "loss_weights")):
        if getattr(cls, switch, False) is True and getattr(cls, call) is getattr(base, call):
            yield f"{switch} is True, and {call}({', '.join(_CALLS[call])}) is missing"


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
