"""Names of before that selectors still import; goes with their conversion."""

from dataflex.signals.kinds import Embedding as EmbeddingSpec
from dataflex.signals.kinds import Generation, GenerationSpec, GradientSpec, Part, Pooling, WeightedAnswer
from dataflex.signals.kinds import LogitFeatures as LogitSpec

__all__ = [
    "EmbeddingSpec",
    "Generation",
    "GenerationSpec",
    "GradientSpec",
    "LogitSpec",
    "Part",
    "Pooling",
    "WeightedAnswer",
]
