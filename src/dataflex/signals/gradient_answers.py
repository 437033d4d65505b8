"""Answers about gradients of rows: what is asked, how it is named in the book, and in which passes it comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from dataflex import comm
from dataflex.method import Rows
from dataflex.signals.cache import Answer
from dataflex.signals.gradients.scorers import GradientScorers
from dataflex.signals.gradients.targets import answers_digest
from dataflex.signals.service_base import ServiceBase
from dataflex.signals.specs import GradientSpec, WeightedAnswer
from dataflex.signals.store import ResumablePass
from dataflex.signals.sweep import Sweep, row_pass

__all__ = ["GradientAnswers"]

_KEPT_NUMBERS = 2**28  # targets of more numbers (1 GiB in fp32) are made anew by every call

Score = Callable[[dict[str, Any]], torch.Tensor]


class GradientAnswers(ServiceBase):
    """The part of ``SignalService`` that differentiates."""

    def gradient_scores(self, rows: Rows, spec: GradientSpec, *, targets: Sequence[str]) -> Answer:
        """Return how far a step on each row goes along each target's gradient [len(rows), len(targets)].

        Rows without supervised tokens get NaN. See ``GradientSpec`` for what is compared.

        Raises:
            UnsupportedError: The optimizer has no moments to precondition with, or some parameters'
                gradients cannot be told apart by sample.
        """
        scorers = GradientScorers(self.handle, spec)
        aims = [self._corpus(name).identity or name for name in targets]

        def open_scorer() -> Score:
            key = repr((aims, spec.parameters, spec.last_blocks, spec.bf16, scorers.mean_of_cosines))
            vectors = self.target_gradients.get(key)
            if vectors is None:
                vectors = scorers.target_vectors([self._target(name) for name in targets])
                if sum(tensor.numel() for tensor in vectors.tensors.values()) <= _KEPT_NUMBERS:
                    self.target_gradients[key] = vectors
            return scorers.towards(vectors)

        return self._scored("gradient scores", scorers, spec, rows, None, open_scorer, (len(targets),), targets=aims)

    def gradient_norms(self, rows: Rows, spec: GradientSpec, *, target: str | None = None) -> Answer:
        """Return the norm of each row's gradient [len(rows)]; ``spec`` says of which parameters."""
        scorers = GradientScorers(self.handle, spec)
        return self._scored("gradient norms", scorers, spec, rows, target, scorers.norms, ())

    def gradient_sketches(self, rows: Rows, spec: GradientSpec, *, dim: int, target: str | None = None) -> Answer:
        """Return sparse sketches of rows' gradients, of length one [len(rows), dim], for clustering and coverage.

        Inner products of sketches estimate cosines of the gradients, those of training rows with target rows too:
        the projection follows from the run's seed alone. Rows without supervised tokens get NaN.

        Args:
            rows: Row ids.
            spec: Which gradients; training rows are preconditioned, target rows never are. Its ``normalize``
                and ``sketch_*`` say nothing here.
            dim: Numbers per row, even.
            target: Name of a target data set; None means the training set.

        Raises:
            ConfigError: ``dim`` is not a positive even number.
        """
        plain = target is not None
        scorers = GradientScorers(self.handle, spec)

        def open_scorer() -> Score:
            return scorers.sketches(dim=dim, seed=self.seed, plain=plain)

        more = {"dim": dim, "seed": self.seed, **({"moments": ""} if plain else {})}
        return self._scored("gradient sketches", scorers, spec, rows, target, open_scorer, (dim,), **more)

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
            spec: Which gradients; training rows are preconditioned, targets never are. Its ``normalize``,
                ``mean_of_cosines`` and ``sketch_*`` say nothing here.
            targets: Names of target data sets.
            target_rows: Rows of a target, by name, that its mean is over; all of those that are not named.

        Returns:
            Scores float32 [len(rows), len(targets)] and the Gram matrix float32 [len(rows), len(rows)];
            NaN in the rows and columns of rows without supervised tokens.
        """
        scorers = GradientScorers(self.handle, spec)
        drawn = dict(target_rows or {})

        def compute(sweep: Sweep, work: ResumablePass | None) -> Answer:
            out = scorers.products(sweep, [self._target(name, drawn.get(name)) for name in targets])
            if work is None:
                return out
            if comm.rank() == 0:
                work.record(np.arange(len(out)), out)
            return work.finish()

        aims = [self._corpus(name).identity or name for name in targets]
        parameters = {**asdict(spec), "targets": aims, "moments": self._moments(scorers)}
        if drawn:
            parameters["target_rows"] = {name: which.tolist() for name, which in drawn.items()}
        found = self._answer("gradient products", parameters, rows, None, compute, (len(targets) + len(rows),))
        return found[:, : len(targets)], found[:, len(targets) :]

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
        scorers = GradientScorers(self.handle, spec)

        def open_scorer() -> Score:
            return scorers.towards(scorers.answer_vectors(list(answers.values())))

        digests = {name: answers_digest(given) for name, given in answers.items()}
        return self._scored("answer scores", scorers, spec, rows, None, open_scorer, (len(answers),), answers=digests)

    def _scored(
        self,
        what: str,
        scorers: GradientScorers,
        spec: GradientSpec,
        rows: Rows,
        target: str | None,
        open_scorer: Callable[[], Score],
        tail: tuple[int, ...],
        **more: Any,
    ) -> Answer:
        def compute(sweep: Sweep, work: ResumablePass | None) -> Answer:
            score = open_scorer()
            with scorers.engine.observing():
                return row_pass(sweep, score, tail, work)

        parameters = {**asdict(spec), "moments": more["moments"] if "moments" in more else self._moments(scorers)}
        return self._answer(what, {**parameters, **more}, rows, target, compute, tail)

    def _moments(self, scorers: GradientScorers) -> str:
        """Name the optimizer's state, which only stored answers need."""
        return "" if self.book.store is None else scorers.moments_identity()

    def _target(self, name: str, rows: Rows | None = None) -> Sweep:
        everyone = np.arange(self.num_rows(name), dtype=np.int64)
        return self._sweep(everyone if rows is None else rows, name, "gradients")
