"""GREATS and OPUS: of a batch of candidates, the rows whose joint step helps the targets most, chosen in every step.

"GREATS: Online Selection of High-Quality Data for LLM Training in Every Iteration", NeurIPS 2024 (OpenReview
232VcN8tSx). Before each step a row i of the candidates scores lr <g_i, g_val>, the first-order fall of the validation
loss; the best is picked, lr^2 <g_i, g_picked> is taken from all (the Hessian being set to the identity), and so on.
OPUS (arXiv 2602.05400) scores the updates that the optimizer would make of the gradients instead, and draws each pick
from softmax(score / temperature).

With one lr divided out, a pick costs the others lr <g_i, g_picked>. At the usual 1e-5 that is nothing, so that the
diversity is inert. ``interaction: scaled`` takes c <g_i, g_picked> with c = strength x mean |score| / (budget x mean
<g_i, g_i>), which depends on no scale; ``learning_rate`` is as published.

Products are exact (no ghost approximation, no CountSketch), over all trainable parameters or those named, in eval mode.
The target gradient is the mean over ``target_rows`` rows drawn anew in every decision, a mean over targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ComponentError, DataError
from dataflex.method import Card, Context, Passes, Requires, Rows, Selection, Selector, param
from dataflex.method import Params as BaseParams
from dataflex.signals.kinds import GradientProducts
from dataflex.signals.specs import GradientOptions

Precondition = Literal["none", "adam_scale", "true_adam", "sign"]


def scaled_strength(scores: NDArray[np.float64], gram: NDArray[np.float64], budget: int, strength: float) -> float:
    """Return c = strength x mean |score| / (budget x mean <g, g>): what a pick costs the others, free of scale.

    Of scores [n], n >= 1, and inner products of rows [n, n]. A strength of 1 makes the picks of a whole budget of
    equal rows cost as much as a row is worth.
    """
    own = budget * float(np.diagonal(gram).mean())
    return strength * float(np.abs(scores).mean()) / own if own > 0 else 0.0


def pick_best(
    scores: NDArray[np.float64], gram: NDArray[np.float64], budget: int, strength: float
) -> NDArray[np.int64]:
    """Pick the best row ``budget`` <= n times; each pick p takes ``strength`` x gram[p] from all. Ties by position.

    Scores [n] are finite, ``gram`` holds inner products of rows [n, n]. The strength is the learning rate, as
    published, scores being free of it. Positions come in the order picked.
    """
    left = scores.copy()
    picked = np.empty(budget, dtype=np.int64)
    for place in range(budget):
        best = int(np.argmax(left))
        picked[place] = best
        left -= strength * gram[best]
        left[picked[: place + 1]] = -np.inf
    return picked


def pick_drawn(
    scores: NDArray[np.float64],
    gram: NDArray[np.float64],
    budget: int,
    strength: float,
    temperature: float,
    uniforms: NDArray[np.float64],
) -> NDArray[np.int64]:
    """As ``pick_best``, but each pick is drawn with probability proportional to exp(what is left / temperature).

    ``temperature`` is above 0, in units of the scores; ``uniforms`` a number in [0, 1) for each pick [budget].
    """
    left = scores.copy()
    remaining = np.ones(len(scores), dtype=np.bool_)
    picked = np.empty(budget, dtype=np.int64)
    for place in range(budget):
        places = np.flatnonzero(remaining)
        values = left[places] / temperature
        cumulative = np.cumsum(np.exp(values - values.max()))
        drawn = int(np.searchsorted(cumulative, uniforms[place] * cumulative[-1], side="right"))
        picked[place] = places[min(drawn, len(places) - 1)]
        remaining[picked[place]] = False
        left -= strength * gram[picked[place]]
    return picked


@dataclass(frozen=True, kw_only=True)
class _Shared(GradientOptions, BaseParams):
    """Parameters of both."""

    precondition: Precondition = param("none", "what turns candidates' gradients into updates; none as published")
    interaction: Literal["scaled", "learning_rate"] = param(
        "scaled", "what a pick takes from the others: free of scale, or as published"
    )
    strength: float = param(1.0, "factor of what a pick takes from the others", minimum=0.0)
    target_rows: int | None = param(
        16, "rows of each target, drawn in every decision, whose gradient counts; null: all", minimum=1
    )


class _Joint(Selector):
    """Common ground: scores and interactions of the candidates."""

    params: _Shared

    def requires(self) -> Requires:
        """State what the run must have."""
        return Requires(
            signals=frozenset({"gradients"}),
            targets=True,
            stages=("pt", "sft"),
            needs_interval=True,
            within_batch=True,
            preconditions={"precondition": self.params.precondition},
            passes=Passes(pool=(1.0, 1.0)),
        )

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Pick up to ``budget`` of the candidates, one after another.

        Returns:
            Rows in the order picked; scores [len(pool)] are the inner products with the targets' gradient before
            any pick, without the learning rate, which changes no order; NaN for rows without a supervised token.

        Raises:
            DataError: No candidate has a gradient.
            ComponentError: Products do not fit the rows asked for.
        """
        if len(pool) == 0:
            return Selection(rows=pool, scores=np.empty(0), reason="empty pool")
        p = self.params
        options = p.options(include_momentum=False, normalize=False)
        signal = GradientProducts(targets=ctx.targets, target_rows=self._target_rows(ctx), **options)
        by_target, gram = signal.split(ctx.signals(signal, pool))
        if by_target.shape != (len(pool), len(ctx.targets)) or gram.shape != (len(pool), len(pool)):
            raise ComponentError(
                f"{self.name}: asked for products of {len(pool):,} rows, was given {by_target.shape} and {gram.shape}"
            )
        scores = by_target.astype(np.float64).mean(axis=1)
        known = np.flatnonzero(np.isfinite(scores) & np.isfinite(np.diagonal(gram)))
        if not len(known):
            raise DataError(
                f"{self.name}: none of {len(pool):,} candidates has a gradient (are their labels all masked?). "
                "Check that cutoff_len leaves room for the response, and that the model's own loss is finite."
            )
        count = min(budget, len(known))
        own, among = scores[known], gram[np.ix_(known, known)].astype(np.float64)
        strength = p.strength * ctx.learning_rate
        if p.interaction == "scaled":
            strength = scaled_strength(own, among, max(count, 1), p.strength)
        picked = known[self._pick(own, among, count, strength, ctx)]
        found = np.full(len(pool), np.nan)
        found[known] = own
        reason = f"{count} of {len(pool)} candidates by joint influence on {', '.join(ctx.targets)}"
        if count:
            reason += f", mean score {found[picked].mean():.3g} against {own.mean():.3g}"
        if len(known) < len(pool):
            reason += f"; {len(pool) - len(known)} have no supervised token"
        return Selection(rows=pool[picked], scores=found, reason=reason)

    def _pick(
        self, scores: NDArray[np.float64], gram: NDArray[np.float64], budget: int, strength: float, ctx: Context
    ) -> NDArray[np.int64]:
        raise NotImplementedError

    def _target_rows(self, ctx: Context) -> dict[str, Rows]:
        """Draw rows of the targets that have more than are wanted."""
        wanted, drawn = self.params.target_rows, {}
        for target in ctx.targets:
            there = ctx.signals.num_rows(target)
            if wanted is not None and wanted < there:
                rng = ctx.rng(f"selector.{self.name}.target_rows.{target}")
                drawn[target] = np.sort(rng.choice(there, size=wanted, replace=False)).astype(np.int64)
        return drawn


