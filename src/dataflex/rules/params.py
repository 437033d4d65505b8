"""Parameters of the subset rules, as they stand beside a rule's name in a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dataflex.core.protocols import Params
from dataflex.rules.quotas import Quota
from dataflex.rules.search import Search

__all__ = [
    "ClusterQuota",
    "Deita",
    "FacilityLocation",
    "GumbelTopK",
    "KCenter",
    "KnnKde",
    "KnnUniform",
    "Multinomial",
    "RoundRobin",
    "TokenBudget",
    "TopK",
    "WaterFilling",
]

_SEARCH_HELP = "exact, or approximate through faiss (extra: faiss)"


@dataclass(frozen=True, kw_only=True)
class TopK(Params):
    """The best rows; ties by pool order."""


@dataclass(frozen=True, kw_only=True)
class RoundRobin(Params):
    """Queries take turns, each taking its best row that is not yet taken."""

    shuffle: bool = field(default=False, metadata={"help": "turns in random order instead of that of the file"})


@dataclass(frozen=True, kw_only=True)
class KnnUniform(Params):
    """Draws from the rows around each query by optimal transport (TSDS with sigma 0)."""

    max_k: int = field(
        default=5000, metadata={"help": "neighbours of a target row at most, also a tenth of the pool", "minimum": 2}
    )
    alpha: float = field(
        default=0.5,
        metadata={"help": "closeness to the target (1) against diversity (0)", "minimum": 0.0, "maximum": 1.0},
    )
    c: float = field(default=5.0, metadata={"help": "scale of the distances", "above": 0.0})
    replacement: bool = field(default=False, metadata={"help": "draw with replacement, so that rows may repeat"})
    search: Search = field(default="exact", metadata={"help": _SEARCH_HELP})


@dataclass(frozen=True, kw_only=True)
class KnnKde(KnnUniform):
    """The same with near-duplicates sharing one place (TSDS)."""

    sigma: float = field(
        default=0.75, metadata={"help": "distance within which rows count as duplicates; 0: never", "minimum": 0.0}
    )
    kde_k: int = field(
        default=1000, metadata={"help": "rows in a density at most, also a tenth of the pool", "minimum": 1}
    )


@dataclass(frozen=True, kw_only=True)
class GumbelTopK(Params):
    """Draws without replacement with probability proportional to exp(score / temperature)."""

    temperature: float = field(default=1.0, metadata={"help": "what scores are divided by", "above": 0.0})
    standardise: bool = field(
        default=False, metadata={"help": "give scores mean 0 and standard deviation 1 first, as QuRating"}
    )


@dataclass(frozen=True, kw_only=True)
class Multinomial(Params):
    """Draws with probability proportional to scores, or to exp(score / temperature)."""

    weights: Literal["scores", "softmax"] = field(
        default="scores", metadata={"help": "scores themselves (then >= 0), or exp(score / temperature)"}
    )
    temperature: float = field(default=1.0, metadata={"help": "temperature of softmax weights", "above": 0.0})
    replacement: bool = field(default=False, metadata={"help": "draw with replacement, so that rows may repeat"})

    def __post_init__(self) -> None:
        if self.temperature != 1.0 and self.weights != "softmax":
            raise ValueError("temperature: has no effect on weights that are the scores; set 'weights: softmax'")


@dataclass(frozen=True, kw_only=True)
class TokenBudget(Params):
    """The best rows that a number of tokens holds."""

    tokens: int = field(metadata={"help": "tokens of the chosen rows together at most", "minimum": 1})
    skip: bool = field(default=True, metadata={"help": "pass over rows that no longer fit, instead of stopping there"})


@dataclass(frozen=True, kw_only=True)
class Deita(Params):
    """The best rows that are not too similar to a better one that was kept."""

    threshold: float = field(
        default=0.9,
        metadata={"help": "largest cosine that two kept rows may have", "minimum": -1.0, "maximum": 1.0},
    )
    fill: bool = field(default=False, metadata={"help": "fill up with the best of the others where too few pass"})


@dataclass(frozen=True, kw_only=True)
class KCenter(Params):
    """Again and again the row furthest from all rows taken."""

    best_share: float = field(
        default=1.0,
        metadata={"help": "share of the rows, best by score, that is chosen from", "above": 0.0, "maximum": 1.0},
    )


@dataclass(frozen=True, kw_only=True)
class FacilityLocation(Params):
    """The rows that represent all rows best."""

    neighbours: int = field(
        default=64, metadata={"help": "similar rows that can represent a row, itself among them", "minimum": 1}
    )
    best_share: float = field(
        default=1.0,
        metadata={"help": "share of the rows, best by score, that is chosen from", "above": 0.0, "maximum": 1.0},
    )
    search: Search = field(default="exact", metadata={"help": _SEARCH_HELP})


@dataclass(frozen=True, kw_only=True)
class WaterFilling(Params):
    """Equally many rows of every domain as far as they last."""

    within: Literal["best", "random"] = field(
        default="best", metadata={"help": "a domain's best rows by score, or random ones"}
    )


@dataclass(frozen=True, kw_only=True)
class ClusterQuota(Params):
    """Rows of every k-means cluster of the vectors (extra: cluster)."""

    clusters: int | None = field(
        default=None, metadata={"help": "clusters; null: the square root of the pool's rows", "minimum": 1}
    )
    quota: Quota = field(default="water_filling", metadata={"help": "equally many of each, or by its size"})
    within: Literal["best", "random"] = field(
        default="best", metadata={"help": "a cluster's best rows by score, or random ones"}
    )
    normalise: bool = field(default=True, metadata={"help": "give vectors length one first"})
