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
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.core.protocols import Rows, State
from dataflex.dist import comm
from dataflex.errors import ComponentError, ConfigError, DataError, DataFlexError, UnsupportedError
from dataflex.signals.answer_source import AnswerSource
from dataflex.signals.answers import Answer, AnswerBook, Question
from dataflex.signals.embeddings import embedding_size
from dataflex.signals.encoded import encoded_rows
from dataflex.signals.encoders import TextEncoder, load_encoder
from dataflex.signals.gates import GateLoads
from dataflex.signals.generate import Generator
from dataflex.signals.gradient_signals import GradientSource
from dataflex.signals.gradients import TargetVectors
from dataflex.signals.handle import Corpus, ModelHandle
from dataflex.signals.head import LogitReader
from dataflex.signals.logits import LogitScorer
from dataflex.signals.losses import row_losses
from dataflex.signals.passes import bucketed, preserved
from dataflex.signals.perturbed import perturbed_row_losses
from dataflex.signals.pieces import Cut
from dataflex.signals.policy import answers_digest
from dataflex.signals.probe import LowRankProbe
from dataflex.signals.resumable import ResumablePass
from dataflex.signals.row_signals import row_embeddings, row_gate_loads, row_logits, token_losses
from dataflex.signals.scorers import Scorer
from dataflex.signals.specs import (
    EmbeddingSpec,
    Generation,
    GenerationSpec,
    GradientSpec,
    LogitSpec,
    Part,
    WeightedAnswer,
)
from dataflex.signals.sweep import Sweep, stored_pass, vector_pass
from dataflex.signals.texts import row_texts, row_tokens
from dataflex.signals.token_losses import TokenLosses, TokenScorer

__all__ = ["SignalService"]

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 5.0

