"""Rules that draw: Gumbel top-k on log weights, and multinomial draws with and without replacement."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.core.choose import gumbel_top_k, weighted_with_replacement, weighted_without_replacement
from dataflex.core.protocols import Rows
from dataflex.errors import DataError
from dataflex.rules.candidates import Uniforms

__all__ = ["gumbel", "log_weights", "multinomial"]


def log_weights(scores: NDArray[np.floating], temperature: float, standardise: bool) -> NDArray[np.float64]:
    """Return ``scores / temperature`` [n], of scores with mean 0 and standard deviation 1 where asked for.

    QuRating (ICML 2024, arXiv 2402.09739) draws with p ~ exp(s / tau) of standardised scores, tau = 2.
    """
    values = np.asarray(scores, dtype=np.float64)
    if standardise and len(values):
        spread = float(values.std())
        values = (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)
    return values / temperature


def gumbel(log_w: NDArray[np.float64], k: int, rows: Rows, uniforms: Uniforms) -> NDArray[np.int64]:
    """Draw ``k`` positions without replacement with probability proportional to exp(log_w), keyed by row id.

    A row's number depends on its id only: neither on the order of the pool nor on the number of ranks.

    Returns:
        int64 [min(k, rows of finite log weight)], in the order of the draw.
    """
    return gumbel_top_k(log_w, min(k, int(np.isfinite(log_w).sum())), uniforms("gumbel", rows))


def multinomial(
    weights: NDArray[np.floating], k: int, rows: Rows, uniforms: Uniforms, *, replacement: bool
) -> NDArray[np.int64]:
    """Draw ``k`` positions with probability proportional to ``weights`` [n].

    Returns:
        int64 in the order of the draw: [k] with replacement; without, [min(k, rows of weight above 0)].

    Raises:
        DataError: A negative weight, or none above 0.
    """
    values = np.asarray(weights, dtype=np.float64)
    if len(values) == 0 or k == 0:
        return np.empty(0, dtype=np.int64)
    if (values < 0).any() or not (values > 0).any():
        found: Literal["negative", "all 0"] = "negative" if (values < 0).any() else "all 0"
        raise DataError(
            f"multinomial: scores are taken for weights, and some are {found}. Set 'weights: softmax', or use "
            "the rule gumbel_top_k."
            if found == "negative"
            else f"multinomial: the weights of {len(values):,} rows are {found}; there is nothing to draw from."
        )
    if replacement:
        return weighted_with_replacement(values, k, uniforms("draws", np.arange(k, dtype=np.int64)))
    return weighted_without_replacement(values, min(k, int((values > 0).sum())), uniforms("gumbel", rows))
