"""Rows by the influence of their gradients on the targets: LESS, ICONS, LESS on clusters, zeroth order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError, DataError
from dataflex.method import Card, Context, Passes, Requires, Rows, param
from dataflex.method import Params as BaseParams
from dataflex.select.cluster import kmeans, members, require_kmeans
from dataflex.select.scoring import AGGREGATE, Aggregate, Found, PoolSelector, ScoringParams, ScoringSelector
from dataflex.selectors._lib import GRADIENTS, TOKEN_LOSSES, even
from dataflex.signals.kinds import Embedding, GradientScores, GradientSketches, PerturbedLoss
from dataflex.signals.specs import InfluenceOptions

logger = logging.getLogger(__name__)

Pick = Literal["mixed", "nearest", "farthest", "random"]
_LEAST = 1e-6  # length of a mean of unit vectors that cancel out


def lr_weighted(scores: list[NDArray[np.float32]], rates: Sequence[float]) -> NDArray[np.float64]:
    """Average the scores of checkpoints by their learning rates (section 3.2, equation 2), equally where all are 0."""
    if len(scores) == 1:
        return scores[0].astype(np.float64)
    weights = np.asarray(rates, dtype=np.float64)
    weights = weights / weights.sum() if weights.sum() > 0 else np.full(len(rates), 1.0 / len(rates))
    return np.tensordot(weights, np.stack(scores).astype(np.float64), axes=1)


class _Influence(ScoringSelector):
    """Compares the gradients of rows with those of the targets' rows."""

    lacking = "no supervised token"

    def requires(self) -> Requires:
        p = self.params
        passes = Passes(pool=(1.0, 1.0), targets=p.target_passes(getattr(p, "normalize", True)))
        return replace(GRADIENTS, preconditions={"precondition": p.precondition}, passes=passes, budget=True)


class Less(_Influence):
    """Keep the rows whose optimizer step goes furthest along the gradient of the targets.

    Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning", ICML 2024, arXiv 2402.04333.
    Training gradients go through Adam with the moments of the run itself, target gradients stay plain, both are
    averaged over a row's supervised tokens. Scores are exact: since only one mean gradient per task is compared with,
    the paper's random projection is not needed (``sketch_size`` brings a sparse one back). The warm-up is the run's
    own; the paper's checkpoints are the last ``checkpoints`` intervals, weighted by their learning rate.

    Under LLaMA-Factory's ``use_muon`` matrices go through Muon: its next update, with the Newton-Schulz polynomial and
    the length of the momentum held fixed at the momentum buffer, so that a row's part is linear in its gradient. What
    Muon leaves to AdamW (embeddings, head, vectors) goes through Adam. Not exact: the polynomial would turn a little as
    the row's gradient turns the momentum, and the optimizer rounds to bfloat16.

    ``precondition: adam_scale`` divides by the root of Adam's second moment as it is, for all rows alike (OPUS, arXiv
    2602.05400; TrackStar, arXiv 2410.17413, whose whitened scores ``dataflex query`` gives).

    ``precondition: ekfac`` asks for influence on the targets' loss instead of an optimizer's step: targets' gradients
    go through the damped inverse of the curvature, in Kronecker-factored eigenbases (EK-FAC, arXiv 1806.03884;
    influence: arXiv 2308.03296, with ``normalize: false`` as published). It is measured anew for each decision, on
    ``ekfac_rows`` training rows with labels drawn from the model (the true Fisher matrix), and kept in
    ``signals.store`` if there is one. Parameters that are no matrices used on tokens, and sides wider than 16,384, keep
    their own coordinates. It needs no optimizer, and rows cost what plain gradients do; cosines divide by the lengths
    of plain gradients.

    The paper selects once. Where a small relevant part of the pool is chosen and served again and again, it is learnt
    by heart, and the cosines of its small gradients lose the target: in a planted pool
    (benchmarks/repeated_decisions.py, two seeds) the relevant share of the rows kept fell from 1 to 0.23 and 0.53 by
    the fifth decision. Inner products (``normalize: false``), in which a learnt row counts for little, ended with 0.63
    and 0.47 and lower held-out losses; they favour short rows and large losses. ``exclude_seen`` helps only where the
    pool holds many more relevant rows than an interval serves. A run warns of rows that come back too often
    (``dynamic.max_repeats``).
    """

    name = "less"
    saved = ("scores", "rates", "pool")
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

        precondition: Literal["true_adam", "paper_repo", "adam_scale", "sign", "none", "ekfac"] = param(  # type: ignore[assignment]
            "true_adam", "what turns training gradients into directions; ekfac: inverse curvature"
        )
        ekfac_rows: int = param(256, "training rows that the curvature of ekfac is measured on", minimum=1)
        ekfac_damping: float = param(0.1, "added to the curvature of ekfac, in its mean eigenvalues", above=0.0)
        normalize: bool = param(True, "compare cosines, as published; false: inner products, which wear out less")
        checkpoints: int = param(1, "intervals whose scores are averaged, weighted by learning rate", minimum=1)

        def __post_init__(self) -> None:
            for name in ("ekfac_rows", "ekfac_damping") if self.precondition != "ekfac" else ():
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(f"{name}: has no effect without 'precondition: ekfac'; remove it")
            if self.precondition == "ekfac" and not self.include_momentum:
                raise ValueError("include_momentum: has no effect with 'precondition: ekfac'; remove it")

    params: Params

    def requires(self) -> Requires:
        required = super().requires()
        if self.params.precondition != "ekfac":
            return required
        return replace(required, stages=("pt", "sft"), budget=False)

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.scores: list[NDArray[np.float32]] = []
        self.rates: tuple[float, ...] = ()
        self.pool = np.zeros(0, dtype=np.int64)

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return influence on the targets [T, N]; ConfigError for several checkpoints with a pool that changes."""
        p = self.params
        if len(self.pool) and not np.array_equal(self.pool, pool):
            raise ConfigError(
                "dynamic.selector.checkpoints: scores of several intervals can only be averaged over the same rows; "
                "set dynamic.signals.pool_fraction to 1, or checkpoints to 1"
            )
        signal = GradientScores(targets=ctx.targets, **p.options(sketch_seed=ctx.seed))
        scores = [*self.scores, ctx.signals(signal, pool)][-p.checkpoints :]
        rates = (*self.rates, float(ctx.learning_rate))[-p.checkpoints :]
        if p.checkpoints > 1:
            self.scores, self.rates, self.pool = scores, rates, pool
        return lr_weighted(scores, rates).T

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return the targets, and over how many intervals the influence is averaged."""
        over = f", over {len(self.rates)} intervals" if len(self.rates) > 1 else ""
        return f"by influence on {', '.join(ctx.targets)}{over}"