T = TypeVar("T")
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
        target_gradients: Mean gradients of targets that were made in this decision.
        scorers: Other causal models that were asked for, by folder or hub id.
    """

    handle: ModelHandle
    train: Corpus
    targets: Mapping[str, Corpus]
    seed: int
    book: AnswerBook = field(default_factory=AnswerBook)
    seconds: float = 0.0
    encoders: dict[tuple[str, EmbeddingSpec], TextEncoder] = field(default_factory=dict)
    scorers: dict[str, Scorer] = field(default_factory=dict)
    target_gradients: dict[str, TargetVectors] = field(default_factory=dict)

    def begin(self, step: int) -> None:
        """Start a decision at ``step``."""
        self.seconds = 0.0
        self.target_gradients.clear()
        self.book.begin(step)

    def end(self) -> None:
        """Let go of what only this decision needed."""
        self.target_gradients.clear()

    def num_rows(self, target: str | None = None) -> int:
        """Return the number of training rows, or of the named target's rows."""
        return len(self._corpus(target).lengths)

    def tokens(self, rows: Rows, *, target: str | None = None, part: Part = "all") -> list[NDArray[np.int64]]:
        """Return the tokens of each row, or of its prompt or completion; nothing is computed."""
        return row_tokens(self._corpus(target).dataset, rows, part)

    def texts(self, rows: Rows, *, target: str | None = None, part: Part = "all") -> list[str]:
        """Return the text of each row, or of its prompt or completion, without special tokens."""
        return row_texts(self._corpus(target).dataset, rows, self._tokenizer("texts"), part)

    def losses(
        self, rows: Rows, *, target: str | None = None, model: str | None = None, same_tokens: bool = False
    ) -> Answer:
        """Return token-mean losses [len(rows)], NaN for rows without supervised tokens.

        Args:
            rows: Row ids.
            target: Name of a target data set; None means the training set.
            model: Folder or hub id of another causal model; None means the model under training. A model
                with another tokenizer reads the rows' text.
            same_tokens: Refuse a model with another tokenizer, whose losses per token cannot be compared.

        Raises:
            ConfigError: ``same_tokens``, and the tokenizers differ.
        """
        if model is not None:
            return self._answers(rows, target, lambda source: source.losses(model, same_tokens=same_tokens))
        return self._answer("losses", {}, rows, target, self._token_means("loss"))

    def answer_losses(
        self,
        rows: Rows,
        *,
        conditioned: bool,
        scorer: str | None = None,
        prefix_tokens: int = 0,
        target: str | None = None,
    ) -> Answer:
        """Return token-mean losses of rows' answers [len(rows)], with or without what comes before them.

        Both ways score the same tokens. Sequences begin with the token that the tokenizer puts there by
        itself; where there is none, an answer's first token, which alone follows nothing, is left out both
        ways. NaN for rows without such tokens. An answer is a stretch of supervised tokens; a row of several
        turns has several, each of which is alone without the others.

        Args:
            rows: Row ids.
            conditioned: Whether an answer follows what comes before it in its row.
            scorer: Folder or hub id of another causal model; None means the model under training.
            prefix_tokens: Tokens directly before an answer that it keeps when alone.
            target: Name of a target data set; None means the training set.
        """
        cut = Cut(alone=not conditioned, prefix_tokens=prefix_tokens)
        return self._answers(rows, target, lambda source: source.answer_losses(scorer, cut))

    def _answers(self, rows: Rows, target: str | None, ask: Callable[[AnswerSource], Answer]) -> Answer:
        self._tokenizer("losses of answers")
        source = AnswerSource(
            handle=self.handle,
            corpus=self._corpus(target),
            name=target or "",
            rows=rows,
            book=self.book,
            scorers=self.scorers,
            progress=_progress(f"step {self.book.step}: answers of {len(rows):,} rows"),
        )
        with self._timed():
            return ask(source)

    def _tokenizer(self, what: str) -> Any:
        if self.handle.tokenizer is None:
            raise UnsupportedError(f"{what}: the tokenizer of the model is needed, which this run does not have")
        return self.handle.tokenizer

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
            sweeps = [self._whole_target(name) for name in targets]
            return source.scores(sweep, sweeps, work, self.target_gradients, repr(aims))

        parameters = {**asdict(spec), "targets": aims, "moments": self._moments(source)}
        return self._answer("gradient scores", parameters, rows, None, compute, (len(targets),))

    def gradient_norms(self, rows: Rows, spec: GradientSpec, *, target: str | None = None) -> Answer:
        """Return the norm of each row's gradient [len(rows)]; ``spec`` says of which parameters."""
        source = GradientSource(self.handle, spec)
        parameters = {**asdict(spec), "moments": self._moments(source)}
        return self._answer("gradient norms", parameters, rows, target, source.norms)

    def gradient_sketches(self, rows: Rows, spec: GradientSpec, *, dim: int, target: str | None = None) -> Answer:
        """Return sparse sketches of rows' gradients, of length one [len(rows), dim], for clustering and coverage.

        Inner products of sketches estimate cosines of the gradients, those of training rows with target rows too:
        the projection follows from the run's seed alone. Rows without supervised tokens get NaN.

        Args:
            rows: Row ids.
            spec: Which gradients; training rows are preconditioned, target rows never are. Its ``normalise``
                and ``sketch_*`` say nothing here.
            dim: Numbers per row, even.
            target: Name of a target data set; None means the training set.

        Raises:
            ConfigError: ``dim`` is not a positive even number.
        """
        source = GradientSource(self.handle, spec)
        plain = target is not None

        def compute(sweep: Sweep, work: ResumablePass | None) -> Answer:
            return source.sketches(sweep, work, dim=dim, seed=self.seed, plain=plain)

        moments = "" if plain else self._moments(source)
        parameters = {**asdict(spec), "dim": dim, "seed": self.seed, "moments": moments}
        return self._answer("gradient sketches", parameters, rows, target, compute, (dim,))

    def gradient_products(
        self,
        rows: Rows,
        spec: GradientSpec,
        *,
        targets: Sequence[str],
        target_rows: Mapping[str, Rows] | None = None,
    ) -> tuple[Answer, Answer]:
        """Return inner products of rows' gradients with each target's mean one, and with one another.

        For choosing within one batch (GREATS, NeurIPS 2024): gradients of all rows are held, about 1 GiB at a time.

        Args:
            rows: Row ids, few.
            spec: Which gradients; training rows are preconditioned, targets never are. Its ``normalise``,
                ``mean_of_cosines`` and ``sketch_*`` say nothing here.
            targets: Names of target data sets.
            target_rows: Rows of a target, by name, that its mean is over; all of those that are not named.

        Returns:
            Scores float32 [len(rows), len(targets)] and the Gram matrix float32 [len(rows), len(rows)];
            NaN in the rows and columns of rows without supervised tokens.
        """
        source = GradientSource(self.handle, spec)
        drawn = dict(target_rows or {})
        aims = [self._corpus(name).identity or name for name in targets]

        def compute(sweep: Sweep, work: ResumablePass | None) -> Answer:
            return source.products(sweep, [self._target(name, drawn.get(name)) for name in targets], work)

        parameters = {**asdict(spec), "targets": aims, "moments": self._moments(source)}
        if drawn:
            parameters["target_rows"] = {name: which.tolist() for name, which in drawn.items()}
        found = self._answer("gradient products", parameters, rows, None, compute, (len(targets) + len(rows),))
        return found[:, : len(targets)], found[:, len(targets) :]

    def pair_scores(self, rows: Rows, spec: GradientSpec, *, target: str) -> Answer:
        """Return the comparison of each row's gradient with that of each single row of a target.

        Exact: the target rows' gradients are held, about 1 GiB at a time, and each so many take one pass over
        ``rows``. With ``spec.sketch_size`` both sides are sketched instead, in one pass each.

        Args:
            rows: Row ids.
            spec: Which gradients; training rows are preconditioned, target rows never are. Cosines, or inner
                products without ``normalise``.
            target: Name of a target data set.

        Returns:
            float32 [len(rows), rows of the target]; NaN for rows of either side without supervised tokens.

        Raises:
            ConfigError: Sketches without ``normalise``.
        """
        everyone = np.arange(self.num_rows(target), dtype=np.int64)
        if spec.sketch_size is not None:
            if not spec.normalise:
                raise ConfigError("gradients: pairs of sketches (sketch_size) give cosines; normalise cannot be false")
            ours, theirs = (
                self.gradient_sketches(which, spec, dim=spec.sketch_size, target=whose)
                for which, whose in ((rows, None), (everyone, target))
            )
            return ours @ theirs.T
        source = GradientSource(self.handle, spec)
        moments, aim = self._moments(source), self._corpus(target).identity or target
        parts = [np.zeros((len(rows), 0), dtype=np.float32)]
        for start in range(0, len(everyone), source.rows_at_once):
            part = everyone[start : start + source.rows_at_once]

            def compute(sweep: Sweep, work: ResumablePass | None, part: Rows = part) -> Answer:
                return source.pairs(sweep, self._sweep(part, target, "gradients"), work)

            parameters = {**asdict(spec), "target": aim, "start": start, "stop": start + len(part), "moments": moments}
            parts.append(self._answer("pair scores", parameters, rows, None, compute, (len(part),)))
        return np.concatenate(parts, axis=1)

    def answer_scores(
        self, rows: Rows, spec: GradientSpec, *, answers: Mapping[str, Sequence[WeightedAnswer]]
    ) -> Answer:
        """Return how far a step on each row goes along the gradient of weighted answers [len(rows), len(answers)].

        Args:
            rows: Row ids of the training set.
            spec: As for ``gradient_scores``; ``mean_of_cosines`` is over the groups of answers.
            answers: By task; the vector of a group is the sum of weight times the gradient of
                -log p(answer | prompt), that of a task the mean over its groups.

        Raises:
            UnsupportedError: As ``gradient_scores``.
            DataError: A task without answers, or an answer without tokens.
        """
        source = GradientSource(self.handle, spec)
        digests = {name: answers_digest(given) for name, given in answers.items()}

        def compute(sweep: Sweep, work: ResumablePass | None) -> Answer:
            return source.answer_scores(sweep, list(answers.values()), work)

        parameters = {**asdict(spec), "answers": digests, "moments": self._moments(source)}
        return self._answer("answer scores", parameters, rows, None, compute, (len(answers),))

    def perturbed_losses(
        self,
        rows: Rows,
        *,
        seed: int,
        direction: int,
        epsilon: float,
        parameters: str | None = None,
        target: str | None = None,
    ) -> Answer:
        """Return losses [len(rows)] with ``epsilon`` times a random direction added to the parameters; not kept.

        Args:
            rows: Row ids.
            seed: Seed of the directions.
            direction: Number of the direction; the same for training and target rows.
            epsilon: Step, of either sign.
            parameters: Regular expression of the names of trainable parameters that move; None: all.
            target: Name of a target data set; None means the training set.

        Raises:
            UnsupportedError: Parameters that move are not float32, or are partitioned over ranks.
        """
        with self._timed():
            sweep = self._sweep(rows, target, "perturbed losses")
            return perturbed_row_losses(
                self.handle.model, sweep, seed=seed, direction=direction, epsilon=epsilon, pattern=parameters
            )

    def on_one_rank(self, what: str, compute: Callable[[], T]) -> T:
        """Run ``compute`` on rank 0 alone and return its value on every rank, for what must not be done twice.

        Raises:
            ComponentError: On the other ranks, if it fails on rank 0, where its own error is raised.
        """
        with self._timed():
            if comm.rank() != 0:
                failed, value = comm.broadcast_object(("", None))
                if failed:
                    raise ComponentError(failed)
                return cast(T, value)
            outcome: tuple[str, T | None] = (f"{what} failed on rank 0", None)
            try:
                value = compute()
                outcome = ("", value)
                return value
            except DataFlexError as error:
                outcome = (str(error), None)
                raise
            finally:
                comm.broadcast_object(outcome)

    def gate_loads(self, rows: Rows, *, target: str | None = None) -> Answer:
        """Return how many tokens of each row go to each expert [len(rows), layers, experts], padding left out.

        Raises:
            UnsupportedError: The model is no mixture of experts, or hides its router logits.
        """
        gates = GateLoads(self.handle.model)

        def compute(sweep: Sweep, work: ResumablePass | None) -> Answer:
            return row_gate_loads(self.handle.model, gates, sweep, around=self.handle.autocast, work=work)

        return self._answer("gate loads", {}, rows, target, compute, gates.shape)

    def logit_nuclear_norms(self, rows: Rows, spec: LogitSpec) -> Answer:
        """Return the sum of the singular values of each training row's logits [len(rows)].

        The sketches of the same rows come out of the same pass. NaN for rows without supervised tokens.
        """
        return self._logits(rows, spec)[:, 0]

    def logit_sketches(self, rows: Rows, spec: LogitSpec) -> Answer:
        """Return a sketch of each training row's logits [len(rows), spec.rows * spec.columns].

        Distances of sketches estimate those of logits, up to a common factor. NaN for rows without supervised tokens.
        """
        return self._logits(rows, spec)[:, 1:]

    def _logits(self, rows: Rows, spec: LogitSpec) -> Answer:
        width, length = 1 + spec.rows * spec.columns, int(self.train.lengths.max(initial=1))

        def compute(sweep: Sweep, work: ResumablePass | None) -> Answer:
            model = self.handle.model
            scorer = LogitScorer(LogitReader(model), spec, length)
            return row_logits(model, scorer, sweep, width, around=self.handle.autocast, work=work)

        return self._answer("logits", {**asdict(spec), "length": length}, rows, None, compute, (width,))

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

        def make(work: ResumablePass | None) -> Answer:
            if work is not None and work.complete:  # stored: nothing that leads up to the pass is needed either
                return work.finish()
            return compute(self._sweep(rows, target, method), work)

        with self._timed():
            return self.book.give(question, make, self.handle.device)

    def _whole_target(self, name: str) -> Sweep:
        return self._target(name, None)

    def _target(self, name: str, rows: Rows | None) -> Sweep:
        everyone = np.arange(self.num_rows(name), dtype=np.int64)
        return self._sweep(everyone if rows is None else rows, name, "gradients")

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
