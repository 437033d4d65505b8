"""The schedule and the cost of a run in words and numbers, for ``dataflex plan``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from dataflex.config.forecast import Forecast
from dataflex.config.schema import MethodConfig
from dataflex.config.values import env_enabled, number
from dataflex.core.protocols import Method, Weighter
from dataflex.errors import UnsupportedError

__all__ = ["cost_lines", "schedule_lines"]

_BACKWARD_IN_FORWARDS = 2.0  # a backward pass computes gradients of inputs and of weights
_DEFAULT_EPOCHS = 3.0

Lines = list[tuple[str, str]]
Cost = tuple[str, float | None]


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
    return lines + _interval_lines(view) + _epoch_lines(view)


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
        return [(label, "known after tokenising (proportions are of tokens)")]
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


def cost_lines(view: Forecast) -> Lines:
    """Return label and text of the passes that training and each method take, and the methods' share."""
    if view.steps is None:
        training, total = "known after loading", None
    else:
        sequences = view.steps * view.batch.size
        training, total = f"{sequences:,} F + {sequences:,} B", _in_forwards(sequences, sequences)
    lines: Lines = [("training", training)]
    if not view.dynamic.methods:
        return lines
    extra: float | None = 0.0
    for method in view.dynamic.methods:
        text, passes = _method_cost(method, view)
        lines.append((f"{method.kind} {method.name}", text))
        extra = None if extra is None or passes is None else extra + passes
    if total and extra is not None:
        aside = "; passes over targets not counted" if view.dynamic.targets else ""
        share = f"{extra / (extra + total):.1%} of all passes, a B counted as two F{aside}"
        lines.append(("share of methods", share))
    return lines


def _method_cost(method: MethodConfig, view: Forecast) -> Cost:
    """Return the text, and the passes counted in forward passes (None where not known)."""
    found = [cost for each in (_pool_cost, _served_cost, _reference_cost) if (cost := each(method, view)) is not None]
    passes = [cost for _, cost in found if cost is not None]
    text = "; ".join(text for text, _ in found) or method.cls.card.cost
    return text, sum(passes) if len(passes) == len(found) else None


def _pool_cost(method: MethodConfig, view: Forecast) -> Cost | None:
    """Return the passes over the pool in every interval, if there are any."""
    card = method.cls.card
    forward, backward = card.forward_per_pool_row, card.backward_per_pool_row
    if not forward and not backward:
        return None
    if view.rows is None or view.schedule is None:
        return f"{_passes(1, forward, backward)} per row of the pool and interval ({card.cost})", None
    pool = view.rows
    if method.kind == "selector" and view.dynamic.candidate_batches is not None and view.first_decision is not None:
        pool = min(pool, view.dynamic.candidate_batches * view.first_decision.steps * view.batch.size)
    rows = f"{view.num_decisions:,} intervals x {pool:,} rows"
    return _counted(view.num_decisions * pool, rows, forward, backward, card.cost)


def _served_cost(method: MethodConfig, view: Forecast) -> Cost | None:
    """Return the passes over the rows trained on beside those of the training itself, if there are any."""
    card = method.cls.card
    forward, backward = card.forward_per_served_row, card.backward_per_served_row
    if not forward and not backward:
        return None
    if view.steps is None:
        return f"{_passes(1, forward, backward)} per row trained on ({card.cost})", None
    rows = _acting_steps(method.build(), view.steps) * view.batch.size
    return _counted(rows, f"{rows:,} rows", forward, backward, card.cost)


def _reference_cost(method: MethodConfig, view: Forecast) -> Cost | None:
    """Return the passes of a reference model over all rows, kept, or over the rows trained on; its F counts as one."""
    built = method.build()
    if built.reference is None:
        return None
    cached = built.reference_cached
    served = None if view.steps is None else _acting_steps(built, view.steps) * view.batch.size
    rows = view.rows if cached else served
    if rows is None:
        return method.cls.card.cost, None
    if not cached:
        return f"{rows:,} F of the reference, in every step", float(rows)
    cheaper = served is not None and served < rows
    hint = f"; reference_cache: false takes {served:,} and keeps none" if cheaper else ""
    return f"{rows:,} F of the reference, kept on disk{hint}", float(rows)


def _acting_steps(method: Method, steps: int) -> int:
    """Return the optimizer steps in which a method acts."""
    return max(steps - method.burn_in(steps), 0) if isinstance(method, Weighter) else steps


def _counted(rows: int, told: str, forward: float, backward: float, cost: str) -> Cost:
    """Return the passes over ``rows``, told as ``told``, of which each takes ``forward`` F and ``backward`` B."""
    text = f"{_passes(rows, forward, backward)} ({told} x {_passes(1, forward, backward)}; {cost})"
    return text, _in_forwards(rows * forward, rows * backward)


def _passes(rows: int, forward: float, backward: float) -> str:
    number = "{:g}" if rows == 1 else "{:,.0f}"
    return " + ".join(f"{number.format(rows * n)} {unit}" for n, unit in ((forward, "F"), (backward, "B")) if n)


def _in_forwards(forward: float, backward: float) -> float:
    return forward + _BACKWARD_IN_FORWARDS * backward