class Icons(_Influence):
    """Keep the rows that most targets vote for, each for the rows of largest influence on it.

    "ICONS: Influence Consensus for Vision-Language Data Selection", arXiv 2501.00654. The influence of row i on task t,
    a target data set, is the mean over the task's rows of the cosine of their gradients with the row's; plain (SGD)
    gradients on both sides. A task votes for the rows whose influence reaches the (100 - p)th percentile, linearly
    interpolated.

    Influences are exact here: the original projects gradients to 5,120 numbers (``sketch_size`` does so with a sparse
    sketch). ``target_gradient: cosine_of_mean`` compares with the mean gradient of the task instead, in which long
    gradients weigh more, as the original does for the subtasks of one benchmark only; it saves a pass over the targets.
    Few tasks give few different numbers of votes, so that ties decide most of the cut: they go to the rows of the
    higher mean percentile rank over the tasks, then by pool order. With one task the rows of largest influence are
    kept.
    """

    name = "icons"
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
        vote_percent: float = param(20.0, "percent of the pool that a task votes for", above=0.0, maximum=100.0)
        votes: Literal["threshold", "borda"] = param("threshold", "votes above the percentile, or percentile ranks")
        precondition: Literal["none", "true_adam", "paper_repo", "sign"] = param(
            "none", "what turns training gradients into directions; none as published"
        )

        def __post_init__(self) -> None:
            moved = [name for name in ("vote_percent", "votes") if getattr(self, name) != getattr(type(self), name)]
            if moved and self.aggregate != type(self).aggregate:
                raise ValueError(f"{moved[0]}: has no effect beside 'aggregate'; write it there, or remove it")

    params: Params

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


def representatives(
    distances: NDArray[np.floating], count: int, pick: Pick, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return the members of a cluster that represent it, as positions [min(count, n)], by distances to the centre.

    ``mixed`` takes the nearest, the farthest and random ones in turns.
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

    ``cosines`` [R, T] are those of the representatives, finite; ``of`` [R] are their clusters; ``sketches`` [R, D] are
    their directions, of length one. Without sketches the mean is not scaled to length one.
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
    """Keep the clusters whose representatives have the largest influence on the targets.

    A method of existing DataFlex without a paper of its own; the influence is that of LESS (Xia et al., ICML 2024,
    arXiv 2402.04333). Rows are clustered by k-means on mean hidden states, one cluster for 64 rows; gradients are taken
    of three rows of each cluster. Their unit directions are averaged and scaled to length one again, and the cosine of
    that with the targets is the score of the cluster: about a twentieth of LESS's backward passes. With as many
    clusters as rows it is LESS exactly.

    Clusters are kept whole, best first. Of the one that the budget cuts, the rows nearest to its centre are kept.
    Hidden states are scaled to length one before they are clustered, so that no outlying dimension decides alone, and
    are averaged over supervised tokens, so that a row without any, which has no gradient, is in no cluster. Products
    with the targets are exact; only the length of a cluster's mean direction is taken from sparse sketches.
    """

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
        signals, passes = frozenset({"embeddings", "gradients"}), Passes(pool=(1.0 + 6 / 64, 6 / 64))
        preconditions = {"precondition": self.params.precondition}
        return replace(GRADIENTS, signals=signals, preconditions=preconditions, passes=passes)

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        require_kmeans()

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.floating]:
        """Return the scores of the rows' clusters [N]; NaN without a supervised token, or a gradient in the cluster."""
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
        kept = np.lexsort((self._away[found.places], -found.scores))[:budget]
        best = f"the best {len(np.unique(self._labels[found.places[kept]]))} of {self._num_clusters} clusters"
        self.told = f"in {best} by influence on {', '.join(ctx.targets)}"
        return kept

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


