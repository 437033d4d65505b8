"""Draw evenly from clusters of loss trajectories, so that every way of being learnt is there.

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

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Card, Context, Passes, Requires, Rows, param
from dataflex.method import Params as BaseParams
from dataflex.select.choose import by_quota, top_k, water_filling
from dataflex.select.cluster import kmeans, require_kmeans
from dataflex.select.scoring import Found, PoolSelector
from dataflex.selectors._lib import TOKEN_LOSSES
from dataflex.signals.kinds import TokenLoss

_TINY = 2  # clusters of at most this many rows are drawn from last
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


class S2l(PoolSelector):
    """Draw evenly from clusters of loss trajectories."""

    name = "s2l"
    saved = ("points",)
    lacking = "no finite loss"
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
        clusters: int = param(100, "largest number of clusters in a domain", minimum=1)
        iterations: int = param(20, "largest number of rounds of k-means", minimum=1)
        min_points: int = param(2, "number of points of the model under training before it clusters", minimum=1)

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        proxies, passes = self.params.proxies, Passes(pool=(1.0, 0.0))
        if proxies:  # they do not change: each scores a row once
            told = f"{len(proxies)} F of the proxies over each row of the pool, once; k-means on the CPU"
            passes = Passes(pool_once=float(len(proxies)), told=told)
        models = {f"proxies[{place}]": name for place, name in enumerate(proxies)}
        return replace(TOKEN_LOSSES, models=models, passes=passes)

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        require_kmeans()
        self.points = np.zeros((0, 0), dtype=np.float32)

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.floating]:
        """Return the last losses [N], and keep the trajectories for the choice."""
        if self.params.proxies:
            seen = np.stack([ctx.signals(TokenLoss(model=name), pool) for name in self.params.proxies], axis=1)
        else:
            seen = self._seen(pool, ctx)
        self._trajectories = filled(np.where(np.isfinite(seen), seen, np.nan))
        return np.where(np.isfinite(seen[:, -1]), self._trajectories[:, -1], np.float32(np.nan))

    def kept(self, found: Found, rows: Rows, budget: int, ctx: Context) -> NDArray[np.int64]:
        """Return the rows drawn, in random order."""
        p, trajectories = self.params, self._trajectories[found.places]
        preference = self.uniforms(ctx)("draws", rows)
        domains = ctx.domains.domain_of[rows]
        there, sizes = np.unique(domains, return_counts=True)
        clusters, parts = 0, [np.empty(0, dtype=np.int64)]
        for domain, quota in zip(there.tolist(), water_filling(sizes, budget).tolist(), strict=True):
            inside = np.flatnonzero(domains == domain)
            labels = np.zeros(len(inside), dtype=np.int64)
            if p.proxies or trajectories.shape[1] >= p.min_points:
                rng = ctx.rng(f"selector.s2l.{domain}")
                labels, _ = kmeans(trajectories[inside], p.clusters, rng, iterations=p.iterations)
                clusters += int(labels.max()) + 1
            parts.append(inside[_even(labels, preference[inside], quota)])
        how = f"from {clusters} clusters of {trajectories.shape[1]} losses"
        self._told = f"{how if clusters else 'without clusters until there are more points'}, {len(there)} domains"
        chosen = np.concatenate(parts)
        return chosen[top_k(preference[chosen], len(chosen))]

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return the number of clusters and domains."""
        return self._told

    def _seen(self, pool: Rows, ctx: Context) -> NDArray[np.float32]:
        """Add this decision's losses and return all points of the pool's rows [len(pool), T]."""
        now = np.full((ctx.signals.num_rows(), 1), np.nan, dtype=np.float32)
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
