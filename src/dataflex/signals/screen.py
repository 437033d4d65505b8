"""Screening: one cheap forward pass leaves the rows that look like the targets to a dearer method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dataflex.errors import DataError
from dataflex.method import Rows, Signals
from dataflex.select.choose import top_k
from dataflex.signals.specs import EmbeddingSpec

__all__ = ["screened"]


def screened(rows: Rows, fraction: float, signals: Signals, targets: Sequence[str]) -> Rows:
    """Return the share of ``rows`` nearest to any target, ascending.

    Nearness is the cosine between a row's embedding (position-weighted mean of the last hidden states, as in
    RDS+, arXiv 2503.01807) and the mean embedding of a target's rows; the best target counts.

    Args:
        rows: Row ids [n], ascending.
        fraction: Share to keep, 0 < fraction <= 1; at least one row is kept.
        signals: Of the model under training.
        targets: Names of target data sets.

    Raises:
        DataError: No row of the pool, or of a target, has an embedding.
    """
    spec = EmbeddingSpec()
    vectors = signals.embeddings(rows, spec)
    nearest = np.full(len(rows), -np.inf)
    for target in targets:
        aims = signals.embeddings(np.arange(signals.num_rows(target), dtype=np.int64), spec, target=target)
        mean = np.nanmean(aims, axis=0) if np.isfinite(aims).any() else np.full(vectors.shape[1], np.nan)
        nearest = np.fmax(nearest, vectors @ mean)
    if not np.isfinite(nearest).any():
        raise DataError("dynamic.signals.screen_fraction: no row has an embedding that could be compared with a target")
    kept = top_k(nearest, max(1, round(fraction * len(rows))))
    return np.sort(rows[kept])
