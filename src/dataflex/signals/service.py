"""The service that answers methods' questions about what the model makes of the data.

Two methods that ask for the same rows at the same step pay once; answers up to ``max_age_steps`` old may
be given again; with a store, an interrupted pass goes on where it stopped. A pass leaves parameters,
gradients, optimizer, random states and modes as they were.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.core.protocols import Rows, State
from dataflex.errors import DataError, UnsupportedError
from dataflex.signals.embeddings import embedding_size
from dataflex.signals.fingerprint import Fingerprint
from dataflex.signals.generate import Generation, Generator
from dataflex.signals.identity import state_identity
from dataflex.signals.losses import row_losses
from dataflex.signals.passes import bucketed, preserved
from dataflex.signals.probe import LowRankProbe
from dataflex.signals.resumable import ResumablePass
from dataflex.signals.row_signals import row_embeddings, token_losses
from dataflex.signals.specs import EmbeddingSpec, GenerationSpec
from dataflex.signals.store import ArrayStore
from dataflex.signals.sweep import Sweep, stored_pass, vector_pass
from dataflex.signals.token_losses import TokenLosses, TokenScorer

__all__ = ["Corpus", "ModelHandle", "SignalService"]

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 5.0

Answer = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A tokenised data set that rows can be taken from.

    Attributes:
        dataset: Features by row id.
        lengths: Tokens of each row.
        identity: Fingerprint of its content.
    """

    dataset: Any
    lengths: NDArray[np.int64]
    identity: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelHandle:
    """How passes reach the model under training.

    Attributes:
        model: The module to call; not the DDP or DeepSpeed engine around it.
        collate: Features to a batch for scoring.
        autocast: The Trainer's mixed-precision context.
        device: Where batches go.
        token_budget: Padded tokens of a scoring batch at most.
        tokenizer: For generation.
    """

    model: torch.nn.Module
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    autocast: Callable[[], AbstractContextManager[Any]]
    device: torch.device
    token_budget: int
    tokenizer: Any = None


