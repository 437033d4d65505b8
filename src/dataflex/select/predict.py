"""Predicts scores of rows from what they are made of, without a pass of the model: Bayesian ridge regression.

An observation j is a score y_j of row i_j that became known in interval t_j. The model is

    y_j = mu_t + x_i' beta + b_i + e_j,   beta ~ N(0, (s2 / alpha) I),   e_j ~ N(0, s2 / w_j),   w_j = forgetting^age_j

with a level mu_t for each interval (x and y are both centred within it), features x that are known beforehand
(``TokenFeatures``) and a row effect b_i, the row's own residuals shrunk towards 0. alpha has the largest marginal
likelihood. Fits are the same wherever they are made from the same observations, up to the order of sums.

Sources: evidence of ridge regression, MacKay 1992 (doi 10.1162/neco.1992.4.3.415); posterior draws by perturbed
observations, Papandreou and Yuille 2010.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import LinearOperator, cg

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TOKENS, PAIRS = 4096, 8192
"""Buckets of tokens of a part (prompt or response), and of pairs of neighbouring tokens of the response."""
_BLOCKS = (TOKENS, TOKENS, PAIRS)
_CHUNK_ROWS = 8192
_DUAL_ROWS = 2048
"""Most observations that are fitted by one eigendecomposition; more are fitted by conjugate gradients."""
_STRENGTHS = np.logspace(-4, 3, 29)
_MOST_COUNT = 255


@dataclass(frozen=True, kw_only=True)
class TokenFeatures:
    """What rows are made of: hashed counts of tokens and pairs of tokens, lengths and domain, 4 bytes a token.

    The features of a row are, side by side: log(1 + count) of the prompt's tokens, of the response's tokens and of the
    response's pairs, each block scaled to length one; log(1 + length) / 10 of prompt and response; one of 0.5 for its
    domain.

    Attributes:
        starts: Where each block of each row begins in ``buckets``, int64 [3 N + 1].
        buckets: Numbers of buckets, uint16.
        counts: Counts of them, uint8, cut at 255.
        lengths: float64 [N, 2].
        domains: Domain of each row, int64 [N]; -1 for none.
        num_domains: Number of domains.
    """

    starts: Ints
    buckets: NDArray[np.uint16]
    counts: NDArray[np.uint8]
    lengths: Floats
    domains: Ints
    num_domains: int

    @classmethod
    def of(
        cls,
        num_rows: int,
        tokens: Callable[[Ints], tuple[Sequence[Ints], Sequence[Ints]]],
        domains: Ints,
        num_domains: int,
    ) -> TokenFeatures:
        """Read the rows once.

        Args:
            num_rows: Number of rows N.
            tokens: Rows to the tokens of each one's prompt and response.
            domains: Domain of each row [N]; -1 for none.
            num_domains: Number of domains.
        """
        sizes, buckets, counts = [], [], []
        lengths = np.zeros((num_rows, 2))
        for start in range(0, num_rows, _CHUNK_ROWS):
            rows = np.arange(start, min(start + _CHUNK_ROWS, num_rows), dtype=np.int64)
            prompts, responses = tokens(rows)
            parts = [
                _counted([part % TOKENS for part in prompts], TOKENS),
                _counted([part % TOKENS for part in responses], TOKENS),
                _counted([(part[:-1] * 1_000_003 + part[1:]) % PAIRS for part in responses], PAIRS),
            ]
            for column, found in enumerate((prompts, responses)):
                lengths[rows, column] = np.log1p([len(part) for part in found]) / 10
            sizes.append(np.stack([np.bincount(row, minlength=len(rows)) for row, _, _ in parts], axis=1).ravel())
            row, block, bucket, count = (
                np.concatenate(columns)
                for columns in zip(*((r, np.full(len(r), b), k, c) for b, (r, k, c) in enumerate(parts)), strict=True)
            )
            order = np.lexsort((block, row))
            buckets.append(bucket[order].astype(np.uint16))
            counts.append(np.minimum(count[order], _MOST_COUNT).astype(np.uint8))
        starts = np.zeros(len(_BLOCKS) * num_rows + 1, dtype=np.int64)
        if num_rows:
            np.cumsum(np.concatenate(sizes), out=starts[1:])
        return cls(
            starts=starts,
            buckets=np.concatenate(buckets) if buckets else np.zeros(0, dtype=np.uint16),
            counts=np.concatenate(counts) if counts else np.zeros(0, dtype=np.uint8),
            lengths=lengths,
            domains=domains,
            num_domains=num_domains,
        )

    @property
    def width(self) -> int:
        """Number of features."""
        return sum(_BLOCKS) + 2 + self.num_domains

    def _chunks(self, rows: Ints) -> Iterator[tuple[slice, csr_matrix]]:
        logs = np.log1p(np.arange(_MOST_COUNT + 1))
        offsets = np.cumsum([0, *_BLOCKS])
        for start in range(0, len(rows), _CHUNK_ROWS):
            part = slice(start, min(start + _CHUNK_ROWS, len(rows)))
            chosen = rows[part]
            blocks = (chosen[:, None] * len(_BLOCKS) + np.arange(len(_BLOCKS))).ravel()
            sizes = self.starts[blocks + 1] - self.starts[blocks]
            ends = np.cumsum(sizes)
            index = np.arange(ends[-1] if len(ends) else 0) + np.repeat(self.starts[blocks] - (ends - sizes), sizes)
            values = logs[self.counts[index]]
            squares = np.bincount(np.repeat(np.arange(len(blocks)), sizes), values**2, minlength=len(blocks))
            values /= np.repeat(np.sqrt(np.maximum(squares, 1e-30)), sizes)
            columns = self.buckets[index] + np.repeat(np.tile(offsets[:-1], len(chosen)), sizes)
            # Three dense features close each row: both lengths and the domain.
            own = sizes.reshape(-1, len(_BLOCKS)).sum(axis=1)
            places = np.repeat(np.cumsum(own), 3)
            domains = self.domains[chosen]
            extra = np.column_stack([self.lengths[chosen], 0.5 * (domains >= 0)]).ravel()
            at = np.column_stack(
                [np.tile([offsets[-1], offsets[-1] + 1], (len(chosen), 1)), offsets[-1] + 2 + np.maximum(domains, 0)]
            ).ravel()
            pointers = np.concatenate([[0], np.cumsum(own + 3)])
            yield (
                part,
                csr_matrix(
                    (np.insert(values, places, extra), np.insert(columns, places, at), pointers),
                    shape=(len(chosen), self.width),
                ),
            )

    def matrix(self, rows: Ints) -> csr_matrix:
        """Return the features of rows, sparse float64 [len(rows), width]."""
        from scipy.sparse import vstack

        parts = [part for _, part in self._chunks(rows)]
        return vstack(parts, format="csr") if parts else csr_matrix((0, self.width))

    def times(self, rows: Ints, weights: Floats) -> Floats:
        """Return features times ``weights`` [width, K] for rows [n, K]; a stretch of rows at a time."""
        out = np.empty((len(rows), weights.shape[1]))
        for part, features in self._chunks(rows):
            out[part] = features @ weights
        return out


def _counted(tokens: Sequence[Ints], buckets: int) -> tuple[Ints, Ints, Ints]:
    """Return (row, bucket, count) of what occurs in each row, ascending."""
    sizes = np.array([len(each) for each in tokens], dtype=np.int64)
    keys = np.repeat(np.arange(len(tokens)), sizes) * buckets + (np.concatenate(tokens) if sizes.sum() else 0)
    if not sizes.sum():
        return (np.zeros(0, dtype=np.int64),) * 3
    found, counts = np.unique(keys, return_counts=True)
    return found // buckets, found % buckets, counts


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A ridge regression of K targets.

    Attributes:
        weights: beta [D, K].
        level: Level of the newest interval [K].
        centre: Means of the features in it, weighted [D].
        strengths: alpha of each target [K].
        noise: s2 of each target [K].
        residuals: Of the observations [n, K].
    """

    weights: Floats
    level: Floats
    centre: Floats
    strengths: Floats
    noise: Floats
    residuals: Floats

    @property
    def offset(self) -> Floats:
        """What is added to features times weights [K]."""
        return self.level - self.centre @ self.weights


