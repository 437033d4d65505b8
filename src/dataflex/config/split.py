"""Splits a configuration into LLaMA-Factory's part and ours; ``resolve`` also checks both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.build import misplaced_keys, parse_dynamic
from dataflex.config.check import first_told, found_problems, notes
from dataflex.config.legacy import translate
from dataflex.config.load import without_oddities
from dataflex.config.schema import FLAT_KEYS, DynamicConfig, block_keys
from dataflex.config.v1 import SEES_BOTH, is_v1, named, refused, translated
from dataflex.errors import ConfigError, did_you_mean
from dataflex.registry import KINDS


@dataclass(frozen=True, kw_only=True)
class Split:
    """One configuration in two parts."""

    lf: LlamaFactoryArgs  # LLaMA-Factory's keys; max_steps from flat keys where those fix the run's length
    dynamic: DynamicConfig | None  # what is decided during training; None for a stock run
    notes: tuple[str, ...] = ()  # what flat keys drop or mean differently, and what else a user should know of
    early_stopping_min_delta: float = 0.0  # a stock run of existing DataFlex may set it too
    v1: Mapping[str, Any] | None = None  # the keys as LLaMA-Factory v1 has them, of which ``lf`` is what v0 calls them


def split(mapping: Mapping[str, Any], base_dir: Path) -> Split:
    """Return the two parts of a configuration that lies in ``base_dir``, without looking at LLaMA-Factory's.

    Raises:
        ConfigError: All problems of the ``dynamic`` block or of the flat keys.
    """
    block, flat = mapping.get("dynamic"), [key for key in mapping if key in FLAT_KEYS]
    problems = [*_misspelt(mapping), *misplaced_keys(mapping)]
    if block is not None and flat:
        problems.append(
            f"dynamic: given together with flat keys of existing DataFlex ({', '.join(flat)}); write one or the other"
        )
    if problems:
        raise ConfigError(problems)
    lf = {key: value for key, value in mapping.items() if key != "dynamic"}
    dynamic: DynamicConfig | None
    told: list[str] = []
    if block is None:
        lf, dynamic, delta, told = translate(lf, base_dir)
    else:
        dynamic = parse_dynamic(block, base_dir)
        delta = dynamic.early_stopping_min_delta
    return Split(lf=LlamaFactoryArgs.read(lf), dynamic=dynamic, notes=tuple(told), early_stopping_min_delta=delta)


def resolve(mapping: Mapping[str, Any], base_dir: Path, *, check_stock: bool = False) -> Split:
    """Return the two parts of a configuration that lies in ``base_dir``, with everything checked that needs no model.

    The model and the data sets of a stock run are looked for with ``check_stock``, else left to LLaMA-Factory.

    Raises:
        ConfigError: All problems of the whole configuration, LLaMA-Factory's keys included.
    """
    mapping, told = without_oddities(mapping)
    v1 = {key: value for key, value in mapping.items() if key != "dynamic"} if is_v1(mapping) else None
    problems: list[str] = []
    broken = False
    if v1 is not None:
        mapping, problems = translated(mapping)
    try:
        parts = split(mapping, base_dir)
    except ConfigError as error:
        told = first_told(told, error.problems)
        # What can be said about the rest does not depend on the part that is broken.
        lf = {key: value for key, value in mapping.items() if key != "dynamic" and key not in FLAT_KEYS}
        parts, broken = Split(lf=LlamaFactoryArgs.read(lf), dynamic=DynamicConfig()), True
    if parts.dynamic is not None or check_stock:
        found = found_problems(parts.dynamic, parts.lf, base_dir)
        if v1 is not None:
            of_block = () if parts.dynamic is None else refused(None if broken else parts.dynamic, v1)
            found = first_told([*problems, *of_block], map(named, found))
        told = first_told(told, found)
    if told:
        raise ConfigError(dict.fromkeys(told))
    parts = replace(parts, v1=v1)
    if parts.dynamic is None:
        return parts
    of_run = [*notes(parts.dynamic, parts.lf, base_dir)]
    if v1 is not None:
        of_run = [*map(named, of_run), *([SEES_BOTH] if parts.lf.stage == "rm" else [])]
    return replace(parts, notes=(*parts.notes, *dict.fromkeys(of_run)))


def _misspelt(mapping: Mapping[str, Any]) -> list[str]:
    """Return a problem for each top-level mapping that looks like a misspelt ``dynamic`` block."""
    return [
        f"{key}: unknown key{did_you_mean(str(key), ['dynamic'])}"
        for key, value in mapping.items()
        if key not in ("dynamic", *KINDS) and isinstance(value, Mapping) and set(block_keys()) & set(value)
    ]
