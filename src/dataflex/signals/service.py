"""The service that answers methods' questions about what the model makes of the data.

Two methods that ask for the same rows at the same step pay once; answers up to ``max_age_steps`` old may
be given again; with a store, an interrupted pass goes on where it stopped. A pass leaves parameters,
gradients, optimizer, random states and modes as they were.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from dataflex.core.protocols import Rows, State
from dataflex.errors import DataError, UnsupportedError
from dataflex.signals.answers import Answer, AnswerBook, Question
from dataflex.signals.embeddings import embedding_size
from dataflex.signals.encoded import encoded_rows
from dataflex.signals.encoders import TextEncoder, load_encoder
from dataflex.signals.generate import Generation, Generator
from dataflex.signals.gradient_signals import GradientSource
from dataflex.signals.handle import Corpus, ModelHandle
from dataflex.signals.losses import row_losses
from dataflex.signals.passes import bucketed, preserved
from dataflex.signals.probe import LowRankProbe
from dataflex.signals.resumable import ResumablePass
from dataflex.signals.row_signals import row_embeddings, token_losses
from dataflex.signals.specs import EmbeddingSpec, GenerationSpec, GradientSpec
from dataflex.signals.sweep import Sweep, stored_pass, vector_pass
from dataflex.signals.token_losses import TokenLosses, TokenScorer

__all__ = ["SignalService"]

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 5.0

Compute = Callable[[Sweep, ResumablePass | None], Answer]


@dataclass(kw_only=True)
class SignalService:
    """Implements ``core.protocols.Signals`` on a model under training. All calls are collective.

    Attributes:
        handle: The model and how to feed it.
        train: Training rows.
        targets: Target data sets by name.
        seed: Seed of everything random in here.
        book: Answers that were paid for.
        seconds: Time spent in passes since the decision began.
        encoders: Other models that were loaded, by folder or hub id and how they pool.
    """

    handle: ModelHandle
    train: Corpus
    targets: Mapping[str, Corpus]
    seed: int
    book: AnswerBook = field(default_factory=AnswerBook)
    seconds: float = 0.0
    encoders: dict[tuple[str, EmbeddingSpec], TextEncoder] = field(default_factory=dict)

    def begin(self, step: int) -> None:
        """Start a decision at ``step``."""
        self.seconds = 0.0
        self.book.begin(step)

    def num_rows(self, target: str | None = None) -> int:
        """Return the number of training rows, or of the named target's rows."""
        return len(self._corpus(target).lengths)

    def losses(self, rows: Rows, *, target: str | None = None) -> Answer:
        """Return token-mean losses [len(rows)], NaN for rows without supervised tokens."""
        return self._answer("losses", {}, rows, target, self._token_means("loss"))

    def el2n(self, rows: Rows, *, target: str | None = None) -> Answer:
        """Return EL2N averaged over supervised tokens [len(rows)] (arXiv 2107.07075, per token)."""
        return self._answer("el2n", {}, rows, target, self._token_means("el2n"))

    def token_losses(self, rows: Rows, *, target: str | None = None, el2n: bool = False) -> TokenLosses:
        """Return the losses of every supervised token of ``rows``; not kept, since they are many."""
        with self._timed():
            sweep = self._sweep(rows, target, "token losses")
            return token_losses(self.handle.model, sweep, el2n=el2n, around=self.handle.autocast)

    def embeddings(
        self, rows: Rows, spec: EmbeddingSpec, *, target: str | None = None, encoder: str | None = None
    ) -> Answer:
        """Return vectors of rows [len(rows), D]; NaN where there is nothing to pool.

        Args:
            rows: Row ids.
            spec: How hidden states become a vector.
            target: Name of a target data set; None means the training set.
            encoder: Folder or hub id of another model that reads the rows' text; None means the model under
                training.
        """
        if encoder is not None:
            return self._encoded(rows, spec, target, encoder)

        def compute(sweep: Sweep, work: ResumablePass | None) -> Answer:
            return row_embeddings(self.handle.model, sweep, spec, around=self.handle.autocast, work=work)

        return self._answer("embeddings", asdict(spec), rows, target, compute, (embedding_size(self.handle.model),))

    def _encoded(self, rows: Rows, spec: EmbeddingSpec, target: str | None, name: str) -> Answer:
        if (name, spec) not in self.encoders:
            self.encoders[name, spec] = load_encoder(name, spec=spec, device=self.handle.device)
        encoder, corpus = self.encoders[name, spec], self._corpus(target)
        with self._timed(), preserved(self.handle.model):
            return encoded_rows(
                encoder,
                corpus,
                rows,
                self.handle.tokenizer,
                token_budget=self.handle.token_budget,
                device=self.handle.device,
            )

    def gradient_scores(self, rows: Rows, spec: GradientSpec, *, targets: Sequence[str]) -> Answer:
        """Return how far a step on each row goes along each target's gradient [len(rows), len(targets)].

        Rows without supervised tokens get NaN. See ``GradientSpec`` for what is compared.

        Raises:
            UnsupportedError: The optimizer has no moments to precondition with, or some parameters'
                gradients cannot be told apart by sample.
        """
        source = GradientSource(self.handle, spec)
        aims = [self._corpus(name).identity or name for name in targets]

        def compute(sweep: Sweep, work: ResumablePass | None) -> Answer:
            sweeps = [self._sweep(np.arange(self.num_rows(name)), name, "gradients") for name in targets]
            return source.scores(sweep, sweeps, work)

        parameters = {**asdict(spec), "targets": aims, "moments": self._moments(source)}
        return self._answer("gradient scores", parameters, rows, None, compute, (len(targets),))

    def gradient_norms(self, rows: Rows, spec: GradientSpec, *, target: str | None = None) -> Answer:
        """Return the norm of each row's gradient [len(rows)]; ``spec`` says of which parameters."""
        source = GradientSource(self.handle, spec)
        parameters = {**asdict(spec), "moments": self._moments(source)}
        return self._answer("gradient norms", parameters, rows, target, source.norms)

    def generate(
        self, prompts: Sequence[Sequence[int]], spec: GenerationSpec, *, ids: Rows | None = None
    ) -> list[Generation]:
        """Sample from the model under training; draws depend on (seed, prompt id, sample, position) only."""
        if self.handle.tokenizer is None:
            raise UnsupportedError("generation needs the tokenizer of the model, which this run does not have")
        with self._timed():
            handle = self.handle
            generator = Generator(
                handle.model,
                handle.tokenizer,
                device=handle.device,
                token_budget=handle.token_budget,
                autocast=handle.autocast,
            )
            return generator.sample(prompts, spec, ids=ids)

    def adapted_losses(
        self, rows: Rows, *, towards: str, depth_steps: int, learning_rate: float, rank: int, alpha: float
    ) -> Answer:
        """Return losses of training rows under a low-rank probe trained on target ``towards``."""

        def compute(sweep: Sweep, work: ResumablePass | None) -> Answer:
            model = self.handle.model
            with preserved(model):
                model.eval()
                probe = LowRankProbe(model, rank=rank, alpha=alpha, seed=self.seed)
                history = probe.train(
                    self._batches(towards), self._row_losses, steps=depth_steps, learning_rate=learning_rate
                )
                logger.info("probe on target %s: losses before each step %s", towards, [round(x, 4) for x in history])
                with probe.attached():
                    return self._token_means("loss")(sweep, work)

        parameters = {
            "towards": self._corpus(towards).identity or towards,
            "depth_steps": depth_steps,
            "learning_rate": learning_rate,
            "rank": rank,
            "alpha": alpha,
            "seed": self.seed,
        }
        return self._answer("adapted losses", parameters, rows, None, compute)

    def state_dict(self) -> State:
        """Return what a resumed run needs to give the same answers."""
        return self.book.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self.book.load_state_dict(state)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    def _corpus(self, target: str | None) -> Corpus:
        if target is None:
            return self.train
        if target not in self.targets:
            raise DataError(f"unknown target {target!r} (known: {', '.join(self.targets) or 'none'})")
        return self.targets[target]

    def _moments(self, source: GradientSource) -> str:
        """Name the optimizer's state, which only stored answers need."""
        return "" if self.book.store is None else source.moments_identity()

    def _answer(
        self,
        method: str,
        parameters: dict[str, Any],
        rows: Rows,
        target: str | None,
        compute: Compute,
        tail: tuple[int, ...] = (),
    ) -> Answer:
        question = Question(
            method=method,
            parameters={**parameters, "token_budget": self.handle.token_budget},
            rows=rows,
            corpus=target or "",
            data=self._corpus(target).identity,
            tail=tail,
        )
        with self._timed():
            return self.book.give(
                question, lambda work: compute(self._sweep(rows, target, method), work), self.handle.device
            )

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
            progress=_progress(f"step {self.book.step}: {what} of {len(rows):,} {whose}"),
        )

    def _token_means(self, value: str) -> Compute:
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
