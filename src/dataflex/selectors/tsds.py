"""Draw rows from the distribution nearest to the targets', without near-duplicates counting twice.

"TSDS: Data Selection for Task-Specific Model Finetuning", NeurIPS 2024, arXiv 2410.11303. Every target row
spreads its mass 1 / M over its nearest rows, each counted as 1 / density, where the density is the number of
near-duplicates around it by an Epanechnikov kernel of radius ``sigma``. All target rows widen their
neighbourhoods together, until transport costs more than the diversity gained: larger ``alpha`` stops earlier.

The defaults are the paper's and belong to its encoder: calibrate. ``c`` is on the scale of the distances: take
about the median distance between a target row and its neighbours. With unit vectors (distances below 2) and
c = 5 the walk stops only after some 50 to 100 neighbours. ``sigma`` is the radius within which rows count as
duplicates: take, say, the 5th percentile of the distance from a row to its nearest one; 0 switches the density
off ("KNN-uniform"). Vectors are those of ``rds_plus``, distances Euclidean, the search is exact unless ``search`` says
faiss.

The paper draws with replacement. The default here draws without: Gumbel top-k on the log probabilities, which
changes the rows' inclusion probabilities; when the budget exceeds the rows of probability above 0, the rest is
filled up with the rows nearest to any target row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Card, Context, Rows
from dataflex.select import tsds
from dataflex.select.neighbours import require_search
from dataflex.select.rules import KnnKde
from dataflex.select.scoring import Found
from dataflex.selectors._lib import Compares, EmbeddingParams


class Tsds(Compares):
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

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        require_search(params.search)

    def scored(self, found: Found) -> Found:
        """Return the same with the probability of each row (sum 1) as its score."""
        probabilities, self._away = self.params.probabilities(np.concatenate(found.queries), found.vectors)
        return replace(found, scores=probabilities)

    def kept(self, found: Found, rows: Rows, budget: int, ctx: Context) -> NDArray[np.int64]:
        """Return the rows in the order drawn; once those of probability above 0 run out, the nearest others."""
        again = self.params.replacement
        return tsds.draw(found.scores, self._away, budget, rows, self.uniforms(ctx), replacement=again)

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return the number of rows that were drawn from."""
        positive = int(np.count_nonzero(found.scores))
        how = f"drawn like {', '.join(ctx.targets)} from {positive} rows of probability above 0"
        more = 0 if self.params.replacement else len(kept) - positive
        return how + (f", and the {more} nearest of the others" if more > 0 else "")
