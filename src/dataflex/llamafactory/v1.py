"""The adapter between LLaMA-Factory v1's trainers, of sft and of reward models, and a session.

v1 asks for the micro-batches of an optimizer step right after the update before; there the session serves them. The
gradients of a step are whole when the last of its micro-batches has been gone through. Upstream names relied upon, each
asserted by ``tests/upstream``: what is imported here of ``llamafactory.v1``, the trainer's methods overridden here, the
order in which ``fit`` works, and the names that ``base_trainer``, the trainers and ``checkpoint`` look up.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from llamafactory.v1.accelerator.helper import ReduceOp
from llamafactory.v1.accelerator.interface import DistributedInterface
from llamafactory.v1.core import base_trainer
from llamafactory.v1.core.data_engine import DataEngine
from llamafactory.v1.core.utils import checkpoint as v1_checkpoint
from llamafactory.v1.core.utils.batching import BatchGenerator
from llamafactory.v1.trainers import rm_trainer, sft_trainer
from llamafactory.v1.utils.callbacks import TrainerCallback
from llamafactory.v1.utils.helper import compute_valid_tokens, get_tokenizer
from torch.nn.parallel import DistributedDataParallel

from dataflex import checkpoints, comm
from dataflex.clock import PhaseClock
from dataflex.config.mappings import as_mapping
from dataflex.config.split import Split
from dataflex.errors import CheckpointError, UnsupportedError
from dataflex.huggingface.loop import replaced
from dataflex.llamafactory.v1_rows import NumberedRows, RenderedRows, collate, loss_weights
from dataflex.plan.plan import BatchShape
from dataflex.train.loader import ROWS
from dataflex.train.session import Loop, Session, Setup

_OF_LOSS = ("labels", "loss_weights")
_TRAINERS = {"sft": (sft_trainer, "SFTTrainer", "run_sft"), "rm": (rm_trainer, "RMTrainer", "run_rm")}
"""Where v1 looks up the trainer of a stage, and what starts it."""


class _Batches(list[Any]):
    """The micro-batches of a step; ``trainer`` is told each time they have been gone through."""

    trainer: Any

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()
        self.trainer.gone_through()


class _Planned:
    """Stands in for v1's ``BatchGenerator``: micro-batches come from the session."""

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._epoch = trainer, 0
        self._steps = trainer.shape.steps_per_epoch(trainer.dataflex_setup.rows.num_rows)
        self.num_micro_batch = trainer.shape.accumulation

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[_Batches]:
        trainer, session = self._trainer, self._trainer.dataflex
        while trainer.global_step < min((self._epoch + 1) * self._steps, trainer.num_training_steps):
            step = session.step(trainer.global_step)
            trainer.num_training_steps = min(trainer.num_training_steps, session.total_steps)
            if step is None:  # the data ran out
                trainer.num_training_steps = trainer.global_step
                return
            yield trainer.serve(step.batches)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        return {}  # the session knows where it is

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Stock(BatchGenerator):
    """v1's own batches, whose rows are noted."""

    trainer: Any

    def __next__(self) -> _Batches:
        batches = super().__next__()
        for batch in batches:
            batch[ROWS] = np.array([int(row) for row in batch["_dataset_name"]], dtype=np.int64)
        self.trainer.dataflex.serve(self.trainer.global_step, batches)
        served: _Batches = self.trainer.serve(batches)
        return served


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    engine = isinstance(model, DistributedDataParallel) or hasattr(model, "get_global_grad_norm")  # DeepSpeed's
    return model.module if engine else model


class _Callback(TrainerCallback):
    def __init__(self, session: Session) -> None:
        self._session = session

    def on_step_end(self, args: Any, state: Any, **_: Any) -> None:
        self._session.updated(state.global_step)

    def on_log(self, args: Any, state: Any, logs: dict[str, Any], **_: Any) -> None:
        self._session.log(state.global_step, dict(logs), logs.update)


