"""Schedule and cost of a run as text, before it is run, for ``dataflex plan`` and a wrapped trainer's ``plan()``."""

from __future__ import annotations

import os

from dataflex.config.args import LlamaFactoryArgs, env_enabled
from dataflex.config.costs import Cost, costs, leaves_targets_out
from dataflex.config.forecast import Forecast
from dataflex.config.schema import DynamicConfig
from dataflex.errors import DataError, UnsupportedError
from dataflex.method import Orderer
from dataflex.plan.mixture import cap_limits
from dataflex.plan.schedule import Schedule, wanted_rows
from dataflex.record.digest import digest
from dataflex.record.read import EVENTS, read_events, record_dir
from dataflex.record.text import duration, rows_of

Lines = list[tuple[str, str]]
"""Label and text of each line."""

_MOST_RECORD_BYTES = 32 << 20  # what is quick to read


def foretold(view: Forecast, lf: LlamaFactoryArgs, step_seconds: float | None) -> str:
    """Return schedule and cost of a run as text; ``step_seconds`` are those that an earlier run's record tells."""
    cost_lines = _cost_lines(view, step_seconds)
    cost = ["Cost (F: forward pass of one sequence, B: backward pass)", *rows_of(cost_lines)]
    return "\n".join(["Schedule", *rows_of(_schedule_lines(view, lf)), "", *cost])


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
    within = "an interval's selection" if dynamic.selects_subset else "the epochs of all rows"
    if dynamic.mixer is not None:
        within = f"each domain{' of ' + within if dynamic.selects_subset else ', epoch by epoch'}"
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
    caps, sizes = view.caps(), view.domains.num_rows
    limits = cap_limits(sizes, caps, view.unit)
    for name, sequences, rows, cap, limit in zip(view.domains.names, served, sizes, caps, limits, strict=True):
        epochs = float(sequences) / int(rows)
        over = ", at its cap" if sequences >= limit - 1e-9 else ""
        if limit == 0 < cap:
            over = f", never: max_epochs {cap:g} leaves fewer rows than a micro-batch of {view.unit}"
        if dynamic.at_cap == "error" and sequences > limit + 1e-9:
            over = f", more than max_epochs {cap:g}: the run would fail"
        told = f"{name}: {epochs:.3g} ({sequences:,.0f} sequences, {sequences / wanted:.1%}{over})"
        lines.append((label if not lines else "", told))
    short = wanted - float(served.sum())
    if short >= 1:
        lines.append(("", f"max_epochs leaves the run {short:,.0f} of {wanted:,} sequences short ({dynamic.at_cap})"))
    return lines


def _cost_lines(view: Forecast, step_seconds: float | None) -> Lines:
    """Return label and text of all passes, the methods' share, and the time, where a step's seconds are known."""
    found = costs(view)
    lines: Lines = [(label, "; ".join(cost.text for cost in each)) for label, each in found.items()]
    if len(found) == 1:
        return lines
    ratio = beside(found)
    if ratio is not None:
        aside = "; passes over targets not counted" if any(map(leaves_targets_out, view.dynamic.methods)) else ""
        share = f"{ratio / (ratio + 1):.1%} of all passes, a B counted as two F{aside}"
        lines.append(("share of methods", share))
        if ratio:
            lines.append(("beside training", f"{ratio:.2g} x the passes of the training itself"))
    if step_seconds is not None and view.steps is not None:
        seconds = view.steps * step_seconds
        told = f"training {duration(seconds)}"
        if ratio:
            told = f"{duration(seconds * (1 + ratio))}: {told}, methods {duration(seconds * ratio)}"
        lines.append(("time", f"about {told} ({step_seconds:.3g} s a step in the record of the run before)"))
    return lines


def beside(found: dict[str, list[Cost]]) -> float | None:
    """Return the passes beside training as a multiple of its own, a backward pass as two; None where unknown."""
    total = found["training"][0].in_forwards
    beside = [cost.in_forwards for label, each in found.items() if label != "training" for cost in each]
    return None if None in beside or not total else sum(passes or 0.0 for passes in beside) / total


def seconds_per_step(output_dir: str | None, view: Forecast) -> float | None:
    """Return the seconds that a step of the training itself took in an earlier run with the same global batch."""
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
