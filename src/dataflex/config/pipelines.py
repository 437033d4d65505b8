"""Pipelines and reorders of existing DataFlex: stages of several families, each a component with a pace of its own.

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
_FAMILIES = ("selector", "mixer", "reorder", "weighter")
_LAYERS = {"layers": "layers", "folding_layer": "layers", "zigzag_layer": "layers"}
_SECTIONS = {**_LAYERS, "num_sections": "sections", "folding_ratio": "ratio"}
_PATTERNS: dict[str, dict[str, str]] = {  # our names of each pattern's parameters
    "shuffle": {},
    "sorting": {},
    "folding": _LAYERS,
    "zigzag": _LAYERS,
    "segment": {"x_pct": "front_percent", "y_pct": "back_percent", "front_is_high": "front", "back_is_high": "back"},
    "stair": _SECTIONS,
    "saw": _SECTIONS,
}
_THERE = {
    "stair": {"sections": 2, "layers": 2},
    "saw": {"sections": 2, "layers": 2},
}  # their defaults that are not ours
_POLARITIES = {"higher_later": False, "higher_is_better": False, "higher_earlier": True, "lower_is_better": True}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a pipeline, with the keys and defaults that it has there."""

    family: str = param(help="selector, mixer, reorder or weighter")
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
        method = orderer(reader, stage.component)[0] if stage.family == "reorder" else reader.read(stage.component)
        if method is None:
            continue
        if method.decides:
            every = -(-max(stage.every, 1) // interval) * interval
            warmup = first + -(-max(stage.warmup_step - first, 0) // interval) * interval
            if every != max(stage.every, 1):
                told = f"boundaries are {interval} steps apart, so it decides every {every} steps, as there"
                reader.notes.append(f"{place}.params.stages ({stage.component}): {told}")
            method = replace(method, every=every, warmup_steps=warmup)
        if stage.family == "reorder" and method.kind != "orderer":
            told = "a reorder of your own gives rows as a selector does; use it with train_type dynamic_reorder"
            reader.problems.append(f"{place}.params.stages ({stage.component}): {told}")
        found[method.kind].append(method)
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
        if stage.family not in _FAMILIES:
            near, known = did_you_mean(stage.family, _FAMILIES), ", ".join(_FAMILIES)
            reader.problems.append(
                f"{place}.stages ({stage.component}): unknown family {stage.family!r}{near} (known: {known})"
            )
    for family in _FAMILIES:
        names = [stage.component for stage in kept if stage.family == family]
        if len(names) > 1 and family != "weighter":
            reader.problems.append(f"{place}.stages: one {family} at most, found {', '.join(names)}")
    return [stage for stage in kept if stage.family in _FAMILIES]


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
    if found["orderer"]:
        what = "rows of each domain are put in order" if found["mixer"] else "what it keeps is served in order"
        reader.notes.append(f"{place}.params.stages ({selector.component}): {what}, until it decides anew")
    elif not found["mixer"]:
        mixer = method_block("mixer", "size", f"{place}.params.stages", reader.problems)
        told = "what it keeps is drawn uniformly from, each data set by its size (mixer size)"
        reader.notes.append(f"{place}.params.stages ({selector.component}): {told}")
        return block if mixer is None else {**block, "mixer": replace(mixer, every=found["selector"][0].every)}
    return block


def orderer(reader: ComponentReader, name: str | None) -> tuple[MethodConfig | None, int]:
    """Return the orderer that a reorder of the file amounts to, and how many boundaries apart it ranks; 0: once."""
    reader.kind, before = "reorder", len(reader.problems)
    entry = reader.entry(name)
    if entry is None:
        return None, 0
    if reader.own:
        return reader.ported(*entry), 1
    given = {key: value for key, value in entry[1].items() if value is not None}
    for key in ("pattern_params", "score_params"):
        if not isinstance(given.get(key, {}), Mapping):
            reader.refuse(f"expected a mapping, found {shown(given[key])}", key)
            return None, 0
    given |= given.pop("pattern_params", {})
    dynamic = given.pop("kind", entry[0]) == "dynamic"
    pattern = given.pop("pattern", "sorting")
    if pattern not in _PATTERNS:
        near = did_you_mean(str(pattern), list(_PATTERNS))
        reader.refuse(f"{shown(pattern)} is not a choice{near} (choices: {', '.join(_PATTERNS)})", "pattern")
        return None, 0
    block: dict[str, Any] = dict(_THERE.get(pattern, {}))
    for key, ours in _PATTERNS[pattern].items():
        if key in given:
            value = given.pop(key)
            block[ours] = ("high" if value else "low") if isinstance(value, bool) else value
    if pattern in ("stair", "saw") and not block.get("ratio"):
        reader.note("without a folding_ratio this is 'sorting', as there", "pattern")
        pattern, block = "sorting", {}
    polarity = given.pop("polarity", "lower_is_better" if dynamic else "higher_later")
    if polarity not in _POLARITIES:
        near = did_you_mean(str(polarity), list(_POLARITIES))
        reader.refuse(f"{shown(polarity)} is not a choice{near} (choices: {', '.join(_POLARITIES)})", "polarity")
        return None, 0
    by = _ranked_by(reader, given.pop("score_source", "model_loss" if dynamic else "precomputed"), given)
    descending = _POLARITIES[polarity] is bool(given.pop("ascending", True))
    window, every = given.pop("window_size", 0), given.pop("reorder_every", 1)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        reader.refuse(f"expected a whole number, at least 1, found {shown(every)}", "reorder_every")
    if pattern != "shuffle":
        block |= {"by": by, "descending": descending, "jitter": window if window != 1 else 0}
    elif dynamic and by:
        reader.note("a shuffle looks at no scores", "score_source")
    if "seed" in given:
        reader.seed = reader._seed(given.pop("seed"))
        reader.note("becomes the seed of all decisions", "seed")
    if given.pop("consume_once", True) is not True:
        reader.refuse("false is not offered: a row is served again once all were served; remove it", "consume_once")
    given.pop("apply_at", None)  # where the order is made there; it is the same order
    known = [*_PATTERNS[pattern], "ascending", "polarity", "window_size", "score_source", "score_params", "seed"]
    for key in given:
        reader.refuse(f"unknown parameter{did_you_mean(str(key), known)}", str(key))
    if len(reader.problems) > before:
        return None, 0
    place = f"{reader.place}.params"
    method = method_block("orderer", {"name": pattern, **block}, place, reader.problems)
    return method, every if dynamic and pattern != "shuffle" else 0


def _ranked_by(reader: ComponentReader, source: Any, given: dict[str, Any]) -> dict[str, Any] | None:
    """Return what rows are ranked by, and take its parameters out of ``given``."""
    params = given.pop("score_params", {})
    if source == "model_loss":
        if params.get("max_samples") is not None:
            reader.note("no effect here: every row that is left is scored", "score_params.max_samples")
        return {"name": "loss"}
    if source == "precomputed" and params.get("score_path") is None:
        return {"name": "column", "column": params.get("score_field", "score")}
    if source == "precomputed":
        told = "is not read; write its numbers into the rows as a column, and name that as score_field"
        reader.refuse(told, "score_params.score_path")
    elif source == "cached_selection":
        told = "scores of another run are not read; let the selector decide in this run, and write 'dynamic: "
        told += "{selector: {name: loss}, orderer: {name: ..., by: selector}}' instead of the flat keys"
        reader.refuse(told, "score_source")
    else:
        known = ("precomputed", "cached_selection", "model_loss")
        near = did_you_mean(str(source), known)
        reader.refuse(f"{shown(source)} is not a choice{near} (choices: {', '.join(known)})", "score_source")
    return None
