"""``dataflex plan``: checks a configuration and says what the run would do and cost, before it is run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dataflex.config.args import LlamaFactoryArgs, env_enabled
from dataflex.config.costs import Cost, costs, leaves_targets_out, passes_by_label
from dataflex.config.data import find_sources
from dataflex.config.forecast import Forecast, forecast
from dataflex.config.load import load_mapping
from dataflex.config.mappings import as_mapping, as_yaml
from dataflex.config.memory import memory
from dataflex.config.schema import DynamicConfig
from dataflex.config.split import Split, resolve
from dataflex.errors import DataError, UnsupportedError
from dataflex.method import Orderer
from dataflex.plan.schedule import Schedule, wanted_rows
from dataflex.printable import Answer, redacted
from dataflex.record.text import duration, rows_of

Lines = list[tuple[str, str]]

_LF_KEYS = (
    "model_name_or_path adapter_name_or_path stage finetuning_type dataset dataset_dir eval_dataset val_size "
    "max_samples cutoff_len packing per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps "
    "learning_rate disable_shuffling seed output_dir resume_from_checkpoint"
).split()
"""Keys of LLaMA-Factory's that are shown, with its defaults."""


def plan(config: Path, overrides: Sequence[str] = (), tokens_per_second: float | None = None) -> Answer:
    """Return the resolved configuration, the schedule, the cost and the size of a run.

    Args:
        config: A YAML or JSON file.
        overrides: ``key=value`` texts.
        tokens_per_second: Tokens that all ranks together train on in a second; hours are told if it is given.

    Raises:
        ConfigError: All problems of the configuration.
    """
    base_dir = config.absolute().parent
    parts = resolve(load_mapping(config, overrides), base_dir, check_stock=True)
    lines = [f"note: {note}" for note in parts.notes]
    lines += ["", "Configuration"] if lines else ["Configuration"]
    lines += [f"  {line}" for line in as_yaml(_mapping(parts)).splitlines()]
    values: dict[str, Any] = {"config": _mapping(parts), "notes": list(parts.notes)}
    if parts.dynamic is None or parts.dynamic.stock:
        recorded = " It is recorded." if parts.dynamic is not None else ""
        lines += ["", f"No method is named, so this is a stock LLaMA-Factory run.{recorded}"]
        if not parts.lf.do_train:
            told = "\n".join([*lines, "Nothing is trained (do_train is not on)."])
            return Answer(told, {**values, "trains": False})
    sources, _ = find_sources(parts.lf.train_sets, parts.lf, "dataset", base_dir)
    dynamic = parts.dynamic or DynamicConfig()
    targets, _ = find_sources(dynamic.targets, parts.lf, "targets", base_dir)
    view = forecast(dynamic, parts.lf, sources, targets)
    size = _size(view, parts.lf, tokens_per_second)
    values = {**values, "trains": True, **_values(view, _seconds_per_step(parts.lf.output_dir, view)), **size}
    lines += ["", foretold(view, parts.lf), "", "Size (docs/scale.md says how it is estimated)"]
    return Answer("\n".join([*lines, *rows_of(_size_lines(size))]), values)


def foretold(view: Forecast, lf: LlamaFactoryArgs) -> str:
    """Return schedule and cost of a run as text."""
    cost_lines = _cost_lines(view, _seconds_per_step(lf.output_dir, view))
    cost = ["Cost (F: forward pass of one sequence, B: backward pass)", *rows_of(cost_lines)]
    return "\n".join(["Schedule", *rows_of(_schedule_lines(view, lf)), "", *cost])


def _size(view: Forecast, lf: LlamaFactoryArgs, tokens_per_second: float | None) -> dict[str, Any]:
    """Return tokens, bytes of a rank, and hours; null for what is not known."""
    tokens = None if view.sequences is None else view.sequences * lf.cutoff_len
    hours = None
    if tokens is not None and tokens_per_second is not None:
        training, beside = tokens / tokens_per_second / 3600, _beside(costs(view))
        hours = {"training": training, "methods": None if beside is None else training * beside}
    return {"tokens": tokens, "memory_per_rank": memory(view, lf), "hours": hours}


