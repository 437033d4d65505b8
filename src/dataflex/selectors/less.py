"""LESS: keep the rows whose optimizer step goes furthest along the gradient of the target tasks.

Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning", ICML 2024, arXiv 2402.04333.
Training gradients go through Adam with the moments of the run itself, target gradients stay plain, both
are averaged over a row's supervised tokens. Scores are exact: since only one mean gradient per task is
compared with, the paper's random projection is not needed (``sketch_size`` brings a sparse one back). The
warm-up is the run's own; the paper's checkpoints are the last ``checkpoints`` intervals, weighted by their
learning rate.

The paper selects once. Where a small relevant part of the pool is chosen and served again and again, it is learnt by
heart: what is left of its rows' gradients is small, momentum outweighs it, and a direction says nothing of its size,
so that cosines lose the target. In a planted pool (docs/results.md, two seeds) the relevant share of the rows kept
fell from 1 to 0.23 and 0.53 by the fifth decision and the held-out loss rose from 1.12 to 1.47 and 1.13 to 1.18. Inner
products (``normalize: false``), in which a learnt row counts for little, ended with 0.63 and 0.47 and losses of 1.12
and 1.15, below the cosines' from the second decision on; they favour short rows and large losses. Without the momentum
(``include_momentum: false``, one seed) it was 0.50 and 1.16. ``exclude_seen`` helps only where the pool holds many more
relevant rows than an interval serves. A run warns of rows that come back too often (``dynamic.max_repeats``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError
from dataflex.method import Card, Context, Needs, Rows, Selection, Selector, State
from dataflex.method import Params as BaseParams
from dataflex.select.choose import round_robin, top_k
from dataflex.selectors.finite import no_gradients
from dataflex.signals.specs import GradientSpec

__all__ = ["Less", "lr_weighted"]


def lr_weighted(scores: list[NDArray[np.float32]], rates: list[float]) -> NDArray[np.float64]:
    """Average the scores of several checkpoints with their learning rates as weights (section 3.2, equation 2).

    Args:
        scores: One array per checkpoint, equal shapes.
        rates: Learning rate of each; all zero counts as equal.

    Returns:
        float64, the shape of one array.
    """
    weights = np.asarray(rates, dtype=np.float64)
    weights = weights / weights.sum() if weights.sum() > 0 else np.full(len(rates), 1.0 / len(rates))
    return np.tensordot(weights, np.stack(scores).astype(np.float64), axes=1)


class Less(Selector):
    """Keep the rows with the largest influence on the targets."""

    name = "less"
    adaptive: ClassVar[bool] = True
    needs = Needs(signals=frozenset({"gradients"}), targets=True, stages=("pt", "sft"))
    card = Card(
        summary="Keeps the rows whose optimizer step goes furthest along the gradient of the targets.",
        paper="LESS: Selecting Influential Data for Targeted Instruction Tuning, ICML 2024, arXiv 2402.04333",
        cost="1 F + 1 B over the pool and 2 (F + B) over the targets per interval",
        note="Repeated decisions that serve the same few rows again and again decay: cosines of rows known by heart "
        "lose the target, and held-out loss rises. normalize: false (inner products) wears out least, then "
        "include_momentum: false; dynamic.max_repeats warns.",
        forward_per_pool_row=1.0,
        backward_per_pool_row=1.0,
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        """Parameters of LESS. ``precondition: paper_repo`` repeats the original code's Adam."""

        precondition: Literal["true_adam", "paper_repo", "sign", "none"] = field(
            default="true_adam", metadata={"help": "what turns training gradients into directions"}
        )
        include_momentum: bool = field(default=True, metadata={"help": "keep Adam's momentum term"})
        normalize: bool = field(
            default=True,
            metadata={"help": "compare directions (cosines, as published); false: inner products, which wear out less"},
        )
        target_gradient: Literal["mean_of_cosines", "cosine_of_mean"] = field(
            default="mean_of_cosines",
            metadata={"help": "mean over a task as in the code or in the text"},
        )
        aggregate: Literal["max", "mean", "round_robin"] = field(
            default="max", metadata={"help": "how tasks are brought together, each being a target data set"}
        )
        checkpoints: int = field(
            default=1, metadata={"help": "intervals whose scores are averaged, weighted by learning rate", "minimum": 1}
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
        times = 2.0 if self.params.normalize and self.params.target_gradient == "mean_of_cosines" else 1.0
        return times, times

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self._scores: list[NDArray[np.float32]] = []
        self._rates: list[float] = []
        self._pool = np.zeros(0, dtype=np.int64)

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Keep the ``budget`` rows of the largest score; ties by pool order.

        Returns:
            Rows best first; scores [len(pool)] after bringing tasks together (their maximum for
            ``round_robin``), NaN for rows without a supervised token, which are never kept.

        Raises:
            DataError: No row of a non-empty pool has a score.
            ConfigError: ``checkpoints`` above 1 with a pool that changes.
        """
        if len(pool) == 0:
            return Selection(rows=pool, scores=np.empty(0), reason="empty pool")
        by_task = self._accumulate(pool, ctx)
        scored = np.flatnonzero(np.isfinite(by_task).all(axis=1))
        if not len(scored):
            raise no_gradients(self.name, len(pool))
        together = by_task.mean(axis=1) if self.params.aggregate == "mean" else by_task.max(axis=1)
        count = min(budget, len(scored))
        if self.params.aggregate == "round_robin":
            kept = scored[round_robin(np.ascontiguousarray(by_task[scored].T), count)]
        else:
            kept = scored[top_k(together[scored], count)]
        reason = f"{len(kept)} of {len(pool)} rows by influence on {', '.join(ctx.targets)}"
        if len(self._rates) > 1:
            reason += f", over {len(self._rates)} intervals"
        if len(scored) < len(pool):
            reason += f"; {len(pool) - len(scored)} rows have no supervised token"
        return Selection(rows=pool[kept], scores=together, reason=reason)

    def _accumulate(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        p = self.params
        spec = GradientSpec(
            precondition=p.precondition,
            include_momentum=p.include_momentum,
            normalize=p.normalize,
            mean_of_cosines=p.target_gradient == "mean_of_cosines",
            parameters=p.parameters,
            last_blocks=p.last_blocks,
            sketch_size=p.sketch_size,
            sketch_seed=ctx.seed,
            bf16=p.bf16,
        )
        if p.checkpoints > 1 and len(self._pool) and not np.array_equal(self._pool, pool):
            raise ConfigError(
                "dynamic.selector.checkpoints: scores of several intervals can only be averaged over the same rows; "
                "set dynamic.signals.pool_fraction to 1, or checkpoints to 1"
            )
        self._scores.append(ctx.signals.gradient_scores(pool, spec, targets=ctx.targets))
        self._rates.append(float(ctx.learning_rate))
        self._scores, self._rates = self._scores[-p.checkpoints :], self._rates[-p.checkpoints :]
        self._pool = pool
        return lr_weighted(self._scores, self._rates)

    def state_dict(self) -> State:
        """Return the scores of earlier intervals that still count."""
        keep = self.params.checkpoints > 1 and bool(self._scores)
        return {"scores": np.stack(self._scores), "rates": self._rates, "pool": self._pool} if keep else {}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave.

        Raises:
            ValueError: The state is not one of ours.
        """
        if state and set(state) != {"scores", "rates", "pool"}:
            raise ValueError(f"less keeps scores, rates and pool, but was given {sorted(state)}")
        self._scores = list(state["scores"]) if state else []
        self._rates = [float(rate) for rate in state["rates"]] if state else []
        self._pool = state["pool"] if state else np.zeros(0, dtype=np.int64)
