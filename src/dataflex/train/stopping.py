"""Ends training at a step when SIGTERM asks for it, on the same step of every rank.

Upstream names relied upon: ``transformers.TrainerCallback`` and its ``on_train_begin``, ``on_step_end``
and ``on_epoch_end``.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from dataflex import comm
from dataflex.ending import TermWish

__all__ = ["StopOnTerm"]


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
