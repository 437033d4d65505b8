"""DataFlex: data-centric dynamic training of large language models on top of LLaMA-Factory."""

from typing import TYPE_CHECKING, Any

from dataflex.method import (
    BatchView,
    Card,
    Context,
    DomainStats,
    Mix,
    Mixer,
    Orderer,
    Params,
    Passes,
    Problem,
    Reference,
    Requires,
    Rows,
    RunFacts,
    Selection,
    Selector,
    Weighter,
    WeighterParams,
)
from dataflex.version import __version__

if TYPE_CHECKING:
    from dataflex.select.scoring import ScoringParams, ScoringSelector

__all__ = [
    "BatchView",
    "Card",
    "Context",
    "DomainStats",
    "Mix",
    "Mixer",
    "Orderer",
    "Params",
    "Passes",
    "Problem",
    "Reference",
    "Requires",
    "Rows",
    "RunFacts",
    "ScoringParams",
    "ScoringSelector",
    "Selection",
    "Selector",
    "Weighter",
    "WeighterParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in ("ScoringParams", "ScoringSelector"):  # the subset rules are imported with them
        from dataflex.select import scoring

        return getattr(scoring, name)
    raise AttributeError(f"module 'dataflex' has no attribute {name!r}")
