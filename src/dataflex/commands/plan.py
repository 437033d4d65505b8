"""``dataflex plan``: checks a configuration and says what the run would do and cost, before it is run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataflex.config.args import LlamaFactoryArgs, env_enabled
from dataflex.config.data import find_sources
from dataflex.config.forecast import Forecast, forecast
from dataflex.config.load import load_mapping
from dataflex.config.mappings import as_mapping, as_yaml
from dataflex.config.schema import DynamicConfig, LedgerConfig, MethodConfig
from dataflex.config.split import Split, resolve
from dataflex.errors import DataError, UnsupportedError
from dataflex.method import Method, Orderer, Weighter
from dataflex.plan.schedule import Schedule, pilot_rows, wanted_rows
from dataflex.printable import redacted
from dataflex.record.text import duration, rows_of

Lines = list[tuple[str, str]]

_LF_KEYS = (
    "model_name_or_path adapter_name_or_path stage finetuning_type dataset dataset_dir eval_dataset val_size "
    "max_samples cutoff_len packing per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps "
    "learning_rate disable_shuffling seed output_dir resume_from_checkpoint"
).split()
"""Keys of LLaMA-Factory's that are shown, with its defaults."""


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
    if parts.dynamic is None or parts.dynamic.stock:
        recorded = " It is recorded." if parts.dynamic is not None else ""
        lines += ["", f"No method is named, so this is a stock LLaMA-Factory run.{recorded}"]
        if not parts.lf.do_train:
            return "\n".join([*lines, "Nothing is trained (do_train is not on)."])
    sources, _ = find_sources(parts.lf.train_sets, parts.lf, "dataset", base_dir)
    dynamic = parts.dynamic or DynamicConfig()
    targets, _ = find_sources(dynamic.targets, parts.lf, "targets", base_dir)
    view = forecast(dynamic, parts.lf, sources, targets)
    lines += ["", "Schedule", *rows_of(_schedule_lines(view, parts.lf))]
    cost_lines = _cost_lines(view, _seconds_per_step(parts.lf.output_dir, view))
    lines += ["", "Cost (F: forward pass of one sequence, B: backward pass)", *rows_of(cost_lines)]
    return "\n".join(lines)


def _configuration(parts: Split) -> str:
    lf = {key: getattr(parts.lf, key) for key in _LF_KEYS}
    del lf["num_train_epochs" if parts.lf.max_steps > 0 else "max_steps"]
    ours = {} if parts.dynamic is None else {"dynamic": as_mapping(parts.dynamic)}
    return as_yaml(redacted({**{key: value for key, value in lf.items() if value is not None}, **ours}))


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


