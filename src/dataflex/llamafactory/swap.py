"""Puts our trainer and our loading of data in the place of LLaMA-Factory's, for a run, in Ray's workers too.

Upstream names relied upon, each asserted by ``tests/upstream``: the workflow modules of the stages, their
references ``get_dataset``, ``load_tokenizer`` and ``load_model``, to which ``ModelArguments`` are given by position,
and their trainer classes; ``run_exp``, ``Worker`` and ``EarlyStoppingCallback`` of ``llamafactory.train.tuner``; the
collators' base class ``MultiModalDataCollatorForSeq2Seq``.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from llamafactory.data.collator import MultiModalDataCollatorForSeq2Seq
from llamafactory.hparams import ModelArguments
from llamafactory.train import tuner
from safetensors import SafetensorError

from dataflex.clock import OTHER, PhaseClock
from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.mappings import as_mapping
from dataflex.config.schema import DynamicConfig
from dataflex.config.split import split
from dataflex.errors import ConfigError
from dataflex.huggingface.loop import replaced
from dataflex.huggingface.trainer import TrainerMixin
from dataflex.llamafactory.board import lines_shown
from dataflex.llamafactory.datasets import DataLoading
from dataflex.llamafactory.loading import Loader, changed_args
from dataflex.train.session import Setup

ENVIRONMENT_KEY = "DATAFLEX_RUN"
"""Environment variable that gives Ray's workers the configuration."""
TRAINERS: dict[str, tuple[str, str, str]] = {
    "pt": ("llamafactory.train.pt.workflow", "llamafactory.train.pt.workflow", "CustomTrainer"),
    "sft": ("llamafactory.train.sft.workflow", "llamafactory.train.sft.workflow", "CustomSeq2SeqTrainer"),
    "rm": ("llamafactory.train.rm.workflow", "llamafactory.train.rm.workflow", "PairwiseTrainer"),
    "dpo": ("llamafactory.train.dpo.workflow", "llamafactory.train.dpo.trainer", "CustomDPOTrainer"),
    "kto": ("llamafactory.train.kto.workflow", "llamafactory.train.kto.workflow", "CustomKTOTrainer"),
}
"""Stage: module that calls ``get_dataset``, module in which the trainer's name is looked up, its name."""

_SCORED_PREFIX = {"rm": "chosen_", "dpo": "chosen_", "kto": ""}
"""What the columns of the answer that a scoring pass scores begin with; other stages have one answer."""


def scoring_collator(stage: str, collator: Any) -> Any:
    """Return a collator for scoring passes, which reduces preference rows to one answer."""
    if stage not in _SCORED_PREFIX:
        return collator
    return functools.partial(_collated, collator, (_SCORED_PREFIX[stage],))


def pair_collator(collator: Any) -> Any:
    """Return a collator of preference rows whose batches hold each chosen answer followed by its rejected one."""
    return functools.partial(_collated, collator, ("chosen_", "rejected_"))


def _collated(collator: Any, prefixes: tuple[str, ...], features: list[dict[str, Any]]) -> Any:
    """Collate the answers of each row whose columns begin with the prefixes, as rows of their own."""
    plain = [
        {
            **{name: feature[prefix + name] for name in ("input_ids", "attention_mask", "labels")},
            **{name: feature[name] for name in ("images", "videos", "audios")},
        }
        for feature in features
        for prefix in prefixes
    ]
    return MultiModalDataCollatorForSeq2Seq.__call__(collator, plain)


def least_gain(delta: float) -> AbstractContextManager[None]:
    """Make LLaMA-Factory's early stopping require a gain of at least ``delta`` while inside."""
    stops = functools.partial(tuner.EarlyStoppingCallback, early_stopping_threshold=delta)
    return replaced((tuner, "EarlyStoppingCallback", stops))


@contextmanager
def loads_told(stage: str) -> Iterator[None]:
    """Tell what a stage's workflow cannot load, tokenizer or model, as a ConfigError, while inside."""
    if stage not in TRAINERS:
        yield
        return
    workflow = importlib.import_module(TRAINERS[stage][0])

    def told(load: Any) -> Any:
        @functools.wraps(load)
        def loaded(*args: Any, **kwargs: Any) -> Any:
            try:
                return load(*args, **kwargs)
            except (OSError, ValueError, SafetensorError) as error:
                given = next(arg for arg in args if isinstance(arg, ModelArguments))
                raise ConfigError(_unloadable(given.model_name_or_path, error)) from error

        return loaded

    names = ("load_tokenizer", "load_model")
    with replaced(*((workflow, name, told(getattr(workflow, name))) for name in names)):
        yield


