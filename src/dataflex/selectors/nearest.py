"""Rows whose vectors are near to those of the targets' rows: RDS+, NEAR, sentence embeddings, TSDS."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Card, Context, Rows, param
from dataflex.select import tsds
from dataflex.select.choose import Uniforms
from dataflex.select.neighbours import require_search
from dataflex.select.rules import KnnKde, RoundRobin, Rule
from dataflex.select.scoring import AGGREGATE, RULE, Aggregate, Found, ScoringParams
from dataflex.selectors._lib import Compares, EmbeddingParams, PooledParams, VectorSelector


class RdsPlus(VectorSelector):
    """Keep the rows nearest to the targets' rows, which take turns.

    RDS+: Ivison et al., "Large-Scale Data Selection for Instruction Tuning", arXiv 2503.01807. A row's vector is the
    mean of the last hidden states over all its tokens, weighted by position (w_t = t / sum of t), divided by its
    norm; similarity is the cosine. With one target its rows take turns, each taking its nearest row that is not
    yet taken; with several targets a row's score for a target is the largest cosine with any of its rows, and
    the targets take turns. The paper takes the base model; here it is the model under training, or ``encoder``. Long
    rows that ``cutoff_len`` cuts lose the tokens that weigh most.
    """

    name = "rds_plus"
    targets_take_turns = True
    decides = ("aggregate", "rule", "taken", "shuffle")
    card = Card(
        summary="Keeps the rows whose hidden states are nearest to those of the targets' rows, which take turns.",
        paper="Large-Scale Data Selection for Instruction Tuning (RDS+), arXiv 2503.01807",
        cost="1 F over the pool and the targets per interval, and a product of each row with each target row",
        note="A target row whose nearest row is taken takes the next one, as the text has it, so that target rows that "
        "are much alike get as many rows as others; in the authors' code it loses its turn (taken: lose_turn).",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(RoundRobin, EmbeddingParams, ScoringParams):
        """Parameters of RDS+; the defaults are the paper's, ``taken`` that of its text."""

        rule: Rule = param(Rule.of("round_robin"), RULE)

    params: Params

    @property
    def rule(self) -> Rule:
        """Turns as ``taken`` and ``shuffle`` say, unless the rule says so itself."""
        given, p = super().rule, self.params
        return given if given != Rule.of("round_robin") else Rule.of("round_robin", taken=p.taken, shuffle=p.shuffle)

    def uniforms(self, ctx: Context, target: str | None = None) -> Uniforms:
        """Return the random numbers of a decision; several targets take turns in their own order."""
        draws = super().uniforms(ctx, target)

        def turns(purpose: str, ids: NDArray[np.int64]) -> NDArray[np.float64]:
            if purpose != "turns":
                return draws(purpose, ids)
            order = ctx.rng("selector.rds_plus").permutation(len(ids)) if len(ctx.targets) == 1 else ids
            return np.argsort(order).astype(np.float64)

        return turns