_BACKWARD_IN_FORWARDS = 2.0  # a backward pass computes gradients of inputs and of weights
_MOST_RECORD_BYTES = 32 << 20  # what is quick to read
_PILOT_TARGET_PASSES = 2.0  # unit gradients of targets take a pass for the norms and one for the sum


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Forward and backward passes of single sequences over the whole run, and the text that tells them."""

    text: str
    forward: float | None = None
    """None where it is not known."""
    backward: float = 0.0

    @property
    def in_forwards(self) -> float | None:
        """All passes as forward passes."""
        return None if self.forward is None else self.forward + _BACKWARD_IN_FORWARDS * self.backward


def _passes(forward: float, backward: float, form: str = "g") -> str:
    return " + ".join(f"{count:{form}} {unit}" for count, unit in ((forward, "F"), (backward, "B")) if count)


def _cost(rows: float, each: tuple[float, float], why: str, bound: str = "") -> Cost:
    """Return the cost of so many forward and backward passes of each row."""
    forward, backward = rows * each[0], rows * each[1]
    text = f"{bound}{_passes(forward, backward, ',.0f')}{f' ({why})' if why else ''}"
    return Cost(text=text, forward=forward, backward=backward)


def costs(view: Forecast) -> dict[str, list[Cost]]:
    """Return the passes of training, of screening, and of each method, by label."""
    known = view.sequences is not None
    training = _cost(view.sequences or 0, (1, 1), "") if known else Cost(text="known after loading")
    screening = _screening(view)
    found = {"training": [training], **({} if screening is None else {"screening": [screening]})}
    for method in view.dynamic.methods:
        parts = (_pool, _once, _targets, _served, _reference)
        told = [cost for part in parts if view.steps is not None and (cost := part(method, view)) is not None]
        found[f"{method.kind} {method.name}"] = told or [Cost(text=method.cost, forward=0.0)]
    if view.dynamic.ledger is not None:
        found["ledger"] = [_ledger(view, view.dynamic.ledger)]
    return found


def _ledger(view: Forecast, ledger: LedgerConfig) -> Cost:
    """Return the passes over the ledger's targets; the split of the steps' gradients is not a pass."""
    counts, most = [view.targets.get(name) for name in ledger.targets], ledger.target_rows
    every = 1 if ledger.refresh_steps == "auto" else ledger.refresh_steps
    bound = "at most " if ledger.refresh_steps == "auto" else ""
    if view.steps is None or None in counts:
        return Cost(text=f"1 F + 1 B of each target row every {every} steps, and the split of each step's gradient")
    rows = sum(min(count or 0, most or count or 0) for count in counts)
    looks = 1 + -(-view.steps // every)
    told = f"{looks:,} looks x {rows:,} target rows x {_passes(1.0, 1.0)}, and more where much is left unexplained"
    return _cost(looks * rows, (1.0, 1.0), told, bound)


def _cost_lines(view: Forecast, step_seconds: float | None) -> Lines:
    """Return label and text of all passes, the methods' share, and the time, where a step's seconds are known."""
    found = costs(view)
    lines: Lines = [(label, "; ".join(cost.text for cost in each)) for label, each in found.items()]
    if len(found) == 1:
        return lines
    total = found["training"][0].in_forwards
    beside = [cost.in_forwards for label, each in found.items() if label != "training" for cost in each]
    extra = None if None in beside else sum(passes or 0.0 for passes in beside)
    if total and extra is not None:
        aside = "; passes over targets not counted" if any(map(_leaves_targets_out, view.dynamic.methods)) else ""
        share = f"{extra / (extra + total):.1%} of all passes, a B counted as two F{aside}"
        lines.append(("share of methods", share))
        if extra:
            lines.append(("beside training", f"{extra / total:.2g} x the passes of the training itself"))
    if step_seconds is not None and view.steps is not None:
        seconds = view.steps * step_seconds
        told = f"training {duration(seconds)}"
        if total and extra:
            told = f"{duration(seconds * (1 + extra / total))}: {told}, methods {duration(seconds * extra / total)}"
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


def _screening(view: Forecast) -> Cost | None:
    """Return the passes by which a pool is screened before the selector sees it."""
    options, pool, decisions = view.dynamic.signals, view.pool, view.num_decisions("selector")
    if options.screen_fraction >= 1.0 or not view.dynamic.narrows or view.dynamic.candidate_batches is not None:
        return None
    by_embeddings = options.screen_by == "embeddings"
    if pool is None:
        each = "1 F of each row of the pool" if by_embeddings else "1 F + 1 B of a twentieth of it"
        return Cost(text=f"{each} and interval ({options.screen_by})")
    if pool.left >= pool.drawn:
        return None
    rows, told = pool.drawn, "rows x 1 F of embeddings"
    if not by_embeddings:
        rows, told = pilot_rows(pool.drawn), "rows of a pilot x 1 F + 1 B"
    told = f"{decisions:,} intervals x {rows:,} {told}"
    aims = _target_rows(view, view.dynamic.selector.targets if view.dynamic.selector else ())
    over = 0.0 if _shares_targets(view) else 1.0 if by_embeddings else _PILOT_TARGET_PASSES
    extra = decisions * (aims or 0) * over
    if over and aims is None:
        told += "; targets not counted"
    elif extra:
        told += f"; {extra:,.0f} of the targets"
    return _cost(decisions * rows + extra, (1.0, 0.0 if by_embeddings else 1.0), told)


def _shares_targets(view: Forecast) -> bool:
    """Whether the selector compares with the very target vectors that screening has made in this decision."""
    from dataflex.signals.kinds import Embedding
    from dataflex.signals.specs import GradientSpec

    selector = view.dynamic.selector
    assert selector is not None
    params = selector.params

    def alike(spec: object, *names: str) -> bool:
        return all(getattr(params, name, None) == getattr(spec, name) for name in names)

    if view.dynamic.signals.screen_by == "embeddings":
        return selector.name == "rds_plus" and alike(Embedding(), "layer", "completion_only")
    unit_vectors = selector.name in ("less", "icons") and selector.requires.passes.targets == (2.0, 2.0)
    return unit_vectors and alike(GradientSpec(), "parameters", "last_blocks", "bf16")


def _pool(method: MethodConfig, view: Forecast) -> Cost | None:
    """Return the passes over the pool in every interval, if there are any."""
    each = method.requires.passes.over_pool(len(method.targets))
    budget = view.dynamic.signals.budget
    if not any(each):
        return None
    if budget is not None and method.kind == "selector":
        passes = None if view.sequences is None else budget * view.sequences
        told = f"at most {budget:g} x the passes of the training (dynamic.signals.budget)"
        if passes is not None:
            told += f": F + B of about {passes:,.0f} rows, of targets first, then of pilots, less what sketches cost"
        return Cost(text=told, forward=passes, backward=passes or 0.0)
    if view.rows is None:
        return Cost(text=f"{_passes(*each)} per row of the pool and interval ({method.cost})")
    pool, decisions = view.pool, view.num_decisions(method.kind)
    size = view.rows if pool is None else pool.left
    rows, told = decisions * size, f"{decisions:,} intervals x {size:,} rows"
    if pool is not None and view.dynamic.candidate_batches is not None:
        batches = view.dynamic.candidate_batches * view.batch.global_batch
        assert view.schedule is not None
        decided = view.schedule.of(method.kind).decided()
        rows = sum(min(view.rows, batches * interval.steps) for interval in decided)
        told = told if rows == decisions * size else f"{rows:,} candidates in {decisions:,} intervals"
    bound = "at most " if view.dynamic.exclude_seen or method.kind == "orderer" else ""
    if method.kind == "orderer" and pool is not None:
        first = view.first_decision("selector")
        size = min(size, 0 if first is None else first.steps * view.batch.global_batch)
        rows, told = decisions * size, f"{decisions:,} intervals x {size:,} rows"
    return _cost(rows, each, f"{told} x {_passes(*each)}; {method.cost}", bound)


def _once(method: MethodConfig, view: Forecast) -> Cost | None:
    """Return the passes of models that stay as they are over every row that is ever in the pool."""
    each, pool = method.requires.passes.pool_once, view.pool
    if not each:
        return None
    if pool is None:
        return Cost(text=f"{each:g} F of another model of each row of the pool, once")
    decisions = view.num_decisions(method.kind)
    bound, rows = "", float(min(pool.rows, decisions * pool.left))
    if pool.left < pool.drawn or view.dynamic.exclude_seen:
        bound = "at most "
    elif pool.drawn < pool.rows and view.dynamic.candidate_batches is None:
        bound, rows = "about ", round(pool.rows * (1 - (1 - pool.drawn / pool.rows) ** decisions))
    return Cost(text=f"{bound}{rows * each:,.0f} F of another model, once for each row", forward=rows * each)


def _targets(method: MethodConfig, view: Forecast) -> Cost | None:
    """Return the passes over the method's targets in every decision, if they are known."""
    each, rows = method.requires.passes.targets, _target_rows(view, method.targets)
    if not rows or not any(each) or (view.dynamic.signals.budget is not None and method.kind == "selector"):
        return None
    decisions = view.num_decisions(method.kind)
    told = f"{decisions:,} intervals x {rows:,} target rows x {_passes(*each)}"
    return _cost(decisions * rows, each, told)


