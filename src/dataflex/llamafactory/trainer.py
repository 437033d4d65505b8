"""Every touch point with the Hugging Face Trainer.

``TrainerMixin`` goes in front of any Trainer class. Upstream names relied upon (transformers 5.x), each
asserted by ``tests/upstream``: ``get_train_dataloader``, ``get_eval_dataloader``, ``set_initial_training_values``,
``_init_training_state``, ``get_batch_samples``, ``_get_num_items_in_batch``, ``training_step``,
``compute_loss``, ``compute_loss_func``, ``current_gradient_accumulation_steps``, ``_finalize_training``, ``train``,
``save_model``, ``add_callback``, ``callback_handler``, ``log``, ``evaluate``, ``predict``,
``compute_loss_context_manager``, ``get_{tp,cp,sp}_size``; of LLaMA-Factory's trainers ``save_predictions``; those of
saving are in ``llamafactory.trainer``.

The Trainer asks ``get_batch_samples`` for all micro-batches of an optimizer step right after the
previous step's update; there a plan is decided if the step has none, and its rows are served. Counting
tokens, accumulation and clipping stay the Trainer's.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from dataflex import checkpoints, comm
from dataflex.checkpoints import FOLDER
from dataflex.config.needs import unmet
from dataflex.ending import Terminated, TermWish, heed_parent_only
from dataflex.errors import ComponentError, ConfigError
from dataflex.method import DomainWeighter, Rows, RunFacts, State
from dataflex.plan.proportions import write_proportions
from dataflex.plan.validate import check_state
from dataflex.record.clock import OTHER
from dataflex.record.read import recorded_run
from dataflex.record.recorder import NullRecorder, RunRecorder
from dataflex.signals.model_parts import capture_hidden, model_parts
from dataflex.train import checkpoint
from dataflex.train.evaluation import EvaluationSums, perplexity, totals, undivided
from dataflex.train.feedback import SAMPLES, describe_rows
from dataflex.train.loader import EpochShell
from dataflex.train.loss import Reweighter, balance_loss
from dataflex.train.session import (
    Session,
    Setup,
    batch_shape,
    build,
    freeze_gates,
    micro_batches_per_epoch,
    open_reference,
    refuse_unsupported,
)

__all__ = ["SavingMixin", "StopOnTerm", "TrainerMixin"]

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class SavingMixin(_Trainer):
    """Begins and seals checkpoints, and carries over what is summed up between two logs."""

    dataflex_setup: ClassVar[Setup]
    _dataflex_session: Session | None
    _dataflex_recorder: RunRecorder
    _dataflex_reweighter: Reweighter | None

    _dataflex_run = ""
    _dataflex_taken_up: tuple[Path, int] | None = None
    _dataflex_unsealed: tuple[Path, float] | None = None
    _dataflex_in_turn = False
    _dataflex_saved_at: int | None = None
    _dataflex_sums: State | None = None

    def _dataflex_settle_run(self, resume: str | None) -> bool:
        """Take the run's id from the checkpoint or make one, the same on all ranks (collective).

        Returns:
            Whether the record in the output folder, if there is one, is that of the run.
        """
        comm.agree("resume_from_checkpoint", str(resume))
        output_dir = Path(self.args.output_dir)
        found: tuple[str, bool] = ("", False)
        if comm.rank() == 0:
            run = None if resume is None else checkpoints.run_of(Path(resume))
            recorded = recorded_run(output_dir / checkpoints.FOLDER)
            found = (
                run or checkpoints.new_run(),
                resume is not None and recorded is not None and recorded in ("", run),
            )
            checkpoints.begin_run(output_dir, found[0])
        self._dataflex_run, continues = comm.broadcast_object(found)
        if resume is not None:
            self._dataflex_taken_up = (Path(resume).resolve(), self.state.global_step)
        return continues

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self._dataflex_taken_up == (folder.resolve(), self.state.global_step):
            return  # it is there, and nothing was trained since
        clock = self.dataflex_setup.clock
        before = clock.spent().get("checkpoint", 0.0)
        with clock.phase("checkpoint"):
            if self.args.should_save:
                checkpoints.begin(folder)
            comm.barrier()  # no rank writes before
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
        self._dataflex_unsealed = (folder, before)
        if not self._dataflex_in_turn:
            self._dataflex_seal()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save as stock; what was saved counts when the callbacks have had it too."""
        with self._dataflex_sealed_after():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    @contextmanager
    def _dataflex_sealed_after(self) -> Iterator[None]:
        """Seal what is saved inside at the end of it, since callbacks may still change its files."""
        self._dataflex_in_turn = True
        try:
            yield
        finally:
            self._dataflex_in_turn = False
        self._dataflex_seal()

    def _dataflex_seal(self) -> None:
        """Make a checkpoint count, then remove those beyond ``save_total_limit`` (collective)."""
        if self._dataflex_unsealed is None:
            return
        (folder, before), self._dataflex_unsealed = self._dataflex_unsealed, None
        clock = self.dataflex_setup.clock
        with clock.phase("checkpoint"):
            comm.barrier()  # every rank's part is there
            if self.args.should_save:
                from transformers.trainer_utils import rotate_checkpoints

                every_hash = self.dataflex_setup.config.checkpoint_hash == "full"
                checkpoints.seal(folder, run=self._dataflex_run, every_hash=every_hash)
                rotate_checkpoints(
                    output_dir=str(folder.parent),
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=self.state.best_model_checkpoint,
                    use_mtime=True,
                )
        seconds = clock.spent()["checkpoint"] - before
        self._dataflex_saved_at = self.state.global_step
        self._dataflex_recorder.checkpointed(self.state.global_step, folder.name, seconds)

    def _save_rng_state(self, output_dir: str) -> None:
        """Write our state beside the random states, before ``trainer_state.json``."""
        super()._save_rng_state(output_dir)
        session, reweighter = self._dataflex_session, self._dataflex_reweighter
        assert session is not None
        since_log = self._dataflex_since_log()
        if self.args.should_save:
            state = {
                "controller": session.controller.state_dict(),
                "weighter": check_state(reweighter.weighter) if reweighter and reweighter.weighter else {},
                "row_weights": reweighter.row_weights.state_dict() if reweighter and reweighter.row_weights else {},
                "reference": reweighter.reference.state_dict() if reweighter and reweighter.reference else {},
                "seconds": self.dataflex_setup.clock.totals(),
                "since_log": since_log,
            }
            plan, step = session.controller.plan, self.state.global_step
            checkpoint.save(Path(output_dir), session.identity, plan, state, step)
            self._dataflex_write_outcome()
            self._dataflex_write_weights()
        comm.barrier()  # other tools take trainer_state.json as the mark: every rank's part is there by then

    def _dataflex_write_outcome(self, *, ended: bool = False) -> None:
        raise NotImplementedError

    def _dataflex_write_weights(self) -> None:
        raise NotImplementedError

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as stock; beside new weights no trainer state of an earlier save is left for its time."""
        if not _internal_call and self.args.should_save:
            checkpoints.unmark(Path(output_dir or self.args.output_dir))
        super().save_model(output_dir, _internal_call)

    def _dataflex_since_log(self) -> State:
        """Return what has been summed up since the last log (collective); the loss by rank."""
        losses, _ = comm.gather_rows(self._tr_loss.detach().reshape(1), equal=True)
        reweighter = self._dataflex_reweighter
        return {
            "loss": losses.cpu().numpy(),
            "total_loss": float(self._total_loss_scalar),
            "logged_step": int(self._globalstep_last_logged),
            "reweighter": {} if reweighter is None else reweighter.since_log(),
        }

    def _dataflex_restore_sums(self) -> None:
        """Take back what was summed up since the last log; once, when the Trainer has set its own sums to zero."""
        if self._dataflex_sums is None:
            return
        sums, self._dataflex_sums = self._dataflex_sums, None
        losses = np.asarray(sums["loss"])
        same = len(losses) == comm.world()
        loss = losses[comm.rank()] if same else losses.mean()  # logged is the mean over ranks
        self._tr_loss += torch.tensor(loss, dtype=self._tr_loss.dtype, device=self._tr_loss.device)
        self._total_loss_scalar = sums["total_loss"]
        self._globalstep_last_logged = sums["logged_step"]
        if self._dataflex_reweighter is not None:
            self._dataflex_reweighter.restore_since_log(sums["reweighter"], self.args.device)


class StopOnTerm(TrainerCallback):
    """Asks the Trainer to stop once any rank was sent SIGTERM.

    Ranks tell each other after every step and read what was told after the step before: nobody waits for the
    answer, all have the same one, and one that got the signal late or not at all stops with the others.

    Args:
        device: Where ranks exchange.
    """

    def __init__(self, device: torch.device) -> None:
        self.wish = TermWish()
        self.agreed = False
        self._device = device
        self._told: tuple[torch.Tensor, Any] | None = None
        self._noted = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """From here on there is something to save."""
        self._told = None
        told = "[dataflex] SIGTERM: ending after the step in progress, with a checkpoint"
        self._noted.enter_context(self.wish.noted(told if comm.rank() == 0 else ""))

    def over(self) -> None:
        """Leave SIGTERM to whoever had it before."""
        self._noted.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop after this step if it is agreed (collective)."""
        before = self._told
        self._told = self._tell()
        self.agreed = self.agreed or self._read(before)
        if self.agreed:
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Do nothing that is due at the end of an epoch, which this is not."""
        if self.agreed:
            control.should_log = control.should_evaluate = control.should_save = False

    def settle(self) -> bool:
        """Return whether the run is to end here, as every rank sees it (collective)."""
        self.agreed = self._read(self._told) or self._read(self._tell()) or self.agreed
        self._told = None
        return self.agreed

    def _tell(self) -> tuple[torch.Tensor, Any]:
        flag = torch.tensor(int(self.wish.asked), device=self._device)
        return flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True) if comm.world() > 1 else None

    def _read(self, told: tuple[torch.Tensor, Any] | None) -> bool:
        if comm.world() == 1:
            return self.wish.asked
        if told is None:
            return False
        flag, work = told
        work.wait()
        return bool(flag)


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


logger = logging.getLogger(__name__)

_TRAINING = ("train", "signals", "decide", "evaluate", "checkpoint")
"""Phases that the closing event always names."""


class TrainerMixin(SavingMixin, _Trainer):
    """Data decided during training, for any Hugging Face Trainer class that follows it in the MRO."""

    dataflex_setup: ClassVar[Setup]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        setup = self.dataflex_setup
        refuse_unsupported(self, setup.config)
        self._dataflex_methods = {"selector": build(setup.config.selector), "mixer": build(setup.config.mixer)}
        self._dataflex_reweighter = self._dataflex_make_reweighter(build(setup.config.weighter))
        if self._dataflex_reweighter is not None:
            self.compute_loss_func: Any = self._dataflex_loss
        if setup.config.freeze_gate:
            freeze_gates(self.model)
        self._dataflex_session: Session | None = None
        self._dataflex_recorder: RunRecorder = NullRecorder()
        self._dataflex_queue: deque[Rows] = deque()
        self._dataflex_rows: Rows | None = None
        self._dataflex_batch: dict[str, Any] = {}
        self._dataflex_hidden: list[torch.Tensor] = []
        self._dataflex_evaluation = EvaluationSums()
        self._dataflex_evaluated: dict[str, tuple[float, float]] = {}
        self._dataflex_stop: StopOnTerm | None = None
        if setup.config.save_on_term:
            self._dataflex_stop = StopOnTerm(self.args.device)
            self.add_callback(self._dataflex_stop)

    # -- before training ------------------------------------------------------------------------

    def _dataflex_make_reweighter(self, weighter: Any) -> Reweighter | None:
        """Return what makes the training loss, or None where it is the stock one and nobody looks at it."""
        setup, mixer = self.dataflex_setup, self._dataflex_methods["mixer"]
        if weighter is not None and weighter.neutral:
            weighter = None
        if mixer is not None and not (mixer.observes or isinstance(mixer, DomainWeighter)):
            mixer = None
        if weighter is None and mixer is None:
            return None
        return Reweighter(
            weighter,
            mixer,
            columns=setup.rows.columns,
            domains=setup.rows.domains,
            over_ranks=self.args.average_tokens_across_devices,
            world=self.args.world_size,
            packed=setup.packed,
        )

    def get_train_dataloader(self) -> EpochShell:
        """Return a loader that has the right lengths and no batches; see ``EpochShell``."""
        setup = self.dataflex_setup
        if setup.config.total_steps is not None:
            self.args.max_steps = setup.config.total_steps
        selector, mixer = self._dataflex_methods["selector"], self._dataflex_methods["mixer"]
        micro_batches = micro_batches_per_epoch(
            setup.rows.num_rows,
            batch_shape(self, shuffle=setup.shuffle),
            full_steps=mixer is not None or (selector is not None and selector.selects_subset),
        )
        return EpochShell(setup.rows.num_rows, micro_batches)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return the stock loader, whose workers leave SIGTERM to this process."""
        loader = super().get_eval_dataloader(*args, **kwargs)
        if self._dataflex_stop is not None and loader.num_workers and loader.worker_init_fn is None:
            loader.worker_init_fn = heed_parent_only
        return loader

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Take the number of steps from the Trainer's own count and build the session."""
        values = super().set_initial_training_values(args, dataloader)
        max_steps = int(values[-1])
        setup = self.dataflex_setup
        lacking = list(unmet(setup.config, RunFacts(total_steps=max_steps)))
        if lacking:
            raise ConfigError(lacking)
        reweighter = self._dataflex_reweighter
        if reweighter is not None and reweighter.weighter is not None:
            reweighter.check_known(setup.rows.all_rows())
        self._dataflex_session = Session.begin(
            setup,
            self,
            max_steps=max_steps,
            shape=batch_shape(self, shuffle=setup.shuffle),
            methods=self._dataflex_methods,
        )
        if reweighter is not None:
            reweighter.reference = open_reference(setup, self, max_steps)
        return values

    def _init_training_state(
        self,
        max_steps: Any,
        num_update_steps_per_epoch: Any,
        num_train_epochs: Any,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> Any:
        """On a resumed run, take back plan and states; then open the record."""
        resume = resume_from_checkpoint
        values = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial)
        session = self._session
        if resume is not None and self.dataflex_setup.config.resume_plan == "ignore":
            session.controller.decided = checkpoint.decisions(Path(resume))
        elif resume is not None:
            session.controller.plan, state = checkpoint.load(Path(resume), session.identity)
            session.controller.load_state_dict(state["controller"])
            reweighter = self._dataflex_reweighter
            if reweighter is not None and reweighter.weighter is not None:
                reweighter.weighter.load_state_dict(state["weighter"])
                if reweighter.row_weights is not None:
                    reweighter.row_weights.load_state_dict(state.get("row_weights") or {})
            if reweighter is not None and reweighter.reference is not None:
                reweighter.reference.load_state_dict(state.get("reference") or {})
            self.dataflex_setup.clock.before = {key: float(value) for key, value in state["seconds"].items()}
            self._dataflex_sums = state.get("since_log")
        self._dataflex_open_record(resume, fresh=not self._dataflex_settle_run(resume))
        self.dataflex_setup.clock.switch("train")
        return values

    @property
    def _session(self) -> Session:
        assert self._dataflex_session is not None
        return self._dataflex_session

    def _dataflex_open_record(self, resume: Any, *, fresh: bool) -> None:
        setup, controller, step = self.dataflex_setup, self._session.controller, self.state.global_step
        folder = Path(self.args.output_dir) / FOLDER
        if self.is_world_process_zero():
            current = None if controller.plan is None else controller.plan.interval.index
            self._dataflex_recorder = setup.recorder = RunRecorder(
                folder, None if fresh else step, plan_in_progress=current, clock=setup.clock
            )
        controller.recorder = self._dataflex_recorder
        self._dataflex_recorder.run_started(  # a resumed run may have more steps, or other caps
            config=setup.resolved,
            schedule=asdict(controller.schedule),
            row_space=controller.space.describe(),
            versions=setup.versions,
            world=controller.shape.world,
            global_batch=controller.shape.global_batch,
            run=self._dataflex_run,
        )
        if resume is not None:
            self._dataflex_recorder.resumed(step=step, checkpoint=str(resume))

    # -- the end of training ---------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, noting where the time goes, and take SIGTERM as ``StopOnTerm`` says meanwhile."""
        with ExitStack() as over:
            over.enter_context(self.dataflex_setup.clock.phase("prepare"))
            if self._dataflex_stop is not None:
                over.callback(self._dataflex_stop.over)
            over.callback(self._dataflex_end_workers)
            return super().train(*args, **kwargs)

    def _dataflex_end_workers(self) -> None:
        if self._dataflex_session is not None:
            self._dataflex_session.feed.close()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, noting the time; once training is over, SIGTERM waits until that is done."""
        clock = self.dataflex_setup.clock
        if _internal_call:  # part of a checkpoint
            with clock.phase(clock.now if clock.now == "checkpoint" else "save"):
                super().save_model(output_dir, _internal_call)
            return
        wish = TermWish()
        with wish.noted(), clock.phase("save"):
            super().save_model(output_dir, _internal_call)
        if wish.asked:
            raise Terminated(f"ended by SIGTERM; {output_dir or self.args.output_dir} holds the trained model")

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """End a run that SIGTERM ended, with a checkpoint and nothing of what follows a finished training."""
        stop, step = self._dataflex_stop, self.state.global_step
        if stop is None or not stop.settle():
            return super()._finalize_training(*args, **kwargs)
        if self._dataflex_saved_at != step:
            with self._dataflex_sealed_after():
                self._save_checkpoint(self.model_wrapped, None)
                self.callback_handler.on_save(self.args, self.state, self.control)
        self.callback_handler.on_train_end(self.args, self.state, self.control)
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        raise Terminated(
            f"ended by SIGTERM after step {step} of {self.state.max_steps}; go on from here with "
            f"'resume_from_checkpoint={folder}'"
        )

    # -- during training ------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Serve the micro-batches of the next optimizer step from the plan."""
        self._dataflex_restore_sums()
        controller, step = self._session.controller, self.state.global_step
        if step < self.state.max_steps:
            plan = controller.plan_for(step)
            if controller.ends_at is not None:
                self.state.max_steps = min(self.state.max_steps, controller.ends_at)
        if step >= self.state.max_steps:  # resumed from the end of a finished run, or the data ran out
            self.control.should_training_stop = True
            return [], None
        if self._dataflex_reweighter is not None and self._dataflex_reweighter.reference is not None:
            with self.dataflex_setup.clock.phase("reference"):
                self._dataflex_reweighter.cover(plan, self.state.max_steps)
        batches, rows = self._session.feed.step(plan, step)
        if len(batches) != num_batches:
            raise ComponentError(f"step {step}: the plan has {len(batches)} micro-batches, the Trainer {num_batches}")
        num_items = self._get_num_items_in_batch(batches, device)
        self._dataflex_queue = deque(rows)
        reweighter = self._dataflex_reweighter
        if reweighter is not None:
            weighter = reweighter.weighter
            if weighter is not None and weighter.active(step, self.state.max_steps):
                controller.prepare(weighter, step)
            reweighter.begin_step(batches, rows, num_items, device, step=step, total_steps=self.state.max_steps)
        return batches, num_items

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Note which rows the micro-batch holds while the Trainer trains on it."""
        self._dataflex_rows = self._dataflex_queue.popleft()
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._dataflex_rows, self._dataflex_batch, self._dataflex_hidden = None, {}, []
        if not self._dataflex_queue and self._dataflex_reweighter is not None:
            self._dataflex_reweighter.end_step(
                step=self.state.global_step,
                total_steps=self.state.max_steps,
                proportions=self._session.controller.proportions_at(self.state.global_step),
                learning_rate=float(self._get_learning_rate()),
                device=self.args.device,
            )
        return loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Weights act on training losses only; evaluation computes the stock loss, which is added up by token."""
        if self._dataflex_rows is None:
            return self._dataflex_held_out_loss(model, inputs, *args, **kwargs)
        self._dataflex_batch, reweighter = inputs, self._dataflex_reweighter
        if reweighter is None or reweighter.embedding is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with capture_hidden(model_parts(self.model), reweighter.embedding.layer) as self._dataflex_hidden:
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _dataflex_held_out_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = inputs.get("labels")
        usual = self.compute_loss_func  # LLaMA-Factory's own where nothing is weighed
        if self._dataflex_reweighter is not None:
            self.compute_loss_func = None
        try:
            found = super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.compute_loss_func = usual
        loss = found[0] if isinstance(found, tuple) else found
        if self.dataflex_setup.stage in ("pt", "sft") and labels is not None:
            num_items = kwargs.get("num_items_in_batch")
            counted = num_items is not None and self.model_accepts_loss_kwargs
            over_ranks = counted and self.args.average_tokens_across_devices
            loss = loss / comm.world() if over_ranks else loss
            balance = balance_loss(found[1], self.model.config) if isinstance(found, tuple) else None
            if balance is not None:  # no part of what a token costs
                loss = loss - balance.to(loss.device)
            self._dataflex_evaluation.add(loss, labels, num_items if counted else None)
        return found

    def _dataflex_loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Weigh one training micro-batch; the Trainer calls it as its ``compute_loss_func``."""
        assert self._dataflex_reweighter is not None
        assert self._dataflex_rows is not None
        loss = self._dataflex_reweighter.loss(
            outputs.logits,
            labels,
            self._dataflex_rows,
            batch={"labels": labels, **self._dataflex_batch},
            hidden=self._dataflex_hidden[-1] if self._dataflex_hidden else None,
            num_items=num_items_in_batch,
            num_micro_batches=self.current_gradient_accumulation_steps,
            step=self.state.global_step,
            total_steps=self.state.max_steps,
        )
        balance = balance_loss(outputs, self.model.config)  # as in the model's own loss
        return loss if balance is None else loss + balance.to(loss.device)

    # -- record and checkpoints -------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Put our scalars beside the loss and into the record."""
        session = self._dataflex_session
        training = "loss" in logs and session is not None
        if training:
            logs.update(self._dataflex_scalars())
        super().log(logs, *args, **kwargs)
        step = self.state.global_step
        if training:
            self._dataflex_recorder.stepped(step, dict(logs))
        elif any(key.startswith("eval_") for key in logs):
            self._dataflex_recorder.evaluated(step, dict(logs))
        elif "train_runtime" in logs and session is not None:
            clock = self.dataflex_setup.clock
            self._dataflex_recorder.finished(step, dict(logs), {**dict.fromkeys(_TRAINING, 0.0), **clock.totals()})
            if self.is_world_process_zero():
                self._dataflex_write_outcome(ended=True)
                self._dataflex_write_weights()
            clock.switch(OTHER)

    def _dataflex_write_outcome(self, *, ended: bool = False) -> None:
        """Write the proportions that a mixer has found so far, if it looks for any; at the end tell what is wrong."""
        mixer = self._dataflex_methods["mixer"]
        found = None if mixer is None else mixer.outcome()
        if found is not None:
            write_proportions(Path(self.args.output_dir) / FOLDER / f"{mixer.name}.json", found)
            if ended and "warning" in found.details:
                logger.warning("%s: %s", mixer.name, found.details["warning"])

    def _dataflex_write_weights(self) -> None:
        """Write the rows that weighed most and least so far, with their text, if any were weighed."""
        reweighter, space = self._dataflex_reweighter, self.dataflex_setup.rows
        if reweighter is None or reweighter.row_weights is None or not len(reweighter.row_weights):
            return
        described = [
            describe_rows(rows, self.train_dataset, self.processing_class, space.domains)
            for rows in reweighter.row_weights.extremes(SAMPLES)
        ]
        rows_weighed = len(reweighter.row_weights)
        self._dataflex_recorder.weighed(
            self.state.global_step, most=described[0], least=described[1], rows=rows_weighed
        )

    def _dataflex_scalars(self) -> dict[str, float]:
        controller = self._session.controller
        scalars = {f"dataflex/{name}": value for name, value in controller.scalars(self.state.global_step).items()}
        if self._dataflex_reweighter is not None:
            read = self._dataflex_reweighter.scalars()
            scalars.update({f"dataflex/{name}": value for name, value in read.items()})
        return scalars

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> Any:
        """Evaluate as stock, noting the time; over several sets add the losses over all of them."""
        several = isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict)
        if several:
            self._dataflex_evaluated.clear()
        with self.dataflex_setup.clock.phase("evaluate"):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        if several:
            overall = totals(self._dataflex_evaluated, metric_key_prefix)
            if overall:
                self.log(dict(overall))
            return {**metrics, **overall}
        return metrics

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict rows that are evaluated by domain as one set, in file order, as LLaMA-Factory does without us."""
        with self.dataflex_setup.clock.phase("predict"):
            return super().predict(undivided(test_dataset), *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one set as stock, and add its loss by token and its perplexity."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        output = super().evaluation_loop(*args, **kwargs)
        total, tokens = self._dataflex_evaluation.take(self.args.device)
        if tokens > 0:
            self._dataflex_evaluated[prefix] = (total, tokens)
            output.metrics[f"{prefix}_token_loss"] = total / tokens
            output.metrics[f"{prefix}_perplexity"] = perplexity(total / tokens)
        return output

    def save_predictions(self, *args: Any, **kwargs: Any) -> Any:
        """Save the predictions of ``predict``; some of LLaMA-Factory's trainers are given the rows again."""
        return super().save_predictions(*map(undivided, args), **kwargs)
