"""The subset rules by name: the parameters of each, what it needs of the candidates, and how it chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Params, param
from dataflex.parts import Part
from dataflex.select import spread, tsds
from dataflex.select.choose import (
    Candidates,
    Quota,
    by_quota,
    gumbel_top_k,
    log_weights,
    multinomial,
    round_robin,
    token_budget,
    top_k,
)
from dataflex.select.cluster import kmeans_labels, require_kmeans
from dataflex.select.neighbours import Search, require_search, round_robin_nearest

REPLACEMENT: Final = "draw with replacement, so that rows may repeat"
QUERIES: Final = frozenset({"queries", "query_vectors"})
SEARCH: Final = "exact, or approximate through faiss (extra: ann)"

Chosen = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SubsetRule(Params):
    """A subset rule: its parameters, what it needs, and how it chooses."""

    always: ClassVar[frozenset[str]] = frozenset({"scores"})
    """What it needs of the candidates under any parameters: ``scores``, ``queries`` (vectors of target rows, or scores
    by query), ``query_vectors``, ``vectors``, ``lengths``, ``groups``."""
    ranks: ClassVar[bool] = False
    """Whether a shorter answer is the beginning of a longer one, so that several can take turns."""

    @property
    def needs(self) -> frozenset[str]:
        """What it needs of the candidates with these parameters."""
        return self.always

    def _choose(self, c: Candidates, k: int) -> Chosen:
        """Return the positions of at most ``k`` >= 1 candidates of at least one, in order of preference."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class BestShare(SubsetRule):
    """Spreads over the best rows by vectors."""

    always = frozenset({"vectors"})
    best_share: float = param(1.0, "share of the rows, best by score, that is chosen from", above=0.0, maximum=1.0)

    @property
    def needs(self) -> frozenset[str]:
        """Scores only where they narrow the choice."""
        return self.always if self.best_share >= 1.0 else self.always | {"scores"}

    def _choose(self, c: Candidates, k: int) -> Chosen:
        if c.scores is None or self.best_share >= 1.0:
            return self._spread(c.vectors, k)
        best = top_k(c.scores, max(k, round(self.best_share * len(c.scores))))
        return best[self._spread(c.vectors[best], k)]

    def _spread(self, vectors_ND: NDArray[np.float32], k: int) -> Chosen:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Within(SubsetRule):
    """Lets every group give its quota."""

    within: Literal["best", "random"] = param("best", "a group's best rows by score, or random ones")

    @property
    def needs(self) -> frozenset[str]:
        """Scores only where the best rows are taken."""
        return self.always if self.within == "random" else self.always | {"scores"}

    def _given(self, c: Candidates, groups: NDArray[np.integer], k: int, quota: Quota) -> Chosen:
        return by_quota(groups, c.uniforms("within", c.rows) if self.within == "random" else c.scores, k, quota)


@dataclass(frozen=True, kw_only=True)
class TopK(SubsetRule):
    """The best rows; ties by pool order."""

    ranks = True

    def _choose(self, c: Candidates, k: int) -> Chosen:
        return top_k(c.scores, k)


@dataclass(frozen=True, kw_only=True)
class RoundRobin(SubsetRule):
    """Queries take turns, each taking its best row that is not yet taken."""

    always = frozenset({"queries"})
    ranks = True
    taken: Literal["next", "lose_turn"] = param("next", "if the best row is taken: try the next one, or lose the turn")
    shuffle: bool = param(False, "let target rows take turns in random order instead of the file's")

    def _choose(self, c: Candidates, k: int) -> Chosen:
        turns, lose_turn = c.queries if c.by_query is None else c.by_query, self.taken == "lose_turn"
        if self.shuffle:
            turns = turns[np.argsort(c.uniforms("turns", np.arange(len(turns))))]
        if c.by_query is None:
            return round_robin_nearest(turns, c.vectors, k, lose_turn=lose_turn)
        return round_robin(turns, k, lose_turn=lose_turn)


