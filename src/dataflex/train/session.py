"""Builds what a run needs once the Trainer knows its batch shape: schedule, signals, controller, feed.

Reads the Trainer's arguments; calls none of its methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dataflex.config.forecast import Batch, Forecast
from dataflex.config.needs import unmet
from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.errors import UnsupportedError
from dataflex.method import RunFacts
from dataflex.plan.schedule import Schedule
from dataflex.record.clock import PhaseClock
from dataflex.record.recorder import NullRecorder, RunRecorder
from dataflex.signals.cache import SignalCache
from dataflex.signals.identity import model_identity, surroundings
from dataflex.signals.model_access import Corpus, ModelAccess
from dataflex.signals.runner import SignalRunner
from dataflex.signals.store import ArrayStore
from dataflex.train.checkpoint import Identity
from dataflex.train.controller import BatchShape, Controller
from dataflex.train.loader import PlanFeed
from dataflex.train.row_space import RowSpace

__all__ = ["Session", "Setup", "batch_shape", "freeze_gates", "micro_batches_per_epoch", "signal_runner"]

_PLAN_IDS = 2**20
"""Ids planned at once when nothing adaptive asks for shorter intervals."""


@dataclass(kw_only=True)
class Setup:
    """What the trainer is told from outside, filled in as the run is built up.

    Attributes:
        config: The dynamic block.
        resolved: JSON form of the whole configuration, for the record.
        versions: Package versions, for the record.
        stage: LLaMA-Factory stage.
        shuffle: False under ``disable_shuffling``.
        packed: Whether several samples share a row.
        space: The row space, once the data is loaded.
        clock: Where the seconds of the run go.
        recorder: The record, once it is open; on rank 0 only.
        scoring_collator: Makes the collator for scoring passes from the Trainer's.
    """

    config: DynamicConfig
    resolved: dict[str, Any]
    versions: dict[str, str]
    stage: str
    shuffle: bool
    packed: bool = False
    space: RowSpace | None = None
    clock: PhaseClock = field(default_factory=PhaseClock)
    recorder: RunRecorder = field(default_factory=NullRecorder)
    scoring_collator: Callable[[Any], Callable[[list[dict[str, Any]]], dict[str, Any]]] = lambda collator: collator

    @property
    def rows(self) -> RowSpace:
        """The row space, which must have been loaded."""
        assert self.space is not None, "the trainer was built before the data was loaded"
        return self.space


@dataclass(kw_only=True)
class Session:
    """The running parts of one training run.

    Attributes:
        controller: Decides plans.
        feed: Serves them.
        identity: What a checkpoint must match.
    """

    controller: Controller
    feed: PlanFeed
    identity: Identity

    @classmethod
    def begin(
        cls, setup: Setup, trainer: Any, *, max_steps: int, shape: BatchShape, methods: dict[str, Any]
    ) -> Session:
        """Build a session for a Trainer that is about to start.

        Args:
            setup: What the run is.
            trainer: The Trainer; its arguments, model, data and collator are read.
            max_steps: Optimizer steps of the whole run.
            shape: How one step is cut up.
            methods: Built ``selector`` and ``mixer``, or None.
        """
        config, args = setup.config, trainer.args
        schedule = Schedule(
            warmup_steps=config.warmup_steps,
            interval_steps=config.interval_steps or max(1, _PLAN_IDS // shape.global_batch),
            total_steps=max_steps,
            cycle_steps=config.cycle_steps,
        )
        seed = args.seed if config.seed is None else config.seed
        controller = Controller(
            config=config,
            space=setup.rows,
            schedule=schedule,
            shape=shape,
            seed=seed,
            signals=signal_runner(setup, trainer, shape, seed),
            selector=methods["selector"],
            mixer=methods["mixer"],
            clock=setup.clock,
        )
        identity = Identity.of(
            config,
            setup.rows,
            setup.resolved,
            micro=shape.micro_batch_size,
            accumulation=shape.accumulation,
            world=shape.world,
            seed=seed,
        )
        feed = PlanFeed(
            trainer.train_dataset,
            trainer.data_collator,
            shape,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return cls(controller=controller, feed=feed, identity=identity)


def signal_runner(setup: Setup, trainer: Any, shape: BatchShape, seed: int) -> SignalRunner:
    """Return the runner of signals about the Trainer's model and the set-up's rows."""
    space = setup.rows
    rows = max(shape.micro_batch_size, trainer.args.per_device_eval_batch_size)
    longest = max(
        int(space.lengths.max(initial=1)), *(int(target.lengths.max()) for target in space.targets.values()), 1
    )
    options = setup.config.signals
    access = ModelAccess(
        model=trainer.model,
        collate=setup.scoring_collator(trainer.data_collator),
        autocast=trainer.compute_loss_context_manager,
        device=trainer.args.device,
        token_budget=rows * longest,  # never more than a batch of the longest rows, which training must bear too
        train=Corpus(dataset=trainer.train_dataset, lengths=space.lengths, identity=space.fingerprint),
        targets={
            name: Corpus(dataset=target.dataset, lengths=target.lengths, identity=target.fingerprint)
            for name, target in space.targets.items()
        },
        seed=seed,
        tokenizer=trainer.processing_class,
        optimizer=lambda: trainer.optimizer,
        learning_rate=lambda: float(trainer._get_learning_rate()),
        backend="zero" if trainer.is_deepspeed_enabled else "plain",
        release=lambda: release_gathered(trainer),
    )

    @cache
    def around(name: str) -> dict[str, Any]:
        corpus = access.corpus(name or None)
        return surroundings(
            corpus.dataset, len(corpus.lengths), access.collate, access.tokenizer, access.autocast, access.device
        )

    kept = SignalCache(
        max_age_steps=options.max_age_steps,
        store=None if options.store is None else ArrayStore(options.store),
        store_bytes=int(options.store_gb * 1e9),
        model_identity=lambda: model_identity(trainer.model),
        surroundings=around,
    )
    return SignalRunner(access=access, cache=kept)


def open_reference(setup: Setup, trainer: Any, max_steps: int) -> Any:
    """Return the reference model's token losses, or None when no method asks for them (collective).

    Args:
        setup: What the run is.
        trainer: The Trainer.
        max_steps: Optimizer steps of the whole run.
    """
    reference = setup.config.requires.reference
    if reference is None:
        return None
    from dataflex.train.reference import ReferenceLosses

    shape = batch_shape(trainer, shuffle=setup.shuffle)
    access = signal_runner(setup, trainer, shape, 0).access
    losses = ReferenceLosses.open(
        reference.folder,
        dataset=trainer.train_dataset,
        lengths=setup.rows.lengths,
        fingerprint=setup.rows.fingerprint,
        collate=access.collate,
        tokenizer=access.tokenizer,
        device=access.device,
        token_budget=access.token_budget,
        autocast=access.autocast,
        store=Path(trainer.args.output_dir) / "dataflex" / "reference",
        cache=reference.cached,
        whole=expected(setup, shape, max_steps).serves_all_again,
    )
    with setup.clock.phase("reference"):
        losses.begin()
    return losses


def expected(setup: Setup, shape: BatchShape, max_steps: int) -> Forecast:
    """Return what was forecast of the run, now that its rows and steps are known."""
    batch = Batch(per_device=shape.micro_batch_size, accumulation=shape.accumulation, world=shape.world)
    counts = dict(zip(setup.rows.domains.names, setup.rows.domains.num_rows.tolist(), strict=True))
    return Forecast(
        dynamic=setup.config, batch=batch, counts=counts, packs=False, rows=setup.rows.num_rows, steps=max_steps
    )


def release_gathered(trainer: Any) -> None:
    """Let go of the parameters that a pass left gathered on this rank (ZeRO-3)."""
    if zero_stage(trainer) == 3:
        trainer.model_wrapped.empty_partition_cache()


def zero_stage(trainer: Any) -> int:
    """Return DeepSpeed's ZeRO stage, 0 without DeepSpeed."""
    return int(trainer.accelerator.state.deepspeed_plugin.zero_stage) if trainer.is_deepspeed_enabled else 0


