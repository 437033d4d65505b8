"""Screening: a cheap pass leaves the rows that look promising to a dearer method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Rows, Signals
from dataflex.plan.schedule import pilot_rows
from dataflex.rng import uniforms
from dataflex.select.choose import top_k
from dataflex.signals.kinds import Embedding, GradientScores
from dataflex.signals.specs import Part


def screened(rows: Rows, fraction: float, signals: Signals, targets: Sequence[str]) -> Rows:
    """Return the share ``fraction`` of ``rows`` nearest to any target, ascending; at least one row.

    Nearness is the cosine between a row's embedding (position-weighted mean of the last hidden states, as in
    RDS+, arXiv 2503.01807) and the mean embedding of a target's rows; the best target counts.

    Raises:
        DataError: No row of the pool, or of a target, has an embedding.
    """
    spec = Embedding()
    vectors = signals(spec, rows)
    nearest = np.full(len(rows), -np.inf)
    for target in targets:
        aims = signals(spec, np.arange(signals.num_rows(target), dtype=np.int64), target=target)
        mean = np.nanmean(aims, axis=0) if np.isfinite(aims).any() else np.full(vectors.shape[1], np.nan)
        nearest = np.fmax(nearest, vectors @ mean)
    if not np.isfinite(nearest).any():
        raise DataError("dynamic.signals.screen_fraction: no row has an embedding that could be compared with a target")
    kept = top_k(nearest, max(1, round(fraction * len(rows))))
    return np.sort(rows[kept])


_BUCKETS = 4096
_CHUNK_ROWS = 8192
_STRENGTHS = np.logspace(-4, 3, 29)


def piloted(rows: Rows, count: int, signals: Signals, targets: Sequence[str], *, seed: int, interval: int) -> Rows:
    """Return ``count`` of ``rows`` with the best predicted LESS scores towards any target, ascending.

    A twentieth of the rows (at least 32, at most 4096) is scored exactly; ridge regression on token counts predicts the
    others.

    Raises:
        DataError: No row of the pilot has a score.
    """
    order = np.argsort(uniforms(seed, "screening pilot", interval, rows), kind="stable")
    drawn = np.sort(order[: pilot_rows(len(rows))])
    scores = signals(GradientScores(targets=tuple(targets)), rows[drawn]).max(axis=1).astype(np.float64)
    known = np.isfinite(scores)
    if not known.any():
        raise DataError("dynamic.signals.screen_by: no row of the pilot has a gradient that could be compared")
    features = token_counts(signals, rows[drawn[known]])
    weights, offset = fitted(features, scores[known])
    predicted = np.empty(len(rows))
    for start in range(0, len(rows), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        predicted[part] = token_counts(signals, rows[part]) @ weights + offset
    predicted[drawn] = np.where(known, scores, -np.inf)
    return np.sort(rows[top_k(predicted, min(count, len(rows)))])


def token_counts(signals: Signals, rows: Rows) -> NDArray[np.float64]:
    """Return log counts of prompt and of completion tokens, each of length one, and log lengths [n, 2 * 4096 + 2].

    Tokens beyond the 4096th share a number with others (token modulo 4096).
    """
    out = np.zeros((len(rows), 2 * _BUCKETS + 2))
    parts: tuple[Part, ...] = ("prompt", "completion")
    for number, part in enumerate(parts):
        for i, tokens in enumerate(signals.tokens(rows, part=part)):
            counts = np.log1p(np.bincount(tokens % _BUCKETS, minlength=_BUCKETS))
            out[i, number * _BUCKETS : (number + 1) * _BUCKETS] = counts / max(np.linalg.norm(counts), 1e-30)
            out[i, 2 * _BUCKETS + number] = np.log1p(len(tokens)) / 10
    return out


def fitted(features: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Return weights [d] and offset of the ridge regression of ``features`` [n, d] of least cross-validation error."""
    centre, offset = features.mean(axis=0), float(values.mean())
    centred, wanted = features - centre, values - offset
    squares, basis = np.linalg.eigh(centred @ centred.T)
    squares = squares.clip(0.0)
    turned = basis.T @ wanted
    strength = _STRENGTHS[int(np.argmin([gcv_error(squares, turned, each) for each in _STRENGTHS]))]
    weights = centred.T @ (basis @ (turned / (squares + strength)))
    return weights, offset - float(centre @ weights)


def gcv_error(squares: NDArray[np.float64], turned: NDArray[np.float64], strength: float) -> float:
    """Return the generalized cross-validation error of a ridge regression with an intercept.

    ``squares`` are the eigenvalues [n], ascending, of X X' with centred columns, of which the first is 0, the
    intercept's direction; ``turned`` are the centred values [n] along its eigenvectors; ``strength`` is above 0.
    """
    left = strength / (squares + strength)  # share of each direction that is not fitted
    free = left[1:].sum() / len(squares)  # the intercept's direction is fitted, whatever the strength
    return float(np.sum((left * turned) ** 2) / max(free, 1e-30) ** 2)
