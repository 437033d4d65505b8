"""Sentence embeddings: rows whose mean similarity to the target's rows is largest.

A baseline of "Compute-Constrained Data Selection", ICLR 2025, arXiv 2410.16208 (there GTR-T5-base on 256 tokens).
A row's score for a target is the mean of its cosines with the target's rows, and the largest over targets counts.
``near`` takes neighbours one by one instead, ``rds_plus`` lets target rows take turns by the model's own states.
A mean prefers rows that are a little like everything in the target; ``aggregate: max`` asks for one close row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from dataflex.method import Card, Context, Needs, Rows, Selection, Selector
from dataflex.method import Params as BaseParams
from dataflex.select.choose import round_robin, top_k
from dataflex.select.neighbours import best_similarity, round_robin_nearest
from dataflex.selectors.similarity import embedded, selection
from dataflex.signals.specs import EmbeddingSpec, Pooling

__all__ = ["Embed"]


class Embed(Selector):
    """Keep the rows whose embeddings are on average nearest to the targets'."""

    name = "embed"
    adaptive: ClassVar[bool] = True
    needs = Needs(signals=frozenset({"embeddings"}), targets=True, stages=("pt", "sft"))
    card = Card(
        summary="Keeps the rows whose sentence embeddings have the largest mean cosine with those of a target.",
        paper="Compute-Constrained Data Selection, ICLR 2025, arXiv 2410.16208",
        cost="1 F of the encoder over the pool and the targets",
        forward_per_pool_row=1.0,
        forward_per_target_row=1.0,
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        """Parameters of selection by sentence embeddings; ``aggregate`` and ``rule`` are the paper's."""

        encoder: str | None = field(
            default=None,
            metadata={"help": "folder or hub id of an embedding model; null: the model under training", "model": True},
        )
        pooling: Pooling = field(
            default="mean",
            metadata={"help": "how tokens become a vector; a sentence-transformers folder has its own way"},
        )
        aggregate: Literal["mean", "max"] = field(
            default="mean", metadata={"help": "a row's score for a target from its cosines with the target's rows"}
        )
        rule: Literal["top_k", "round_robin"] = field(
            default="top_k", metadata={"help": "keep the highest scores, or let target rows (or targets) take turns"}
        )

    params: Params

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Keep up to ``budget`` rows; ties by pool order.

        Returns:
            Rows in order; scores [len(pool)] are the largest over targets, NaN for rows without an embedding,
            which are never kept.

        Raises:
            DataError: The pool, or a target, has no row with an embedding.
        """
        if len(pool) == 0:
            return Selection(rows=pool, scores=np.empty(0), reason="empty pool")
        p = self.params
        own_pooling = p.encoder is not None and (Path(p.encoder) / "modules.json").is_file()
        spec = EmbeddingSpec() if own_pooling else EmbeddingSpec(pooling=p.pooling)
        space = embedded(self.name, pool, ctx, spec, p.encoder)
        if p.aggregate == "mean":  # the mean of cosines with unit vectors is the product with their mean
            by_task = np.stack([space.vectors @ queries.mean(axis=0) for queries in space.queries])
        else:
            by_task = np.stack([best_similarity(queries, space.vectors) for queries in space.queries])
        scores = by_task.max(axis=0)
        if p.rule == "top_k":
            kept = top_k(scores, budget)
        elif len(space.queries) > 1:
            kept = round_robin(by_task, budget)
        else:
            kept = round_robin_nearest(space.queries[0], space.vectors, budget)
        how = f"by {p.aggregate} cosine with {', '.join(ctx.targets)} ({p.rule})"
        return selection(pool, space, kept, scores, how)