def _size_lines(size: dict[str, Any]) -> Lines:
    tokens, found, hours = size["tokens"], size["memory_per_rank"], size["hours"]
    at_most = "known after loading" if tokens is None else f"at most {tokens:,} (sequences x cutoff_len)"
    lines: Lines = [("tokens", at_most)]
    if found is not None:
        listed = ", ".join(f"{name} {_gib(each)}" for name, each in found.items() if name != "total")
        lines.append(("memory per rank", f"about {_gib(found['total'])} GiB: {listed}"))
    if hours is not None:
        told = "of methods not known" if hours["methods"] is None else f"of methods {hours['methods']:,.1f}"
        lines.append(("hours", f"at most {hours['training']:,.1f} of training, {told}, at the tokens per second given"))
    return lines


def _gib(count: float) -> str:
    return f"{count / 2**30:,.2f}"


def _values(view: Forecast, step_seconds: float | None) -> dict[str, Any]:
    """Return schedule and cost for JSON; null for what is not known before the data are loaded."""
    schedule, pool = view.schedule, view.pool
    passes = passes_by_label(view)
    return {
        "rows": view.rows,
        "steps": view.steps,
        "sequences": view.sequences,
        "global_batch": view.batch.global_batch,
        "world": view.batch.world,
        "datasets": dict(view.counts),
        "targets": dict(view.targets),
        "warmup_steps": None if schedule is None else schedule.all_warmup_steps,
        "decisions": {each.kind: view.num_decisions(each.kind) for each in view.dynamic.methods if each.decides},
        "pool": None if pool is None else asdict(pool),
        "passes": passes,
        "seconds_per_step": step_seconds,
    }


def _mapping(parts: Split) -> dict[str, Any]:
    if parts.v1 is not None:
        lf = dict(parts.v1)
    else:
        lf = {key: getattr(parts.lf, key) for key in _LF_KEYS}
        del lf["num_train_epochs" if parts.lf.max_steps > 0 else "max_steps"]
    ours = {} if parts.dynamic is None else {"dynamic": as_mapping(parts.dynamic)}
    shown: dict[str, Any] = redacted({**{key: value for key, value in lf.items() if value is not None}, **ours})
    return shown


def _schedule_lines(view: Forecast, lf: LlamaFactoryArgs) -> Lines:
    """Return label and text of what is served when."""
    batch, epochs = view.batch, f"{lf.num_train_epochs:g} epochs"
    processes = f"{batch.world} process" if batch.world == 1 else f"{batch.world} processes"
    if env_enabled("FORCE_TORCHRUN") and "NPROC_PER_NODE" not in os.environ:
        processes += ", as NPROC_PER_NODE is not set"
    listed = ", ".join(f"{name} {'?' if count is None else f'{count:,}'}" for name, count in view.counts.items())
    if view.packs:
        rows = f"known after packing (samples: {listed})"
    elif view.rows is None:
        rows = f"known after loading ({listed})"
    else:
        held = sum(count or 0 for count in view.counts.values()) - view.rows
        rows = f"{view.rows:,} ({listed}{f'; val_size sets {held:,} aside' if lf.val_size > 1e-6 else ''})"
    if view.steps is None:
        steps = f"known after loading ({epochs})"
    else:
        steps = f"{view.steps:,} ({'max_steps' if lf.max_steps > 0 else f'{epochs} over {view.rows:,} rows'})"
    parts = f"{batch.micro_batch_size} per device x {batch.accumulation} accumulated x {processes}"
    lines = [("global batch", f"{batch.global_batch:,} sequences ({parts})"), ("rows", rows), ("steps", steps)]
    if not view.dynamic.methods or view.schedule is None:
        return lines
    return lines + _interval_lines(view) + _pool_lines(view) + _order_lines(view.dynamic) + _epoch_lines(view)


def _interval_lines(view: Forecast) -> Lines:
    """Return warm-up and intervals, of each method where they have cadences of their own."""
    schedule = view.schedule
    assert schedule is not None
    if not schedule.own:
        return _cadence_lines(view, schedule, "", mixes=view.dynamic.mixer is not None)
    lines: Lines = []
    for kind, own in schedule.own.items():
        lines += _cadence_lines(view, own, f"{kind}: ", mixes=kind == "mixer")
    return [*lines, ("plans", f"{schedule.num_intervals:,}, a new one whenever a method decides")]


