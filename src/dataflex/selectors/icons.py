"""Keep the rows that most targets vote for, each for the rows of largest influence on it.

"ICONS: Influence Consensus for Vision-Language Data Selection", arXiv 2501.00654. The influence of row i on
task t, a target data set, is the mean over the task's rows of the cosine of their gradients with the row's; plain (SGD)
gradients on both sides. A task votes for the rows whose influence reaches the (100 - p)th percentile, linearly
interpolated.

Influences are exact here: the original projects gradients to 5,120 numbers (``sketch_size`` does so with a
sparse sketch). ``target_gradient: cosine_of_mean`` compares with the mean gradient of the task instead, in which long
gradients weigh more, as the original does for the subtasks of one benchmark only; it saves a pass over the targets. Few
tasks give few different numbers of votes, so that ties decide most of the cut: they go to the rows of the higher mean
percentile rank over the tasks, then by pool order. With one task the rows of largest influence are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Card, Context, Passes, Requires, Rows, param
from dataflex.select.scoring import AGGREGATE, Aggregate, Found, ScoringParams, ScoringSelector
from dataflex.selectors._lib import GRADIENTS
from dataflex.signals.kinds import GradientScores
from dataflex.signals.specs import InfluenceOptions


class Icons(ScoringSelector):
    """Keep the rows that most targets vote for."""

    name = "icons"
    lacking = "no supervised token"
    decides = ("aggregate", "rule", "vote_percent", "votes")
    card = Card(
        summary="Keeps the rows that most targets vote for, each for the rows of largest influence on it.",
        paper="ICONS: Influence Consensus for Vision-Language Data Selection, arXiv 2501.00654",
        cost="1 F + 1 B over the pool and 2 (F + B) over the targets per interval",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(InfluenceOptions, ScoringParams):
        """Parameters of ICONS; the defaults are the original code's, but for the exact influences."""

        aggregate: Aggregate | None = param(Aggregate.of("votes"), AGGREGATE)
        vote_percent: float = param(
            20.0, "share of the pool that a task votes for, in percent", above=0.0, maximum=100.0
        )
        votes: Literal["threshold", "borda"] = param(
            "threshold", "one vote above the percentile, or soft votes: the mean percentile rank"
        )
        precondition: Literal["none", "true_adam", "paper_repo", "sign"] = param(
            "none", "what turns training gradients into directions; none as published"
        )

        def __post_init__(self) -> None:
            moved = [name for name in ("vote_percent", "votes") if getattr(self, name) != getattr(type(self), name)]
            if moved and self.aggregate != type(self).aggregate:
                raise ValueError(f"{moved[0]}: has no effect beside 'aggregate'; write it there, or remove it")

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        p = self.params
        passes = Passes(pool=(1.0, 1.0), targets=p.target_passes())
        return replace(GRADIENTS, preconditions={"precondition": p.precondition}, passes=passes)

    @property
    def aggregate(self) -> Aggregate:
        """Votes, unless targets are to come together otherwise."""
        p = self.params
        if p.votes == "borda":
            return Aggregate.of("ranks")
        return super().aggregate if p.vote_percent == 20.0 else Aggregate.of("votes", vote_percent=p.vote_percent)

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.floating]:
        """Return influence on the targets [T, N]."""
        options = self.params.options(sketch_seed=ctx.seed)
        return ctx.signals(GradientScores(targets=ctx.targets, **options), pool).T

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return how targets came together."""
        return f"by {self.aggregate.name} of {', '.join(ctx.targets)}"
