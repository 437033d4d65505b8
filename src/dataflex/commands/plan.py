"""``dataflex plan``: checks a configuration and says what the run would do and cost, before it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.costs import costs, passes_by_label
from dataflex.config.data import find_sources, target_data_sets
from dataflex.config.forecast import Forecast, forecast
from dataflex.config.load import load_mapping
from dataflex.config.mappings import as_mapping, as_yaml
from dataflex.config.memory import memory
from dataflex.config.schema import DynamicConfig
from dataflex.config.split import Split, resolve
from dataflex.preview import Lines, beside, foretold, seconds_per_step
from dataflex.printable import Answer, redacted
from dataflex.record.text import rows_of

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
    named = [*dict.fromkeys(target_data_sets(*dynamic.targets))]
    targets, _ = find_sources(named, parts.lf, "targets", base_dir)
    view = forecast(dynamic, parts.lf, sources, targets)
    size = _size(view, parts.lf, tokens_per_second)
    step_seconds = seconds_per_step(parts.lf.output_dir, view)
    values = {**values, "trains": True, **_values(view, step_seconds), **size}
    lines += ["", foretold(view, parts.lf, step_seconds), "", "Size (docs/scale.md says how it is estimated)"]
    return Answer("\n".join([*lines, *rows_of(_size_lines(size))]), values)


def _size(view: Forecast, lf: LlamaFactoryArgs, tokens_per_second: float | None) -> dict[str, Any]:
    """Return tokens, bytes of a rank, and hours; null for what is not known."""
    tokens = None if view.sequences is None else view.sequences * lf.cutoff_len
    hours = None
    if tokens is not None and tokens_per_second is not None:
        training, ratio = tokens / tokens_per_second / 3600, beside(costs(view))
        hours = {"training": training, "methods": None if ratio is None else training * ratio}
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
