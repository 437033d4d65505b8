"""Pipelines of existing DataFlex: stages of several families, each a component with a pace of its own.

There, a stage is asked anew at the first boundary (every ``update_step`` steps after ``warmup_step``) at which its
``every`` steps have passed, and so are all stages after it. Here each method is asked at its own pace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dataflex.config.build import method_block
from dataflex.config.components import ComponentReader
from dataflex.config.mappings import collect, plain, shown
from dataflex.config.schema import MethodConfig
from dataflex.errors import did_you_mean
from dataflex.method import param
from dataflex.registry import KINDS

_KEPT_THERE = 0.5  # share of the pool that a filter keeps where it does not say
_IDLE = ("cache_dir", "score_batch_size", "score_num_workers", "save_plans", "seed")  # of a pipeline


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a pipeline, with the keys and defaults that it has there."""

    family: str = param(help="selector, mixer or weighter")
    component: str = param(help="its name in the components file")
    every: int = param(1, "optimizer steps between two decisions", minimum=0)
    warmup_step: int = param(0, "optimizer steps before the first decision", minimum=0)
    enabled: bool = param(True, "whether the stage takes part")
    mode: Literal["filter", "draw"] = param("filter", "a selector keeps a share of the pool, or chooses the interval")
    keep_ratio: float = param(_KEPT_THERE, "share of the pool that a filter keeps", above=0.0, maximum=1.0)
    allow_replacement: bool = param(False, "whether a mixer may draw a row again")


def pipeline(reader: ComponentReader, name: str | None, interval: int) -> dict[str, Any]:
    """Return the methods of the pipeline ``name``, and what they need of the block.

    Args:
        reader: Of the components file; its kind is set to each stage's in turn. Problems and notes go there.
        name: Of the pipeline in the file.
        interval: Optimizer steps between two boundaries.
    """
    reader.kind, before, first = "pipeline", len(reader.problems), reader.warmup_steps
    entry = reader.entry(name)
    if entry is None:
        return {}
    place = reader.place
    stages = _stages(entry[1], f"{place}.params", reader)
    for key in entry[1]:
        if key in _IDLE:
            reader.notes.append(f"{place}.params.{key}: no effect here")
        elif key != "stages":
            near = did_you_mean(str(key), ("stages", *_IDLE))
            reader.problems.append(f"{place}.params.{key}: unknown key{near}")
    found: dict[str, list[MethodConfig]] = {kind: [] for kind in KINDS}
    for stage in stages:
        reader.kind, reader.warmup_steps = stage.family, stage.warmup_step
        method = reader.read(stage.component)
        if method is None:
            continue
        if method.decides:
            every = -(-max(stage.every, 1) // interval) * interval
            warmup = first + -(-max(stage.warmup_step - first, 0) // interval) * interval
            if every != max(stage.every, 1):
                told = f"boundaries are {interval} steps apart, so it decides every {every} steps, as there"
                reader.notes.append(f"{place}.params.stages ({stage.component}): {told}")
            method = replace(method, every=every, warmup_steps=warmup)
        found[stage.family].append(method)
    if len(reader.problems) > before:
        return {}
    return {**_methods(found, reader, place), **_block(found, stages, reader, place)}


def _stages(params: Mapping[str, Any], place: str, reader: ComponentReader) -> list[Stage]:
    given = params.get("stages")
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        told = f"expected a list of stages, each with 'family' and 'component', found {shown(given)}"
        reader.problems.append(f"{place}.stages: {told}")
        return []
    stages = [collect(Stage, each, f"{place}.stages[{i}]", reader.problems) for i, each in enumerate(given)]
    kept = [stage for stage in stages if stage is not None and stage.enabled]
    for stage in kept:
        if stage.family not in KINDS:
            near = did_you_mean(stage.family, KINDS)
            reader.problems.append(
                f"{place}.stages ({stage.component}): unknown family {stage.family!r}{near} (known: {', '.join(KINDS)})"
            )
    for kind in KINDS:
        names = [stage.component for stage in kept if stage.family == kind]
        if len(names) > 1 and kind != "weighter":
            reader.problems.append(f"{place}.stages: one {kind} at most, found {', '.join(names)}")
    return [stage for stage in kept if stage.family in KINDS]


def _methods(found: Mapping[str, list[MethodConfig]], reader: ComponentReader, place: str) -> dict[str, MethodConfig]:
    """Return one method of each kind; the weights of several weighters are multiplied."""
    methods = {kind: each[0] for kind, each in found.items() if each}
    weighters = found["weighter"]
    if len(weighters) > 1:
        targets = list(dict.fromkeys(name for each in weighters for name in each.targets))
        factors = [{key: value for key, value in plain(each).items() if key != "targets"} for each in weighters]
        block = {"name": "product", "of": factors, **({"targets": targets} if targets else {})}
        product = method_block("weighter", block, f"{place}.params.stages", reader.problems)
        return methods if product is None else {**methods, "weighter": product}
    return methods


def _block(
    found: Mapping[str, list[MethodConfig]], stages: Sequence[Stage], reader: ComponentReader, place: str
) -> dict[str, Any]:
    """Return the keys of the block that a selector's stage amounts to."""
    selector = next((stage for stage in stages if stage.family == "selector"), None)
    if selector is None or not found["selector"] or not found["selector"][0].decides:
        return {}
    if selector.mode == "draw":
        if found["mixer"]:
            told = "a selector with 'mode: draw' takes the whole interval, which leaves the mixer nothing to set"
            reader.problems.append(f"{place}.params.stages ({selector.component}): {told}; write 'mode: filter'")
        return {}
    block: dict[str, Any] = {"keep_ratio": selector.keep_ratio, "repeat": True}
    if not found["mixer"]:
        mixer = method_block("mixer", "size", f"{place}.params.stages", reader.problems)
        told = "what it keeps is drawn uniformly from, each data set by its size (mixer size)"
        reader.notes.append(f"{place}.params.stages ({selector.component}): {told}")
        return block if mixer is None else {**block, "mixer": replace(mixer, every=found["selector"][0].every)}
    return block
