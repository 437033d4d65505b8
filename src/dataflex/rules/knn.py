"""KNN-uniform and KNN-KDE, the rules of TSDS: probabilities by optimal transport, and draws from them.

"TSDS: Data Selection for Task-Specific Model Finetuning", NeurIPS 2024, arXiv 2410.11303. KNN-uniform is its case of
sigma = 0: near-duplicates count in full.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dataflex.core.choose import gumbel_top_k, top_k, weighted_with_replacement
from dataflex.core.protocols import Rows
from dataflex.core.transport import tsds_widened
from dataflex.rules.candidates import Uniforms
from dataflex.rules.density import Densities
from dataflex.rules.search import Search, nearest

__all__ = ["draw", "probabilities"]


def probabilities(
    queries_MD: NDArray[np.float32],
    vectors_ND: NDArray[np.float32],
    *,
    max_k: int,
    kde_k: int,
    sigma: float,
    alpha: float,
    c: float,
    search: Search = "exact",
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the probability of each row (sum 1), and its distance to the nearest query, both float64 [N].

    Args:
        queries_MD: Vectors of the targets' rows, finite, M >= 1.
        vectors_ND: Vectors of the rows, finite, N >= 1.
        max_k: Neighbours of a query at most; also a tenth of the rows, but at least two.
        kde_k: Rows in a density at most; also a tenth of the rows.
        sigma: Radius within which rows count as duplicates; 0: never.
        alpha: Weight of closeness against diversity, 0 to 1.
        c: Scale of the distances, > 0.
        search: How neighbours are looked for.
    """
    num_rows = len(vectors_ND)
    # The paper's cap of a tenth leaves nothing to widen in a tiny pool: two neighbours are the least.
    width = min(num_rows, max(2, min(max_k, num_rows // 10)))
    neighbours, distances, away = nearest(queries_MD, vectors_ND, width, search)
    density = Densities(vectors_ND, np.unique(neighbours), sigma, max(1, min(kde_k, num_rows // 10)))
    return tsds_widened(distances, neighbours, density, num_rows, alpha=alpha, c=c), away


def draw(
    probability: NDArray[np.float64],
    away: NDArray[np.float64],
    k: int,
    rows: Rows,
    uniforms: Uniforms,
    *,
    replacement: bool,
) -> NDArray[np.int64]:
    """Draw ``k`` positions; without replacement, those of probability 0 follow by distance where the others run out.

    Args:
        probability: Of each row [N], sum 1.
        away: Distance of each row to its nearest query [N].
        k: How many.
        rows: Row ids [N], which draws without replacement are keyed by.
        uniforms: Random numbers.
        replacement: Whether rows may repeat, as in the paper.

    Returns:
        int64 [k], or [min(k, N)] without replacement, in the order drawn.
    """
    if replacement:
        return weighted_with_replacement(probability, k, uniforms("draws", np.arange(k, dtype=np.int64)))
    positive = probability > 0
    with np.errstate(divide="ignore"):
        log_p = np.log(probability)
    drawn = gumbel_top_k(log_p, min(k, int(positive.sum())), uniforms("gumbel", rows))
    return np.concatenate([drawn, top_k(np.where(positive, -np.inf, -away), k - len(drawn))])