@dataclass(frozen=True, kw_only=True)
class Centred:
    """Features and weights of observations, centred within their intervals.

    Attributes:
        features: [n, D].
        intervals: Numbers of the intervals from 0 on [n].
        weights: w [n].
    """

    features: csr_matrix
    intervals: Ints
    weights: Floats

    @classmethod
    def of(cls, features: csr_matrix, intervals: Ints, weights: Floats) -> Centred:
        """Return them, with the intervals numbered from 0."""
        numbers = np.unique(intervals, return_inverse=True)[1].astype(np.int64)
        return cls(features=features, intervals=numbers, weights=weights)

    @property
    def count(self) -> int:
        """Number of intervals."""
        return int(self.intervals.max()) + 1

    @cached_property
    def sums_of_weights(self) -> Floats:
        """Weights by interval [count]."""
        return np.bincount(self.intervals, self.weights, self.count).astype(np.float64)

    @cached_property
    def eigen(self) -> tuple[Floats, Floats]:
        """Eigenvalues [n], ascending, and eigenvectors of sqrt(W) X~ X~' sqrt(W), X~ being the centred features."""
        gram = np.asarray((self.features @ self.features.T).todense())
        gram = self.centred(self.centred(gram).T)
        root = np.sqrt(self.weights)
        squares, basis = np.linalg.eigh(gram * root[:, None] * root[None, :])
        return squares.clip(0.0), basis

    def turned(self, values: Floats) -> Floats:
        """Return centred ``values`` [n, K] along the eigenvectors."""
        found: Floats = self.eigen[1].T @ (np.sqrt(self.weights)[:, None] * values)
        return found

    def centred(self, values: Floats) -> Floats:
        """Take the weighted means by interval away from ``values`` [n, K]."""
        means = np.zeros((self.count, values.shape[1]))
        np.add.at(means, self.intervals, self.weights[:, None] * values)
        means /= self.sums_of_weights[:, None]
        return values - means[self.intervals]

    def forth(self, weights: Floats) -> Floats:
        """Return X~ b for ``weights`` b [D, K] as [n, K]."""
        return self.centred(np.asarray(self.features @ weights))

    def back(self, values: Floats) -> Floats:
        """Return X~' W v for ``values`` v [n, K] as [D, K]."""
        weighted = self.weights[:, None] * self.centred(values)
        return np.asarray(self.features.T @ weighted)


