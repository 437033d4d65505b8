"""Answers that forward passes give: losses, EL2N, embeddings, expert loads and logits, by this model or another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Literal

from dataflex.method import Rows
from dataflex.signals.answer_source import AnswerSource
from dataflex.signals.cache import Answer
from dataflex.signals.embeddings import embedding_size, encoded_rows, load_encoder
from dataflex.signals.logits import GateLoads, LogitReader, LogitScorer, TokenLosses
from dataflex.signals.row_signals import row_embeddings, row_gate_loads, row_logits, token_losses, token_means
from dataflex.signals.service_base import ServiceBase
from dataflex.signals.specs import EmbeddingSpec, LogitSpec
from dataflex.signals.store import ResumablePass
from dataflex.signals.sweep import Sweep, preserve_state
from dataflex.signals.texts import Cut

__all__ = ["ForwardAnswers"]


class ForwardAnswers(ServiceBase):
    """The part of ``SignalService`` that runs models forward, as they are."""

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
        return self._means("loss", rows, target, "losses")

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

    def el2n(self, rows: Rows, *, target: str | None = None) -> Answer:
        """Return EL2N averaged over supervised tokens [len(rows)] (arXiv 2107.07075, per token)."""
        return self._means("el2n", rows, target, "el2n")

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

    def _answers(self, rows: Rows, target: str | None, ask: Callable[[AnswerSource], Answer]) -> Answer:
        self._tokenizer("losses of answers")
        source = AnswerSource(
            handle=self.handle,
            corpus=self._corpus(target),
            name=target or "",
            rows=rows,
            book=self.book,
            scorers=self.scorers,
            what=f"step {self.book.step}: answers of {len(rows):,} rows",
        )
        with self._timed():
            return ask(source)

    def _encoded(self, rows: Rows, spec: EmbeddingSpec, target: str | None, name: str) -> Answer:
        if (name, spec) not in self.encoders:
            self.encoders[name, spec] = load_encoder(name, spec=spec, device=self.handle.device)
        encoder, corpus = self.encoders[name, spec], self._corpus(target)
        with self._timed(), preserve_state(self.handle.model):
            return encoded_rows(
                encoder,
                corpus,
                rows,
                self.handle.tokenizer,
                token_budget=self.handle.token_budget,
                device=self.handle.device,
            )

    def _means(self, value: Literal["loss", "el2n"], rows: Rows, target: str | None, method: str) -> Answer:
        """Return a value averaged over the supervised tokens of each row [len(rows)]."""

        def compute(sweep: Sweep, work: ResumablePass | None) -> Answer:
            return token_means(self.handle.model, sweep, value, around=self.handle.autocast, work=work)

        return self._answer(method, {}, rows, target, compute)