def central_difference(above: NDArray[np.floating], below: NDArray[np.floating], epsilon: float) -> NDArray[np.float64]:
    """Return (above - below) / (2 epsilon) of losses at p + epsilon x and p - epsilon x [n]; NaN where not finite."""
    with np.errstate(invalid="ignore"):
        found = (above.astype(np.float64) - below.astype(np.float64)) / (2.0 * epsilon)
    return np.where(np.isfinite(found), found, np.nan)


class Zeroth(ScoringSelector):
    """Keep rows by influence on the targets, estimated from differences of losses without a backward pass.

    A method of existing DataFlex, without a paper: for random directions x_k, the same for all rows, the derivative of
    row i's loss is g_ik = (l_i(p + e x_k) - l_i(p - e x_k)) / (2 e), the simultaneous perturbation of Spall (1992). The
    vector of all K derivatives is a sketch of the row's gradient; rows are ranked by the cosine of theirs with that of
    the target's mean loss, or by the mean product, which is an unbiased estimate of the inner product of gradients.

    It is experimental. The estimate of a cosine has a standard error of about 1 / sqrt(K), so that K = 256 directions,
    that is 512 forward passes over the pool, tell apart cosines that differ by 0.1 or so; one backward pass (``less``,
    ``precondition: none``) gives them exactly for the price of some three. Use this only where no gradient can be had.
    """

    name = "zeroth"
    lacking = "no finite loss"
    card = Card(
        summary="Experimental and noisy: keeps rows by influence on the targets, estimated without backward passes.",
        paper="baseline (simultaneous perturbation of existing DataFlex; no paper)",
        cost="2 F over the pool and the targets per direction (256) and interval; prefer less, which is exact",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ScoringParams):
        """Parameters of the zeroth-order selector."""

        directions: int = param(256, "random directions K; noise falls with 1 / sqrt(K), cost is 2 K F", minimum=1)
        epsilon: float = param(1e-3, "step added to or taken from every parameter", above=0.0)
        similarity: Literal["cosine", "product"] = param("cosine", "cosines, or products, which favour steep rows")
        parameters: str | None = param(None, "regular expression of those that move; null: all trainable", pattern=True)

    params: Params
    _warned = False

    def requires(self) -> Requires:
        passes = Passes(pool=(2.0 * self.params.directions, 0.0))
        return replace(TOKEN_LOSSES, targets=True, whole_parameters=True, passes=passes)

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.floating]:
        """Return estimated influence on the targets [T, N]; DataError where a target has no finite loss."""
        num, targets = self.params.directions, ctx.targets
        if not self._warned:
            self._warned = True
            logger.warning(
                "zeroth is experimental: with %d directions its cosines have a standard error of about %.2f, for %d "
                "forward passes over the pool; less gives them exactly for one forward and one backward pass",
                num,
                num**-0.5,
                2 * num,
            )
        products, squares = np.zeros((len(pool), len(targets))), np.zeros(len(pool))
        target_squares = np.zeros(len(targets))
        for direction in range(num * ctx.interval.index, num * (ctx.interval.index + 1)):
            aims = np.array([self._target_derivative(name, direction, ctx) for name in targets])
            own = self._derivatives(pool, direction, ctx, None)
            products += own[:, None] * aims
            squares += own**2
            target_squares += aims**2
        if self.params.similarity == "product":
            return products.T / num
        return np.asarray(products / np.maximum(np.sqrt(squares[:, None] * target_squares), 1e-30)).T

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return the standard error of the estimate."""
        num = self.params.directions
        how = f"{num} directions, standard error about {num**-0.5:.2f}"
        return f"by estimated influence on {', '.join(ctx.targets)} ({how})"

    def _target_derivative(self, target: str, direction: int, ctx: Context) -> float:
        rows = np.arange(ctx.signals.num_rows(target), dtype=np.int64)
        found = self._derivatives(rows, direction, ctx, target) if len(rows) else np.empty(0)
        if not np.isfinite(found).any():
            raise DataError(f"zeroth: target {target!r} has {len(rows):,} rows, none of which has a finite loss")
        return float(np.nanmean(found))

    def _derivatives(self, rows: Rows, direction: int, ctx: Context, target: str | None) -> NDArray[np.float64]:
        p = self.params
        above, below = (
            ctx.signals(
                PerturbedLoss(seed=ctx.seed, direction=direction, epsilon=step, parameters=p.parameters),
                rows,
                target=target,
            )
            for step in (p.epsilon, -p.epsilon)
        )
        return central_difference(above, below, p.epsilon)
