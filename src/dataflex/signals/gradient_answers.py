"""Answers about gradients of rows: what is asked, how it is named in the book, and in which passes it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from dataflex.errors import ConfigError
from dataflex.method import Rows
from dataflex.signals.cache import Answer
from dataflex.signals.gradient_signals import GradientSource
from dataflex.signals.policy import answers_digest
from dataflex.signals.service_base import ServiceBase
from dataflex.signals.specs import GradientSpec, WeightedAnswer
from dataflex.signals.store import ResumablePass
from dataflex.signals.sweep import Sweep

__all__ = ["GradientAnswers"]


class GradientAnswers(ServiceBase):
    """The part of ``SignalService`` that differentiates."""

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
            sweeps = [self._target(name) for name in targets]
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
            spec: Which gradients; training rows are preconditioned, target rows never are. Its ``normalize``
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
            spec: Which gradients; training rows are preconditioned, targets never are. Its ``normalize``,
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
                products without ``normalize``.
            target: Name of a target data set.

        Returns:
            float32 [len(rows), rows of the target]; NaN for rows of either side without supervised tokens.

        Raises:
            ConfigError: Sketches without ``normalize``.
        """
        everyone = np.arange(self.num_rows(target), dtype=np.int64)
        if spec.sketch_size is not None:
            if not spec.normalize:
                raise ConfigError("gradients: pairs of sketches (sketch_size) give cosines; normalize cannot be false")
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

    def _moments(self, source: GradientSource) -> str:
        """Name the optimizer's state, which only stored answers need."""
        return "" if self.book.store is None else source.moments_identity()

    def _target(self, name: str, rows: Rows | None = None) -> Sweep:
        everyone = np.arange(self.num_rows(name), dtype=np.int64)
        return self._sweep(everyone if rows is None else rows, name, "gradients")
