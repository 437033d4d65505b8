"""``dataflex plan``: validates a configuration and says what the run would do and cost, before it is run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.config.args import LlamaFactoryArgs, env_enabled
from dataflex.config.data import find_sources
from dataflex.config.forecast import Forecast, forecast
from dataflex.config.load import load_mapping
from dataflex.config.mappings import as_mapping, as_yaml
from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.config.split import Split, resolve
from dataflex.errors import DataError, UnsupportedError
from dataflex.method import Method, Weighter
from dataflex.plan.schedule import pilot_rows, wanted_rows
from dataflex.printable import redacted
from dataflex.record.text import rows_of

Lines = list[tuple[str, str]]


def schedule_lines(view: Forecast, lf: LlamaFactoryArgs) -> Lines:
    """Return label and text of what is served when."""
    batch = view.batch
    processes = f"{batch.world} process" if batch.world == 1 else f"{batch.world} processes"
    if env_enabled("FORCE_TORCHRUN") and "NPROC_PER_NODE" not in os.environ:
        processes += ", as NPROC_PER_NODE is not set"
    parts = f"{batch.micro_batch_size} per device x {batch.accumulation} accumulated x {processes}"
    lines = [
        ("global batch", f"{batch.global_batch:,} sequences ({parts})"),
        ("rows", _rows(view, lf)),
        ("steps", _steps(view, lf)),
    ]
    if not view.dynamic.methods or view.schedule is None:
        return lines
    return lines + _interval_lines(view) + _pool_lines(view) + _epoch_lines(view)


def _rows(view: Forecast, lf: LlamaFactoryArgs) -> str:
    listed = ", ".join(f"{name} {'?' if count is None else f'{count:,}'}" for name, count in view.counts.items())
    if view.packs:
        return f"known after packing (samples: {listed})"
    if view.rows is None:
        return f"known after loading ({listed})"
    held = f"; val_size sets {sum(c or 0 for c in view.counts.values()) - view.rows:,} aside" if _holds(lf) else ""
    return f"{view.rows:,} ({listed}{held})"


def _holds(lf: LlamaFactoryArgs) -> bool:
    return lf.val_size > 1e-6


def _steps(view: Forecast, lf: LlamaFactoryArgs) -> str:
    epochs = lf.num_train_epochs
    if view.steps is None:
        return f"known after loading ({epochs:g} epochs)"
    if lf.max_steps > 0:
        return f"{view.steps:,} (max_steps)"
    return f"{view.steps:,} ({epochs:g} epochs over {view.rows:,} rows)"


def _interval_lines(view: Forecast) -> Lines:
    dynamic, size, first = view.dynamic, view.batch.global_batch, view.first_decision
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
    sequences = first.steps * view.batch.global_batch
    wanted = wanted_rows(first, view.batch.global_batch, pool.left, dynamic.keep_ratio, dynamic.mixer is not None)
    kept = min(wanted, pool.left)
    of = f" (keep_ratio {dynamic.keep_ratio:g})" if dynamic.keep_ratio is not None else ""
    told = f"at most {kept:,} of {pool.left:,} rows{of} for {sequences:,} sequences of an interval"
    if dynamic.mixer is None and kept < sequences:
        told += f": each {sequences / kept:.3g} times"
    lines.append(("kept", told))
    if dynamic.mixer is None and not dynamic.exclude_seen and view.num_decisions > 1 and kept:
        steps = sum(each.steps for each in view.decided())
        again = steps * view.batch.global_batch / kept
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
        epochs = view.steps * view.batch.global_batch / view.rows
        return [("epochs", f"{epochs:.3g} over all rows on average{narrowed}")]
    if view.domains is None:
        return [(label, "known after loading")]
    if dynamic.unit == "tokens":
        return [(label, "known after tokenizing (proportions are of tokens)")]
    try:
        served = view.served()
    except UnsupportedError as error:
        return [(label, f"known during training ({dynamic.mixer.name}: {error})")]
    lines: Lines = []
    wanted = view.steps * view.batch.global_batch
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


_BACKWARD_IN_FORWARDS = 2.0  # a backward pass computes gradients of inputs and of weights
_MOST_RECORD_BYTES = 32 << 20  # what is quick to read
_PILOT_TARGET_PASSES = 2.0  # unit gradients of targets take a pass for the norms and one for the sum


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Passes of one kind, over the whole run.

    Attributes:
        text: What is printed.
        forward: Forward passes of single sequences, of whatever model; None where not known.
        backward: Backward passes.
    """

    text: str
    forward: float | None
    backward: float = 0.0

    @property
    def in_forwards(self) -> float | None:
        """All passes as forward passes."""
        return None if self.forward is None else self.forward + _BACKWARD_IN_FORWARDS * self.backward