def _cadence_lines(view: Forecast, schedule: Schedule, of: str, *, mixes: bool) -> Lines:
    dynamic, first = view.dynamic, schedule.first_decision
    lines: Lines = []
    if schedule.warmup_steps:
        what = "at the mixer's proportions of step 0" if mixes else "rows drawn uniformly"
        what = "rows in random order" if of.startswith("orderer") else what
        if dynamic.initial_proportions is not None and mixes:
            what = "at initial_proportions"
        if of.startswith("selector") and dynamic.mixer is not None:
            what = "the whole pool"
        lines.append(("warm-up", f"{of}{schedule.warmup_steps:,} steps, {what}"))
    if dynamic.cycle_steps is not None:
        lines.append(("cycle", f"warm-up and intervals start again every {dynamic.cycle_steps:,} steps"))
    if first is None:
        lines.append(("intervals", f"{of}none: the run ends with the warm-up, and no method ever decides"))
    elif any(dynamic.every(method) is not None for method in dynamic.methods if method.decides):
        rest = ((dynamic.cycle_steps or schedule.total_steps) - schedule.warmup_steps) % first.steps
        last = f"; the last{' of a cycle' if dynamic.cycle_steps else ''} has {rest:,} steps" if rest else ""
        each = f"{first.steps:,} steps, {first.steps * view.batch.global_batch:,} sequences each"
        lines.append(("intervals", f"{of}{schedule.num_decisions:,} of {each}{last}"))
    elif dynamic.selector is not None or dynamic.mixer is not None or dynamic.orderer is not None:
        lines.append(("intervals", "interval_steps is not set: one decision holds for the whole run"))
    return lines


def _pool_lines(view: Forecast) -> Lines:
    """Return what the selector is given and keeps in an interval, and how often that is served."""
    dynamic, options, pool = view.dynamic, view.dynamic.signals, view.pool
    first, decisions = view.first_decision("selector"), view.num_decisions("selector")
    if pool is None or first is None:
        return []
    lines: Lines = []
    if dynamic.candidate_batches is not None:
        lines.append(("pool", f"the next {pool.left:,} candidates of shuffled epochs over {view.rows:,} rows"))
    elif pool.left < pool.rows:
        told = f"{pool.drawn:,} of {pool.rows:,} rows"
        told += f", drawn anew in each interval (pool_fraction {options.pool_fraction:g})" * (pool.drawn < pool.rows)
        if pool.left < pool.drawn:
            by = f"{options.screen_by}, screen_fraction {options.screen_fraction:g}"
            told += f"; screening leaves {pool.left:,} ({by})"
        lines.append(("pool", told))
    sequences = first.steps * view.batch.global_batch
    wanted = wanted_rows(first, view.batch.global_batch, pool.left, dynamic.keep_ratio, dynamic.mixer is not None)
    kept = min(wanted, pool.left)
    of = f" (keep_ratio {dynamic.keep_ratio:g})" if dynamic.keep_ratio is not None else ""
    told = f"at most {kept:,} of {pool.left:,} rows{of} for {sequences:,} sequences of an interval"
    if dynamic.mixer is None and kept < sequences:
        told += f": each {sequences / kept:.3g} times"
    lines.append(("kept", told))
    if dynamic.mixer is None and not dynamic.exclude_seen and decisions > 1 and kept:
        assert view.schedule is not None
        again = sum(each.steps for each in view.schedule.of("selector").decided()) * view.batch.global_batch / kept
        lines.append(("repeats", f"{again:.3g} times a row over the run if every decision kept the same rows"))
    return lines


def _order_lines(dynamic: DynamicConfig) -> Lines:
    """Return in which order rows are served, and within what."""
    orderer = None if dynamic.orderer is None else dynamic.orderer.build()
    if not isinstance(orderer, Orderer):
        return []
    within = "an interval's selection" if dynamic.narrows else "the epochs of all rows"
    if dynamic.mixer is not None:
        within = f"each domain{' of ' + within if dynamic.narrows else ', epoch by epoch'}"
    return [("order", f"{orderer.reason.removeprefix('order: ')}; within {within}")]