@dataclass(frozen=True, kw_only=True)
class KnnUniform(SubsetRule):
    """Draws from the rows around each query by optimal transport (TSDS with sigma 0)."""

    always = frozenset({"query_vectors"})
    ranks = True
    max_k: int = param(5000, "largest number of neighbours of a target row, also a tenth of the pool", minimum=2)
    alpha: float = param(0.5, "closeness to the target (1) against diversity (0)", minimum=0.0, maximum=1.0)
    c: float = param(5.0, "scale of the distances", above=0.0)
    replacement: bool = param(False, REPLACEMENT)
    search: Search = param("exact", SEARCH)

    def probabilities(
        self, queries_MD: NDArray[np.float32], vectors_ND: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the probability of each row and its distance to the nearest query, both float64 [N]."""
        sigma, kde_k = (self.sigma, self.kde_k) if isinstance(self, KnnKde) else (0.0, 1)
        numbers = {"alpha": self.alpha, "c": self.c, "sigma": sigma}
        return tsds.probabilities(queries_MD, vectors_ND, max_k=self.max_k, kde_k=kde_k, search=self.search, **numbers)

    def _choose(self, c: Candidates, k: int) -> Chosen:
        probability, away = self.probabilities(c.queries, c.vectors)
        return tsds.draw(probability, away, k, c.rows, c.uniforms, replacement=self.replacement)


@dataclass(frozen=True, kw_only=True)
class KnnKde(KnnUniform):
    """The same with near-duplicates sharing one place (TSDS)."""

    sigma: float = param(0.75, "distance within which rows count as duplicates; 0: never", minimum=0.0)
    kde_k: int = param(1000, "largest number of rows in a density, also a tenth of the pool", minimum=1)


@dataclass(frozen=True, kw_only=True)
class GumbelTopK(SubsetRule):
    """Draws without replacement with probability proportional to exp(score / temperature)."""

    ranks = True
    temperature: float = param(1.0, "what scores are divided by", above=0.0)
    standardize: bool = param(False, "give scores mean 0 and standard deviation 1 first, as QuRating")

    def _choose(self, c: Candidates, k: int) -> Chosen:
        weights = log_weights(c.scores, self.temperature, self.standardize)
        return gumbel_top_k(weights, k, c.uniforms("gumbel", c.rows))


@dataclass(frozen=True, kw_only=True)
class Multinomial(SubsetRule):
    """Draws with probability proportional to scores, or to exp(score / temperature)."""

    ranks = True
    weights: Literal["scores", "softmax"] = param("scores", "scores (then >= 0), or exp(score / temperature)")
    temperature: float = param(1.0, "temperature of softmax weights", above=0.0)
    replacement: bool = param(False, REPLACEMENT)

    def __post_init__(self) -> None:
        if self.temperature != 1.0 and self.weights != "softmax":
            raise ValueError("temperature: has no effect on weights that are the scores; set 'weights: softmax'")

    def _choose(self, c: Candidates, k: int) -> Chosen:
        if self.weights == "softmax" and not self.replacement:  # no weight is 0, however far below the best a score is
            return GumbelTopK(temperature=self.temperature)._choose(c, k)
        weights = np.asarray(c.scores, dtype=np.float64)
        if self.weights == "softmax":
            weights = np.exp((weights - weights.max()) / self.temperature)
        return multinomial(weights, k, c.rows, c.uniforms, replacement=self.replacement)


@dataclass(frozen=True, kw_only=True)
class TokenBudget(SubsetRule):
    """The best rows that a number of tokens holds."""

    always = frozenset({"scores", "lengths"})
    tokens: int = param(help="largest number of tokens of the chosen rows together", minimum=1)
    skip: bool = param(True, "pass over rows that no longer fit, instead of stopping there")

    def _choose(self, c: Candidates, k: int) -> Chosen:
        return token_budget(c.scores, c.lengths, self.tokens, k, skip=self.skip)


@dataclass(frozen=True, kw_only=True)
class Deita(SubsetRule):
    """The best rows that are not too similar to a better one that was kept."""

    always = frozenset({"scores", "vectors"})
    threshold: float = param(0.9, "largest cosine that two kept rows may have", minimum=-1.0, maximum=1.0)
    fill: bool = param(False, "fill up with the best of the others where too few pass")

    def _choose(self, c: Candidates, k: int) -> Chosen:
        order = top_k(c.scores, len(c.scores))
        chosen = spread.apart(spread.unit(c.vectors), order, self.threshold, k)
        if not self.fill or len(chosen) == k:
            return chosen
        return np.concatenate([chosen, order[~np.isin(order, chosen)][: k - len(chosen)]])


@dataclass(frozen=True, kw_only=True)
class KCenter(BestShare):
    """Again and again the row furthest from all rows taken."""

    def _spread(self, vectors_ND: NDArray[np.float32], k: int) -> Chosen:
        return spread.k_center(vectors_ND, k)


@dataclass(frozen=True, kw_only=True)
class FacilityLocation(BestShare):
    """The rows that represent all rows best."""

    neighbours: int = param(64, "number of similar rows that can represent a row, itself among them", minimum=1)
    search: Search = param("exact", SEARCH)

    def _spread(self, vectors_ND: NDArray[np.float32], k: int) -> Chosen:
        return spread.facility_location(vectors_ND, k, neighbours=self.neighbours, search=self.search)


@dataclass(frozen=True, kw_only=True)
class WaterFilling(Within):
    """Equally many rows of every domain as far as they last."""

    always = frozenset({"groups"})

    def _choose(self, c: Candidates, k: int) -> Chosen:
        return self._given(c, c.groups, k, "water_filling")


@dataclass(frozen=True, kw_only=True)
class ClusterQuota(Within):
    """Rows of every k-means cluster of the vectors (extra: cluster)."""

    always = frozenset({"vectors"})
    clusters: int | None = param(None, "number of clusters; null: square root of the pool's rows", minimum=1)
    quota: Quota = param("water_filling", "the same number of rows of each, or by its size")
    normalize: bool = param(True, "give vectors length one first")

    def _choose(self, c: Candidates, k: int) -> Chosen:
        vectors = spread.unit(c.vectors) if self.normalize else c.vectors
        count = self.clusters or max(1, round(np.sqrt(len(vectors))))
        seed = int(c.uniforms("kmeans", np.zeros(1, dtype=np.int64))[0] * 2**52)
        labels = kmeans_labels(vectors, count, np.random.Generator(np.random.Philox(key=seed)))
        return self._given(c, labels, k, self.quota)


RULES: Final[dict[str, type[SubsetRule]]] = {
    "top_k": TopK,
    "round_robin": RoundRobin,
    "knn_uniform": KnnUniform,
    "knn_kde": KnnKde,
    "gumbel_top_k": GumbelTopK,
    "multinomial": Multinomial,
    "token_budget": TokenBudget,
    "deita": Deita,
    "k_center": KCenter,
    "facility_location": FacilityLocation,
    "water_filling": WaterFilling,
    "cluster_quota": ClusterQuota,
}


@dataclass(frozen=True)
class Rule(Part):
    """A subset rule with its parameters."""

    what = "rule"
    table = RULES

    params: SubsetRule

    @property
    def needs(self) -> frozenset[str]:
        """What the rule needs of the candidates with these parameters."""
        return self.params.needs

    @property
    def replacement(self) -> bool:
        """Whether a row may be drawn several times."""
        return bool(getattr(self.params, "replacement", False))

    def require(self) -> None:
        """Raise ConfigError if the rule needs scikit-learn, UnsupportedError if it needs faiss, and it is missing."""
        if isinstance(self.params, ClusterQuota):
            require_kmeans()
        require_search(getattr(self.params, "search", "exact"))


def choose(rule: Rule, candidates: Candidates, k: int) -> NDArray[np.int64]:
    """Return the positions of at most ``k`` candidates, in order of preference.

    Distinct, unless the rule draws with replacement. All ``k`` come back while the candidates last, except under
    ``token_budget``, ``deita``, and draws that leave out weights of 0. ``candidates`` has what ``rule.needs`` names.
    Weights that cannot be drawn from raise DataError.
    """
    if k == 0 or len(candidates.rows) == 0:
        return np.empty(0, dtype=np.int64)
    return rule.params._choose(candidates, k)