def costs(view: Forecast) -> dict[str, list[Cost]]:
    """Return the passes of training, of screening, and of each method, by label."""
    if view.sequences is None:
        found = {"training": [Cost(text="known after loading", forward=None)]}
    else:
        sequences = view.sequences
        training = Cost(text=f"{sequences:,} F + {sequences:,} B", forward=sequences, backward=sequences)
        found = {"training": [training]}
    screening = _screening(view)
    if screening is not None:
        found["screening"] = [screening]
    for method in view.dynamic.methods:
        parts = (_pool, _once, _targets, _served, _reference)
        told = [cost for part in parts if (cost := part(method, view)) is not None]
        found[f"{method.kind} {method.name}"] = told or [Cost(text=method.cost, forward=0.0)]
    return found


def cost_lines(view: Forecast, step_seconds: float | None = None) -> Lines:
    """Return label and text of all passes, the methods' share, and what that is in time.

    Args:
        view: The run.
        step_seconds: Seconds of one optimizer step of the training itself, where they are known.
    """
    found = costs(view)
    lines: Lines = [(label, "; ".join(cost.text for cost in each)) for label, each in found.items()]
    if not view.dynamic.methods:
        return lines
    total = _added(found["training"])
    extra = _added(cost for label, each in found.items() if label != "training" for cost in each)
    aside = "; passes over targets not counted" if any(map(_leaves_targets_out, view.dynamic.methods)) else ""
    if total and extra is not None:
        share = f"{extra / (extra + total):.1%} of all passes, a B counted as two F{aside}"
        lines.append(("share of methods", share))
        if extra:
            lines.append(("beside training", f"{extra / total:.2g} x the passes of the training itself"))
    if step_seconds is not None and view.steps is not None:
        seconds = view.steps * step_seconds
        told = f"training {_duration(seconds)}"
        if total and extra:
            told = f"{_duration(seconds * (1 + extra / total))}: {told}, methods {_duration(seconds * extra / total)}"
        lines.append(("time", f"about {told} ({step_seconds:.3g} s a step in the record of the run before)"))
    return lines


def seconds_per_step(output_dir: str | None, view: Forecast) -> float | None:
    """Return the seconds that a step of the training itself took in an earlier run with the same global batch."""
    from dataflex.record.digest import digest
    from dataflex.record.read import EVENTS, read_events, record_dir

    if not output_dir or not Path(output_dir).is_dir():
        return None
    try:
        if (record_dir(output_dir) / EVENTS).stat().st_size > _MOST_RECORD_BYTES:
            return None
        run = digest(read_events(output_dir))
        if run.started.get("global_batch") != view.batch.global_batch or run.started.get("world") != view.batch.world:
            return None
        spent = ((run.finished or {}).get("seconds") or {}).get("train") or run.phase_seconds().get("training", 0.0)
        return float(spent) / run.steps_done if run.steps_done and spent else None
    except (DataError, OSError, KeyError, TypeError, ValueError):
        return None  # a record that cannot be read is for 'dataflex report' to complain about


