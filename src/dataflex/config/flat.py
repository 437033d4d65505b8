"""The flat keys of existing DataFlex themselves: names, types and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from dataflex.config.collect import collect
from dataflex.errors import did_you_mean

KIND_OF: dict[str, str] = {"dynamic_select": "selector", "dynamic_mix": "mixer", "dynamic_weight": "weighter"}
"""Which kind of method a training type runs."""

_TRAIN_TYPES = ("static", *KIND_OF)


@dataclass(frozen=True, kw_only=True)
class FlatKeys:
    """The flat keys, with the defaults that they have in existing DataFlex."""

    train_type: str = "static"
    components_cfg_file: str = "configs/components.yaml"
    component_name: str | None = None
    warmup_step: int = field(default=0, metadata={"minimum": 0})
    update_step: int = field(default=0, metadata={"minimum": 0})
    update_times: int = 1
    train_step: int = field(default=0, metadata={"minimum": 0})
    static_mix: bool = False
    mixture_sample_rule: Literal["mixture", "stratified", "uniform"] = "mixture"
    init_mixture_proportions: tuple[float, ...] | None = field(default=None, metadata={"minimum": 0.0})
    mixer_eval_dataset: str | tuple[str, ...] | None = None
    freeze_gate: bool = False
    early_stopping_min_delta: float = field(default=0.0, metadata={"minimum": 0.0})


FLAT_KEYS: tuple[str, ...] = tuple(f.name for f in fields(FlatKeys))


def read_flat(flat: Mapping[str, Any], problems: list[str]) -> FlatKeys | None:
    """Return the flat keys of a configuration, or None after noting why not."""
    flat = dict(flat)
    if flat.get("train_type") == "dynamic_weighting":
        flat["train_type"] = "dynamic_weight"
    kind = flat.get("train_type")
    if isinstance(kind, str) and kind not in _TRAIN_TYPES:
        known = ", ".join(_TRAIN_TYPES)
        problems.append(f"train_type: {kind!r} is not available{did_you_mean(kind, _TRAIN_TYPES)} (known: {known})")
    keys = collect(FlatKeys, flat, "", problems)
    return None if problems else keys
