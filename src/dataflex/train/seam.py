"""Every touch point with the Hugging Face Trainer.

``TrainerMixin`` goes in front of any Trainer class. Upstream names relied upon (transformers 5.x), each
asserted by ``tests/upstream``: ``get_train_dataloader``, ``set_initial_training_values``,
``_init_training_state``, ``get_batch_samples``, ``_get_num_items_in_batch``, ``training_step``,
``compute_loss``, ``compute_loss_func``, ``current_gradient_accumulation_steps``, ``_save_rng_state``,
``log``, ``evaluate``, ``get_total_train_batch_size``, ``compute_loss_context_manager``.

The Trainer asks ``get_batch_samples`` for all micro-batches of an optimizer step right after the
previous step's update; there a plan is decided if the step has none, and its rows are served. Counting
tokens, accumulation, clipping and saving stay the Trainer's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from dataflex.config.schema import DynamicConfig
from dataflex.core.protocols import Mixer, Rows, Selector, Weighter
from dataflex.core.registry import find
from dataflex.core.schedule import Schedule
from dataflex.dist import comm
from dataflex.errors import ComponentError, UnsupportedError
from dataflex.record.read import EVENTS
from dataflex.record.recorder import NullRecorder, RunRecorder
from dataflex.signals.service import Corpus, ModelHandle, SignalService
from dataflex.train import checkpoint, weighting
from dataflex.train.controller import BatchShape, Controller
from dataflex.train.loader import EpochShell, PlanFeed
from dataflex.train.row_space import RowSpace

__all__ = ["Setup", "TrainerMixin"]

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
        space: The row space, once the data is loaded.
        scoring_collator: Makes the collator for scoring passes from the Trainer's.
    """

    config: DynamicConfig
    resolved: dict[str, Any]
    versions: dict[str, str]
    stage: str
    shuffle: bool
    space: RowSpace | None = None
    scoring_collator: Callable[[Any], Callable[[list[dict[str, Any]]], dict[str, Any]]] = lambda collator: collator


def _build(config: Any) -> Any:
    return None if config is None else find(config.kind, config.name)(config.params)


