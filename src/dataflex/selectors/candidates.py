"""Rows of a batch of candidates, chosen in every step: GREATS, OPUS, UDS."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Card, Context, Requires, Rows, param
from dataflex.method import Params as BaseParams
from dataflex.select.scoring import Found, PoolSelector, ScoringParams, ScoringSelector
from dataflex.selectors._lib import GRADIENTS, TOKEN_LOSSES
from dataflex.signals.kinds import GradientProducts, LogitFeatures
from dataflex.signals.specs import GradientOptions

Precondition = Literal["none", "adam_scale", "true_adam", "sign"]
Draws = tuple[float, NDArray[np.float64]]  # temperature, and a number in [0, 1) for each pick


def scaled_strength(scores: NDArray[np.float64], gram: NDArray[np.float64], budget: int, strength: float) -> float:
    """Return c = strength x mean |score| / (budget x mean <g, g>): what a pick costs the others, free of scale.

    A strength of 1 makes the picks of a whole budget of equal rows cost as much as a row is worth.
    """
    own = budget * float(np.diagonal(gram).mean())
    return strength * float(np.abs(scores).mean()) / own if own > 0 else 0.0


def pick(
    scores: NDArray[np.float64], gram: NDArray[np.float64], budget: int, strength: float, draws: Draws | None = None
) -> NDArray[np.int64]:
    """Pick ``budget`` <= n rows one after another; each pick p takes ``strength`` x gram[p] from what is left of all.

    Scores [n] are finite, ``gram`` holds inner products of rows [n, n]. The strength is the learning rate, as
    published, scores being free of it. Without ``draws`` the best row is picked, ties by position; a temperature above
    0, in units of the scores, and a number in [0, 1) for each pick draw with probability proportional to
    exp(what is left / temperature). Positions come in the order picked.
    """
    left, remaining = scores.copy(), np.ones(len(scores), dtype=np.bool_)
    picked = np.empty(budget, dtype=np.int64)
    for place in range(budget):
        places = np.flatnonzero(remaining)
        if draws is None:
            chosen = int(np.argmax(left[places]))
        else:
            values = left[places] / draws[0]
            cumulative = np.cumsum(np.exp(values - values.max()))
            drawn = int(np.searchsorted(cumulative, draws[1][place] * cumulative[-1], side="right"))
            chosen = min(drawn, len(places) - 1)
        picked[place] = places[chosen]
        remaining[picked[place]] = False
        left -= strength * gram[picked[place]]
    return picked


class Greats(PoolSelector):
    """Keep, of a batch of candidates, the rows whose joint step helps the targets most, chosen in every step.

    "GREATS: Online Selection of High-Quality Data for LLM Training in Every Iteration", NeurIPS 2024 (OpenReview
    232VcN8tSx). Before each step a row i of the candidates scores lr <g_i, g_val>, the first-order fall of the
    validation loss; the best is picked, lr^2 <g_i, g_picked> is taken from all (the Hessian being set to the identity),
    and so on.

    With one lr divided out, a pick costs the others lr <g_i, g_picked>. At the usual 1e-5 that is too little to change
    any pick. ``interaction: scaled`` takes c <g_i, g_picked> with c = strength x mean |score| / (budget x mean <g_i,
    g_i>), which depends on no scale; ``learning_rate`` is as published.

    Products are exact (no ghost approximation, no CountSketch), over all trainable parameters or those named, in eval
    mode. The target gradient is the mean over ``target_rows`` rows drawn anew in every decision, a mean over targets.
    """

    name = "greats"
    lacking = "no supervised token"
    card = Card(
        summary="Picks, in every step, the candidates whose gradients together go furthest along the targets'.",
        paper="GREATS: Online Selection of High-Quality Data, NeurIPS 2024, OpenReview 232VcN8tSx (no arXiv version)",
        cost="1 F + 1 B over the candidates and F + B over target_rows rows of each target per interval",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(GradientOptions, BaseParams):
        """Parameters of GREATS; ``interaction: learning_rate`` with ``target_rows: 2`` is as published."""

        precondition: Precondition = param("none", "what turns candidates' gradients into updates; none as published")
        interaction: Literal["scaled", "learning_rate"] = param("scaled", "cost of a pick: free of scale, or published")
        strength: float = param(1.0, "factor of what a pick takes from the others", minimum=0.0)
        target_rows: int | None = param(16, "rows drawn of each target in every decision; null: all", minimum=1)

    params: Params

    def requires(self) -> Requires:
        preconditions = {"precondition": self.params.precondition}
        return replace(
            GRADIENTS, within_batch=True, preconditions=preconditions, budget=self.params.interaction == "scaled"
        )

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return inner products with the targets' gradient, without the learning rate [N]; NaN without a gradient."""
        options = self.params.options(include_momentum=False, normalize=False)
        signal = GradientProducts(targets=ctx.targets, target_rows=self._target_rows(ctx), **options)
        by_target, self._gram = signal.split(ctx.signals(signal, pool))
        scores = by_target.astype(np.float64).mean(axis=1)
        return np.where(np.isfinite(np.diagonal(self._gram)), scores, np.nan)

    def kept(self, found: Found, rows: Rows, budget: int, ctx: Context) -> NDArray[np.int64]:
        """Return the candidates in the order picked."""
        p, scores, count = self.params, np.asarray(found.scores), min(budget, len(rows))
        gram = self._gram[np.ix_(found.places, found.places)].astype(np.float64)
        strength = p.strength * ctx.learning_rate
        if p.interaction == "scaled":
            strength = scaled_strength(scores, gram, max(count, 1), p.strength)
        kept = pick(scores, gram, count, strength, self._draws(scores, count, ctx))
        self.told = f"by joint influence on {', '.join(ctx.targets)}"
        if len(kept):
            self.told += f", mean score {scores[kept].mean():.3g} against {scores.mean():.3g}"
        return kept

    def _draws(self, scores: NDArray[np.float64], count: int, ctx: Context) -> Draws | None:
        return None

    def _target_rows(self, ctx: Context) -> dict[str, Rows]:
        """Draw rows of the targets that have more than are wanted."""
        wanted, drawn = self.params.target_rows, {}
        for target in ctx.targets:
            there = ctx.signals.num_rows(target)
            if wanted is not None and wanted < there:
                rng = ctx.rng(f"selector.{self.name}.target_rows.{target}")
                drawn[target] = np.sort(rng.choice(there, size=wanted, replace=False)).astype(np.int64)
        return drawn


