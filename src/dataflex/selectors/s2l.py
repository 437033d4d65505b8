"""S2L: rows drawn evenly from clusters of loss trajectories, so that every way of being learnt is there.

"SmallToLarge (S2L): Scalable Data Selection for Fine-tuning LLMs by Summarizing Training Trajectories of Small
Models", NeurIPS 2024, arXiv 2403.07384. A row's trajectory is its loss at several checkpoints. The budget is shared
over domains by water-filling (equally, small ones giving all they have); inside a domain, trajectories are clustered
by k-means, and its share is water-filled over the clusters of more than two rows, drawn at random inside. If that is
too little, rows of the tiny clusters are drawn.

The paper's checkpoints are those of a small proxy model: train it once with ``save_steps`` and list its folders in
``proxies``. Without, the trajectory is that of the model under training: every decision adds a point, and decisions
before the ``min_points``-th draw without clusters. Points that a row lacks (``pool_fraction``) are taken from its
neighbours in time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Card, Context, Passes, Requires, Rows, Selection, Selector, param
from dataflex.method import Params as BaseParams
from dataflex.rng import uniforms
from dataflex.select.choose import by_quota, top_k, water_filling
from dataflex.select.cluster import kmeans, require_kmeans
from dataflex.signals.kinds import TokenLoss

_TINY = 2  # clusters of so few rows are left aside first
_MOST_POINTS = 64  # of a trajectory; beyond it every second one is forgotten


def filled(trajectories_NT: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return trajectories whose missing points (NaN) hold the point before, or at the start the first one there is.

    Rows without any point stay NaN.
    """
    out = np.array(trajectories_NT, dtype=np.float32)
    for steps in (range(1, out.shape[1]), range(out.shape[1] - 2, -1, -1)):
        for t in steps:
            before = out[:, t - 1] if steps.step > 0 else out[:, t + 1]
            out[:, t] = np.where(np.isnan(out[:, t]), before, out[:, t])
    return out


