"""DataFlex: data-centric dynamic training of large language models on top of LLaMA-Factory."""

from dataflex.method import (
    BatchView,
    Card,
    Context,
    Mix,
    Mixer,
    Needs,
    Params,
    Selection,
    Selector,
    Weighter,
    WeighterParams,
)
from dataflex.select.scoring import ScoringParams, ScoringSelector
from dataflex.version import __version__

__all__ = [
    "BatchView",
    "Card",
    "Context",
    "Mix",
    "Mixer",
    "Needs",
    "Params",
    "ScoringParams",
    "ScoringSelector",
    "Selection",
    "Selector",
    "Weighter",
    "WeighterParams",
    "__version__",
]