class Checkpoints(v1_checkpoint.TrainingCheckpointCoordinator):
    """v1's checkpoints with our state; ``CHECKPOINT_COMPLETE`` comes when all files are there and hashed."""

    resumed: str | None = None

    def save(self, epoch: int) -> None:
        """Write a checkpoint after the last step (collective)."""
        args, step = self._t.args, self._t.global_step
        folder, limit = Path(args.output_dir) / f"checkpoint-{step}", args.save_total_limit
        early = (v1_checkpoint, "mark_checkpoint_complete", lambda folder: None)
        with replaced(early, (args, "save_total_limit", None)), self._t.dataflex.checkpoint(folder, step):
            super().save(epoch)
        if comm.rank() == 0:
            v1_checkpoint.mark_checkpoint_complete(str(folder))
            if limit is not None:
                v1_checkpoint.rotate_checkpoints(args.output_dir, limit)

    def resume(self, ckpt_path: str) -> None:
        """Load all but the session's state, which it takes back when training starts."""
        found = v1_checkpoint.resolve_resume_checkpoint_path(ckpt_path, self._t.args.output_dir)
        self.resumed = found
        broken = None if found is None else checkpoints.manifest_reason(Path(found))
        if broken is not None and not self._t.dataflex.config.stock:
            raise CheckpointError(f"resume_from_checkpoint: {found} cannot be resumed from: {broken}")
        if found is not None:
            with replaced((v1_checkpoint, "load_file", partial(self._loaded, v1_checkpoint.load_file))):
                super().resume(found)

    def _loaded(self, load: Any, file: str, **options: Any) -> dict[str, torch.Tensor]:
        """Load a file of weights, and give tied ones all their names, of which one is saved and all are wanted."""
        found: dict[str, torch.Tensor] = load(file, **options)
        names: dict[int, list[str]] = {}
        for name, value in _unwrapped(self._t.model).state_dict().items():
            names.setdefault(value.data_ptr(), []).append(name)
        for same in names.values():
            saved = next((name for name in same if name in found), None)
            found |= {} if saved is None else dict.fromkeys(same, found[saved])
        return found