class Opus(Greats):
    """Draw, of a batch of candidates, by the value of the optimizer's updates, in every step.

    OPUS (arXiv 2602.05400) is GREATS with the updates that the optimizer would make of the gradients instead of the
    gradients; each pick is drawn from softmax(score / temperature). Under ``use_muon`` gradients of matrices go through
    Muon's polynomial, held fixed at the momentum (see ``less``). ``interaction`` and ``target_rows`` are those of
    ``greats``.
    """

    name = "opus"
    card = Card(
        summary="Draws, in every step, candidates by how far the optimizer's update on them goes along the targets.",
        paper="OPUS: Data Selection in LLM Pre-training in Every Iteration, arXiv 2602.05400",
        cost="1 F + 1 B over the candidates and F + B over target_rows rows of each target per interval",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(Greats.Params):
        """Parameters of OPUS; ``standardize: false`` and ``interaction: learning_rate`` are as published."""

        precondition: Precondition = param("adam_scale", "which updates; Adam's by its second moment as published")
        temperature: float = param(1.5, "flattens the draw as it grows; the paper's", above=0.0)
        standardize: bool = param(True, "temperature counts in standard deviations of the candidates' scores")

    params: Params

    def _draws(self, scores: NDArray[np.float64], count: int, ctx: Context) -> Draws | None:
        unit = float(scores.std()) if self.params.standardize else 1.0 / ctx.learning_rate if ctx.learning_rate else 0.0
        informative = unit > 0.0 and np.isfinite(unit)  # else all are alike, or no step is taken: uniform draws
        temperature = self.params.temperature * unit if informative else np.inf
        return temperature, ctx.rng("selector.opus.draws").random(count)


def mean_distances(vectors: NDArray[np.floating], queue: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the mean distance of each vector [n, D] to those of the queue [q, D]: [n], 0 where it is empty."""
    if not len(queue):
        return np.zeros(len(vectors))
    ours, theirs = vectors.astype(np.float64), queue.astype(np.float64)
    squares = (ours**2).sum(axis=1)[:, None] + (theirs**2).sum(axis=1) - 2.0 * (ours @ theirs.T)
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)).mean(axis=1))


class Uds(ScoringSelector):
    """Keep, of a batch of candidates, the rows whose logits span most and are unlike those of rows chosen lately.

    UDS: "Utility-Diversity Aware Online Batch Selection for LLM Supervised Fine-tuning", ICML 2026, arXiv 2510.16882. A
    row's score is the nuclear norm of its logits (positions x vocabulary), plus alpha times the mean distance of a
    sketch of them to the sketches of the rows chosen last, a queue of 1,024; nothing is added while the queue is empty.
    The best rows are trained on, and their sketches join the queue.

    Norms grow with length, so that long rows win. Padding never counts here, and by default only positions that predict
    the response do (``tokens: all`` takes the prompt in, which is as published); ``per_length`` divides norms and
    sketches by the square root of their number. The record's reason tells the mean length of the chosen rows. Scored in
    eval mode; alpha depends on the scale of the logits.
    """

    name = "uds"
    saved = ("queue",)
    lacking = "no supervised token"
    card = Card(
        summary="Keeps, in every step, candidates whose logits span most and are unlike those of rows chosen lately.",
        paper="Utility-Diversity Aware Online Batch Selection, ICML 2026, arXiv 2510.16882",
        cost="1 F over the candidates and the eigenvalues of a positions x positions matrix each, per interval",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ScoringParams):
        """Parameters of UDS; alpha, queue and sketch are the original code's."""

        alpha: float = param(2.5e-3, "factor of the mean distance to rows chosen lately", minimum=0.0)
        queue_size: int = param(1024, "rows chosen last that distances are taken to", minimum=1)
        tokens: Literal["completion", "all"] = param("completion", "positions whose logits count; all as published")
        per_length: bool = param(False, "divide norms and sketches by the square root of the number of positions")
        sketch_rows: int = param(8, "positions' side of a sketch", minimum=1)
        sketch_columns: int = param(128, "vocabulary's side of a sketch", minimum=1)

    params: Params
    queue: NDArray[np.float32] | None = None

    def requires(self) -> Requires:
        return replace(TOKEN_LOSSES, signals=frozenset({"logits"}), within_batch=True)

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return nuclear norms plus distances to rows chosen lately [N]."""
        p = self.params
        signal = LogitFeatures(
            tokens=p.tokens, per_length=p.per_length, rows=p.sketch_rows, columns=p.sketch_columns, seed=ctx.seed
        )
        found = ctx.signals(signal, pool)
        norms, sketches = found[:, 0], found[:, 1:]
        queue = np.zeros((0, sketches.shape[1]), dtype=np.float32) if self.queue is None else self.queue
        finite = np.isfinite(norms)
        scores = np.full(len(pool), np.nan)
        distances = p.alpha * mean_distances(sketches[finite], queue)
        scores[finite] = norms[finite].astype(np.float64) + distances
        self._asked = pool, queue, sketches
        self._share = distances.mean() / max(abs(float(scores[finite].mean())), 1e-30) if finite.any() else 0.0
        return scores

    def kept(self, found: Found, rows: Rows, budget: int, ctx: Context) -> NDArray[np.int64]:
        """Return the positions kept, and put their sketches into the queue."""
        kept = super().kept(found, rows, budget, ctx)
        _, queue, sketches = self._asked
        chosen = sketches[found.places[kept]].astype(np.float32)
        self.queue = np.concatenate([queue, chosen])[-self.params.queue_size :]
        return kept

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return what distances add to the score, and how long the rows kept are."""
        pool, queue, _ = self._asked
        how = "by nuclear norm"
        if len(queue):
            how += f" and distance to {len(queue)} rows ({self._share:.1%} of the score)"
        lengths = ctx.domains.lengths
        if lengths is not None and len(kept):
            ours = lengths[pool[found.places[kept]]]
            how += f", {ours.mean():.0f} tokens on average against {lengths[pool].mean():.0f}"
        return how
