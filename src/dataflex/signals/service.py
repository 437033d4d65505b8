"""The service that answers methods' questions about what the model makes of the data.

Answers are cached for the optimizer step at which they were computed, so that two methods that ask
for the same rows pay once. A pass leaves parameters, gradients, optimizer, random states and modes
as they were.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.core.protocols import Rows
from dataflex.errors import DataError
from dataflex.signals.losses import row_losses
from dataflex.signals.passes import bucketed, preserved, run_pass
from dataflex.signals.probe import LowRankProbe

__all__ = ["Corpus", "ModelHandle", "SignalService"]

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A tokenised data set that rows can be taken from.

    Attributes:
        dataset: Features by row id.
        lengths: Tokens of each row.
    """

    dataset: Any
    lengths: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ModelHandle:
    """How passes reach the model under training.

    Attributes:
        model: The module to call; not the DDP or DeepSpeed engine around it.
        collate: Features to a batch for scoring.
        autocast: The Trainer's mixed-precision context.
        device: Where batches go.
        token_budget: Padded tokens of a scoring batch at most.
    """

    model: torch.nn.Module
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    autocast: Callable[[], AbstractContextManager[Any]]
    device: torch.device
    token_budget: int


@dataclass(kw_only=True)
class SignalService:
    """Implements ``core.protocols.Signals`` on a model under training. All calls are collective.

    Attributes:
        handle: The model and how to feed it.
        train: Training rows.
        targets: Target data sets by name.
        seed: Seed of everything random in here.
        step: Optimizer step that answers belong to; set by the controller before a decision.
        seconds: Time spent in passes since the controller last took it.
    """

    handle: ModelHandle
    train: Corpus
    targets: Mapping[str, Corpus]
    seed: int
    step: int = 0
    seconds: float = 0.0
    _cache: dict[tuple[Any, ...], NDArray[np.float32]] = field(default_factory=dict)

    def begin(self, step: int) -> None:
        """Forget answers of earlier steps."""
        if step != self.step:
            self._cache.clear()
        self.step = step

    def num_rows(self, target: str | None = None) -> int:
        """Return the number of training rows, or of the named target's rows."""
        return len(self._corpus(target).lengths)

    def losses(self, rows: Rows, *, target: str | None = None) -> NDArray[np.float32]:
        """Return token-mean losses [len(rows)], NaN for rows without supervised tokens."""
        return self._cached(("losses", target), rows, lambda: self._losses(rows, target))

    def adapted_losses(
        self, rows: Rows, *, towards: str, depth_steps: int, learning_rate: float, rank: int, alpha: float
    ) -> NDArray[np.float32]:
        """Return losses of training rows under a low-rank probe trained on target ``towards``."""
        key = ("adapted", towards, depth_steps, learning_rate, rank, alpha)

        def compute() -> NDArray[np.float32]:
            with self._observing():
                probe = LowRankProbe(self.handle.model, rank=rank, alpha=alpha, seed=self.seed)
                history = probe.train(
                    self._target_batches(towards), self._score, steps=depth_steps, learning_rate=learning_rate
                )
                logger.info("probe on target %s: losses before each step %s", towards, [round(x, 4) for x in history])
                with probe.attached():
                    return self._losses(rows, None)

        return self._cached(key, rows, compute)

    def _corpus(self, target: str | None) -> Corpus:
        if target is None:
            return self.train
        if target not in self.targets:
            raise DataError(f"unknown target {target!r} (known: {', '.join(self.targets) or 'none'})")
        return self.targets[target]

    def _cached(
        self, key: tuple[Any, ...], rows: Rows, compute: Callable[[], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        identity = (*key, hashlib.blake2b(np.ascontiguousarray(rows).tobytes(), digest_size=16).digest())
        if identity not in self._cache:
            started = time.perf_counter()
            self._cache[identity] = compute()
            self.seconds += time.perf_counter() - started
        return self._cache[identity].copy()

    def _observing(self) -> AbstractContextManager[None]:
        return preserved(self.handle.model)

    def _score(self, batch: dict[str, Any]) -> torch.Tensor:
        with self.handle.autocast():
            return row_losses(self.handle.model, batch)

    def _losses(self, rows: Rows, target: str | None) -> NDArray[np.float32]:
        corpus = self._corpus(target)
        what = "training rows" if target is None else f"rows of target {target}"
        with self._observing(), torch.no_grad():
            self.handle.model.eval()
            return run_pass(
                corpus.dataset,
                rows,
                corpus.lengths[rows],
                collate=self.handle.collate,
                score=self._score,
                token_budget=self.handle.token_budget,
                device=self.handle.device,
                progress=_progress(f"step {self.step}: losses of {len(rows):,} {what}"),
            )

    def _target_batches(self, target: str) -> list[dict[str, Any]]:
        corpus = self._corpus(target)
        self.handle.model.eval()
        batches = []
        for positions in bucketed(corpus.lengths, self.handle.token_budget):
            batch = self.handle.collate(list(corpus.dataset.__getitems__(positions.tolist())))
            batches.append(
                {key: value.to(self.handle.device) if torch.is_tensor(value) else value for key, value in batch.items()}
            )
        return batches


def _progress(what: str) -> Callable[[int, int, float], None]:
    """Report progress in the log, at most every few seconds, and once at the end of a long pass."""
    last = [0.0]

    def report(done: int, total: int, seconds: float) -> None:
        finished = done >= total
        if seconds - last[0] < _PROGRESS_SECONDS and not (finished and last[0] > 0):
            return
        last[0] = seconds
        left = seconds / max(done, 1) * (total - done)
        logger.info("%s: %d of %d, %.0f s so far, %.0f s left", what, done, total, seconds, left)

    return report