class S2l(Selector):
    """Draw evenly from clusters of loss trajectories."""

    name = "s2l"
    saved = ("points",)
    card = Card(
        summary="Draws evenly from clusters of rows whose losses fell alike, within each domain.",
        paper="SmallToLarge (S2L), NeurIPS 2024, arXiv 2403.07384",
        cost="1 F over the pool per interval, or 1 F of each proxy checkpoint once; k-means on the CPU",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        """Parameters of S2L; ``clusters`` and ``iterations`` are the paper's."""

        proxies: tuple[str, ...] = param(
            (), "checkpoint folders of a small model, in order; none: the model under training"
        )
        clusters: int = param(100, "clusters in a domain at most", minimum=1)
        iterations: int = param(20, "rounds of k-means at most", minimum=1)
        min_points: int = param(2, "points of the model under training before it clusters", minimum=1)

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        proxies, passes = self.params.proxies, Passes(pool=(1.0, 0.0))
        if proxies:  # they do not change: each scores a row once
            told = f"{len(proxies)} F of the proxies over each row of the pool, once; k-means on the CPU"
            passes = Passes(pool_once=float(len(proxies)), told=told)
        return Requires(
            signals=frozenset({"losses"}),
            stages=("pt", "sft"),
            needs_interval=True,
            models={f"proxies[{place}]": name for place, name in enumerate(proxies)},
            passes=passes,
        )

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        require_kmeans()
        self.points = np.zeros((0, 0), dtype=np.float32)

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Draw up to ``budget`` rows.

        Returns:
            Rows in random order; scores [len(pool)] are the last losses, NaN for rows without a finite loss,
            which are never drawn.

        Raises:
            ConfigError: scikit-learn is not installed.
            DataError: No row of a non-empty pool has a finite loss, or the data set is not the one that the
                losses of before belong to.
        """
        if len(pool) == 0:
            return Selection(rows=pool, scores=np.empty(0, dtype=np.float32), reason="empty pool")
        trajectories = self._trajectories(pool, ctx)
        scores = trajectories[:, -1].copy()
        usable = np.flatnonzero(np.isfinite(scores))
        if not len(usable):
            raise DataError(
                f"s2l: all {len(pool):,} rows have no finite loss (are their labels all masked?). Check that "
                "cutoff_len leaves room for the response, and that the model's own loss is finite."
            )
        rows, points = pool[usable], trajectories.shape[1]
        preference = uniforms(ctx.seed, "selector.s2l", ctx.interval.index, rows)
        domains = ctx.domains.domain_of[rows]
        quotas = np.zeros(len(ctx.domains.names), dtype=np.int64)
        there, sizes = np.unique(domains, return_counts=True)
        quotas[there] = water_filling(sizes, min(budget, len(rows)))
        clusters, kept = 0, [np.empty(0, dtype=np.int64)]
        for domain in there.tolist():
            inside = np.flatnonzero(domains == domain)
            labels = np.zeros(len(inside), dtype=np.int64)
            if self.params.proxies or points >= self.params.min_points:
                rng = ctx.rng(f"selector.s2l.{domain}")
                vectors = trajectories[usable[inside]]
                labels, _ = kmeans(vectors, self.params.clusters, rng, iterations=self.params.iterations)
                clusters += int(labels.max()) + 1
            kept.append(inside[_even(labels, preference[inside], int(quotas[domain]))])
        chosen = np.concatenate(kept)
        chosen = chosen[top_k(preference[chosen], len(chosen))]
        how = (
            f"from {clusters} clusters of {points} losses"
            if clusters
            else "without clusters until there are more points"
        )
        reason = f"{len(chosen)} of {len(pool)} rows {how}, {len(there)} domains"
        if len(usable) < len(pool):
            reason += f"; {len(pool) - len(usable)} rows have no finite loss"
        return Selection(rows=rows[chosen], scores=scores, reason=reason)

    def _trajectories(self, pool: Rows, ctx: Context) -> NDArray[np.float32]:
        """Return the trajectories of the pool's rows [len(pool), T]; NaN rows have no finite last loss."""
        if self.params.proxies:
            seen = np.stack([ctx.signals(TokenLoss(model=name), pool) for name in self.params.proxies], axis=1)
        else:
            seen = self._seen(pool, ctx)
        last = np.isfinite(seen[:, -1])
        seen = filled(np.where(np.isfinite(seen), seen, np.nan))
        seen[~last] = np.nan
        return seen

    def _seen(self, pool: Rows, ctx: Context) -> NDArray[np.float32]:
        """Add this decision's losses and return all points of the pool's rows [len(pool), T]."""
        num_rows = ctx.signals.num_rows()
        if self.points.shape[1] and len(self.points) != num_rows:
            raise DataError(
                f"s2l: the trajectories are those of {len(self.points):,} rows, but the training set has "
                f"{num_rows:,}. Resume with the data set that the run began with."
            )
        now = np.full((num_rows, 1), np.nan, dtype=np.float32)
        now[pool, 0] = ctx.signals(TokenLoss(), pool)
        self.points = np.concatenate([self.points, now], axis=1) if self.points.shape[1] else now
        if self.points.shape[1] > _MOST_POINTS:  # every second one, the newest included
            self.points = np.ascontiguousarray(self.points[:, ::-2][:, ::-1])
        return self.points[pool]


def _even(labels: NDArray[np.int64], preference: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Return positions: water-filled over clusters of more than two rows, then from the tiny ones if need be."""
    large = np.bincount(labels)[labels] > _TINY
    first = np.flatnonzero(large)
    _, groups = np.unique(labels[first], return_inverse=True)
    chosen = first[by_quota(groups, preference[first], count, "water_filling")] if len(first) else first
    rest = np.flatnonzero(~large)
    return np.concatenate([chosen, rest[top_k(preference[rest], count - len(chosen))]])