def _screening(view: Forecast) -> Cost | None:
    """Return the passes by which a pool is screened before the selector sees it."""
    options, pool = view.dynamic.signals, view.pool
    if options.screen_fraction >= 1.0 or not view.dynamic.narrows or view.dynamic.candidate_batches is not None:
        return None
    if pool is None or view.steps is None:
        each = "1 F of each row of the pool" if options.screen_by == "embeddings" else "1 F + 1 B of a twentieth of it"
        return Cost(text=f"{each} and interval ({options.screen_by})", forward=None)
    if pool.left >= pool.drawn:
        return None
    decisions = view.num_decisions
    aims = _target_rows(view, view.dynamic.selector.targets if view.dynamic.selector else ())
    if options.screen_by == "embeddings":
        told = f"{decisions:,} intervals x {pool.drawn:,} rows x 1 F of embeddings"
        rows, backward, over = decisions * pool.drawn, 0.0, 0.0 if _shares_embeddings(view) else 1.0
    else:
        rows = decisions * pilot_rows(pool.drawn)
        told = f"{decisions:,} intervals x {pilot_rows(pool.drawn):,} rows of a pilot x 1 F + 1 B"
        backward, over = 1.0, 0.0 if _shares_gradients(view) else _PILOT_TARGET_PASSES
    if aims is None and over:
        return Cost(
            text=f"{_passes(rows, 1.0, backward)} ({told}; targets not counted)", forward=rows, backward=rows * backward
        )
    extra = decisions * (aims or 0) * over
    forward, back = rows + extra, rows * backward + extra * backward
    told += f"; {extra:,.0f} of the targets" if extra else ""
    return Cost(text=f"{_told(forward, back)} ({told})", forward=forward, backward=back)


def _shares_embeddings(view: Forecast) -> bool:
    """Whether the selector compares with the very target embeddings that screening has made in this decision."""
    from dataflex.signals.kinds import Embedding

    selector, spec = view.dynamic.selector, Embedding()
    assert selector is not None
    alike = all(getattr(selector.params, name, None) == getattr(spec, name) for name in ("layer", "completion_only"))
    return selector.name == "rds_plus" and alike


def _shares_gradients(view: Forecast) -> bool:
    """Whether the selector compares with the very target gradients that the pilot has made in this decision."""
    from dataflex.signals.kinds import GradientSpec

    selector = view.dynamic.selector
    assert selector is not None
    params, spec = selector.params, GradientSpec()
    alike = all(getattr(params, name, None) == getattr(spec, name) for name in ("parameters", "last_blocks", "bf16"))
    return selector.name in ("less", "icons") and alike and selector.requires.passes.targets == (2.0, 2.0)


def _pool(method: MethodConfig, view: Forecast) -> Cost | None:
    """Return the passes over the pool in every interval, if there are any."""
    forward, backward = method.requires.passes.over_pool(len(method.targets))
    if not forward and not backward:
        return None
    if view.rows is None or view.schedule is None:
        return Cost(
            text=f"{_passes(1, forward, backward)} per row of the pool and interval ({method.cost})", forward=None
        )
    pool, decisions = view.pool, view.num_decisions
    each = view.rows if pool is None else pool.left
    rows, told = decisions * each, f"{decisions:,} intervals x {each:,} rows"
    if pool is not None and view.dynamic.candidate_batches is not None:
        batches = view.dynamic.candidate_batches * view.batch.global_batch
        rows = sum(min(view.rows, batches * interval.steps) for interval in view.decided())
        told = told if rows == decisions * each else f"{rows:,} candidates in {decisions:,} intervals"
    most = "at most " if view.dynamic.exclude_seen else ""
    text = f"{most}{_passes(rows, forward, backward)} ({told} x {_passes(1, forward, backward)}; {method.cost})"
    return Cost(text=text, forward=rows * forward, backward=rows * backward)