def _unloadable(model: Any, error: Exception) -> str:
    """Return why a model cannot be loaded; that its tokenizer cannot be is said without the reason."""
    reason = " ".join(str(error.__cause__ or error).split())
    there = Path(str(model)).expanduser().exists()
    how = "cannot be loaded" if there else "is no folder here, and cannot be loaded from a hub"
    return f"model_name_or_path: {model} {how}: {reason}"


@contextmanager
def swapped(
    config: DynamicConfig, lf: dict[str, Any], mixin: type[Any] = TrainerMixin, clock: PhaseClock | None = None
) -> Iterator[Setup]:
    """Make LLaMA-Factory's workflow of the stage build our trainer while inside.

    Args:
        config: The dynamic block.
        lf: LLaMA-Factory's keys.
        mixin: The class that goes before the stage's trainer class.
        clock: Runs since the command began; None: from now on.
    """
    stage, clock = lf.get("stage", "sft"), clock or PhaseClock()
    caller, holder, name = TRAINERS[stage]
    workflow, home = importlib.import_module(caller), importlib.import_module(holder)
    written = LlamaFactoryArgs.read({**lf, "stage": stage})
    setup = Setup(
        config=config,
        resolved={**lf, "dynamic": as_mapping(config)},
        stage=stage,
        shuffle=not written.disable_shuffling,
        packed=written.packed,
        clock=clock,
        score_collator=functools.partial(scoring_collator, stage),
        pair_collator=pair_collator if stage == "dpo" else None,
    )

    def load_data(
        template: Any, model_args: Any, data_args: Any, training_args: Any, stage: Any, **tokenizer_module: Any
    ) -> dict[str, Any]:
        clock.switch(OTHER)
        with clock.phase("data"):
            if written.tokenized and not config.stock:
                data_args = changed_args(data_args)  # a copy is mapped into memory, streamed or not
            given = (template, model_args, data_args, training_args, stage, tokenizer_module)
            level, name = config.requires.token_weights or ("", "")
            turns = name if level == "turn" else ""
            loader = Loader(
                *given,
                written=written,
                by_file=config.domain_path is not None,
                skip_bad_shards=config.on_bad_shard == "skip",
                turns=turns,
            )
            module, setup.space = DataLoading(config, loader, clock).load()
        return module

    load_model = workflow.load_model

    def load_timed(*args: Any, **kwargs: Any) -> Any:
        with clock.phase("model"):
            return load_model(*args, **kwargs)

    ours = type(f"Dynamic{name}", (mixin, getattr(home, name)), {"dataflex_setup": setup})
    changes = ((workflow, "get_dataset", load_data), (workflow, "load_model", load_timed), (home, name, ours))
    try:
        with replaced(*changes):
            yield setup
    finally:
        setup.recorder.ended()


def run(lf: dict[str, Any], config: DynamicConfig | None, early_stopping_min_delta: float, clock: PhaseClock) -> None:
    """Train in this process: stock LLaMA-Factory with its keys ``lf`` alone, our trainer with a dynamic block.

    ``early_stopping_min_delta``: least gain that counts for LLaMA-Factory's ``early_stopping_steps``.
    """
    ours = nullcontext() if config is None else swapped(config, lf, clock=clock)
    with lines_shown(), least_gain(early_stopping_min_delta), loads_told(str(lf.get("stage", "sft"))), ours:
        tuner.run_exp(lf)


class RayWorker(tuner.Worker):
    """Runs LLaMA-Factory's training function with our trainer swapped in."""

    def _training_function(self, config: dict[str, Any]) -> None:
        given = json.loads(os.environ[ENVIRONMENT_KEY])
        parts = split(given["mapping"], Path(given["base_dir"]))
        assert parts.dynamic is not None
        with least_gain(parts.early_stopping_min_delta), swapped(parts.dynamic, dict(parts.lf)):
            super()._training_function(config)


@contextmanager
def ray_workers(mapping: dict[str, Any], base_dir: Path) -> Iterator[None]:
    """Make LLaMA-Factory start ``RayWorker``s while inside."""
    os.environ[ENVIRONMENT_KEY] = json.dumps({"mapping": mapping, "base_dir": str(base_dir)})
    try:
        with replaced((tuner, "Worker", RayWorker)):
            yield
    finally:
        del os.environ[ENVIRONMENT_KEY]