def fitted(
    features: csr_matrix,
    intervals: Ints,
    values: Floats,
    weights: Floats,
    *,
    strengths: Floats | None = None,
    perturbed: tuple[Floats, Floats] | None = None,
) -> Fit:
    """Return the ridge regression of ``values`` on ``features``, both centred within intervals.

    Args:
        features: [n, D].
        intervals: Interval of each observation, ascending numbers [n].
        values: y [n, K].
        weights: w [n], above 0.
        strengths: alpha of each target [K]; None: that of the largest marginal likelihood.
        perturbed: Standard normal draws [n, K] and [D, K]: the fit is a draw of the posterior.
    """
    data = part = Centred.of(features, intervals, weights)
    wanted = some = data.centred(values)
    if len(values) > _DUAL_ROWS:  # strength and noise follow from a part of the observations
        subset = np.linspace(0, len(values) - 1, _DUAL_ROWS).astype(np.int64)
        part = Centred.of(features[subset], intervals[subset], weights[subset])
        some = part.centred(values[subset])
    if strengths is None:
        strengths = _strengths(part, some)
    noise = _noise(part, some, strengths)
    start = np.zeros((features.shape[1], values.shape[1]))
    if perturbed is not None:
        start = perturbed[1] * np.sqrt(noise / strengths)
        wanted = wanted + data.centred(perturbed[0] * np.sqrt(noise / weights[:, None])) - data.forth(start)
    beta = start + _solved(data, wanted, strengths)
    newest = data.intervals == data.count - 1
    share = weights[newest] / weights[newest].sum()
    return Fit(
        weights=beta,
        level=share @ values[newest],
        centre=np.asarray(features[newest].T @ share).ravel(),
        strengths=strengths,
        noise=noise,
        residuals=data.centred(values) - data.forth(beta),
    )