def _once(method: MethodConfig, view: Forecast) -> Cost | None:
    """Return the passes of models that stay as they are over every row that is ever in the pool."""
    each, pool = method.requires.passes.pool_once, view.pool
    if not each:
        return None
    if pool is None or view.steps is None:
        return Cost(text=f"{each:g} F of another model of each row of the pool, once", forward=None)
    decisions, all_rows = view.num_decisions, min(pool.rows, view.num_decisions * pool.left)
    bound, rows = "", float(all_rows)
    if pool.left < pool.drawn or view.dynamic.exclude_seen:
        bound = "at most "
    elif pool.drawn < pool.rows and view.dynamic.candidate_batches is None:
        bound, rows = "about ", round(pool.rows * (1 - (1 - pool.drawn / pool.rows) ** decisions))
    return Cost(text=f"{bound}{rows * each:,.0f} F of another model, once for each row", forward=rows * each)


def _targets(method: MethodConfig, view: Forecast) -> Cost | None:
    """Return the passes over the method's targets in every decision, if they are known."""
    forward, backward = method.requires.passes.targets
    rows = _target_rows(view, method.targets)
    if rows is None or view.steps is None or not (forward or backward) or not rows:
        return None
    over, each = f"{view.num_decisions:,} intervals x {rows:,} target rows", _passes(1, forward, backward)
    total = view.num_decisions * rows
    text = f"{_passes(total, forward, backward)} ({over} x {each})"
    return Cost(text=text, forward=total * forward, backward=total * backward)


def _leaves_targets_out(method: MethodConfig) -> bool:
    return bool(method.targets) and method.requires.passes.targets == (0.0, 0.0) and method.requires.signals != _TEXTS


_TEXTS = frozenset({"texts"})


def _target_rows(view: Forecast, names: Iterable[str]) -> int | None:
    counts = [view.targets.get(name) for name in names]
    return None if any(count is None for count in counts) else sum(count or 0 for count in counts)


def _served(method: MethodConfig, view: Forecast) -> Cost | None:
    """Return the passes over the rows trained on beside those of the training itself, if there are any."""
    forward, backward = method.requires.passes.served
    if not forward and not backward:
        return None
    if view.steps is None:
        return Cost(text=f"{_passes(1, forward, backward)} per row trained on ({method.cost})", forward=None)
    rows = _acting(method.build(), view)
    text = f"{_passes(rows, forward, backward)} ({rows:,} rows x {_passes(1, forward, backward)}; {method.cost})"
    return Cost(text=text, forward=rows * forward, backward=rows * backward)


def _reference(method: MethodConfig, view: Forecast) -> Cost | None:
    """Return the passes of a reference model over the rows trained on, each once if they are kept."""
    reference, built = method.requires.reference, method.build()
    if reference is None:
        return None
    if view.steps is None or (reference.cached and view.rows is None):
        return Cost(text=method.cost, forward=None)
    served = _acting(built, view)
    if not reference.cached:
        return Cost(text=f"{served:,} F of the reference, in every step", forward=served)
    assert view.rows is not None
    if view.serves_all_again:
        return Cost(text=f"{view.rows:,} F of the reference, over the whole pool, kept on disk", forward=view.rows)
    rows, bound = _distinct(built, view, served)
    return Cost(text=f"{bound}{rows:,} F of the reference, kept on disk", forward=rows)


def _distinct(method: Method, view: Forecast, served: int) -> tuple[int, str]:
    """Return how many different rows are served while a method acts, and how sure that is."""
    assert view.rows is not None
    assert view.steps is not None
    dynamic, most = view.dynamic, min(view.rows, served)
    if view.dynamic.narrows:
        return most, "at most "
    if dynamic.mixer is None:  # less than an epoch, or ``serves_all_again``
        return most, ""
    begins_late = isinstance(method, Weighter) and method.burn_in(view.steps) > 0
    if view.domains is None or dynamic.mixer.requires.needs_interval or dynamic.unit != "sequences" or begins_late:
        return most, "at most "
    try:
        each = view.served()
    except UnsupportedError:
        return most, "at most "
    rows = int(np.rint(np.minimum(each, view.domains.num_rows).sum()))
    return rows, "" if np.allclose(each, np.rint(each)) else "about "


