"""What every answer of the signal service goes through: the book of answers, passes over rows and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dataflex.errors import DataError, UnsupportedError
from dataflex.method import Rows
from dataflex.signals.cache import Answer, Question, SignalCache
from dataflex.signals.embeddings import TextEncoder
from dataflex.signals.gradients import TargetVectors
from dataflex.signals.model_access import Corpus, ModelAccess
from dataflex.signals.other_models import Scorer
from dataflex.signals.specs import EmbeddingSpec
from dataflex.signals.store import ResumablePass
from dataflex.signals.sweep import Sweep

__all__ = ["Compute", "ServiceBase"]

Compute = Callable[[Sweep, ResumablePass | None], Answer]
"""A pass over rows, into a store if there is one."""


@dataclass(kw_only=True)
class ServiceBase:
    """State of a ``SignalService``, whose docstring tells of the fields, and how its parts ask."""

    handle: ModelAccess
    train: Corpus
    targets: Mapping[str, Corpus]
    seed: int
    book: SignalCache = field(default_factory=SignalCache)
    seconds: float = 0.0
    encoders: dict[tuple[str, EmbeddingSpec], TextEncoder] = field(default_factory=dict)
    scorers: dict[str, Scorer] = field(default_factory=dict)
    target_gradients: dict[str, TargetVectors] = field(default_factory=dict)

    def num_rows(self, target: str | None = None) -> int:
        """Return the number of training rows, or of the named target's rows."""
        return len(self._corpus(target).lengths)

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

    def _tokenizer(self, what: str) -> Any:
        if self.handle.tokenizer is None:
            raise UnsupportedError(f"{what}: the tokenizer of the model is needed, which this run does not have")
        return self.handle.tokenizer

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
            what=f"step {self.book.step}: {what} of {len(rows):,} {whose}",
        )
