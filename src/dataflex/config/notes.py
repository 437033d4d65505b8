"""What a run does otherwise than its keys may be read: told by ``plan`` and at the start of ``train``, not refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.check_data import targets_in_training
from dataflex.config.schema import DynamicConfig

_OF_THE_LOADER: tuple[str, ...] = ("data_seed", "dataloader_persistent_workers")
_OF_ACCELERATE: dict[str, Any] = {"split_batches": False, "dispatch_batches": None, "even_batches": True}


def notes(dynamic: DynamicConfig, lf: LlamaFactoryArgs, base_dir: Path) -> Iterator[str]:
    """Yield one line per thing that a user should know of before the run.

    Args:
        dynamic: What is decided during training.
        lf: LLaMA-Factory's keys.
        base_dir: Folder of the configuration file.
    """
    yield from _of_the_data(dynamic, lf, base_dir)
    yield from _of_the_block(dynamic, lf)
    for key in _OF_THE_LOADER:
        if lf.on(key):
            yield f"{key}: no effect beside 'dynamic', which serves the rows itself ('seed' draws them)"
    config = lf.accelerator_config
    if isinstance(config, Mapping):
        for key, usual in _OF_ACCELERATE.items():
            if config.get(key, usual) != usual:
                yield f"accelerator_config.{key}: no effect beside 'dynamic', which deals out the rows itself"
    if "buffer_size" in lf and lf.streaming:
        yield "buffer_size: no effect beside 'dynamic': streamed rows are read at any place, so all can be shuffled"
    if lf.dataloader_drop_last and (dynamic.mixer is not None or dynamic.narrows):
        yield "dataloader_drop_last: no effect here: every step is full"


def _of_the_data(dynamic: DynamicConfig, lf: LlamaFactoryArgs, base_dir: Path) -> Iterator[str]:
    for key, name, other in targets_in_training(dynamic, lf, base_dir):
        same = "" if name == other else f" (its file is that of {other!r})"
        then = {
            "warn": "what is selected towards it is, in part, the target itself",
            "error": "the run would end",
            "drop": "all its rows leave the training set ('leakage: drop')",
        }[dynamic.leakage]
        yield f"{key}: {name!r} is also trained on{same}; {then}"
    names = lf.train_sets
    for name in lf.eval_sets:
        if name in names:
            yield f"eval_dataset: {name!r} is also trained on; its loss is not one of held-out rows"
    if lf.tokenized_path and len(names) > 1 and dynamic.domains_are_sources:
        listed = ", ".join(names)
        yield f"tokenized_path: a copy does not say which of {listed} a row is from: all are one domain, 'all'"
    if lf.max_samples is not None and dynamic.targets:
        yield f"max_samples: cuts training and evaluation sets; targets ({', '.join(dynamic.targets)}) are taken whole"


def _of_the_block(dynamic: DynamicConfig, lf: LlamaFactoryArgs) -> Iterator[str]:
    mixer, signals = dynamic.mixer, dynamic.signals
    if (
        dynamic.interval_steps is not None
        and not dynamic.narrows
        and not (mixer is not None and mixer.requires.needs_interval)
    ):
        what = "a weighter alone" if mixer is None and dynamic.selector is None else "methods that decide once for all"
        yield f"dynamic.interval_steps: no effect with {what}"
    if dynamic.warmup_steps and not dynamic.narrows and mixer is not None and not mixer.requires.needs_interval:
        if dynamic.initial_proportions is None:
            yield f"dynamic.warmup_steps: no effect, since the {mixer.name} mixer has the same proportions throughout"
    asks = dynamic.requires.signals - {"texts"} or signals.screen_fraction < 1.0
    for key, given in (("max_age_steps", signals.max_age_steps > 0), ("store", signals.store is not None)):
        if given and not asks:
            yield f"dynamic.signals.{key}: no effect, since no method says that it asks the model about rows"
    if dynamic.unit == "documents" and not lf.packed:
        yield "dynamic.unit: no effect without packing, where every row is one document"
    if dynamic.leakage != "warn" and lf.packed and not lf.tokenized:
        yield "dynamic.leakage: no effect under packing, where no row is equal to a target row"
    if dynamic.early_stopping_min_delta > 0 and not lf.early_stopping_steps:
        yield "dynamic.early_stopping_min_delta: no effect without LLaMA-Factory's 'early_stopping_steps'"
    if dynamic.eval_by_domain and not lf.evaluates:
        yield "dynamic.eval_by_domain: no effect, since nothing is evaluated; set 'eval_strategy' or 'do_eval'"