def build(config: MethodConfig | None) -> Any:
    """Return the method that a configuration names, or None."""
    return None if config is None else config.build()


def batch_shape(trainer: Any, *, shuffle: bool) -> BatchShape:
    """Read how one optimizer step is cut up from the Trainer's arguments."""
    args = trainer.args
    return BatchShape(
        micro_batch_size=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        world=args.world_size,
        rank=args.process_index,
        drop_last=args.dataloader_drop_last,
        shuffle=shuffle,
    )


def micro_batches_per_epoch(num_rows: int, shape: BatchShape, *, full_steps: bool) -> int:
    """Return this rank's micro-batches per epoch as the stock Trainer counts them.

    Args:
        num_rows: Rows of the training set.
        shape: How one step is cut up.
        full_steps: Whether every step is full, as when a selector or mixer fills it.
    """
    layout = shape.layout(num_rows)
    micro_batches = layout.steps_per_epoch * shape.accumulation if full_steps else layout.micro_batches_per_epoch
    return max(micro_batches, 1)


def refuse_unsupported(trainer: Any, config: DynamicConfig) -> None:
    """Refuse kinds of parallelism that plans or methods cannot serve.

    Raises:
        UnsupportedError: With the reason.
    """
    if zero_stage(trainer) == 3 or trainer.is_fsdp_enabled:
        lacking = list(unmet(config, RunFacts(partitioned="DeepSpeed ZeRO-3 or FSDP")))
        if lacking:
            raise UnsupportedError("\n".join(lacking))
    sizes = {
        "tensor": trainer.get_tp_size(),
        "context": trainer.get_cp_size(),
        "sequence": trainer.get_sp_size(),
    }
    for what, size in sizes.items():
        if size > 1:
            raise UnsupportedError(f"{what} parallelism of size {size}: only data-parallel ranks are supported")
    if trainer.args.n_gpu > 1:
        raise UnsupportedError("several devices in one process (DataParallel): start one process per device")


def freeze_gates(model: torch.nn.Module) -> int:
    """Freeze the routers of a mixture-of-experts model and return how many parameters that were.

    Raises:
        UnsupportedError: The model has no router.
    """
    frozen = 0
    for name, parameter in model.named_parameters():
        if {"gate", "router"} & set(name.split(".")):
            parameter.requires_grad = False
            frozen += 1
    if not frozen:
        raise UnsupportedError("freeze_gate: the model has no router (a module named 'gate' or 'router')")
    return frozen
