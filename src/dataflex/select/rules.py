"""The subset rules by name: what each needs of the candidates, its parameters, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Params, param
from dataflex.parts import Part
from dataflex.select import spread, tsds
from dataflex.select.choose import (
    Candidates,
    Quota,
    by_quota,
    gumbel,
    log_weights,
    multinomial,
    ranking,
    round_robin,
    token_budget,
    top_k,
)
from dataflex.select.cluster import kmeans_labels, require_kmeans
from dataflex.select.neighbours import Search, require_search, round_robin_nearest, walk_by_rank

_SEARCH_HELP = "exact, or approximate through faiss (extra: faiss)"


@dataclass(frozen=True, kw_only=True)
class TopK(Params):
    """The best rows; ties by pool order."""


@dataclass(frozen=True, kw_only=True)
class RoundRobin(Params):
    """Queries take turns, each taking its best row that is not yet taken."""

    shuffle: bool = param(False, "turns in random order instead of that of the file")
    taken: Literal["next", "lose_turn"] = param(
        "next", "where a query's best row is taken: it takes the next one, or loses its turn"
    )


@dataclass(frozen=True, kw_only=True)
class KnnUniform(Params):
    """Draws from the rows around each query by optimal transport (TSDS with sigma 0)."""

    max_k: int = param(5000, "neighbours of a target row at most, also a tenth of the pool", minimum=2)
    alpha: float = param(0.5, "closeness to the target (1) against diversity (0)", minimum=0.0, maximum=1.0)
    c: float = param(5.0, "scale of the distances", above=0.0)
    replacement: bool = param(False, "draw with replacement, so that rows may repeat")
    search: Search = param("exact", _SEARCH_HELP)


@dataclass(frozen=True, kw_only=True)
class KnnKde(KnnUniform):
    """The same with near-duplicates sharing one place (TSDS)."""

    sigma: float = param(0.75, "distance within which rows count as duplicates; 0: never", minimum=0.0)
    kde_k: int = param(1000, "rows in a density at most, also a tenth of the pool", minimum=1)


@dataclass(frozen=True, kw_only=True)
class GumbelTopK(Params):
    """Draws without replacement with probability proportional to exp(score / temperature)."""

    temperature: float = param(1.0, "what scores are divided by", above=0.0)
    standardize: bool = param(False, "give scores mean 0 and standard deviation 1 first, as QuRating")


@dataclass(frozen=True, kw_only=True)
class Multinomial(Params):
    """Draws with probability proportional to scores, or to exp(score / temperature)."""

    weights: Literal["scores", "softmax"] = param(
        "scores", "scores themselves (then >= 0), or exp(score / temperature)"
    )
    temperature: float = param(1.0, "temperature of softmax weights", above=0.0)
    replacement: bool = param(False, "draw with replacement, so that rows may repeat")

    def __post_init__(self) -> None:
        if self.temperature != 1.0 and self.weights != "softmax":
            raise ValueError("temperature: has no effect on weights that are the scores; set 'weights: softmax'")


@dataclass(frozen=True, kw_only=True)
class TokenBudget(Params):
    """The best rows that a number of tokens holds."""

    tokens: int = param(help="tokens of the chosen rows together at most", minimum=1)
    skip: bool = param(True, "pass over rows that no longer fit, instead of stopping there")


@dataclass(frozen=True, kw_only=True)
class Deita(Params):
    """The best rows that are not too similar to a better one that was kept."""

    threshold: float = param(0.9, "largest cosine that two kept rows may have", minimum=-1.0, maximum=1.0)
    fill: bool = param(False, "fill up with the best of the others where too few pass")


@dataclass(frozen=True, kw_only=True)
class KCenter(Params):
    """Again and again the row furthest from all rows taken."""

    best_share: float = param(1.0, "share of the rows, best by score, that is chosen from", above=0.0, maximum=1.0)


@dataclass(frozen=True, kw_only=True)
class FacilityLocation(Params):
    """The rows that represent all rows best."""

    neighbours: int = param(64, "similar rows that can represent a row, itself among them", minimum=1)
    best_share: float = param(1.0, "share of the rows, best by score, that is chosen from", above=0.0, maximum=1.0)
    search: Search = param("exact", _SEARCH_HELP)


@dataclass(frozen=True, kw_only=True)
class WaterFilling(Params):
    """Equally many rows of every domain as far as they last."""

    within: Literal["best", "random"] = param("best", "a domain's best rows by score, or random ones")


@dataclass(frozen=True, kw_only=True)
class ClusterQuota(Params):
    """Rows of every k-means cluster of the vectors (extra: cluster)."""

    clusters: int | None = param(None, "clusters; null: the square root of the pool's rows", minimum=1)
    quota: Quota = param("water_filling", "equally many of each, or by its size")
    within: Literal["best", "random"] = param("best", "a cluster's best rows by score, or random ones")
    normalize: bool = param(True, "give vectors length one first")


Chosen = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RuleSpec:
    """One rule.

    Attributes:
        params: Its parameters.
        call: ``(candidates, k, params)`` to at most k positions, in order of preference.
        needs: Of ``scores``, ``queries`` (vectors of target rows, or scores by query), ``query_vectors``,
            ``vectors``, ``lengths``; or what gives them for some parameters.
        ranks: Whether a shorter answer is the beginning of a longer one, so that several can take turns.
        draws: Whether the answer depends on the seed, for some parameters.
    """

    params: type[Params]
    call: Callable[[Candidates, int, Any], Chosen]
    needs: frozenset[str] | Callable[[Any], frozenset[str]]
    ranks: bool = False
    draws: bool = False


def _top_k(c: Candidates, k: int, _: Params) -> Chosen:
    assert c.scores is not None
    return top_k(c.scores, k)


def _round_robin(c: Candidates, k: int, p: RoundRobin) -> Chosen:
    turns = c.queries if c.by_query is None else c.by_query
    assert turns is not None
    order = np.argsort(c.uniforms("turns", np.arange(len(turns)))) if p.shuffle else None
    if c.by_query is not None:
        return round_robin(c.by_query, k, order, lose_turn=p.taken == "lose_turn")
    assert c.vectors is not None
    if p.taken == "next":
        return round_robin_nearest(turns, c.vectors, k, order)
    return walk_by_rank(turns if order is None else turns[order], c.vectors, k)


def _knn(c: Candidates, k: int, p: KnnUniform) -> Chosen:
    assert c.queries is not None
    assert c.vectors is not None
    kde = (p.sigma, p.kde_k) if isinstance(p, KnnKde) else (0.0, 1)
    probability, away = tsds.probabilities(
        c.queries, c.vectors, max_k=p.max_k, kde_k=kde[1], sigma=kde[0], alpha=p.alpha, c=p.c, search=p.search
    )
    return tsds.draw(probability, away, k, c.rows, c.uniforms, replacement=p.replacement)


def _gumbel(c: Candidates, k: int, p: GumbelTopK) -> Chosen:
    assert c.scores is not None
    return gumbel(log_weights(c.scores, p.temperature, p.standardize), k, c.rows, c.uniforms)


def _multinomial(c: Candidates, k: int, p: Multinomial) -> Chosen:
    assert c.scores is not None
    weights = np.asarray(c.scores, dtype=np.float64)
    if p.weights == "softmax" and not p.replacement:  # no weight is 0, however far below the best a score is
        return gumbel(log_weights(weights, p.temperature, False), k, c.rows, c.uniforms)
    if p.weights == "softmax" and len(weights):
        weights = np.exp((weights - weights.max()) / p.temperature)
    return multinomial(weights, k, c.rows, c.uniforms, replacement=p.replacement)


def _token_budget(c: Candidates, k: int, p: TokenBudget) -> Chosen:
    assert c.scores is not None
    assert c.lengths is not None
    return token_budget(c.scores, c.lengths, p.tokens, k, skip=p.skip)


def _deita(c: Candidates, k: int, p: Deita) -> Chosen:
    assert c.scores is not None
    assert c.vectors is not None
    order = ranking(c.scores)
    chosen = spread.apart(spread.unit(c.vectors), order, p.threshold, k)
    if not p.fill or len(chosen) == k:
        return chosen
    return np.concatenate([chosen, order[~np.isin(order, chosen)][: k - len(chosen)]])


def _among(c: Candidates, k: int, share: float) -> tuple[NDArray[np.float32], Chosen | None]:
    """Return the vectors chosen from, and their positions where they are not all: the best share by score."""
    assert c.vectors is not None
    if c.scores is None or share >= 1.0:
        return c.vectors, None
    best = top_k(c.scores, max(k, round(share * len(c.scores))))
    return c.vectors[best], best


def _k_center(c: Candidates, k: int, p: KCenter) -> Chosen:
    vectors, best = _among(c, k, p.best_share)
    chosen = spread.k_center(vectors, k)
    return chosen if best is None else best[chosen]


def _facility(c: Candidates, k: int, p: FacilityLocation) -> Chosen:
    vectors, best = _among(c, k, p.best_share)
    chosen = spread.facility_location(vectors, k, neighbours=p.neighbours, search=p.search)
    return chosen if best is None else best[chosen]


def _water_filling(c: Candidates, k: int, p: WaterFilling) -> Chosen:
    assert c.groups is not None
    return by_quota(c.groups, _preference(c, p.within), k, "water_filling")


def _cluster_quota(c: Candidates, k: int, p: ClusterQuota) -> Chosen:
    assert c.vectors is not None
    vectors = spread.unit(c.vectors) if p.normalize else c.vectors
    count = p.clusters or max(1, round(np.sqrt(len(vectors))))
    seed = int(c.uniforms("kmeans", np.zeros(1, dtype=np.int64))[0] * 2**52)
    labels = kmeans_labels(vectors, count, np.random.Generator(np.random.Philox(key=seed)))
    return by_quota(labels, _preference(c, p.within), k, p.quota)


def _preference(c: Candidates, within: str) -> NDArray[np.floating]:
    if within == "random":
        return c.uniforms("within", c.rows)
    assert c.scores is not None
    return c.scores


def _within(p: Any) -> frozenset[str]:
    own = frozenset({"vectors"} if isinstance(p, ClusterQuota) else {"groups"})
    return own if p.within == "random" else own | {"scores"}


def _spreads(p: Any) -> frozenset[str]:
    return frozenset({"vectors"}) if p.best_share >= 1.0 else frozenset({"vectors", "scores"})


_SCORES = frozenset({"scores"})
_TARGETED = frozenset({"query_vectors"})

RULES: Final[dict[str, RuleSpec]] = {
    "top_k": RuleSpec(params=TopK, call=_top_k, needs=_SCORES, ranks=True),
    "round_robin": RuleSpec(params=RoundRobin, call=_round_robin, needs=frozenset({"queries"}), ranks=True, draws=True),
    "knn_uniform": RuleSpec(params=KnnUniform, call=_knn, needs=_TARGETED, ranks=True, draws=True),
    "knn_kde": RuleSpec(params=KnnKde, call=_knn, needs=_TARGETED, ranks=True, draws=True),
    "gumbel_top_k": RuleSpec(params=GumbelTopK, call=_gumbel, needs=_SCORES, ranks=True, draws=True),
    "multinomial": RuleSpec(params=Multinomial, call=_multinomial, needs=_SCORES, ranks=True, draws=True),
    "token_budget": RuleSpec(params=TokenBudget, call=_token_budget, needs=_SCORES | {"lengths"}),
    "deita": RuleSpec(params=Deita, call=_deita, needs=_SCORES | {"vectors"}),
    "k_center": RuleSpec(params=KCenter, call=_k_center, needs=_spreads),
    "facility_location": RuleSpec(params=FacilityLocation, call=_facility, needs=_spreads),
    "water_filling": RuleSpec(params=WaterFilling, call=_water_filling, needs=_within, draws=True),
    "cluster_quota": RuleSpec(params=ClusterQuota, call=_cluster_quota, needs=_within, draws=True),
}


@dataclass(frozen=True)
class Rule(Part):
    """A subset rule with its parameters."""

    what = "rule"

    @classmethod
    def known(cls) -> list[str]:
        """Return the names of all rules."""
        return list(RULES)

    @classmethod
    def listed(cls, name: str) -> type[Params]:
        """Return a rule's parameters."""
        return RULES[name].params

    @property
    def needs(self) -> frozenset[str]:
        """What the rule needs of the candidates with these parameters."""
        needs = RULES[self.name].needs
        return needs if isinstance(needs, frozenset) else needs(self.params)

    @property
    def replacement(self) -> bool:
        """Whether a row may be drawn several times."""
        return isinstance(self.params, KnnUniform | Multinomial) and self.params.replacement

    def require(self) -> None:
        """Raise the error of a package that the rule needs and that is not installed; nothing is imported.

        Raises:
            ConfigError: scikit-learn is not installed.
            UnsupportedError: faiss is not installed.
        """
        if isinstance(self.params, ClusterQuota):
            require_kmeans()
        require_search(getattr(self.params, "search", "exact"))


def choose(rule: Rule, candidates: Candidates, k: int) -> NDArray[np.int64]:
    """Return the positions of at most ``k`` candidates, in order of preference.

    Distinct, unless the rule draws with replacement. All ``k`` come back while the candidates last, except where
    the rule says otherwise: ``token_budget``, ``deita``, and draws that leave out weights of 0.

    Args:
        rule: The rule.
        candidates: What it may look at, with all that ``rule.needs`` names.
        k: How many, >= 0.

    Raises:
        DataError: Weights that cannot be drawn from.
        UnsupportedError: A package that the rule needs is not installed.
    """
    if k == 0 or len(candidates.rows) == 0:
        return np.empty(0, dtype=np.int64)
    return RULES[rule.name].call(candidates, k, rule.params)
