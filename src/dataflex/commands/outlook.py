"""What a run serves when, in words and numbers, for ``dataflex plan``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from dataflex.config.forecast import Forecast
from dataflex.config.values import env_enabled, number
from dataflex.errors import UnsupportedError
from dataflex.plan.schedule import wanted_rows

__all__ = ["Lines", "schedule_lines"]

_DEFAULT_EPOCHS = 3.0

Lines = list[tuple[str, str]]


def schedule_lines(view: Forecast, lf: Mapping[str, Any]) -> Lines:
    """Return label and text of what is served when."""
    batch = view.batch
    processes = f"{batch.world} process" if batch.world == 1 else f"{batch.world} processes"
    if env_enabled("FORCE_TORCHRUN") and "NPROC_PER_NODE" not in os.environ:
        processes += ", as NPROC_PER_NODE is not set"
    parts = f"{batch.per_device} per device x {batch.accumulation} accumulated x {processes}"
    lines = [
        ("global batch", f"{batch.size:,} sequences ({parts})"),
        ("rows", _rows(view, lf)),
        ("steps", _steps(view, lf)),
    ]
    if not view.dynamic.methods or view.schedule is None:
        return lines
    return lines + _interval_lines(view) + _pool_lines(view) + _epoch_lines(view)


def _rows(view: Forecast, lf: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{name} {'?' if count is None else f'{count:,}'}" for name, count in view.counts.items())
    if view.packs:
        return f"known after packing (samples: {listed})"
    if view.rows is None:
        return f"known after loading ({listed})"
    held = f"; val_size sets {sum(c or 0 for c in view.counts.values()) - view.rows:,} aside" if _holds(lf) else ""
    return f"{view.rows:,} ({listed}{held})"


def _holds(lf: Mapping[str, Any]) -> bool:
    return number(lf, "val_size", 0.0) > 1e-6


def _steps(view: Forecast, lf: Mapping[str, Any]) -> str:
    epochs = number(lf, "num_train_epochs", _DEFAULT_EPOCHS)
    if view.steps is None:
        return f"known after loading ({epochs:g} epochs)"
    if number(lf, "max_steps", -1) > 0:
        return f"{view.steps:,} (max_steps)"
    return f"{view.steps:,} ({epochs:g} epochs over {view.rows:,} rows)"


def _interval_lines(view: Forecast) -> Lines:
    dynamic, size, first = view.dynamic, view.batch.size, view.first_decision
    lines: Lines = []
    if dynamic.warmup_steps:
        what = "rows drawn uniformly" if dynamic.mixer is None else "at the mixer's proportions of step 0"
        if dynamic.initial_proportions is not None:
            what = "at initial_proportions"
        lines.append(("warm-up", f"{dynamic.warmup_steps:,} steps, {what}"))
    if dynamic.cycle_steps is not None:
        lines.append(("cycle", f"warm-up and intervals start again every {dynamic.cycle_steps:,} steps"))
    if first is None:
        return [*lines, ("intervals", "none: the run ends with the warm-up, and no method ever decides")]
    if dynamic.interval_steps is None:
        if dynamic.selector is not None or dynamic.mixer is not None:
            lines.append(("intervals", "interval_steps is not set: decided alike throughout"))
        return lines
    assert view.steps is not None
    rest = ((dynamic.cycle_steps or view.steps) - dynamic.warmup_steps) % first.steps
    last = f"; the last{' of a cycle' if dynamic.cycle_steps else ''} has {rest:,} steps" if rest else ""
    told = f"{view.num_decisions:,} of {first.steps:,} steps, {first.steps * size:,} sequences each{last}"
    return [*lines, ("intervals", told)]


def _pool_lines(view: Forecast) -> Lines:
    """Return what the selector is given and keeps in an interval, and how often that is served."""
    dynamic, options, first, pool = view.dynamic, view.dynamic.signals, view.first_decision, view.pool
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
    sequences = first.steps * view.batch.size
    wanted = wanted_rows(first, view.batch.size, pool.left, dynamic.keep_ratio, dynamic.mixer is not None)
    kept = min(wanted, pool.left)
    of = f" (keep_ratio {dynamic.keep_ratio:g})" if dynamic.keep_ratio is not None else ""
    told = f"at most {kept:,} of {pool.left:,} rows{of} for {sequences:,} sequences of an interval"
    if dynamic.mixer is None and kept < sequences:
        told += f": each {sequences / kept:.3g} times"
    lines.append(("kept", told))
    if dynamic.mixer is None and not dynamic.exclude_seen and view.num_decisions > 1 and kept:
        steps = sum(each.steps for each in view.decided())
        again = steps * view.batch.size / kept
        lines.append(("repeats", f"{again:.3g} times a row over the run if every decision kept the same rows"))
    return lines


def _epoch_lines(view: Forecast) -> Lines:
    """Return how often each domain is seen, where the mixture is known before training."""
    assert view.steps is not None
    dynamic, label = view.dynamic, "epochs per domain"
    if dynamic.mixer is None:
        if view.rows is None:
            return []
        narrowed = ", but the selector decides which rows" if dynamic.selector is not None else ""
        return [("epochs", f"{view.steps * view.batch.size / view.rows:.3g} over all rows on average{narrowed}")]
    if view.domains is None:
        return [(label, "known after loading")]
    if dynamic.unit == "tokens":
        return [(label, "known after tokenizing (proportions are of tokens)")]
    try:
        served = view.served()
    except UnsupportedError as error:
        return [(label, f"known during training ({dynamic.mixer.name}: {error})")]
    lines: Lines = []
    wanted = view.steps * view.batch.size
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
