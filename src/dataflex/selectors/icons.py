"""ICONS: every target votes for the rows of largest influence on it; the rows of most votes are kept.

"ICONS: Influence Consensus for Vision-Language Data Selection", arXiv 2501.00654. The influence of row i on
task t is the mean over the task's rows of the cosine of their gradients with the row's; plain (SGD) gradients on both
sides. A task votes for the rows whose influence reaches the (100 - p)th percentile, linearly
interpolated. A task is a target data set.

Influences are exact here: the original projects gradients to 5,120 numbers (``sketch_size`` does so with a
sparse sketch). ``target_gradient: cosine_of_mean`` compares with the mean gradient of the task instead, in which long
gradients weigh more, as the original does for the subtasks of one benchmark only; it saves a pass over the targets. Few
tasks give few different numbers of votes, so that ties decide most of
the cut: they go to the rows of the higher mean percentile rank over the tasks, then by pool order. With one task
the votes are a threshold and the ranks decide, so that the rows kept are those of largest influence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ComponentError
from dataflex.method import Card, Context, Needs, Rows, Selection, Selector
from dataflex.method import Params as BaseParams
from dataflex.select.choose import top_k
from dataflex.selectors.finite import no_gradients
from dataflex.signals.specs import GradientSpec

__all__ = ["Icons", "count_votes", "percentile_ranks"]


def count_votes(influence: NDArray[np.floating], vote_percent: float) -> NDArray[np.int64]:
    """Return each row's number of votes [n].

    Args:
        influence: Influence of each row on each task [n, T], finite, n >= 1.
        vote_percent: p; a task votes for the rows at or above the (100 - p)th percentile of its influences.
    """
    values = np.asarray(influence, dtype=np.float64)
    return (values >= np.percentile(values, 100.0 - vote_percent, axis=0)).sum(axis=1)


def percentile_ranks(influence: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return each row's percentile rank, averaged over tasks [n], in (0, 1).

    In a task it is (rank - 1/2) / n, and equal values share the mean of their ranks. Rows whose ranks add up
    to the same have the same bits.
    """
    values = np.asarray(influence, dtype=np.float64)
    doubled = np.zeros(len(values), dtype=np.int64)  # twice the ranks: whole numbers, whose sums are exact
    for column in values.T:
        _, place, counts = np.unique(column, return_inverse=True, return_counts=True)
        doubled += (2 * (np.cumsum(counts) - counts) + counts)[place.reshape(-1)]
    return doubled / (2.0 * len(values) * values.shape[1])


class Icons(Selector):
    """Keep the rows that most targets vote for."""

    name = "icons"
    adaptive: ClassVar[bool] = True
    needs = Needs(signals=frozenset({"gradients"}), targets=True, stages=("pt", "sft"))
    card = Card(
        summary="Keeps the rows that most targets vote for, each for the rows of largest influence on it.",
        paper="ICONS: Influence Consensus for Vision-Language Data Selection, arXiv 2501.00654",
        cost="1 F + 1 B over the pool and 2 (F + B) over the targets per interval",
        forward_per_pool_row=1.0,
        backward_per_pool_row=1.0,
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        """Parameters of ICONS; the defaults are the original code's, but for the exact influences."""

        vote_percent: float = field(
            default=20.0,
            metadata={"help": "share of the pool that a task votes for, in percent", "above": 0.0, "maximum": 100.0},
        )
        votes: Literal["threshold", "borda"] = field(
            default="threshold",
            metadata={"help": "one vote above the percentile, or soft votes: the mean percentile rank"},
        )
        precondition: Literal["none", "true_adam", "paper_repo", "sign"] = field(
            default="none", metadata={"help": "what turns training gradients into directions; none as published"}
        )
        target_gradient: Literal["mean_of_cosines", "cosine_of_mean"] = field(
            default="mean_of_cosines",
            metadata={
                "help": "every target row counts alike as published, or by the length of its gradient, in one pass less"
            },
        )
        sketch_size: int | None = field(
            default=None, metadata={"help": "compare sparse sketches of this size; null: exact", "minimum": 2}
        )
        parameters: str | None = field(
            default=None, metadata={"help": "regular expression of parameter names; null: all trainable ones"}
        )
        last_blocks: int | None = field(
            default=None, metadata={"help": "use only the last so many blocks of the model", "minimum": 1}
        )
        bf16: bool = field(default=False, metadata={"help": "run the passes in bfloat16"})

    params: Params

    @property
    def target_passes(self) -> tuple[float, float]:
        """Unit gradients take a pass for the norms and one for the sum."""
        times = 2.0 if self.params.target_gradient == "mean_of_cosines" else 1.0
        return times, times

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Keep the ``budget`` rows of most votes; ties by mean percentile rank, then by pool order.

        Returns:
            Rows best first; scores [len(pool)] are votes + mean percentile rank (a number in (0, 1)), or with
            ``borda`` that rank alone; NaN for rows without a supervised token, never kept.

        Raises:
            DataError: No row of a non-empty pool has a score.
            ComponentError: Influences do not fit the rows asked for.
        """
        if len(pool) == 0:
            return Selection(rows=pool, scores=np.empty(0), reason="empty pool")
        influence = ctx.signals.gradient_scores(pool, self._spec(ctx.seed), targets=ctx.targets)
        if influence.shape != (len(pool), len(ctx.targets)):
            raise ComponentError(f"icons: asked for influences of {len(pool):,} rows, was given {influence.shape}")
        scored = np.flatnonzero(np.isfinite(influence).all(axis=1))
        if not len(scored):
            raise no_gradients(self.name, len(pool))
        scores = np.full(len(pool), np.nan)
        ranks = percentile_ranks(influence[scored])
        if self.params.votes == "borda":
            scores[scored] = ranks
            how = "by soft votes"
        else:
            votes = count_votes(influence[scored], self.params.vote_percent)
            scores[scored] = votes + ranks
            how = f"by votes (at most {int(votes.max())})"
        kept = top_k(scores, budget)
        reason = f"{len(kept)} of {len(pool)} rows {how} of {', '.join(ctx.targets)}"
        if len(scored) < len(pool):
            reason += f"; {len(pool) - len(scored)} rows have no supervised token"
        return Selection(rows=pool[kept], scores=scores, reason=reason)

    def _spec(self, seed: int) -> GradientSpec:
        p = self.params
        return GradientSpec(
            precondition=p.precondition,
            mean_of_cosines=p.target_gradient == "mean_of_cosines",
            parameters=p.parameters,
            last_blocks=p.last_blocks,
            sketch_size=p.sketch_size,
            sketch_seed=seed,
            bf16=p.bf16,
        )