class TrainerMixin:
    """Data decided during training, for any Hugging Face Trainer class that follows it in the MRO."""

    dataflex_setup: ClassVar[Setup]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        setup = self.dataflex_setup
        assert setup.space is not None, "the trainer was built before the data was loaded"
        self._dataflex_refuse()
        self._dataflex_controller: Controller | None = None
        self._dataflex_feed: PlanFeed | None = None
        self._dataflex_queue: deque[Rows] = deque()
        self._dataflex_rows: Rows | None = None
        self._dataflex_step_scale: torch.Tensor | None = None
        self._dataflex_recorder: RunRecorder | NullRecorder = NullRecorder()
        self._dataflex_seconds = {"checkpoint": 0.0, "evaluate": 0.0}
        self._dataflex_selector: Selector | None = _build(setup.config.selector)
        self._dataflex_mixer: Mixer | None = _build(setup.config.mixer)
        weighter: Weighter | None = _build(setup.config.weighter)
        self._dataflex_weighter = None if weighter is None or weighter.neutral else weighter
        self._dataflex_stats = weighting.WeightStats(weighter.name if weighter else "")
        if self._dataflex_weighter is not None:
            self.compute_loss_func = self._dataflex_loss
        if setup.config.freeze_gate:
            freeze_gates(self.model)

    # -- before training ------------------------------------------------------------------------

    def _dataflex_refuse(self) -> None:
        needs = self.dataflex_setup.config.needs
        partitioned = self.is_fsdp_enabled or (self.is_deepspeed_enabled and self._dataflex_zero_stage() == 3)
        if partitioned and not needs.zero3:
            raise UnsupportedError("this method needs whole parameters, but ZeRO-3 or FSDP partitions them over ranks")
        for what, size in (("tensor", self.get_tp_size()), ("context", self.get_cp_size())):
            if size > 1:
                raise UnsupportedError(f"{what} parallelism of size {size}: only data-parallel ranks are supported")
        if self.get_sp_size() > 1:
            raise UnsupportedError("sequence parallelism: only data-parallel ranks are supported")
        if self.args.n_gpu > 1:
            raise UnsupportedError("several devices in one process (DataParallel): start one process per device")

    def _dataflex_zero_stage(self) -> int:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return 0 if plugin is None else int(plugin.zero_stage)

    def _dataflex_shape(self) -> BatchShape:
        return BatchShape(
            micro_batch_size=self._train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            world=self.args.world_size,
            rank=self.args.process_index,
            drop_last=self.args.dataloader_drop_last,
            shuffle=self.dataflex_setup.shuffle,
        )

    def get_train_dataloader(self) -> EpochShell:
        """Return a loader that has the right lengths and no batches; see ``EpochShell``."""
        space = self.dataflex_setup.space
        assert space is not None
        shape = self._dataflex_shape()
        narrowing = self._dataflex_selector is not None and self._dataflex_selector.narrows
        per_rank = -(-space.num_rows // shape.micro_batch_size)
        micro = -(-per_rank // shape.world)
        if shape.drop_last:
            micro = space.num_rows // shape.micro_batch_size // shape.world
        if narrowing or self._dataflex_mixer is not None:  # every step is full
            micro = -(-micro // shape.accumulation) * shape.accumulation
        total = self.dataflex_setup.config.total_steps
        if total is not None:
            self.args.max_steps = total
        return EpochShell(space.num_rows, max(micro, 1))

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Take the number of steps from the Trainer's own count and build the controller."""
        values = super().set_initial_training_values(args, dataloader)
        self._dataflex_begin(max_steps=int(values[-1]))
        return values

    def _dataflex_begin(self, max_steps: int) -> None:
        setup, config = self.dataflex_setup, self.dataflex_setup.config
        assert setup.space is not None
        shape = self._dataflex_shape()
        if self._dataflex_weighter is not None:
            self._dataflex_weighter.active(0, max_steps)  # a burn-in longer than the run is told now
        schedule = Schedule(
            warmup_steps=config.warmup_steps,
            interval_steps=config.interval_steps or max(1, _PLAN_IDS // shape.global_batch),
            total_steps=max_steps,
            cycle_steps=config.cycle_steps,
        )
        seed = self.args.seed if config.seed is None else config.seed
        self._dataflex_controller = Controller(
            config=config,
            space=setup.space,
            schedule=schedule,
            shape=shape,
            seed=seed,
            signals=self._dataflex_signals(setup.space, shape, seed),
            selector=self._dataflex_selector,
            mixer=self._dataflex_mixer,
        )
        self._dataflex_identity = checkpoint.Identity.of(
            config,
            setup.space,
            global_batch=shape.global_batch,
            seed=seed,
            schedule={key: value for key, value in asdict(schedule).items() if key != "total_steps"},
        )
        self._dataflex_feed = PlanFeed(
            self.train_dataset,
            self.data_collator,
            shape,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def _dataflex_signals(self, space: RowSpace, shape: BatchShape, seed: int) -> SignalService:
        rows = max(shape.micro_batch_size, self.args.per_device_eval_batch_size)
        longest = max(int(space.lengths.max(initial=1)), *(int(t.lengths.max()) for t in space.targets.values()), 1)
        return SignalService(
            handle=ModelHandle(
                model=self.model,
                collate=self.dataflex_setup.scoring_collator(self.data_collator),
                autocast=self.compute_loss_context_manager,
                device=self.args.device,
                token_budget=rows * longest,
            ),
            train=Corpus(dataset=self.train_dataset, lengths=space.lengths),
            targets={name: Corpus(dataset=t.dataset, lengths=t.lengths) for name, t in space.targets.items()},
            seed=seed,
        )

    def _init_training_state(
        self, max_steps: Any, num_update_steps_per_epoch: Any, num_train_epochs: Any, resume: Any, trial: Any
    ) -> Any:
        """Open the record; on a resumed run, take back plan and states first."""
        values = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial)
        setup, controller = self.dataflex_setup, self._dataflex_controller
        assert controller is not None
        step = self.state.global_step
        if resume is not None and setup.config.resume_plan == "strict":
            controller.plan, state = checkpoint.load(Path(resume), self._dataflex_identity)
            controller.load_state_dict(state["controller"])
            if self._dataflex_weighter is not None:
                self._dataflex_weighter.load_state_dict(state["weighter"])
            self._dataflex_seconds.update(state["seconds"])
        fresh = True
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir) / checkpoint.FOLDER
            fresh = resume is None or not (folder / EVENTS).is_file()
            current = None if controller.plan is None else controller.plan.interval.index
            self._dataflex_recorder = RunRecorder(folder, None if fresh else step, plan_in_progress=current)
        controller.recorder = self._dataflex_recorder
        if fresh:
            self._dataflex_recorder.run_started(
                config=setup.resolved,
                schedule=asdict(controller.schedule),
                row_space=controller.space.describe(),
                versions=setup.versions,
                world=controller.shape.world,
                global_batch=controller.shape.global_batch,
            )
        if resume is not None:
            self._dataflex_recorder.resumed(step=step, checkpoint=str(resume))
        self._dataflex_clock = time.perf_counter()
        return values

    # -- during training ------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Serve the micro-batches of the next optimizer step from the plan."""
        controller, feed = self._dataflex_controller, self._dataflex_feed
        assert controller is not None
        assert feed is not None
        step = self.state.global_step
        plan = controller.plan_for(step)
        if controller.ends_at is not None:
            self.state.max_steps = min(self.state.max_steps, controller.ends_at)
            if step >= controller.ends_at:
                self.control.should_training_stop = True
                return [], None
        batches, rows = feed.step(plan, step)
        if len(batches) != num_batches:
            raise ComponentError(f"step {step}: the plan has {len(batches)} micro-batches, the Trainer {num_batches}")
        num_items = self._get_num_items_in_batch(batches, device)
        self._dataflex_queue = deque(rows)
        if self._dataflex_weighter is not None:
            self._dataflex_step_scale = self._dataflex_scale(batches, rows, num_items, device)
        return batches, num_items

    def _dataflex_scale(self, batches: list[Any], rows: list[Rows], num_items: Any, device: Any) -> Any:
        """Return num_items / sum(w * tokens) of the step for weights that are known beforehand, else None."""
        weighter, space = self._dataflex_weighter, self.dataflex_setup.space
        assert weighter is not None
        assert space is not None
        if weighter.normaliser != "token":
            return None
        total = torch.zeros((), dtype=torch.float64)
        for batch, ids in zip(batches, rows, strict=True):
            weights = weighter.static_weights(ids, space.columns)
            if weights is None:
                return None
            tokens_B = batch["labels"].ne(weighting.IGNORE_INDEX).sum(dim=1).double()
            total += (torch.from_numpy(weights).double() * tokens_B).sum()
        if self.args.average_tokens_across_devices:
            total = comm.gather_sum(total.to(device))
        items = torch.as_tensor(num_items, dtype=torch.float64, device=total.device)
        return torch.where(total > 0, items / total, torch.zeros_like(total))

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Note which rows the micro-batch holds while the Trainer trains on it."""
        self._dataflex_rows = self._dataflex_queue.popleft()
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        finally:
            self._dataflex_rows = None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Weights act on training losses only; evaluation computes the stock loss."""
        if self._dataflex_weighter is None or self._dataflex_rows is not None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        self.compute_loss_func = None
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.compute_loss_func = self._dataflex_loss

    def _dataflex_loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Weigh one training micro-batch; called by the Trainer as its ``compute_loss_func``."""
        weighter, space, rows = self._dataflex_weighter, self.dataflex_setup.space, self._dataflex_rows
        assert weighter is not None
        assert space is not None
        assert rows is not None
        step = self.state.global_step
        losses = weighting.token_losses(outputs.logits, labels)
        normaliser, scale = weighter.normaliser, self._dataflex_step_scale
        if not weighter.active(step, self.state.max_steps):
            weights, normaliser, scale = losses.loss_BT.new_ones(len(rows), 1), "count", None
        else:
            known = weighter.static_weights(rows, space.columns)
            if known is None:
                batch = weighting.view(losses, rows, step=step, total_steps=self.state.max_steps)
                known_tensor = weighter.weigh(batch)
            else:
                known_tensor = torch.from_numpy(known)
            weights = weighting.checked(known_tensor, weighter, losses)
            self._dataflex_stats.add(weights)
        trainer_multiplies = self.args.average_tokens_across_devices and num_items_in_batch is not None
        return weighting.weighted_loss(
            losses,
            weights,
            normaliser=normaliser,
            num_items=num_items_in_batch,
            num_micro_batches=self.current_gradient_accumulation_steps,
            step_scale=scale,
            replicas=1 if trainer_multiplies else self.args.world_size,
        )

    # -- record and checkpoints -------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Put our scalars beside the loss and into the record."""
        controller = self._dataflex_controller
        training = "loss" in logs and controller is not None and controller.plan is not None
        if training:
            assert controller is not None
            logs.update(self._dataflex_scalars(controller))
        super().log(logs, *args, **kwargs)
        step = self.state.global_step
        if training:
            self._dataflex_recorder.stepped(step, dict(logs))
        elif any(key.startswith("eval_") for key in logs):
            self._dataflex_recorder.evaluated(step, dict(logs))
        elif "train_runtime" in logs and controller is not None:
            self._dataflex_finish(dict(logs), controller)

    def _dataflex_scalars(self, controller: Controller) -> dict[str, float]:
        assert controller.plan is not None
        interval = controller.plan.interval
        scalars = {"dataflex/interval": float(interval.index)}
        scalars.update({f"dataflex/{key}": value for key, value in self._dataflex_stats.read().items()})
        for name, share in controller.shares().items():
            scalars[f"dataflex/mix/{name}"] = share
        scalars["dataflex/decide_seconds"] = controller.seconds["signals"] + controller.seconds["decide"]
        return scalars

    def _dataflex_finish(self, metrics: dict[str, float], controller: Controller) -> None:
        others = {**controller.seconds, **self._dataflex_seconds}
        total = time.perf_counter() - self._dataflex_clock
        this_run = others["signals"] + others["decide"] + others["checkpoint"] + others["evaluate"]
        seconds = {"train": max(total - this_run, 0.0), **others}
        self._dataflex_recorder.finished(self.state.global_step, metrics, seconds)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as stock, noting the time."""
        started = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self._dataflex_seconds["evaluate"] += time.perf_counter() - started
        return metrics

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        super()._save_checkpoint(*args, **kwargs)
        self._dataflex_seconds["checkpoint"] += time.perf_counter() - started
        self._dataflex_recorder.checkpointed(
            self.state.global_step,
            f"checkpoint-{self.state.global_step}",
            time.perf_counter() - started,
        )

    def _save_rng_state(self, output_dir: str) -> None:
        """Write our state beside the random states, before ``trainer_state.json`` and any rotation."""
        super()._save_rng_state(output_dir)
        controller = self._dataflex_controller
        assert controller is not None
        if self.args.should_save:
            weighter = self._dataflex_weighter
            state = {
                "controller": controller.state_dict(),
                "weighter": weighter.state_dict() if weighter else {},
                "seconds": dict(self._dataflex_seconds),
            }
            checkpoint.save(
                Path(output_dir), self._dataflex_identity, controller.plan, state, self.state.global_step
            )
        comm.barrier()  # trainer_state.json marks the checkpoint complete: every rank's part is there by then


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