def _strengths(data: Centred, wanted: Floats) -> Floats:
    """Return the alpha of the largest marginal likelihood for each target [K].

    The directions of the levels, as many as there are intervals, have eigenvalue 0 and say nothing.
    """
    squares, turned = data.eigen[0][data.count :], data.turned(wanted)[data.count :]
    if not len(squares):
        return np.full(wanted.shape[1], _STRENGTHS[-1])
    left = _STRENGTHS[:, None] / (squares + _STRENGTHS[:, None])  # [grid, n]
    energy = left @ turned**2  # [grid, K]
    evidence = np.log(left).sum(axis=1)[:, None] - len(squares) * np.log(np.maximum(energy, 1e-300))
    return _STRENGTHS[np.argmax(evidence, axis=0)]


def _noise(data: Centred, wanted: Floats, strengths: Floats) -> Floats:
    """Return s2 of each target [K]: sum w r^2 / (n - degrees of freedom), levels included."""
    left = strengths / (data.eigen[0][:, None] + strengths)
    free = left[data.count :].sum(axis=0)
    return np.maximum(((left * data.turned(wanted)) ** 2).sum(axis=0) / np.maximum(free, 1.0), 1e-300)


def _solved(data: Centred, wanted: Floats, strengths: Floats) -> Floats:
    """Return argmin_b sum w (y - X~ b)^2 + alpha b^2 [D, K]."""
    if len(wanted) <= _DUAL_ROWS:
        squares, basis = data.eigen
        dual = basis @ (data.turned(wanted) / (squares[:, None] + strengths))
        return data.back(dual / np.sqrt(data.weights)[:, None])
    width = data.features.shape[1]
    columns = []
    for k, strength in enumerate(strengths):

        def product(b: Floats, strength: float = strength) -> Floats:
            return (data.back(data.forth(b.reshape(-1, 1))) + strength * b.reshape(-1, 1)).ravel()

        operator = LinearOperator((width, width), matvec=product)
        columns.append(cg(operator, data.back(wanted[:, [k]]).ravel(), rtol=1e-8, maxiter=200)[0])
    return np.stack(columns, axis=1)


def row_effects(rows: Ints, residuals: Floats, weights: Floats, num_rows: int, *, shrinkage: float = 2.0) -> Floats:
    """Return b [num_rows, K]: weighted sums of a row's residuals over (sum of weights + ``shrinkage``)."""
    total = np.bincount(rows, weights, num_rows) + shrinkage
    sums = [np.bincount(rows, weights * column, num_rows) for column in residuals.T]
    return np.stack(sums, axis=1) / total[:, None]


def rank_correlation(predicted: Floats, observed: Floats) -> tuple[float, float]:
    """Return Spearman's correlation, and the probability that it is above 0 (Fisher's z); (NaN, 0.5) below 4 pairs."""
    from scipy.stats import norm, rankdata

    if len(predicted) < 4:
        return float("nan"), 0.5
    a, b = rankdata(predicted), rankdata(observed)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    found = float(a @ b) / scale if scale > 0 else 0.0
    score = np.arctanh(min(max(found, -0.999999), 0.999999)) * np.sqrt(len(a) - 3)
    return found, float(norm.cdf(score))
