"""Gradients of domains, estimated from a few rows of each: all that is needed are inner products of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Context
from dataflex.signals.specs import GradientSpec

__all__ = ["DomainGradients", "domain_gradients"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DomainGradients:
    """Inner products of the mean gradients g_d of the domains.

    Attributes:
        products: <g_d, g_e> [K, K]; the diagonal is the squared norm of the mean over the rows drawn.
        variance: Unbiased variance of a row's gradient within its domain, E ||g_i - g_d||^2 [K]; 0 for a domain of
            one row, which is always the same.
        rows: Rows that each domain's mean is over [K].
        targets: <g_d, g_t> with the mean gradient of each target [K, T].
    """

    products: Floats
    variance: Floats
    rows: NDArray[np.int64]
    targets: Floats

    @property
    def squared_norms(self) -> Floats:
        """Unbiased estimate of ||E g_d||^2 [K], at least 0: the mean's own norm is too large by variance / rows."""
        biased = self.products.diagonal()
        return np.maximum(biased - self.variance / self.rows, 0.0)


def domain_gradients(
    ctx: Context, *, rows_per_domain: int, parameters: str | None = None, last_blocks: int | None = None
) -> DomainGradients:
    """Draw rows of every domain and compare their gradients (collective; F + B over the rows and targets).

    Args:
        ctx: The decision's context; its targets are compared with too.
        rows_per_domain: Rows drawn of each domain, without replacement; all of a smaller one.
        parameters: As in ``GradientSpec``.
        last_blocks: As in ``GradientSpec``.

    Raises:
        DataError: None of the rows drawn of a domain has a finite gradient.
    """
    names, rng = ctx.domains.names, ctx.rng("domain gradients")
    drawn = []
    for k in range(len(names)):
        rows = ctx.domains.rows(k)
        drawn.append(np.sort(rng.choice(rows, size=min(rows_per_domain, len(rows)), replace=False)))
    spec = GradientSpec(
        precondition="none",
        include_momentum=False,
        normalize=False,
        parameters=parameters,
        last_blocks=last_blocks,
    )
    everything = np.concatenate(drawn)
    scores, gram = ctx.signals.gradient_products(everything, spec, targets=ctx.targets)
    scores, gram = np.asarray(scores, dtype=np.float64), np.asarray(gram, dtype=np.float64)
    owner = np.repeat(np.arange(len(names)), [len(rows) for rows in drawn])
    known = np.isfinite(gram.diagonal())
    counts = np.bincount(owner[known], minlength=len(names))
    if (counts == 0).any():
        lost = names[int(np.argmin(counts))]
        raise DataError(f"none of the rows drawn of domain {lost!r} has a finite gradient (no supervised tokens?)")
    mean_KN = np.zeros((len(names), len(everything)))
    mean_KN[owner[known], np.flatnonzero(known)] = 1.0 / counts[owner[known]]
    gram, scores = np.where(np.isfinite(gram), gram, 0.0), np.where(np.isfinite(scores), scores, 0.0)
    products = mean_KN @ gram @ mean_KN.T
    squares = mean_KN @ gram.diagonal()
    many = counts > 1
    spread = np.maximum(squares - products.diagonal(), 0.0)
    variance = np.where(many, spread * counts / np.maximum(counts - 1, 1), 0.0)
    return DomainGradients(products=products, variance=variance, rows=counts, targets=mean_KN @ scores)
