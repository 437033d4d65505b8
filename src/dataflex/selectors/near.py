"""NEAR: the nearest neighbours of every target row by an embedding model, walked rank by rank.

A baseline of existing DataFlex without a paper. First the nearest row of every target row, then the second
nearest of every one, and so on; rows met before are passed over, until the budget is full. (Round-robin, as in
``rds_plus``, lets a target row go on to its next free row in the same turn.) The search is exact, so that lists
hold no gaps and never run out before the pool does. ``encoder`` is meant to be a sentence-embedding model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from dataflex.method import Card, Context, Needs, Rows, Selection, Selector
from dataflex.method import Params as BaseParams
from dataflex.select.neighbours import best_similarity, walk_by_rank
from dataflex.selectors.similarity import embedded, selection
from dataflex.signals.specs import EmbeddingSpec, Pooling

__all__ = ["Near"]


class Near(Selector):
    """Keep the nearest neighbours of the targets' rows."""

    name = "near"
    adaptive: ClassVar[bool] = True
    needs = Needs(signals=frozenset({"embeddings"}), targets=True, stages=("pt", "sft"))
    card = Card(
        summary="Keeps the nearest neighbours of the targets' rows by embeddings, rank by rank.",
        paper="baseline (no paper)",
        cost="1 F of the encoder over the pool and the targets, and a product of each row with each target row",
        forward_per_pool_row=1.0,
        forward_per_target_row=1.0,
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        """Parameters of NEAR."""

        encoder: str | None = field(
            default=None,
            metadata={"help": "folder or hub id of an embedding model; null: the model under training", "model": True},
        )
        pooling: Pooling = field(
            default="mean",
            metadata={"help": "how tokens become a vector; a sentence-transformers folder has its own way"},
        )

    params: Params

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Keep up to ``budget`` rows; ties by pool order.

        Returns:
            Rows in the order met; scores [len(pool)] are the largest cosine with any target row, NaN for
            rows without an embedding, which are never kept.

        Raises:
            DataError: The pool, or a target, has no row with an embedding.
        """
        if len(pool) == 0:
            return Selection(rows=pool, scores=np.empty(0), reason="empty pool")
        encoder = self.params.encoder
        own_pooling = encoder is not None and (Path(encoder) / "modules.json").is_file()
        spec = EmbeddingSpec() if own_pooling else EmbeddingSpec(pooling=self.params.pooling)
        space = embedded(self.name, pool, ctx, spec, encoder)
        queries = np.concatenate(space.queries)
        kept = walk_by_rank(queries, space.vectors, budget)
        scores = best_similarity(queries, space.vectors)
        return selection(pool, space, kept, scores, f"by rank among the neighbours of {', '.join(ctx.targets)}")
