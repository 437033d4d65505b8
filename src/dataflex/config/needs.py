"""Needs that methods declare, of the method and of all its parts, against what a run has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.method import Params
from dataflex.parts import Part

__all__ = ["moment_problems", "parameters", "too_few_domains"]

_NO_MOMENTS: tuple[str, ...] = (
    "adafactor",
    "adagrad",
    "ademamix",
    "apollo",
    "badam",
    "galore",
    "lion",
    "lomo",
    "muon",
    "rmsprop",
    "schedule_free",
    "sgd",
    "stable_adamw",
)
_MOMENT_FLAGS: tuple[str, ...] = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")
_PRECONDITIONS: tuple[str, ...] = ("true_adam", "paper_repo", "adam_scale")


def parameters(method: MethodConfig) -> Iterator[tuple[str, str, Params]]:
    """Yield dotted path, name and parameters of a method, then those of its parts, of theirs, and so on."""
    yield from _nested(f"dynamic.{method.kind}", method.name, method.params)


def _nested(path: str, name: str, params: Params) -> Iterator[tuple[str, str, Params]]:
    yield path, name, params
    for field in fields(type(params)):
        for place, part in _parts(getattr(params, field.name)):
            yield from _nested(f"{path}.{field.name}{place}", part.name, part.params)


def _parts(value: Any) -> Iterator[tuple[str, Part]]:
    if isinstance(value, Part):
        yield "", value
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from ((f"[{i}]{place}", part) for place, part in _parts(item))


def too_few_domains(dynamic: DynamicConfig, found: int, *, copied: bool = False) -> list[str]:
    """Return one line per method that needs more domains than there are.

    Args:
        dynamic: The methods, and what the domains are.
        found: Number of domains.
        copied: Whether the data sets are one because they come from a tokenized copy.
    """
    told = []
    for method in dynamic.methods:
        least = max(method.cls.needs.domains, 2 if method.kind == "mixer" else 1)
        if least <= found:
            continue
        needs = f"{method.name} needs at least {'two' if least == 2 else least} domains"
        if copied:
            told.append(
                "tokenized_path: a tokenized copy does not say which data set a row is from, so that all rows are one "
                f"domain, and dynamic.{method.kind}: {needs}; remove it"
            )
        else:
            told.append(f"dynamic.{method.kind}: {needs}, found {found}; {_way_out(dynamic)}")
    return told


def _way_out(dynamic: DynamicConfig) -> str:
    if dynamic.domains_are_sources:
        return "list several data sets in 'dataset', or name a 'domain_column'"
    key = next(key for key in ("domain_column", "domain_path", "domain_clusters") if getattr(dynamic, key) is not None)
    return f"every row has the same one by {key}"


def moment_problems(dynamic: DynamicConfig, lf: LlamaFactoryArgs) -> Iterator[str]:
    """Yield why gradients cannot be turned into directions of the run's optimizer."""
    name = lf.optim or "adamw_torch"
    key = next((flag for flag in _MOMENT_FLAGS if lf.on(flag)), "")
    if not key and any(word in name for word in _NO_MOMENTS):
        key = f"optim: {name}"
    if not key:
        return
    moments = f"needs Adam's moments for each element, which the run's optimizer ({key}) does not keep"
    for method in dynamic.methods:
        for path, _, params in parameters(method):
            asked = getattr(params, "precondition", None)
            if asked in _PRECONDITIONS:
                yield (
                    f"{path}.precondition: {asked} {moments}; write 'precondition: none' or 'sign', or use an AdamW "
                    "optimizer"
                )
    if dynamic.signals.screen_by == "pilot":
        yield f"dynamic.signals.screen_by: a pilot {moments}; use embeddings, or an AdamW optimizer"
