"""Puts our trainer and our data loading where LLaMA-Factory's workflows look for theirs, for the time of a run.

Upstream names relied upon, each asserted by ``tests/upstream``: the workflow modules of the stages, their
references ``get_dataset`` and their trainer classes, ``llamafactory.train.tuner.run_exp`` and its
``EarlyStoppingCallback``, ``llamafactory.train.tuner.Worker`` (Ray).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dataflex.bridge.datasets import DataLoading, scoring_collator
from dataflex.config.schema import DynamicConfig
from dataflex.errors import UnsupportedError
from dataflex.train.seam import Setup, TrainerMixin
from dataflex.version import __version__

__all__ = ["TRAINERS", "run", "swapped", "versions"]

TRAINERS: dict[str, tuple[str, str, str]] = {
    "pt": ("llamafactory.train.pt.workflow", "llamafactory.train.pt.workflow", "CustomTrainer"),
    "sft": ("llamafactory.train.sft.workflow", "llamafactory.train.sft.workflow", "CustomSeq2SeqTrainer"),
    "rm": ("llamafactory.train.rm.workflow", "llamafactory.train.rm.workflow", "PairwiseTrainer"),
    "dpo": ("llamafactory.train.dpo.workflow", "llamafactory.train.dpo.trainer", "CustomDPOTrainer"),
    "kto": ("llamafactory.train.kto.workflow", "llamafactory.train.kto.workflow", "CustomKTOTrainer"),
}
"""Stage: module that calls ``get_dataset``, module in which the trainer's name is looked up, its name."""


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    found = {"dataflex": __version__}
    for package in ("llamafactory", "transformers", "torch", "accelerate", "datasets", "peft", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


@contextmanager
def swapped(stage: str, config: DynamicConfig, mapping: dict[str, Any]) -> Iterator[Setup]:
    """Make LLaMA-Factory's workflow of ``stage`` build our trainer while inside.

    Raises:
        UnsupportedError: The stage has no trainer that data can be decided for.
    """
    if stage not in TRAINERS:
        raise UnsupportedError(f"stage {stage!r} has no dynamic training (supported: {', '.join(TRAINERS)})")
    caller, holder, name = TRAINERS[stage]
    workflow, home = importlib.import_module(caller), importlib.import_module(holder)
    tuner = importlib.import_module("llamafactory.train.tuner")
    loading = DataLoading(config)
    setup = Setup(
        config=config,
        resolved=mapping,
        versions=versions(),
        stage=stage,
        shuffle=not mapping.get("disable_shuffling", False),
        scoring_collator=scoring_collator(stage),
    )

    def load(*args: Any, **kwargs: Any) -> Any:
        module = loading(*args, **kwargs)
        setup.space = loading.space
        return module

    base = getattr(home, name)
    ours = type(f"Dynamic{name}", (TrainerMixin, base), {"dataflex_setup": setup})
    stops = functools.partial(tuner.EarlyStoppingCallback, early_stopping_threshold=config.early_stopping_min_delta)
    changes = [(workflow, "get_dataset", load), (home, name, ours), (tuner, "EarlyStoppingCallback", stops)]
    before = [(module, attribute, getattr(module, attribute)) for module, attribute, _ in changes]
    for module, attribute, value in changes:
        setattr(module, attribute, value)
    try:
        yield setup
    finally:
        for module, attribute, value in before:
            setattr(module, attribute, value)


def run(lf: dict[str, Any], config: DynamicConfig | None, mapping: dict[str, Any]) -> None:
    """Train in this process: stock LLaMA-Factory without a dynamic block, our trainer with one.

    Args:
        lf: LLaMA-Factory's own keys.
        config: The dynamic block, or None.
        mapping: The whole configuration as given, for the record.
    """
    tuner = importlib.import_module("llamafactory.train.tuner")
    if config is None:
        tuner.run_exp(lf)
        return
    with swapped(lf.get("stage", "sft"), config, mapping):
        tuner.run_exp(lf)
