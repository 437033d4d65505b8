"""TSDS: rows drawn so that the sample looks like the target, without near-duplicates counting twice.

"TSDS: Data Selection for Task-Specific Model Finetuning", NeurIPS 2024, arXiv 2410.11303. Every target row
spreads its mass 1 / M over its nearest rows, each counted as 1 / density, where the density is the number of
near-duplicates around it by an Epanechnikov kernel of radius ``sigma``. All target rows widen their
neighbourhoods together, until transport costs more than the diversity gained: larger ``alpha`` stops earlier.

The defaults are the paper's and belong to its encoder: calibrate. ``c`` is on the scale of the distances: take
about the median distance between a target row and its neighbours. With unit vectors (distances below 2) and
c = 5 the walk stops only after some 50 to 100 neighbours. ``sigma`` is the radius within which rows count as
duplicates: take, say, the 5th percentile of the distance from a row to its nearest one; 0 switches the density
off ("KNN-uniform"). Vectors are those of ``rds_plus``, distances Euclidean, the search is exact
unless ``search`` says faiss. Densities are computed only for rows that the walk reaches, and compare them with all
rows found by any target row; beyond two thousand million pairs, with those of at most ten cells of an inverted file,
as the authors' code does throughout.

The paper draws with replacement. The default here draws without: Gumbel top-k on the log probabilities, which
changes the rows' inclusion probabilities; when the budget exceeds the rows of probability above 0, the rest is
filled up with the rows nearest to any target row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Card, Context, Requires, Rows, Selection, Selector
from dataflex.rng import uniforms
from dataflex.select import tsds
from dataflex.select.neighbours import require_search
from dataflex.select.rules import KnnKde
from dataflex.select.scoring import scattered
from dataflex.selectors._lib import EmbeddingParams, compared, embeddings, embeddings_required


class Tsds(Selector):
    """Draw rows from the distribution nearest to the targets'."""

    name = "tsds"
    card = Card(
        summary="Draws rows distributed like the targets' by optimal transport; near-duplicates share one place.",
        paper="TSDS: Data Selection for Task-Specific Model Finetuning, NeurIPS 2024, arXiv 2410.11303",
        cost="1 F of the encoder over the pool and the targets, and exact search of neighbours",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(EmbeddingParams, KnnKde):
        """Parameters of TSDS; the defaults are the paper's, but for ``replacement``."""

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        return embeddings_required(self.params)

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        require_search(params.search)

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Draw ``budget`` rows, or all that have an embedding where that is fewer and nothing repeats.

        Returns:
            Rows in the order drawn; scores [len(pool)] are the probabilities (sum 1), NaN for rows without
            an embedding, which are never drawn.

        Raises:
            DataError: The pool, or a target, has no row with an embedding.
        """
        if len(pool) == 0:
            return Selection(rows=pool, scores=np.empty(0), reason="empty pool")
        p = self.params
        space = compared(self.name, pool, ctx, lambda rows, target: embeddings(rows, target, ctx, p))
        assert space.vectors is not None
        probabilities, away = tsds.probabilities(
            np.concatenate(space.queries),
            space.vectors,
            max_k=p.max_k,
            kde_k=p.kde_k,
            sigma=p.sigma,
            alpha=p.alpha,
            c=p.c,
            search=p.search,
        )

        def draws(_: str, ids: NDArray[np.int64]) -> NDArray[np.float64]:
            return uniforms(ctx.seed, "selector.tsds", ctx.interval.index, ids)

        kept = tsds.draw(probabilities, away, budget, pool[space.places], draws, replacement=p.replacement)
        positive = int(np.count_nonzero(probabilities))
        reason = f"{len(kept)} of {len(pool)} rows drawn like {', '.join(ctx.targets)} from {positive} rows of "
        reason += "probability above 0"
        if not p.replacement and len(kept) > positive:
            reason += f", and the {len(kept) - positive} nearest of the others"
        if len(space.places) < len(pool):
            reason += f"; {len(pool) - len(space.places)} rows have no embedding"
        scores = scattered(probabilities, space.places, len(pool))
        return Selection(rows=pool[space.places[kept]], scores=scores, reason=reason)
