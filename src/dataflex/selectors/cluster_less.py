"""Keep the clusters whose representatives have the largest influence on the targets.

A method of existing DataFlex without a paper of its own; the influence is that of LESS (Xia et al., ICML 2024,
arXiv 2402.04333). Rows are clustered by k-means on mean hidden states, one cluster for 64 rows; gradients are taken of
three rows of each cluster. Their unit directions are averaged and scaled to length one again, and the cosine of that
with the targets is the score of the cluster: about a twentieth of LESS's backward passes. With as many clusters
as rows it is LESS exactly.

Clusters are kept whole, best first. Of the one that the budget cuts, the rows nearest to its centre are kept.
Hidden states are scaled to length one before they are clustered, so that no outlying dimension decides alone, and
are averaged over supervised tokens, so that a row without any, which has no gradient, is in no cluster. Products with
the targets are exact; only the length of a cluster's mean direction is taken from sparse sketches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Card, Context, Passes, Requires, Rows, param
from dataflex.method import Params as BaseParams
from dataflex.select.cluster import kmeans, members, require_kmeans
from dataflex.select.scoring import Found, PoolSelector
from dataflex.selectors._lib import GRADIENTS, even
from dataflex.signals.kinds import Embedding, GradientScores, GradientSketches
from dataflex.signals.specs import InfluenceOptions

Pick = Literal["mixed", "nearest", "farthest", "random"]

_LEAST = 1e-6  # length of a mean of unit vectors that cancel out


def representatives(
    distances: NDArray[np.floating], count: int, pick: Pick, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return the members of a cluster that represent it, as positions [min(count, n)].

    ``distances`` [n] are those to the centre; ``pick`` takes the ``nearest``, the ``farthest``, ``random`` ones, or
    ``mixed``: these three in turns.
    """
    order = np.argsort(distances, kind="stable").astype(np.int64)
    if count >= len(order):
        return order
    if pick == "nearest":
        return order[:count]
    if pick == "farthest":
        return order[::-1][:count]
    if pick == "random":
        return order[np.sort(rng.choice(len(order), size=count, replace=False))]
    near, far = -(-count // 3), -(-(count - 1) // 3)
    ends = np.concatenate([order[:near], order[len(order) - far :]])
    middle = order[near : len(order) - far]
    return np.concatenate([ends, middle[np.sort(rng.choice(len(middle), size=count - len(ends), replace=False))]])


def cluster_means(
    cosines: NDArray[np.floating], of: NDArray[np.int64], num: int, sketches: NDArray[np.floating] | None
) -> NDArray[np.float64]:
    """Return the cosine of each cluster's mean direction with each target [K, T]; NaN without a representative.

    Args:
        cosines: Cosine of each representative with each target [R, T], finite.
        of: Cluster of each representative [R].
        num: Number of clusters K.
        sketches: Directions of the representatives, of length one [R, D]; None: the mean is not scaled to length one.
    """
    counts = np.bincount(of, minlength=num).astype(np.float64)
    sums = np.zeros((num, cosines.shape[1]))
    np.add.at(sums, of, cosines.astype(np.float64))
    with np.errstate(invalid="ignore"):
        means = sums / counts[:, None]
    if sketches is not None:
        lengths = np.zeros((num, sketches.shape[1]), dtype=np.float32)
        np.add.at(lengths, of, sketches)
        norms = np.linalg.norm(lengths, axis=1) / np.maximum(counts, 1.0)
        norms[counts <= 1] = 1.0
        means /= np.maximum(norms, _LEAST)[:, None]
    return means


class ClusterLess(PoolSelector):
    """Keep the clusters whose representatives have the largest influence on the targets."""

    name = "cluster_less"
    lacking = "no score"
    card = Card(
        summary="Keeps the clusters of which a few rows go furthest along the gradient of the targets.",
        paper="baseline: LESS (arXiv 2402.04333) on representatives of clusters",
        cost="1 F over the pool, 2 (F + B) over 3 rows of each cluster of 64, 2 (F + B) over the targets",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(InfluenceOptions, BaseParams):
        """Parameters of Cluster-LESS."""

        clusters: int | None = param(None, "number of clusters; null: one for cluster_size rows", minimum=1)
        cluster_size: int = param(64, "rows per cluster on average, where clusters is null", minimum=1)
        representatives: int = param(3, "number of rows of each cluster that gradients are taken of", minimum=1)
        pick: Pick = param("mixed", "which rows: nearest to the centre, farthest, random, or these in turns")
        renormalize: bool = param(True, "scale the mean direction of a cluster to length one; costs a second pass")
        sketch_size: int = param(4096, "numbers per sketch of a representative; even", minimum=2)
        aggregate: Literal["max", "mean"] = param("max", "how targets come together: the best, or their mean")
        layer: int = param(-1, "layer of the hidden states that are clustered")

        def __post_init__(self) -> None:
            even("sketch_size", self.sketch_size)

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        return replace(
            GRADIENTS,
            signals=frozenset({"embeddings", "gradients"}),
            preconditions={"precondition": self.params.precondition},
            passes=Passes(pool=(1.0 + 6 / 64, 6 / 64)),
        )

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        require_kmeans()

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.floating]:
        """Return the scores of the rows' clusters [N].

        NaN for rows without a supervised token, and in a cluster none of whose representatives has a gradient.
        """
        p, scores = self.params, np.full(len(pool), np.nan)
        self._labels, self._away = np.zeros(len(pool), dtype=np.int64), np.zeros(len(pool))
        found = ctx.signals(Embedding(layer=p.layer, pooling="mean", completion_only=True), pool)
        places = np.flatnonzero(np.isfinite(found).all(axis=1))
        if len(places):
            vectors = found[places]
            wanted = p.clusters if p.clusters is not None else -(-len(places) // p.cluster_size)
            labels, centres = kmeans(vectors, wanted, ctx.rng("selector.cluster_less.kmeans"))
            distances = np.linalg.norm(vectors - centres[labels], axis=1)
            by_cluster = self._influence(pool[places], labels, distances, ctx)
            best = by_cluster.mean(axis=1) if p.aggregate == "mean" else by_cluster.max(axis=1)
            scores[places], self._labels[places], self._away[places] = best[labels], labels, distances
            self._num_clusters = len(centres)
        return scores

    def kept(self, found: Found, rows: Rows, budget: int, ctx: Context) -> NDArray[np.int64]:
        """Return the rows of the best clusters; in a cluster by distance to its centre, then pool order."""
        return np.lexsort((self._away[found.places], -found.scores))[:budget]

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return the number of clusters kept."""
        best = len(np.unique(self._labels[found.places[kept]]))
        return f"in the best {best} of {self._num_clusters} clusters by influence on {', '.join(ctx.targets)}"

    def _influence(
        self, rows: Rows, labels: NDArray[np.int64], distances: NDArray[np.floating], ctx: Context
    ) -> NDArray[np.float64]:
        """Return the scores of clusters by target [K, T]."""
        p, rng = self.params, ctx.rng("selector.cluster_less.representatives")
        groups = members(labels)
        chosen = [group[representatives(distances[group], p.representatives, p.pick, rng)] for group in groups]
        of = np.repeat(np.arange(len(groups)), [len(part) for part in chosen])
        asked = rows[np.concatenate(chosen)]
        options = p.options(sketch_size=None)  # scores are exact; sketch_size is that of the mean directions
        cosines = ctx.signals(GradientScores(targets=ctx.targets, **options), asked)
        known = np.isfinite(cosines).all(axis=1)
        sketches = None
        if p.renormalize and known.any() and np.bincount(of[known]).max() > 1:
            sketches = ctx.signals(GradientSketches(dim=p.sketch_size, **options), asked[known])
        return cluster_means(cosines[known], of[known], len(groups), sketches)
