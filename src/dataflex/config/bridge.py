"""What a class of the older spelling states: only until the last one is converted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from dataflex.method import Method, Params, Passes, Reference, Requires

__all__ = ["stated"]


def stated(method: Method) -> Requires:
    """Return what a method requires, in whichever spelling."""
    cls = type(method)
    if cls.requires is not Method.requires or method.kind == "weighter":
        return method.requires()
    needs, card = cls.needs, cls.card
    none, one = method.pool_passes(0), method.pool_passes(1)
    models: dict[str, str] = {}
    preconditions: dict[str, str] = {}
    by_target: dict[str, Any] = {}
    for place, params in _nested("", method.params):
        for field in fields(type(params)):
            value = getattr(params, field.name)
            key = f"{place}{field.name}"
            if field.metadata.get("model") and value is not None:
                if isinstance(value, tuple):
                    models.update({f"{key}[{i}]": str(item) for i, item in enumerate(value)})
                else:
                    models[key] = str(value)
            if field.name == "precondition":
                preconditions[key] = value
            if field.metadata.get("by_target") and isinstance(value, Mapping):
                by_target[key] = value
    return Requires(
        signals=needs.signals,
        targets=needs.targets,
        domains=needs.domains,
        stages=needs.stages,
        whole_parameters=not needs.zero3,
        needs_interval=cls.adaptive,
        within_batch=getattr(cls, "within_batch", False),
        columns=method.columns(),
        reference=None if method.reference is None else Reference(method.reference, method.reference_cached),
        models=models,
        preconditions=preconditions,
        by_target=by_target,
        passes=Passes(
            pool=none,
            pool_by_target=(one[0] - none[0], one[1] - none[1]),
            pool_once=card.forward_once_per_pool_row,
            targets=method.target_passes,
            served=(card.forward_per_served_row, card.backward_per_served_row),
            told=card.cost,
        ),
    )


def _nested(place: str, params: Params) -> Iterator[tuple[str, Params]]:
    from dataflex.parts import Part

    yield place, params
    for field in fields(type(params)):
        value = getattr(params, field.name)
        if isinstance(value, Part):
            yield from _nested(f"{place}{field.name}.", value.params)
