"""RDS+: rows whose representation is close to those of the target's rows, each target row served in turn.

Ivison et al., "Large-Scale Data Selection for Instruction Tuning", arXiv 2503.01807. A row's vector is the
mean of the last hidden states over all its tokens, weighted by position (w_t = t / sum of t), divided by its
norm; similarity is the cosine. With one target its rows take turns, each taking its nearest row that is not
yet taken; with several targets a row's score for a target is the largest cosine with any of its rows, and
the targets take turns. In the authors' code a target row whose next row is taken loses its turn (``taken:
lose_turn``); by default it takes the one after that, as the paper describes it, so that target rows that are much alike
get as many rows as others. The paper takes the base model; here it is the model under training, or ``encoder``.
Long rows that ``cutoff_len`` cuts lose the tokens that weigh most.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from dataflex.method import Card, Context, Needs, Rows, Selection, Selector
from dataflex.method import Params as BaseParams
from dataflex.select.choose import round_robin, top_k
from dataflex.select.neighbours import best_similarity, round_robin_nearest, walk_by_rank
from dataflex.selectors.similarity import embedded, selection
from dataflex.signals.specs import EmbeddingSpec

__all__ = ["RdsPlus"]


class RdsPlus(Selector):
    """Keep the rows nearest to the targets' rows."""

    name = "rds_plus"
    adaptive: ClassVar[bool] = True
    needs = Needs(signals=frozenset({"embeddings"}), targets=True, stages=("pt", "sft"))
    card = Card(
        summary="Keeps the rows whose hidden states are nearest to those of the targets' rows, which take turns.",
        paper="Large-Scale Data Selection for Instruction Tuning (RDS+), arXiv 2503.01807",
        cost="1 F over the pool and the targets per interval, and a product of each row with each target row",
        note="A target row whose nearest row is taken takes the next one, as the text has it, so that target rows that "
        "are much alike get as many rows as others; in the authors' code it loses its turn (taken: lose_turn).",
        forward_per_pool_row=1.0,
        forward_per_target_row=1.0,
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        """Parameters of RDS+; the defaults are the paper's, ``taken`` that of its text."""

        encoder: str | None = field(
            default=None,
            metadata={"help": "folder or hub id of another model; null: the model under training", "model": True},
        )
        layer: int = field(default=-1, metadata={"help": "layer of the hidden states; -1 is the last, after its norm"})
        completion_only: bool = field(
            default=False, metadata={"help": "average the supervised tokens only, not the prompt's"}
        )
        rule: Literal["round_robin", "top_k"] = field(
            default="round_robin", metadata={"help": "let target rows (or targets) take turns, or keep the nearest"}
        )
        taken: Literal["next", "lose_turn"] = field(
            default="next",
            metadata={
                "help": "where a target row's nearest row is taken: it takes the next one, or loses its turn as in the "
                "authors' code"
            },
        )
        shuffle: bool = field(
            default=False, metadata={"help": "turns of target rows in random order instead of the file's"}
        )

        def __post_init__(self) -> None:
            if self.completion_only and self.encoder is not None:
                raise ValueError("completion_only: an encoder reads plain text without labels; leave one of them out")

    params: Params

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Keep up to ``budget`` rows; ties by pool order.

        Returns:
            Rows in the order taken; scores [len(pool)] are the largest cosine with any target row, NaN for
            rows without an embedding, which are never kept.

        Raises:
            DataError: The pool, or a target, has no row with an embedding.
        """
        if len(pool) == 0:
            return Selection(rows=pool, scores=np.empty(0), reason="empty pool")
        p = self.params
        spec = EmbeddingSpec(layer=p.layer, completion_only=p.completion_only)
        space = embedded(self.name, pool, ctx, spec, p.encoder)
        by_task = np.stack([best_similarity(queries, space.vectors) for queries in space.queries])
        scores = by_task.max(axis=0)
        if p.rule == "top_k":
            kept = top_k(scores, budget)
        elif len(space.queries) > 1:
            kept = round_robin(by_task, budget, lose_turn=p.taken == "lose_turn")
        else:
            queries = space.queries[0]
            order = ctx.rng("selector.rds_plus").permutation(len(queries)) if p.shuffle else None
            if p.taken == "next":
                kept = round_robin_nearest(queries, space.vectors, budget, order)
            else:
                kept = walk_by_rank(queries if order is None else queries[order], space.vectors, budget)
        return selection(pool, space, kept, scores, f"nearest to {', '.join(ctx.targets)} ({p.rule})")