def _acting(method: Method, view: Forecast) -> int:
    """Return the sequences that are trained on while a method acts."""
    assert view.steps is not None
    assert view.sequences is not None
    if not isinstance(method, Weighter):
        return view.sequences
    return max(view.sequences - min(method.burn_in(view.steps), view.steps) * view.batch.global_batch, 0)


def _added(found: Iterable[Cost]) -> float | None:
    each = [cost.in_forwards for cost in found]
    return None if any(passes is None for passes in each) else sum(passes or 0.0 for passes in each)


def _passes(rows: float, forward: float, backward: float) -> str:
    number = "{:g}" if rows == 1 else "{:,.0f}"
    return " + ".join(f"{number.format(rows * n)} {unit}" for n, unit in ((forward, "F"), (backward, "B")) if n)


def _told(forward: float, backward: float) -> str:
    return " + ".join(f"{n:,.0f} {unit}" for n, unit in ((forward, "F"), (backward, "B")) if n)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    hours, rest = divmod(round(minutes), 60)
    return f"{hours} h {rest} min" if hours else f"{rest} min"


_LF_DEFAULTS: dict[str, Any] = {
    "model_name_or_path": None,
    "adapter_name_or_path": None,
    "stage": "sft",
    "finetuning_type": "lora",
    "dataset": None,
    "dataset_dir": "data",
    "eval_dataset": None,
    "val_size": 0.0,
    "max_samples": None,
    "cutoff_len": 2048,
    "packing": None,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "learning_rate": 5e-5,
    "disable_shuffling": False,
    "seed": 42,
    "output_dir": None,
    "resume_from_checkpoint": None,
}


def plan(config: Path, overrides: Sequence[str] = ()) -> str:
    """Return the resolved configuration, the schedule and the cost of a run.

    Args:
        config: A YAML or JSON file.
        overrides: ``key=value`` texts.

    Raises:
        ConfigError: All problems of the configuration.
    """
    base_dir = config.absolute().parent
    parts = resolve(load_mapping(config, overrides), base_dir, check_stock=True)
    lines = [f"note: {note}" for note in parts.notes]
    lines += ["", "Configuration"] if lines else ["Configuration"]
    lines += [f"  {line}" for line in _configuration(parts).splitlines()]
    if parts.dynamic is None:
        lines += ["", "No method is named, so this is a stock LLaMA-Factory run."]
        if not parts.lf.do_train:
            return "\n".join([*lines, "Nothing is trained (do_train is not on)."])
    sources, _ = find_sources(parts.lf.train_sets, parts.lf, "dataset", base_dir)
    dynamic = parts.dynamic or DynamicConfig()
    targets, _ = find_sources(dynamic.targets, parts.lf, "targets", base_dir)
    view = forecast(dynamic, parts.lf, sources, targets)
    step_seconds = seconds_per_step(parts.lf.output_dir, view)
    lines += ["", "Schedule", *rows_of(schedule_lines(view, parts.lf))]
    lines += ["", "Cost (F: forward pass of one sequence, B: backward pass)", *rows_of(cost_lines(view, step_seconds))]
    return "\n".join(lines)


def _configuration(parts: Split) -> str:
    lf = {key: parts.lf.get(key, default) for key, default in _LF_DEFAULTS.items()}
    shown_keys = {key: value for key, value in lf.items() if value is not None}
    if parts.lf.max_steps > 0:
        del shown_keys["num_train_epochs"]
    else:
        del shown_keys["max_steps"]
    ours = {} if parts.dynamic is None else {"dynamic": as_mapping(parts.dynamic)}
    return as_yaml(redacted({**shown_keys, **ours}))
