"""Puts our trainer and our data loading where LLaMA-Factory's workflows look for theirs, for the time of a run.

Upstream names relied upon, each asserted by ``tests/upstream``: the workflow modules of the stages, their
references ``get_dataset`` and ``load_model`` and their trainer classes, ``llamafactory.train.tuner.run_exp`` and its
``EarlyStoppingCallback``, ``llamafactory.train.tuner.Worker`` (Ray).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.mappings import as_mapping
from dataflex.config.schema import DynamicConfig
from dataflex.errors import UnsupportedError
from dataflex.llamafactory.datasets import DataLoading
from dataflex.llamafactory.trainer import TrainerMixin
from dataflex.record.clock import OTHER, PhaseClock
from dataflex.train.session import Setup

TRAINERS: dict[str, tuple[str, str, str]] = {
    "pt": ("llamafactory.train.pt.workflow", "llamafactory.train.pt.workflow", "CustomTrainer"),
    "sft": ("llamafactory.train.sft.workflow", "llamafactory.train.sft.workflow", "CustomSeq2SeqTrainer"),
    "rm": ("llamafactory.train.rm.workflow", "llamafactory.train.rm.workflow", "PairwiseTrainer"),
    "dpo": ("llamafactory.train.dpo.workflow", "llamafactory.train.dpo.trainer", "CustomDPOTrainer"),
    "kto": ("llamafactory.train.kto.workflow", "llamafactory.train.kto.workflow", "CustomKTOTrainer"),
}
"""Stage: module that calls ``get_dataset``, module in which the trainer's name is looked up, its name."""


@contextmanager
def _replaced(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes of modules while inside."""
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def least_gain(delta: float) -> Iterator[None]:
    """Make LLaMA-Factory's early stopping ask for a gain of at least ``delta`` while inside."""
    tuner = importlib.import_module("llamafactory.train.tuner")
    stops = functools.partial(tuner.EarlyStoppingCallback, early_stopping_threshold=delta)
    with _replaced([(tuner, "EarlyStoppingCallback", stops)] if delta else []):
        yield


@contextmanager
def swapped(
    stage: str,
    config: DynamicConfig,
    lf: dict[str, Any],
    mixin: type[Any] = TrainerMixin,
    clock: PhaseClock | None = None,
) -> Iterator[Setup]:
    """Make LLaMA-Factory's workflow of ``stage`` build our trainer while inside: ``mixin`` before its own.

    Args:
        stage: LLaMA-Factory's.
        config: The dynamic block.
        lf: LLaMA-Factory's keys.
        mixin: What goes before the stage's trainer class.
        clock: Runs since the command began; None: from now on.

    Raises:
        UnsupportedError: The stage has no trainer that data can be decided for.
    """
    if stage not in TRAINERS:
        raise UnsupportedError(f"stage {stage!r} has no dynamic training (supported: {', '.join(TRAINERS)})")
    caller, holder, name = TRAINERS[stage]
    workflow, home = importlib.import_module(caller), importlib.import_module(holder)
    clock = clock or PhaseClock()
    written = LlamaFactoryArgs.read({**lf, "stage": stage})
    loading = DataLoading(config, written, clock)
    setup = Setup(
        config=config,
        resolved={**lf, "dynamic": as_mapping(config)},
        stage=stage,
        shuffle=not written.disable_shuffling,
        packed=written.packed,
        clock=clock,
    )

    def load(*args: Any, **kwargs: Any) -> Any:
        clock.switch(OTHER)
        with clock.phase("data"):
            module = loading(*args, **kwargs)
        setup.space = loading.space
        return module

    load_model = workflow.load_model

    def model(*args: Any, **kwargs: Any) -> Any:
        with clock.phase("model"):
            return load_model(*args, **kwargs)

    base = getattr(home, name)
    ours = type(f"Dynamic{name}", (mixin, base), {"dataflex_setup": setup})
    with _replaced([(workflow, "get_dataset", load), (workflow, "load_model", model), (home, name, ours)]):
        yield setup
    setup.recorder.ended()


def run(
    lf: dict[str, Any],
    config: DynamicConfig | None,
    early_stopping_min_delta: float = 0.0,
    clock: PhaseClock | None = None,
) -> None:
    """Train in this process: stock LLaMA-Factory without a dynamic block, our trainer with one.

    Args:
        lf: LLaMA-Factory's own keys.
        config: The dynamic block, or None.
        early_stopping_min_delta: Least gain that counts for LLaMA-Factory's ``early_stopping_steps``.
        clock: Runs since the command began; None: from now on.
    """
    tuner = importlib.import_module("llamafactory.train.tuner")
    with least_gain(early_stopping_min_delta):
        if config is None:
            tuner.run_exp(lf)
            return
        with swapped(lf.get("stage", "sft"), config, lf, clock=clock):
            tuner.run_exp(lf)