class Near(VectorSelector):
    """Keep the nearest neighbours of every target row by an embedding model, rank by rank.

    NEAR, a baseline of existing DataFlex without a paper. First the nearest row of every target row, then the second
    nearest of every one, and so on; rows met before are passed over, until the budget is full. (Under the rule of
    ``rds_plus`` a target row goes on to its next free row in the same turn.) The search is exact, so that lists
    hold no gaps and never run out before the pool does. ``encoder`` is meant to be a sentence-embedding model.
    """

    name = "near"
    card = Card(
        summary="Keeps the nearest neighbours of the targets' rows by embeddings, rank by rank.",
        paper="baseline (no paper)",
        cost="1 F of the encoder over the pool and the targets, and a product of each row with each target row",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(PooledParams, ScoringParams):
        """Parameters of NEAR: the rows of all targets take turns, and lose one where their row is taken."""

        rule: Rule = param(Rule.of("round_robin", taken="lose_turn"), RULE)

    params: Params


class Embed(VectorSelector):
    """Keep the rows whose embeddings are on average nearest to the targets'.

    A baseline of "Compute-Constrained Data Selection", ICLR 2025, arXiv 2410.16208 (there GTR-T5-base on 256 tokens).
    A row's score for a target is the mean of its cosines with the target's rows, and the largest over targets counts.
    A mean prefers rows that are a little like everything in the target; ``aggregate: max`` asks for one close row.
    """

    name = "embed"
    targets_take_turns = True
    card = Card(
        summary="Keeps the rows whose sentence embeddings have the largest mean cosine with those of a target.",
        paper="Compute-Constrained Data Selection, ICLR 2025, arXiv 2410.16208",
        cost="1 F of the encoder over the pool and the targets",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(PooledParams, ScoringParams):
        """Parameters of selection by sentence embeddings; ``aggregate`` and ``rule`` are the paper's."""

        aggregate: Aggregate | None = param(Aggregate.of("mean_then_max"), AGGREGATE)

    params: Params

    def by_task(self, found: Found) -> NDArray[np.float64]:
        """Return mean cosines one target at a time, the products of unit vectors with their mean."""
        return np.stack([found.vectors @ queries.mean(axis=0) for queries in found.queries]).astype(np.float64)


class Tsds(Compares):
    """Draw rows from the distribution nearest to the targets', without near-duplicates counting twice.

    "TSDS: Data Selection for Task-Specific Model Finetuning", NeurIPS 2024, arXiv 2410.11303. Every target row spreads
    its mass 1 / M over its nearest rows, each counted as 1 / density, where the density is the number of
    near-duplicates around it by an Epanechnikov kernel of radius ``sigma``. All target rows widen their neighbourhoods
    together, until transport costs more than the diversity gained: larger ``alpha`` stops earlier.

    The defaults are the paper's and belong to its encoder: calibrate. ``c`` is on the scale of the distances: take
    about the median distance between a target row and its neighbours. With unit vectors (distances below 2) and c = 5
    the walk stops only after some 50 to 100 neighbours. ``sigma`` is the radius within which rows count as duplicates:
    take, say, the 5th percentile of the distance from a row to its nearest one; 0 switches the density off
    ("KNN-uniform"). Vectors are those of ``rds_plus``, distances Euclidean, the search is exact unless ``search`` says
    faiss.

    The paper draws with replacement. The default here draws without: Gumbel top-k on the log probabilities, which
    changes the rows' inclusion probabilities; when the budget exceeds the rows of probability above 0, the rest is
    filled up with the rows nearest to any target row.
    """

    name = "tsds"
    decides = ("replacement",)
    card = Card(
        summary="Draws rows distributed like the targets' by optimal transport; near-duplicates share one place.",
        paper="TSDS: Data Selection for Task-Specific Model Finetuning, NeurIPS 2024, arXiv 2410.11303",
        cost="1 F of the encoder over the pool and the targets, and exact search of neighbours",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(EmbeddingParams, KnnKde):
        """Parameters of TSDS; the defaults are the paper's, but for ``replacement``."""

    params: Params

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        require_search(params.search)

    def scored(self, found: Found) -> Found:
        """Return the same with the probability of each row (sum 1) as its score."""
        probabilities, self._away = self.params.probabilities(np.concatenate(found.queries), found.vectors)
        return replace(found, scores=probabilities)

    def kept(self, found: Found, rows: Rows, budget: int, ctx: Context) -> NDArray[np.int64]:
        """Return the rows in the order drawn; once those of probability above 0 run out, the nearest others."""
        again, positive = self.params.replacement, int(np.count_nonzero(found.scores))
        kept = tsds.draw(found.scores, self._away, budget, rows, self.uniforms(ctx), replacement=again)
        self.told = f"drawn like {', '.join(ctx.targets)} from {positive} rows of probability above 0"
        if not again and len(kept) > positive:
            self.told += f", and the {len(kept) - positive} nearest of the others"
        return kept