class Greats(_Joint):
    """Pick greedily, with plain gradients as published."""

    name = "greats"
    card = Card(
        summary="Picks, in every step, the candidates whose gradients together go furthest along the targets'.",
        paper="GREATS: Online Selection of High-Quality Data, NeurIPS 2024, OpenReview 232VcN8tSx (no arXiv version)",
        cost="1 F + 1 B over the candidates and F + B over target_rows rows of each target per interval",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(_Shared):
        """Parameters of GREATS; ``interaction: learning_rate`` with ``target_rows: 2`` is as published."""

    params: Params

    def _pick(
        self, scores: NDArray[np.float64], gram: NDArray[np.float64], budget: int, strength: float, ctx: Context
    ) -> NDArray[np.int64]:
        return pick_best(scores, gram, budget, strength)


class Opus(_Joint):
    """Draw from what the optimizer's updates are worth."""

    name = "opus"
    card = Card(
        summary="Draws, in every step, candidates by how far the optimizer's update on them goes along the targets.",
        paper="OPUS: Data Selection in LLM Pre-training in Every Iteration, arXiv 2602.05400",
        cost="1 F + 1 B over the candidates and F + B over target_rows rows of each target per interval",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(_Shared):
        """Parameters of OPUS; ``standardize: false`` and ``interaction: learning_rate`` are as published."""

        precondition: Precondition = param(
            "adam_scale", "updates: Adam's with its second moment as it is (as published), with the row's own too"
        )
        temperature: float = param(1.5, "flattens the draw as it grows; the paper's", above=0.0)
        standardize: bool = param(True, "temperature counts in standard deviations of the candidates' scores")

    params: Params

    def _pick(
        self, scores: NDArray[np.float64], gram: NDArray[np.float64], budget: int, strength: float, ctx: Context
    ) -> NDArray[np.int64]:
        unit = float(scores.std()) if self.params.standardize else 1.0 / ctx.learning_rate if ctx.learning_rate else 0.0
        uniforms = ctx.rng("selector.opus.draws").random(budget)
        if unit <= 0.0 or not np.isfinite(unit):  # all alike, or no step to be taken: nothing to tell rows apart
            return pick_drawn(np.zeros_like(scores), np.zeros_like(gram), budget, 0.0, 1.0, uniforms)
        return pick_drawn(scores, gram, budget, strength, self.params.temperature * unit, uniforms)