class DynamicTrainer(base_trainer.BaseTrainer):
    """What goes before v1's trainer of a stage, whose data is then decided during training."""

    dataflex_setup: Setup
    held_out: str | None  # where targets are looked up first

    def _create_batch_generator(self) -> None:
        setup, args, world = self.dataflex_setup, self.args, self.dp_size
        self.dataflex, self._left = Session(setup), 0
        if setup.config.total_steps is not None:
            args.max_steps = setup.config.total_steps
        with setup.clock.phase("data"):
            engines = self.train_dataset, DataEngine(self.held_out) if self.held_out else self.train_dataset
            pairs = setup.stage == "rm"
            rows, held = (RenderedRows(engine, self.renderer, args.cutoff_len, pairs=pairs) for engine in engines)
            setup.space = rows.space(setup.config, held)
        if self.dataflex.weighs and (odd := [each for each in loss_weights(setup.rows) if each not in (0.0, 1.0)]):
            told = f"messages have a loss_weight of {odd[0]:g}, which the loss that a method here makes would leave out"
            raise UnsupportedError(f"train_dataset: {told}; write 0 or 1")
        self.shape = BatchShape(
            micro_batch_size=args.micro_batch_size,
            accumulation=max(1, (args.global_batch_size or 1) // (world * args.micro_batch_size)),
            world=world,
            rank=comm.rank(),
            drop_last=False,
            shuffle=True,
        )
        if not setup.config.stock:
            self.train_batch_generator: Any = _Planned(self)
            return
        numbered = (self, "train_dataset", NumberedRows(self.train_dataset))
        with replaced((base_trainer, "BatchGenerator", _Stock), numbered):
            super()._create_batch_generator()
            self.train_batch_generator.trainer = self

    def _loop(self) -> Loop:
        args, sharding = self.args, self._sharding()
        return Loop(
            model=_unwrapped(self.model),
            optimizer=lambda: self.optimizer,
            learning_rate=lambda: float(self.lr_scheduler.get_last_lr()[0]),
            collate=partial(collate, args.cutoff_len, ()),
            score_collate=partial(collate, args.cutoff_len, ("loss_weights",)),
            shape=self.shape,
            total_steps=self.num_training_steps,
            seed=args.seed,
            device=self.device,
            output_dir=Path(args.output_dir),
            tokenizer=get_tokenizer(self.renderer.processor),
            score_rows=args.micro_batch_size,
            num_workers=args.batching_workers,
            pin_memory=True,
            averages=False,  # the trainer multiplies by the ranks itself
            sharding=sharding,
            release=lambda: self.model.empty_partition_cache() if sharding == "zero3" else None,
            parallel={"context": self.cp_size},
        )

    def _sharding(self) -> Literal["none", "zero", "zero3", "fsdp2"]:
        if self._deepspeed_engine is None:
            return "none" if self.args.dist_config is None else "fsdp2"
        return "zero3" if self._deepspeed_engine.accelerator.state.deepspeed_plugin.zero_stage == 3 else "zero"

    def fit(self) -> None:
        """Train the model."""
        session, resumed = self.dataflex, self._checkpoint.resumed
        try:
            session.prepare(self._loop())
            session.start(resumed, self.global_step if resumed is None or session.config.stock else None)
            self.callback_handler.callbacks.insert(0, _Callback(session))  # before that which writes the log
            super().fit()
            session.finish(self.global_step, {})
        finally:
            session.close()

    def serve(self, batches: list[Any]) -> _Batches:
        """Return the micro-batches of a step, which begins (collective where losses are weighed)."""
        self._left, served = len(batches), _Batches(batches)
        if self.dataflex.weighs:
            counted = compute_valid_tokens(batches)
            self._tokens = DistributedInterface().all_reduce(counted, op=ReduceOp.SUM)
        served.trainer = self
        return served

    def gone_through(self) -> None:
        """Tell the session of the end of a step; v1 also goes through the batches before, to count tokens."""
        if self._left == 0:
            self._left = -1
            self.dataflex.end_step()

    def compute_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the loss of a micro-batch, which v1 multiplies by its share of the step's tokens."""
        session, self._left = self.dataflex, self._left - 1
        if not session.weighs:
            with session.forward():
                loss: torch.Tensor = super().compute_loss(batch)
            session.note(batch, loss)
            return loss
        moved = {key: value.to(self.device) if torch.is_tensor(value) else value for key, value in batch.items()}
        with session.forward():
            given = {key: value for key, value in moved.items() if torch.is_tensor(value) and key not in _OF_LOSS}
            logits = self.model(**given).logits
        loss, tokens = session.loss(moved, logits), compute_valid_tokens([batch])
        return loss * ((self._tokens + 1e-6) / tokens) if tokens else loss

    def save_model(self) -> None:
        """Write the model, and the average of its last weights."""
        super().save_model()
        average = None if self.dataflex.average is None else self.dataflex.average.found()
        if average is not None:
            folder = str(Path(self.args.output_dir) / "averaged")
            with average.in_place(), replaced((self.args, "output_dir", folder)):
                super().save_model()


def run(parts: Split, clock: PhaseClock) -> None:
    """Train in this process as LLaMA-Factory v1 does: stock without a dynamic block, else with our trainer.

    The stage, which v1 is told by its command, is a key here.
    """
    args, config = dict(parts.v1 or {}), parts.dynamic
    stage = args.pop("stage") if str(args.get("stage")) in _TRAINERS else "sft"
    module, name, start = _TRAINERS[stage]
    if config is None:
        getattr(module, start)(args)
        return
    resolved = {**parts.lf, "v1": dict(parts.v1 or {}), "dynamic": as_mapping(config)}
    setup = Setup(config=config, resolved=resolved, stage=stage, clock=clock)
    given = {"dataflex_setup": setup, "held_out": args.get("eval_dataset")}
    ours = type(f"Dynamic{name}", (DynamicTrainer, getattr(module, name)), given)
    try:
        with replaced((module, name, ours), (base_trainer, "TrainingCheckpointCoordinator", Checkpoints)):
            getattr(module, start)(args)
    finally:
        setup.recorder.ended()
