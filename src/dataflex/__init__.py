"""DataFlex: data-centric dynamic training of large language models on top of LLaMA-Factory."""

import importlib
from collections.abc import Callable
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
    RolloutStats,
    Rows,
    RunFacts,
    Selection,
    Selector,
    Weighter,
    WeighterParams,
)
from dataflex.version import __version__

if TYPE_CHECKING:
    from dataflex.huggingface.wrap import wrap
    from dataflex.plan.plan import BatchShape
    from dataflex.select.scoring import ScoringParams, ScoringSelector
    from dataflex.train.row_space import RowSpace
    from dataflex.train.session import Loop, Session

    plan: Callable[[Any], str]


_LATER = {
    "BatchShape": "plan.plan",
    "Loop": "train.session",
    "RowSpace": "train.row_space",
    "ScoringParams": "select.scoring",
    "ScoringSelector": "select.scoring",
    "Session": "train.session",
    "wrap": "huggingface.wrap",
}
"""Names whose modules are imported when they are asked for: torch, transformers, or the subset rules come with them."""

__all__ = [
    "BatchShape",
    "BatchView",
    "Card",
    "Context",
    "DomainStats",
    "Loop",
    "Mix",
    "Mixer",
    "Orderer",
    "Params",
    "Passes",
    "Problem",
    "Reference",
    "Requires",
    "RolloutStats",
    "RowSpace",
    "Rows",
    "RunFacts",
    "ScoringParams",
    "ScoringSelector",
    "Selection",
    "Selector",
    "Session",
    "Weighter",
    "WeighterParams",
    "__version__",
    "plan",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"dataflex.{_LATER[name]}"), name)
    raise AttributeError(f"module 'dataflex' has no attribute {name!r}")
