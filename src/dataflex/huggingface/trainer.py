"""The adapter between the Hugging Face Trainer and a session: a mixin that goes in front of any Trainer class.

All micro-batches of an optimizer step are asked for right after the previous step's update; there the session serves
them. A checkpoint is begun before anything of it is written, and sealed after everything, callbacks included, which may
rewrite the weights (stage rm). Upstream names relied upon (transformers 5.x), each asserted by ``tests/upstream``: the
methods overridden here, ``compute_loss_func``, ``add_callback``, ``callback_handler``, ``_get_output_dir``,
``_tr_loss``, ``_total_loss_scalar``, ``_globalstep_last_logged``, ``current_gradient_accumulation_steps``,
``rotate_checkpoints``, and ``early_stopping_patience_counter`` in ``stateful_callbacks``.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import rotate_checkpoints

from dataflex import checkpoints, comm
from dataflex.ending import Terminated, TermWish, heed_parent_only
from dataflex.errors import ComponentError
from dataflex.huggingface.evaluation import EvaluationMixin
from dataflex.huggingface.fused import Once, fuses
from dataflex.huggingface.loop import EpochShell, StopOnTerm, loop_of, moments_by_name, replaced
from dataflex.huggingface.trackers import send_report, shown_apart
from dataflex.train.average import WeightAverage
from dataflex.train.loader import ROWS, NumberedBatches, NumberedStream, unchanged
from dataflex.train.loss import balance_loss
from dataflex.train.session import Loop, Session, Setup

logger = logging.getLogger(__name__)


class TrainerMixin(EvaluationMixin):
    """Data decided during training, for any Hugging Face Trainer class that follows it in the MRO."""

    dataflex_setup: Setup

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dataflex = Session(self.dataflex_setup)
        if self.dataflex.weighs:
            self.compute_loss_func = self._dataflex_loss
        self._dataflex_left = 0  # micro-batches of the step
        self._dataflex_batch: dict[str, Any] = {}
        self._dataflex_resumed: tuple[Path, int] | None = None  # checkpoint and step
        self._dataflex_saved_at: int | None = None
        self._dataflex_sealed_later = False  # while callbacks may still change a checkpoint's files
        self._dataflex_average: WeightAverage | None = None  # once the training is over
        self._dataflex_stop: StopOnTerm | None = None
        if self.dataflex_setup.config.save_on_term:
            self._dataflex_stop = StopOnTerm(self.args.device)
            self.add_callback(self._dataflex_stop)

    # -- before training ------------------------------------------------------------------------

    def _dataflex_loop(self, total_steps: int) -> Loop:
        return loop_of(self, self.dataflex_setup, total_steps)

    def _dataflex_index(self, step: int) -> int:
        """Return the session's step of an optimizer step."""
        return step

    def get_train_dataloader(self) -> Any:
        """Return a loader that has the right lengths and no batches; for a stock run its own, with ids of rows."""
        setup = self.dataflex_setup
        if setup.config.stock and (rows_of := getattr(setup.rows.dataset, "rows_of", None)):
            numbering = NumberedStream(rows_of, self.data_collator)
            with replaced((self, "data_collator", numbering)):
                return super().get_train_dataloader()
        if setup.config.stock:
            numbered = NumberedBatches(self.train_dataset, self.data_collator, joined=setup.joined)
            kept = (self.args, "remove_unused_columns", False)  # its features are batches
            with replaced((self, "train_dataset", numbered), (self, "data_collator", unchanged), kept):
                return super().get_train_dataloader()
        if setup.config.total_steps is not None:
            self.args.max_steps = setup.config.total_steps
        micro_batches = self.dataflex.micro_batches_per_epoch(self._dataflex_loop(1).shape)
        return EpochShell(setup.rows.num_rows, micro_batches)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return the stock loader, whose workers leave SIGTERM to this process."""
        loader = super().get_eval_dataloader(*args, **kwargs)
        if self._dataflex_stop is not None and loader.num_workers and loader.worker_init_fn is None:
            loader.worker_init_fn = heed_parent_only
        return loader

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Take the number of steps from the Trainer's own count and prepare the session."""
        values = super().set_initial_training_values(args, dataloader)
        if not self.dataflex_setup.config.stock:
            self.refuse_unseen()
        self.dataflex.prepare(self._dataflex_loop(int(values[-1])))
        return values

    def _init_training_state(
        self, max_steps: Any, num_update_steps_per_epoch: Any, num_train_epochs: Any, resume: Any, trial: Any
    ) -> Any:
        """Open the record; on a resumed run, restore plan and states first."""
        values = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial)
        self.dataflex.start(resume, self._dataflex_index(self.state.global_step))
        if resume is not None:
            self._dataflex_resumed = (Path(resume).resolve(), self.state.global_step)
        return values

    # -- the end of training ---------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train from the beginning, or a checkpoint; SIGTERM is handled by ``StopOnTerm`` meanwhile."""
        self._dataflex_resumed = self._dataflex_saved_at = self._dataflex_average = None  # of a training before
        with ExitStack() as over:
            over.enter_context(shown_apart())
            over.enter_context(self.dataflex_setup.clock.phase("prepare"))
            if self._dataflex_stop is not None:
                over.callback(self._dataflex_stop.over)
            over.callback(self.dataflex.close)
            return super().train(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """After SIGTERM, end with a checkpoint instead of what follows a finished training."""
        stop, step = self._dataflex_stop, self.state.global_step
        if stop is None or not stop.settle():
            self.dataflex.settle(self._dataflex_index(step))
            if self.is_world_process_zero():
                send_report(self.callback_handler.callbacks, self.dataflex.recorder.directory, step)
            found = super()._finalize_training(*args, **kwargs)
            average = self.dataflex.average
            self._dataflex_average = None if average is None else average.found()
            return found
        if self._dataflex_saved_at != step:
            with replaced((self, "_dataflex_sealed_later", True)):
                self._save_checkpoint(self.model_wrapped, None)
                self.callback_handler.on_save(self.args, self.state, self.control)
            self._dataflex_seal()
        self.callback_handler.on_train_end(self.args, self.state, self.control)
        raise Terminated(
            f"ended by SIGTERM after step {step} of {self.state.max_steps}; go on from here with "
            f"'resume_from_checkpoint={Path(self.args.output_dir) / f'checkpoint-{step}'}'"
        )

    # -- during training ------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Serve the micro-batches of the next optimizer step from the plan."""
        if self._dataflex_ended_early():
            return [], None
        if self.dataflex_setup.config.stock:
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
            for batch in batches:
                batch[ROWS] = np.asarray(torch.as_tensor(batch[ROWS]).cpu())  # a stream's are a tensor on the device
            self.dataflex.serve(self.state.global_step, batches)
            self._dataflex_left = len(batches)
            return batches, num_items
        step = self.dataflex.step(self.state.global_step)
        self.state.max_steps = min(self.state.max_steps, self.dataflex.total_steps)
        if step is None:  # resumed from the end of a finished run, or the data ran out
            self.control.should_training_stop = True
            return [], None
        if len(step.batches) != num_batches:
            told = f"the plan has {len(step.batches)} micro-batches, the Trainer {num_batches}"
            raise ComponentError(f"step {step.index}: {told}")
        self._dataflex_left = num_batches
        return step.batches, step.num_items

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Train on a micro-batch; after the last one of a step, the mixer observes it."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._dataflex_batch = {}
        self._dataflex_left -= 1
        if self._dataflex_left == 0:
            self.dataflex.end_step()
        return loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the training loss, which weights act on, or the stock loss of a batch that is evaluated."""
        if ROWS not in inputs:
            return self.held_out_loss(model, inputs, *args, **kwargs)
        self._dataflex_batch = dict(inputs)
        del inputs[ROWS]
        if self.dataflex.weighs and fuses(self):
            model = Once(model, inputs["labels"])
        with self.dataflex.forward():
            found = super().compute_loss(model, inputs, *args, **kwargs)
        if not self.dataflex.weighs:
            self.dataflex.note(self._dataflex_batch, found[0] if isinstance(found, tuple) else found)
        return found

    def _dataflex_loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Weigh one training micro-batch; the Trainer calls it as its ``compute_loss_func``."""
        loss = self.dataflex.loss(self._dataflex_batch, outputs.logits)
        balance = balance_loss(outputs, self.model.config)  # as in the model's own loss
        if balance is None:
            return loss
        if fuses(self):  # TRL adds the mean over micro-batches and ranks, and multiplies what we return by the ranks
            over_ranks = self.args.average_tokens_across_devices and num_items_in_batch is not None
            balance = balance / (self.current_gradient_accumulation_steps * (comm.world() if over_ranks else 1))
        return loss + balance.to(loss.device)

    # -- log and saving ---------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log our scalars beside the loss, and record both."""
        session, step, began = self.dataflex, self._dataflex_index(self.state.global_step), self.dataflex.began
        if "loss" in logs and began:
            session.log(step, logs, lambda found: super(TrainerMixin, self).log(found, *args, **kwargs))
            return
        super().log(logs, *args, **kwargs)
        if any(key.startswith("eval_") for key in logs):
            session.recorder.evaluated(step, dict(logs))
        elif "train_runtime" in logs and began:
            session.finish(step, logs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """Evaluate the model, and once it is trained the average of its last weights as well (``eval_averaged_``)."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        if self._dataflex_average is None or metric_key_prefix != "eval":
            return metrics
        with self._dataflex_average.in_place():
            return {**metrics, **super().evaluate(eval_dataset, ignore_keys, "eval_averaged", **kwargs)}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model; after training, SIGTERM takes effect when that is done."""
        clock = self.dataflex_setup.clock
        if _internal_call:  # part of a checkpoint
            with clock.phase(clock.now if clock.now == "checkpoint" else "save"):
                super().save_model(output_dir, _internal_call)
            return
        wish, folder = TermWish(), output_dir or self.args.output_dir
        with wish.noted(), clock.phase("save"):
            if self.args.should_save:  # no trainer state of an earlier save stays beside new weights
                checkpoints.unmark(Path(folder))
            super().save_model(output_dir, _internal_call)
            if self._dataflex_average is not None:
                with self._dataflex_average.in_place():
                    super().save_model(str(Path(folder) / "averaged"), True)
        if wish.asked:
            raise Terminated(f"ended by SIGTERM; {folder} holds the trained model")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self._dataflex_resumed == (folder.resolve(), self.state.global_step):
            return  # it is the one that was resumed from, and nothing was trained since
        with self.dataflex_setup.clock.phase("checkpoint"):
            self.dataflex.begin_checkpoint(folder)
            with replaced((self.args, "save_total_limit", None)):
                super()._save_checkpoint(model, trial)
        if not self._dataflex_sealed_later:
            self._dataflex_seal()

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        """Load as stock, also sharded states of FSDP2."""
        if checkpoint is not None:
            with moments_by_name(self):
                super()._load_optimizer_and_scheduler(checkpoint)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save as stock; a checkpoint counts once the callbacks have seen it."""
        self.dataflex.updated(self._dataflex_index(self.state.global_step))
        with replaced((self, "_dataflex_sealed_later", True)):
            super()._maybe_log_save_evaluate(*args, **kwargs)
        self._dataflex_seal()

    def _dataflex_seal(self) -> None:
        def rotate(folder: Path) -> None:
            rotate_checkpoints(
                output_dir=str(folder.parent),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

        if self.dataflex.seal_checkpoint(self._dataflex_index(self.state.global_step), rotate):
            self._dataflex_saved_at = self.state.global_step

    def _save_rng_state(self, output_dir: str) -> None:
        """Write our state beside the random states, before ``trainer_state.json``."""
        super()._save_rng_state(output_dir)
        losses, _ = comm.gather_rows(self._tr_loss.detach().reshape(1), equal=True)
        sums = {
            "loss": losses.cpu().numpy(),
            "total_loss": float(self._total_loss_scalar),
            "logged_step": int(self._globalstep_last_logged),
        }
        self.dataflex.save(Path(output_dir), self._dataflex_index(self.state.global_step), sums)

    def _dataflex_ended_early(self) -> bool:
        """Restore what the loop and its callbacks count, and return whether early stopping had ended the run there.

        Once, before the first step, after the Trainer has set its own sums to zero and evaluated if asked to.
        """
        if self._dataflex_resumed is None or self._dataflex_resumed[1] != self.state.global_step:
            return False
        self._dataflex_restore_sums()
        early = [each for each in self.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]
        saved = self.state.stateful_callbacks.get(EarlyStoppingCallback.__name__, [])
        for each, state in zip(early, [saved] if isinstance(saved, dict) else saved[-len(early) :], strict=False):
            each.early_stopping_patience_counter = state["attributes"]["early_stopping_patience_counter"]
        ended = any(each.early_stopping_patience_counter >= each.early_stopping_patience for each in early)
        if ended:
            logger.info("early stopping had ended this run; a larger 'early_stopping_steps' trains on")
            self.control.should_training_stop = True
        return ended

    def _dataflex_restore_sums(self) -> None:
        """Restore the loss sums since the last log."""
        sums = self.dataflex.restore_since_log()
        if sums is None:
            return
        losses = np.asarray(sums["loss"])
        loss = losses[comm.rank()] if len(losses) == comm.world() else losses.mean()  # logged: the mean over ranks
        self._tr_loss += torch.tensor(loss, dtype=self._tr_loss.dtype, device=self._tr_loss.device)
        self._total_loss_scalar = sums["total_loss"]
        self._globalstep_last_logged = sums["logged_step"]
