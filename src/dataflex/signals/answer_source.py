"""Losses of rows' answers: by the model under training or by another one, with or without what comes before them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dataflex.errors import ConfigError
from dataflex.method import Rows
from dataflex.signals.cache import Answer, Question, SignalCache
from dataflex.signals.model_access import Corpus, ModelAccess
from dataflex.signals.other_models import Scorer, start_tokens
from dataflex.signals.row_signals import segment_sums
from dataflex.signals.store import ResumablePass
from dataflex.signals.sweep import Sweep, preserve_state
from dataflex.signals.texts import Cut, Segments, collate_segments, row_means

__all__ = ["AnswerSource"]


@dataclass(frozen=True, kw_only=True)
class AnswerSource:
    """Scores the answers of some rows (collective).

    Attributes:
        handle: The model under training, whose tokenizer made the rows.
        corpus: Where the rows are.
        name: Name of the target, "" for the training set.
        rows: Row ids [n].
        book: Answers that were paid for.
        scorers: Other models by folder or hub id; those asked for are added.
        what: What the passes are for, as ``Sweep.what``.
    """

    handle: ModelAccess
    corpus: Corpus
    name: str
    rows: Rows
    book: SignalCache
    scorers: dict[str, Scorer]
    what: str | None = None

    def losses(self, model: str, *, same_tokens: bool) -> Answer:
        """Return token-mean losses of whole rows by another model [n].

        Raises:
            ConfigError: ``same_tokens``, and its tokenizer is not that of the run.
        """
        scorer = self._scorer(model)
        if same_tokens and not scorer.same_tokens:
            raise ConfigError(
                f"model {model}: its tokenizer is not that of the run, so its losses per token cannot be compared "
                "with those of the model under training; take a model of the same family"
            )
        # Rows of the same tokens are scored as they are trained on; a text begins as the model has learnt it.
        start = () if scorer.same_tokens else scorer.start
        return self._by(scorer, Cut(leave_out_first=False, start=start))

    def answer_losses(self, scorer: str | None, cut: Cut) -> Answer:
        """Return token-mean losses of answers [n], of the sequences that ``cut`` makes (its ``start`` is set here)."""
        if scorer is not None:
            other = self._scorer(scorer)
            return self._by(other, replace(cut, start=other.start))

        def compute(sweep: Sweep, work: ResumablePass | None) -> Answer:
            model = self.handle.model
            with preserve_state(model):
                model.eval()
                return segment_sums(model, sweep, self.handle.autocast, work)

        return self._means("answer losses", replace(cut, start=start_tokens(self.handle.tokenizer)), compute, "")

    def _scorer(self, name: str) -> Scorer:
        """Return another model, whose weights are loaded for each pass."""
        if name not in self.scorers:
            self.scorers[name] = Scorer(name, self.handle.tokenizer)
        return self.scorers[name]

    def _by(self, scorer: Scorer, cut: Cut) -> Answer:
        cut = replace(cut, limit=scorer.limit, translate=None if scorer.same_tokens else scorer.translate)

        def compute(sweep: Sweep, work: ResumablePass | None) -> Answer:
            with preserve_state(self.handle.model), scorer.loaded(self.handle.device) as model:
                return segment_sums(model, sweep, self.handle.autocast, work)

        method = "losses by another model"
        return self.book.once(
            json.dumps([method, scorer.identity, cut.identity, self.name], sort_keys=True),
            self.rows,
            len(self.corpus.lengths),
            lambda new: replace(self, rows=new)._means(method, cut, compute, scorer.identity),
        )

    def _means(
        self, method: str, cut: Cut, compute: Callable[[Sweep, ResumablePass | None], Answer], model: str
    ) -> Answer:
        pieces = Segments(dataset=self.corpus.dataset, rows=self.rows, cut=cut)
        if not len(pieces):
            return np.full(len(self.rows), np.nan, dtype=np.float32)
        question = Question(
            method=method,
            parameters={**pieces.identity, "token_budget": self.handle.token_budget},
            rows=np.arange(len(pieces), dtype=np.int64),
            corpus=self.name,
            data=self.corpus.identity,
            tail=(2,),
            model=model,
        )
        sweep = Sweep(
            dataset=pieces,
            rows=question.rows,
            lengths=pieces.lengths,
            collate=collate_segments,
            token_budget=self.handle.token_budget,
            device=self.handle.device,
            what=self.what,
        )

        def make(work: ResumablePass | None) -> Answer:
            if work is not None and work.complete:  # stored: the other model need not be loaded
                return work.finish()
            return compute(sweep, work)

        return row_means(pieces, self.book.give(question, make, self.handle.device))
