"""Rows drawn from every cluster: of features (COINCIDE) and of loss trajectories (S2L)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Card, Context, Passes, Requires, Rows, param
from dataflex.method import Params as BaseParams
from dataflex.parts import refuse_idle
from dataflex.select.choose import by_quota, top_k, water_filling
from dataflex.select.cluster import kmeans, members, require_kmeans, spherical_kmeans
from dataflex.select.scoring import Found, PoolSelector
from dataflex.selectors._lib import EMBEDDINGS, TOKEN_LOSSES
from dataflex.signals.kinds import Embedding, TokenLoss

_CELLS = 1 << 22  # kernel values held at a time: 32 MiB
_NEAR = 0.9  # cosine of centres above which one is the other's near-duplicate
_TINY = 2  # clusters of at most this many rows are drawn from last
_MOST_POINTS = 64  # of a trajectory; beyond it every second one is forgotten


def gaussian_kernel(left: NDArray[np.floating], right: NDArray[np.floating], gamma: float = 1.0) -> NDArray[np.float64]:
    """Return exp(-|x - y|^2 / (2 gamma^2)) of all pairs, float64 [n, m]."""
    a, b = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    squares = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2.0 * (a @ b.T)
    return np.asarray(np.exp(np.maximum(squares, 0.0) / (-2.0 * gamma * gamma)))


def _row_means(rows: NDArray[np.float64], gamma: float) -> NDArray[np.float64]:
    step = max(1, _CELLS // len(rows))
    parts = (rows[start : start + step] for start in range(0, len(rows), step))
    return np.concatenate([gaussian_kernel(part, rows, gamma).mean(axis=1) for part in parts])


def density(rows: NDArray[np.floating], gamma: float = 1.0) -> float:
    """Return D: the mean kernel over all pairs of rows [n, d], each with itself included; n >= 1."""
    return float(_row_means(np.asarray(rows, dtype=np.float64), gamma).mean())


def greedy_mmd(rows: NDArray[np.floating], count: int, gamma: float = 1.0) -> NDArray[np.int64]:
    """Return positions of rows [n, d] whose distribution is closest to that of all rows, added one at a time.

    Each step adds the row x that makes the squared maximum mean discrepancy of the chosen rows S (m of them) to all
    rows least: (Q + 2 b_x + k(x, x)) / (m + 1)^2 - 2 (A + a_x) / (m + 1), with a_x the mean kernel of x with all
    rows, b_x its sum with S, Q the sum over pairs of S, and A the sum of a over S. O(n d) a step. Gives
    int64 [min(count, n)] in the order added; ties to the smaller position.
    """
    vectors = np.asarray(rows, dtype=np.float64)
    chosen = np.empty(min(count, len(vectors)), dtype=np.int64)
    if not len(chosen):
        return chosen
    means = _row_means(vectors, gamma)
    near = np.zeros(len(vectors))
    free = np.ones(len(vectors), dtype=np.bool_)
    pairs = aligned = 0.0
    for m in range(len(chosen)):
        # k(x, x) = 1.
        value = (pairs + 2.0 * near + 1.0) / (m + 1) ** 2 - 2.0 * (aligned + means) / (m + 1)
        best = int(np.argmin(np.where(free, value, np.inf)))
        chosen[m], free[best] = best, False
        pairs += 2.0 * near[best] + 1.0
        aligned += means[best]
        near += gaussian_kernel(vectors[best : best + 1], vectors, gamma)[0]
    return chosen


def transferability(centres: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return S of each cluster [K]: the mean cosine with the centres that are no near-duplicates; 0 without any."""
    units = np.asarray(centres, dtype=np.float64)
    units = units / np.maximum(np.linalg.norm(units, axis=1, keepdims=True), 1e-30)
    result = np.zeros(len(units))
    step = max(1, (1 << 23) // len(units))
    for start in range(0, len(units), step):
        cosines = units[start : start + step] @ units.T
        kept = cosines <= _NEAR
        rows = np.arange(len(cosines))
        kept[rows, start + rows] = False  # a centre of zeros has cosine 0 with itself
        result[start : start + step] = np.where(kept, cosines, 0.0).sum(axis=1) / np.maximum(kept.sum(axis=1), 1)
    return result


def cluster_quotas(
    scores: NDArray[np.floating], sizes: NDArray[np.integer], budget: int, temperature: float
) -> list[tuple[int, int]]:
    """Return (cluster, rows to take) in the order served, for scores S / D [K]; the numbers sum to min(budget, rows).

    Each cluster is given its share of what is left, rounded (half to even), and at most its size; then the
    shares of the clusters not yet served are taken anew. What rounding and small clusters leave over is filled
    up in the same order.
    """
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    left = min(int(budget), int(np.sum(sizes)))
    # Shares of the clusters from place i on are weights[i] over the sum of those from i on.
    ordered = np.asarray(scores, dtype=np.float64)[order] / temperature
    quotas = []
    after = np.logaddexp.accumulate(ordered[::-1])[::-1]
    for place, cluster in enumerate(order.tolist()):
        count = min(round(left * float(np.exp(ordered[place] - after[place]))), int(sizes[cluster]), left)
        quotas.append(count)
        left -= count
    for place, cluster in enumerate(order.tolist()):
        more = min(left, int(sizes[cluster]) - quotas[place])
        quotas[place] += more
        left -= more
    return list(zip(order.tolist(), quotas, strict=True))


class Coincide(PoolSelector):
    """Keep rows of transferable, sparse clusters, each cluster in miniature.

    "Concept-skill Transferability-based Data Selection for Large Vision-Language Models", EMNLP 2024, arXiv 2406.10995.
    A cluster's share is softmax(S / D / temperature): its transferability S is the mean cosine of its centre with the
    other centres, without those above 0.9 (near-duplicates); its density D is the mean Gaussian kernel over all pairs
    of its rows, each with itself included. Clusters are served by descending share, the shares of the rest taken anew
    after each; inside a cluster rows are added one at a time so that the maximum mean discrepancy to the whole cluster
    is least. Clusters are those of spherical k-means.

    The original embeds text and images with the attention outputs of five layers of a small vision-language model. Here
    features are text only and of the residual stream: for each of ``layers`` the tanh of the mean hidden state over a
    row's tokens, scaled to length one, concatenated. They come from the model under training or from ``encoder``.
    """

    name = "coincide"
    decides = ("temperature",)
    lacking = "no embedding"
    card = Card(
        summary="Keeps more rows of clusters that transfer well and are not dense, each cluster in miniature.",
        paper="COINCIDE: Concept-skill Transferability-based Data Selection, EMNLP 2024, arXiv 2406.10995",
        cost="1 F over the pool per layer and interval, and k-means",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        """Parameters of COINCIDE; temperature and kernel are the original code's."""

        clusters: int | None = param(None, "number of clusters; null: one for 66 rows, as published", minimum=1)
        temperature: float = param(0.1, "of the softmax over clusters; large: equal shares", above=0.0)
        gamma: float = param(1.0, "width of the Gaussian kernel", above=0.0)
        layers: tuple[int, ...] = param((-1,), "layers whose hidden states make the features; 1 F each")
        iterations: int = param(50, "largest number of rounds of k-means", minimum=1)
        encoder: str | None = param(None, "folder or hub id of another (small) model; null: the model under training")

        def __post_init__(self) -> None:
            if not self.layers:
                raise ValueError("layers: name at least one layer (-1 is the last)")
            if len(set(self.layers)) < len(self.layers):
                raise ValueError(f"layers: names a layer twice: {', '.join(map(str, self.layers))}")

    params: Params

    def requires(self) -> Requires:
        passes = Passes(pool=(float(len(self.params.layers)), 0.0))
        return replace(EMBEDDINGS, targets=False, models={"encoder": self.params.encoder}, passes=passes)

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.floating]:
        """Return S / D of each row's cluster [N]; NaN for rows without features."""
        p, scores = self.params, np.full(len(pool), np.nan)
        features = self._features(pool, ctx)
        places = np.flatnonzero(np.isfinite(features).all(axis=1))
        if len(places):
            self._rows = features[places]
            wanted = p.clusters if p.clusters is not None else -(-len(places) // 66)
            rng = ctx.rng("selector.coincide.kmeans")
            labels, centres = spherical_kmeans(self._rows, wanted, rng, iterations=p.iterations)
            self._groups = members(labels)
            densities = np.array([density(self._rows[group], p.gamma) for group in self._groups])
            self._values = transferability(centres) / densities
            scores[places] = self._values[labels]
        return scores

    def kept(self, found: Found, rows: Rows, budget: int, ctx: Context) -> NDArray[np.int64]:
        """Return rows cluster by cluster as they are served, inside a cluster in the order they are added."""
        p, groups = self.params, self._groups
        sizes = np.array([len(group) for group in groups])
        kept = [np.empty(0, dtype=np.int64)]
        for cluster, count in cluster_quotas(self._values, sizes, budget, p.temperature):
            kept.append(groups[cluster][greedy_mmd(self._rows[groups[cluster]], count, p.gamma)])
        self.told = f"from {sum(len(part) > 0 for part in kept)} of {len(groups)} clusters"
        return np.concatenate(kept)

    def _features(self, pool: Rows, ctx: Context) -> NDArray[np.float32]:
        parts = []
        for layer in self.params.layers:
            signal = Embedding(layer=layer, pooling="mean", normalize=False, encoder=self.params.encoder)
            found = np.tanh(ctx.signals(signal, pool))
            parts.append(found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-30))
        return np.asarray(np.concatenate(parts, axis=1) / np.sqrt(len(parts)), dtype=np.float32)


def filled(trajectories_NT: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return trajectories whose missing points (NaN) hold the point before, or at the start the first one, if any."""
    out = np.array(trajectories_NT, dtype=np.float32)
    for steps in (range(1, out.shape[1]), range(out.shape[1] - 2, -1, -1)):
        for t in steps:
            before = out[:, t - 1] if steps.step > 0 else out[:, t + 1]
            out[:, t] = np.where(np.isnan(out[:, t]), before, out[:, t])
    return out


class S2l(PoolSelector):
    """Draw evenly from clusters of loss trajectories, so that every way of being learnt is there.

    "SmallToLarge (S2L): Scalable Data Selection for Fine-tuning LLMs by Summarizing Training Trajectories of Small
    Models", NeurIPS 2024, arXiv 2403.07384. A row's trajectory is its loss at several checkpoints. The budget is shared
    over domains by water-filling (equally, small ones giving all they have); inside a domain, trajectories are
    clustered by k-means, and its share is water-filled over the clusters of more than two rows, drawn at random inside.
    If that is too little, rows of the tiny clusters are drawn.

    The paper's checkpoints are those of a small proxy model: train it once with ``save_steps`` and list its folders in
    ``proxies``. Without, the trajectory is that of the model under training: every decision adds a point, and decisions
    before the ``min_points``-th draw without clusters. Points that a row lacks (``pool_fraction``) are taken from its
    neighbours in time.
    """

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

        proxies: tuple[str, ...] = param((), "checkpoint folders of a small model, in order; none: the run's model")
        clusters: int = param(100, "largest number of clusters in a domain", minimum=1)
        iterations: int = param(20, "largest number of rounds of k-means", minimum=1)
        min_points: int = param(2, "number of points of the model under training before it clusters", minimum=1)

        def __post_init__(self) -> None:
            if self.proxies:
                refuse_idle(self, ("min_points",), "beside proxies, whose points are all there")

    params: Params

    def requires(self) -> Requires:
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
        self.told = f"{how if clusters else 'without clusters until there are more points'}, {len(there)} domains"
        chosen = np.concatenate(parts)
        return chosen[top_k(preference[chosen], len(chosen))]

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
