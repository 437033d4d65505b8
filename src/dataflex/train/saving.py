"""How the Trainer saves: the part of the seam that makes a checkpoint count only when it is whole.

``SavingMixin`` is a base of ``train.seam.TrainerMixin``. Upstream names relied upon, each asserted by
``tests/upstream``: ``_save_checkpoint``, ``_save_rng_state``, ``save_model``, ``_maybe_log_save_evaluate``,
``_get_output_dir``, ``_tr_loss``, ``_total_loss_scalar``, ``_globalstep_last_logged``, ``rotate_checkpoints``.

A checkpoint is begun before anything of it is written and sealed after everything, callbacks included, which
LLaMA-Factory lets rewrite the weights (stage rm). Older checkpoints are removed only then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from dataflex import checkpoints, comm
from dataflex.method import State
from dataflex.record.read import recorded_run
from dataflex.record.recorder import RunRecorder
from dataflex.train import checkpoint
from dataflex.train.answers import check_state
from dataflex.train.reweighting import Reweighter
from dataflex.train.session import Session, Setup

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

__all__ = ["SavingMixin"]


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