def _leaves_targets_out(method: MethodConfig) -> bool:
    needs = method.requires
    asks = not needs.ledger and needs.signals != frozenset({"texts"})
    return bool(method.targets) and needs.passes.targets == (0.0, 0.0) and asks


def _target_rows(view: Forecast, names: Iterable[str]) -> int | None:
    counts = [view.targets.get(name) for name in names]
    return None if None in counts else sum(count or 0 for count in counts)


def _served(method: MethodConfig, view: Forecast) -> Cost | None:
    """Return the passes over the rows trained on beside those of the training itself, if there are any."""
    each = method.requires.passes.served
    if not any(each):
        return None
    rows = _acting(method.build(), view)
    return _cost(rows, each, f"{rows:,} rows x {_passes(*each)}; {method.cost}")


def _reference(method: MethodConfig, view: Forecast) -> Cost | None:
    """Return the passes of a reference model over the rows trained on, each once if they are kept."""
    reference, built = method.requires.reference, method.build()
    if reference is None:
        return None
    if reference.cached and view.rows is None:
        return Cost(text=method.cost)
    rows, bound = _acting(built, view), ""
    if not reference.cached:
        return Cost(text=f"{rows:,} F of the reference, in every step", forward=rows)
    kept = "kept on disk"
    if view.serves_all_again:
        assert view.rows is not None
        rows, kept = view.rows, "over the whole pool, kept on disk"
    else:
        rows, bound = _distinct(built, view, rows)
    return Cost(text=f"{bound}{rows:,} F of the reference, {kept}", forward=rows)


def _distinct(method: Method, view: Forecast, served: int) -> tuple[int, str]:
    """Return the number of different rows served while a method acts, and how sure that is."""
    assert view.rows is not None
    assert view.steps is not None
    dynamic, most = view.dynamic, min(view.rows, served)
    if not dynamic.full_steps:  # less than an epoch, or ``serves_all_again``
        return most, ""
    begins_late = isinstance(method, Weighter) and method.warmup(view.steps) > 0
    known = not dynamic.narrows and view.domains is not None and dynamic.unit == "sequences" and not begins_late
    if not known or dynamic.mixer is None or dynamic.mixer.requires.needs_interval:
        return most, "at most "
    assert view.domains is not None
    try:
        each = view.served()
    except UnsupportedError:
        return most, "at most "
    rows = int(np.rint(np.minimum(each, view.domains.num_rows).sum()))
    return rows, "" if np.allclose(each, np.rint(each)) else "about "


def _acting(method: Method, view: Forecast) -> int:
    """Return the number of sequences that are trained on while a method acts."""
    assert view.steps is not None
    assert view.sequences is not None
    if not isinstance(method, Weighter):
        return view.sequences
    return max(view.sequences - min(method.warmup(view.steps), view.steps) * view.batch.global_batch, 0)
