"""What a request for scores leaves out of a training configuration, and what can be found wrong with it early."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataflex.config.check_data import column_problems, data_set_problems
from dataflex.config.check_models import other_model_problems
from dataflex.config.check_run import model_problems, reference_problems, setting_problems, stage_problems
from dataflex.config.check_targets import by_target_problems, target_problems
from dataflex.config.data import Source
from dataflex.config.needs import parameters
from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.config.values import env_enabled, truthy
from dataflex.core.sealed import broken_reason
from dataflex.offline.table import is_scores

__all__ = ["FIXED", "adam_problems", "checked", "checkpoint_of", "entries_of", "out_problems", "tidy"]

_DROPPED = (
    "auto_find_batch_size",
    "do_eval",
    "do_predict",
    "early_stopping_steps",
    "eval_dataset",
    "eval_on_start",
    "eval_steps",
    "eval_strategy",
    "evaluation_strategy",
    "group_by_length",
    "ignore_data_skip",
    "load_best_model_at_end",
    "mix_strategy",
    "plot_loss",
    "predict_with_generate",
    "push_to_hub",
    "save_steps",
    "streaming",
    "train_sampling_strategy",
    "val_size",
)
"""Keys that only training and evaluation look at."""
FIXED: dict[str, Any] = {
    "do_train": True,
    "neat_packing": False,
    "overwrite_output_dir": True,
    "packing": False,
    "report_to": "none",
    "save_strategy": "no",
}


def tidy(lf: dict[str, Any], problems: list[str]) -> list[str]:
    """Take out what only training needs; return notes on what is done otherwise."""
    notes = []
    if lf.get("tokenized_path"):
        problems.append("tokenized_path: a tokenised copy does not say which row of a file it came from; remove it")
    if truthy(lf, "packing") or truthy(lf, "neat_packing") or (lf.get("stage") == "pt" and lf.get("packing") is None):
        notes.append("packing is off: every sample is scored by itself")
    if truthy(lf, "streaming"):
        notes.append("streaming is off: all rows are tokenised first")
    config = lf.pop("deepspeed", None)
    if config is not None:
        if isinstance(config, str) and Path(config).is_file():
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        stage = config.get("zero_optimization", {}).get("stage", 0) if isinstance(config, Mapping) else 0
        if stage == 3:
            problems.append(
                "deepspeed: scoring keeps the whole model on each rank, and ZeRO-3 partitions it; remove it"
            )
        else:
            notes.append("deepspeed is left out: nothing is trained")
    if lf.get("fsdp") not in (None, "", [], False):
        problems.append("fsdp: scoring keeps the whole model on each rank; remove it")
    if env_enabled("USE_RAY"):
        problems.append("USE_RAY (environment): scoring on several ranks is started by torchrun (FORCE_TORCHRUN=1)")
    held = [key for key in ("val_size", "eval_dataset") if lf.get(key)]
    if held:
        notes.append(f"{', '.join(held)} left out: every row of the data set is scored")
    for key in _DROPPED:
        lf.pop(key, None)
    return notes


def checkpoint_of(lf: dict[str, Any], problems: list[str]) -> Path | None:
    """Take out the checkpoint whose weights and optimizer state are to be used, or None."""
    asked = lf.pop("resume_from_checkpoint", None)
    if asked in (None, False, "false", "False"):
        return None
    if asked in (True, "true", "True"):
        problems.append(
            "resume_from_checkpoint: name the checkpoint's folder whose weights and optimizer are to be used"
        )
        return None
    folder = Path(str(asked))
    if (reason := broken_reason(folder)) is not None:
        problems.append(f"resume_from_checkpoint: {folder} cannot be used: {reason}")
    elif not (folder / "optimizer.pt").is_file():
        problems.append(f"resume_from_checkpoint: {folder} holds no optimizer.pt (DeepSpeed keeps its state elsewhere)")
    return folder


def checked(lf: dict[str, Any], config: DynamicConfig, base_dir: Path, problems: list[str]) -> list[Source]:
    """Note what is wrong with stage, settings, model, data and targets; return the data sets."""
    view = {**lf, **FIXED}
    problems += [
        problem.replace("dynamic.selector: ", "--method: ", 1)
        for problem in (*stage_problems(config, view), *setting_problems(config, view))
    ]
    problems += model_problems(view)
    for method in config.methods:
        alone = DynamicConfig(selector=method)
        found = (
            *reference_problems(alone),
            *other_model_problems(alone),
            *target_problems(alone, view, base_dir),
            *by_target_problems(alone),
        )
        problems += [problem.replace("dynamic.selector.", f"{method.name}.", 1) for problem in found]
    sources: list[Source] = []
    problems += data_set_problems(view, base_dir, sources)
    problems += column_problems(config, view, sources)
    for source in sources:
        if source.num_samples is not None:
            problems.append(
                f"dataset: {source.name!r} has num_samples in dataset_info.json, which draws rows anew in every load; "
                "remove it, and draw with 'dataflex select --budget'"
            )
    return sources


def entries_of(lf: Mapping[str, Any], datasets: Sequence[str]) -> dict[str, Any]:
    """Return what ``dataset_info.json`` says about data sets, by name."""
    folder = lf.get("dataset_dir", "data")
    if isinstance(folder, Mapping):
        info: Mapping[str, Any] = folder
    else:
        path = Path(str(folder)) / "dataset_info.json"
        info = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: dict(info[name]) for name in datasets if name in info}


def out_problems(out: Path) -> list[str]:
    """Return why the scores could not be written there."""
    if out.suffix != ".parquet":
        return [f"--out: {out} must end in .parquet"]
    if out.is_dir():
        return [f"--out: {out} is a folder"]
    if os.path.lexists(out) and not is_scores(out):
        return [f"--out: {out} is there, and 'dataflex score' did not write it; name another file, or move it away"]
    above = next(path for path in out.absolute().parents if path.exists())
    return [] if above.is_dir() else [f"--out: {above} is a file, not a folder"]


def adam_problems(scorers: Sequence[MethodConfig]) -> list[str]:
    """Return which methods want moments: without training there is no optimizer that has any."""
    return [
        f"{key}: {kind} needs the moments of a run's Adam, and without training there are none; "
        f"write '{key}=none', or name a checkpoint of the run: 'resume_from_checkpoint=saves/run/checkpoint-100'"
        for method in scorers
        for path, _, params in parameters(method)
        if (kind := getattr(params, "precondition", None)) in ("true_adam", "paper_repo", "adam_scale")
        and (key := f"{path.replace('dynamic.selector', method.name, 1)}.precondition")
    ]