def _epoch_lines(view: Forecast) -> Lines:
    """Return how often each domain is seen, where the mixture is known before training."""
    assert view.steps is not None
    dynamic, label, wanted = view.dynamic, "epochs per domain", view.steps * view.batch.global_batch
    if dynamic.mixer is None:
        narrowed = ", but the selector decides which rows" if dynamic.selector is not None else ""
        told = f"{wanted / view.rows:.3g} over all rows on average{narrowed}" if view.rows is not None else ""
        return [("epochs", told)] if told else []
    if view.domains is None:
        return [(label, "known after loading")]
    if dynamic.unit == "tokens":
        return [(label, "known after tokenizing (proportions are of tokens)")]
    try:
        served = view.served()
    except UnsupportedError as error:
        return [(label, f"known during training ({dynamic.mixer.name}: {error})")]
    lines: Lines = []
    for name, sequences, rows, cap in zip(view.domains.names, served, view.domains.num_rows, view.caps(), strict=True):
        epochs = float(sequences) / int(rows)
        over = ", at its cap" if epochs >= cap - 1e-9 else ""
        if dynamic.at_cap == "error" and epochs > cap + 1e-9:
            over = f", more than max_epochs {cap:g}: the run would fail"
        told = f"{name}: {epochs:.3g} ({sequences:,.0f} sequences, {sequences / wanted:.1%}{over})"
        lines.append((label if not lines else "", told))
    short = wanted - float(served.sum())
    if short >= 1:
        lines.append(("", f"max_epochs leaves the run {short:,.0f} of {wanted:,} sequences short ({dynamic.at_cap})"))
    return lines


def _beside(found: dict[str, list[Cost]]) -> float | None:
    """Return the passes beside training as a multiple of its own, a backward pass as two; None where unknown."""
    total = found["training"][0].in_forwards
    beside = [cost.in_forwards for label, each in found.items() if label != "training" for cost in each]
    return None if None in beside or not total else sum(passes or 0.0 for passes in beside) / total


_MOST_RECORD_BYTES = 32 << 20  # what is quick to read


def _cost_lines(view: Forecast, step_seconds: float | None) -> Lines:
    """Return label and text of all passes, the methods' share, and the time, where a step's seconds are known."""
    found = costs(view)
    lines: Lines = [(label, "; ".join(cost.text for cost in each)) for label, each in found.items()]
    if len(found) == 1:
        return lines
    beside = _beside(found)
    if beside is not None:
        aside = "; passes over targets not counted" if any(map(leaves_targets_out, view.dynamic.methods)) else ""
        share = f"{beside / (beside + 1):.1%} of all passes, a B counted as two F{aside}"
        lines.append(("share of methods", share))
        if beside:
            lines.append(("beside training", f"{beside:.2g} x the passes of the training itself"))
    if step_seconds is not None and view.steps is not None:
        seconds = view.steps * step_seconds
        told = f"training {duration(seconds)}"
        if beside:
            told = f"{duration(seconds * (1 + beside))}: {told}, methods {duration(seconds * beside)}"
        lines.append(("time", f"about {told} ({step_seconds:.3g} s a step in the record of the run before)"))
    return lines


def _seconds_per_step(output_dir: str | None, view: Forecast) -> float | None:
    """Return the seconds that a step of the training itself took in an earlier run with the same global batch."""
    from dataflex.record.digest import digest
    from dataflex.record.read import EVENTS, read_events, record_dir

    if not output_dir:
        return None
    try:
        if (record_dir(output_dir) / EVENTS).stat().st_size > _MOST_RECORD_BYTES:
            return None
        run = digest(read_events(output_dir))
    except (DataError, OSError):
        return None  # a record that cannot be read is for 'dataflex report' to complain about
    if run.started.get("global_batch") != view.batch.global_batch or run.started.get("world") != view.batch.world:
        return None
    spent = ((run.finished or {}).get("seconds") or run.spent).get("train")
    return float(spent) / run.steps_done if run.steps_done and spent else None