@dataclass(kw_only=True)
class SignalService:
    """Implements ``core.protocols.Signals`` on a model under training. All calls are collective.

    Attributes:
        handle: The model and how to feed it.
        train: Training rows.
        targets: Target data sets by name.
        seed: Seed of everything random in here.
        store: Where passes write their answers as they go; None keeps them in memory only.
        store_bytes: Oldest stored answers are dropped beyond this size.
        max_age_steps: Oldest answer, in optimizer steps, that is given again instead of a new pass.
        step: Optimizer step that answers belong to; set by the controller before a decision.
        seconds: Time spent in passes since the controller last took it.
    """

    handle: ModelHandle
    train: Corpus
    targets: Mapping[str, Corpus]
    seed: int
    store: ArrayStore | None = None
    store_bytes: int = 10 * 2**30
    max_age_steps: int = 0
    step: int = 0
    seconds: float = 0.0
    _answers: dict[str, tuple[int, Answer]] = field(default_factory=dict)
    _identity: tuple[int, str] | None = None

    def begin(self, step: int) -> None:
        """Start a decision at ``step``: forget answers that are too old for it."""
        self.step, self.seconds = step, 0.0
        self._answers = {key: kept for key, kept in self._answers.items() if step - kept[0] <= self.max_age_steps}

    def num_rows(self, target: str | None = None) -> int:
        """Return the number of training rows, or of the named target's rows."""
        return len(self._corpus(target).lengths)

    def losses(self, rows: Rows, *, target: str | None = None) -> Answer:
        """Return token-mean losses [len(rows)], NaN for rows without supervised tokens."""
        return self._answer("losses", {}, rows, target, self._token_means("loss"))

    def el2n(self, rows: Rows, *, target: str | None = None) -> Answer:
        """Return EL2N scores averaged over supervised tokens [len(rows)] (arXiv 2107.07075, per token)."""
        return self._answer("el2n", {}, rows, target, self._token_means("el2n"))

    def token_losses(self, rows: Rows, *, target: str | None = None, el2n: bool = False) -> TokenLosses:
        """Return the losses of every supervised token of ``rows``; not cached, since they are many."""
        started = time.perf_counter()
        sweep = self._sweep(rows, target, "token losses")
        found = token_losses(self.handle.model, sweep, el2n=el2n, around=self.handle.autocast)
        self.seconds += time.perf_counter() - started
        return found

    def embeddings(self, rows: Rows, spec: EmbeddingSpec, *, target: str | None = None) -> Answer:
        """Return vectors of rows from the model under training [len(rows), D]; see ``EmbeddingSpec``."""
        model, around = self.handle.model, self.handle.autocast

        def compute(sweep: Sweep, work: ResumablePass | None) -> Answer:
            return row_embeddings(model, sweep, spec, around=around, work=work)

        return self._answer("embeddings", asdict(spec), rows, target, compute, (embedding_size(model),))

    def generate(
        self, prompts: Sequence[Sequence[int]], spec: GenerationSpec, *, ids: Rows | None = None
    ) -> list[Generation]:
        """Sample from the model under training; draws depend on (seed, prompt id, sample, position) only."""
        if self.handle.tokenizer is None:
            raise UnsupportedError("generation needs the tokenizer of the model, which this run does not have")
        started = time.perf_counter()
        made = Generator(
            self.handle.model,
            self.handle.tokenizer,
            device=self.handle.device,
            token_budget=self.handle.token_budget,
            autocast=self.handle.autocast,
        ).sample(prompts, spec, ids=ids)
        self.seconds += time.perf_counter() - started
        return made

    def adapted_losses(
        self, rows: Rows, *, towards: str, depth_steps: int, learning_rate: float, rank: int, alpha: float
    ) -> Answer:
        """Return losses of training rows under a low-rank probe trained on target ``towards``."""
        parameters = {
            "towards": self._corpus(towards).identity or towards,
            "depth_steps": depth_steps,
            "learning_rate": learning_rate,
            "rank": rank,
            "alpha": alpha,
            "seed": self.seed,
        }

        def compute(sweep: Sweep, work: ResumablePass | None) -> Answer:
            with preserved(self.handle.model):
                self.handle.model.eval()
                probe = LowRankProbe(self.handle.model, rank=rank, alpha=alpha, seed=self.seed)
                history = probe.train(
                    self._batches(towards), self._row_losses, steps=depth_steps, learning_rate=learning_rate
                )
                logger.info("probe on target %s: losses before each step %s", towards, [round(x, 4) for x in history])
                with probe.attached():
                    return self._token_means("loss")(sweep, work)

        return self._answer("adapted losses", parameters, rows, None, compute)

    def state_dict(self) -> State:
        """Return answers that a later step may be given again, so that a resumed run gives the same ones."""
        kept = self._answers.items() if self.max_age_steps else ()
        return {"answers": {key: {"step": step, "values": values} for key, (step, values) in kept}}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self._answers = {key: (int(kept["step"]), kept["values"]) for key, kept in state["answers"].items()}

    def _corpus(self, target: str | None) -> Corpus:
        if target is None:
            return self.train
        if target not in self.targets:
            raise DataError(f"unknown target {target!r} (known: {', '.join(self.targets) or 'none'})")
        return self.targets[target]

    def _answer(
        self,
        method: str,
        parameters: dict[str, Any],
        rows: Rows,
        target: str | None,
        compute: Callable[[Sweep, ResumablePass | None], Answer],
        tail: tuple[int, ...] = (),
    ) -> Answer:
        """Give a kept answer, or make a pass and keep what it gives. Callers get their own copy."""
        corpus = self._corpus(target)
        which = hashlib.blake2b(np.ascontiguousarray(rows).tobytes(), digest_size=16).hexdigest()
        key = json.dumps([method, parameters, target or "", which], sort_keys=True)
        if key not in self._answers:
            started = time.perf_counter()
            work = None
            if self.store is not None:
                work = ResumablePass(
                    self.store,
                    Fingerprint(
                        model=self._model_identity(),
                        data=f"{corpus.identity} {target or 'training rows'} {which} {self.handle.token_budget}",
                        method=method,
                        parameters=parameters,
                    ),
                    shape=(len(rows), *tail),
                    dtype=np.float32,
                    device=self.handle.device,
                )
            answer = compute(self._sweep(rows, target, method), work)
            self._answers[key] = (self.step, np.array(answer, dtype=np.float32))
            if self.store is not None:
                self.store.evict(self.store_bytes)
            self.seconds += time.perf_counter() - started
        return self._answers[key][1].copy()

    def _model_identity(self) -> str:
        if self._identity is None or self._identity[0] != self.step:
            self._identity = (self.step, state_identity(self.handle.model.named_parameters()))
        return self._identity[1]

    def _sweep(self, rows: Rows, target: str | None, what: str) -> Sweep:
        corpus = self._corpus(target)
        whose = "training rows" if target is None else f"rows of target {target}"
        return Sweep(
            dataset=corpus.dataset,
            rows=rows,
            lengths=corpus.lengths[rows],
            collate=self.handle.collate,
            token_budget=self.handle.token_budget,
            device=self.handle.device,
            progress=_progress(f"step {self.step}: {what} of {len(rows):,} {whose}"),
        )

    def _token_means(self, value: str) -> Callable[[Sweep, ResumablePass | None], Answer]:
        """Return a pass that averages a value over each row's supervised tokens."""

        def compute(sweep: Sweep, work: ResumablePass | None) -> Answer:
            with preserved(self.handle.model), torch.no_grad():
                self.handle.model.eval()
                scorer = TokenScorer(self.handle.model, el2n=value == "el2n")

                def score(batch: dict[str, Any]) -> torch.Tensor:
                    with self.handle.autocast():
                        return scorer(batch).means(value)

                return vector_pass(sweep, score, ()) if work is None else stored_pass(sweep, score, work)

        return compute

    def _row_losses(self, batch: dict[str, Any]) -> torch.Tensor:
        with self.handle.autocast():
            return row_losses(self.handle.model, batch)

    def _batches(self, target: str) -> list[dict[str, Any]]:
        """Return the whole target in batches on the device, the same on every rank."""
        corpus, device = self._corpus(target), self.handle.device
        batches = []
        for positions in bucketed(corpus.lengths, self.handle.token_budget):
            batch = self.handle.collate(list(corpus.dataset.__getitems__(positions.tolist())))
            batches.append({key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()})
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
