"""Keep the rows whose optimizer step goes furthest along the gradient of the targets.

Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning", ICML 2024, arXiv 2402.04333.
Training gradients go through Adam with the moments of the run itself, target gradients stay plain, both
are averaged over a row's supervised tokens. Scores are exact: since only one mean gradient per task is
compared with, the paper's random projection is not needed (``sketch_size`` brings a sparse one back). The
warm-up is the run's own; the paper's checkpoints are the last ``checkpoints`` intervals, weighted by their
learning rate.

The paper selects once. Where a small relevant part of the pool is chosen and served again and again, it is learnt by
heart, and the cosines of its small gradients lose the target. Inner products (``normalize: false``), in which a learnt
row counts for little, wear out least, but favour short rows and large losses; then ``include_momentum: false``.
``exclude_seen`` helps only where the pool holds many more relevant rows than an interval serves. A planted pool in
docs/results.md shows the effect, and a run warns of rows that come back too often (``dynamic.max_repeats``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError
from dataflex.method import Card, Context, Passes, Requires, Rows, State, param
from dataflex.select.scoring import Found, ScoringParams, ScoringSelector
from dataflex.selectors._lib import GRADIENTS
from dataflex.signals.kinds import GradientScores
from dataflex.signals.specs import InfluenceOptions


def lr_weighted(scores: list[NDArray[np.float32]], rates: list[float]) -> NDArray[np.float64]:
    """Average the scores of several checkpoints with their learning rates as weights (section 3.2, equation 2).

    float64. Rates that are all zero count as equal.
    """
    weights = np.asarray(rates, dtype=np.float64)
    weights = weights / weights.sum() if weights.sum() > 0 else np.full(len(rates), 1.0 / len(rates))
    return np.tensordot(weights, np.stack(scores).astype(np.float64), axes=1)


class Less(ScoringSelector):
    """Keep the rows with the largest influence on the targets."""

    name = "less"
    lacking = "no supervised token"
    card = Card(
        summary="Keeps the rows whose optimizer step goes furthest along the gradient of the targets.",
        paper="LESS: Selecting Influential Data for Targeted Instruction Tuning, ICML 2024, arXiv 2402.04333",
        cost="1 F + 1 B over the pool and 2 (F + B) over the targets per interval",
        note="Repeated decisions that serve the same few rows again and again decay: cosines of rows known by heart "
        "lose the target, and held-out loss rises. normalize: false (inner products) wears out least, then "
        "include_momentum: false; dynamic.max_repeats warns.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(InfluenceOptions, ScoringParams):
        """Parameters of LESS. ``precondition: paper_repo`` repeats the original code's Adam."""

        normalize: bool = param(
            True, "compare directions (cosines, as published); false: inner products, which wear out less"
        )
        checkpoints: int = param(1, "intervals whose scores are averaged, weighted by learning rate", minimum=1)

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        p = self.params
        passes = Passes(pool=(1.0, 1.0), targets=p.target_passes(p.normalize))
        return replace(GRADIENTS, preconditions={"precondition": p.precondition}, passes=passes)

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self._scores: list[NDArray[np.float32]] = []
        self._rates: list[float] = []
        self._pool = np.zeros(0, dtype=np.int64)

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return influence on the targets [T, N].

        Raises:
            ConfigError: ``checkpoints`` above 1 with a pool that changes.
        """
        p = self.params
        if p.checkpoints > 1 and len(self._pool) and not np.array_equal(self._pool, pool):
            raise ConfigError(
                "dynamic.selector.checkpoints: scores of several intervals can only be averaged over the same rows; "
                "set dynamic.signals.pool_fraction to 1, or checkpoints to 1"
            )
        signal = GradientScores(targets=ctx.targets, **p.options(sketch_seed=ctx.seed))
        self._scores.append(ctx.signals(signal, pool))
        self._rates.append(float(ctx.learning_rate))
        self._scores, self._rates = self._scores[-p.checkpoints :], self._rates[-p.checkpoints :]
        self._pool = pool
        return lr_weighted(self._scores, self._rates).T

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return the targets, and over how many intervals the influence is averaged."""
        over = f", over {len(self._rates)} intervals" if len(self._rates) > 1 else ""
        return f"by influence on {', '.join(ctx.targets)}{over}"

    def state_dict(self) -> State:
        """Return the scores of earlier intervals that still count."""
        keep = self.params.checkpoints > 1 and bool(self._scores)
        return {"scores": np.stack(self._scores), "rates": self._rates, "pool": self._pool} if keep else {}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave; ValueError where that is not one of ours."""
        if state and set(state) != {"scores", "rates", "pool"}:
            raise ValueError(f"less keeps scores, rates and pool, but was given {sorted(state)}")
        self._scores = list(state.get("scores", []))
        self._rates = [float(rate) for rate in state.get("rates", [])]
        self._pool = state.get("pool", np.zeros(0, dtype=np.int64))
