"""``dataflex plan``: validates a configuration and says what the run would do and cost, before it is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataflex.commands.costs import cost_lines, seconds_per_step
from dataflex.commands.layout import rows_of
from dataflex.commands.outlook import schedule_lines
from dataflex.config.data import data_sets, find_sources
from dataflex.config.forecast import forecast
from dataflex.config.load import load_mapping
from dataflex.config.schema import DynamicConfig
from dataflex.config.show import as_mapping, as_yaml
from dataflex.config.split import Split, resolve
from dataflex.config.values import number, truthy
from dataflex.core.redact import redacted

__all__ = ["plan"]

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
        if not truthy(parts.lf, "do_train"):
            return "\n".join([*lines, "Nothing is trained (do_train is not on)."])
    sources, _ = find_sources(data_sets(parts.lf.get("dataset")), parts.lf, "dataset", base_dir)
    dynamic = parts.dynamic or DynamicConfig()
    targets, _ = find_sources(dynamic.targets, parts.lf, "targets", base_dir)
    view = forecast(dynamic, parts.lf, sources, targets)
    step_seconds = seconds_per_step(parts.lf.get("output_dir"), view)
    lines += ["", "Schedule", *rows_of(schedule_lines(view, parts.lf))]
    lines += ["", "Cost (F: forward pass of one sequence, B: backward pass)", *rows_of(cost_lines(view, step_seconds))]
    return "\n".join(lines)


def _configuration(parts: Split) -> str:
    lf = {key: parts.lf.get(key, default) for key, default in _LF_DEFAULTS.items()}
    shown_keys = {key: value for key, value in lf.items() if value is not None}
    if number(parts.lf, "max_steps", -1) > 0:
        del shown_keys["num_train_epochs"]
    else:
        del shown_keys["max_steps"]
    ours = {} if parts.dynamic is None else {"dynamic": as_mapping(parts.dynamic)}
    return as_yaml(redacted({**shown_keys, **ours}))
