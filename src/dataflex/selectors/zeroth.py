"""Keep rows by influence on the targets, estimated by differences of losses, without a backward pass (experimental).

A method of existing DataFlex, without a paper: for random directions x_k, the same for all rows, the derivative of
row i's loss is g_ik = (l_i(p + e x_k) - l_i(p - e x_k)) / (2 e), the simultaneous perturbation of Spall (1992). The
vector of all K derivatives is a sketch of the row's gradient; rows are ranked by the cosine of theirs with that of
the target's mean loss, or by the mean product, which is an unbiased estimate of the inner product of gradients.

Be warned. The estimate of a cosine has a standard error of about 1 / sqrt(K), so that K = 256 directions, that is
512 forward passes over the pool, tell apart cosines that differ by 0.1 or so; one backward pass (``less``,
``precondition: none``) gives them exactly for the price of some three. One direction is noise: it ranks
all rows by one random projection. Use this only where no gradient can be had.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Card, Context, Passes, Requires, Rows, param
from dataflex.select.scoring import Found, ScoringParams, ScoringSelector
from dataflex.selectors._lib import TOKEN_LOSSES
from dataflex.signals.kinds import PerturbedLoss

logger = logging.getLogger(__name__)


def central_difference(above: NDArray[np.floating], below: NDArray[np.floating], epsilon: float) -> NDArray[np.float64]:
    """Return (above - below) / (2 epsilon) in float64: exact for linear and quadratic functions; NaN where not finite.

    ``above`` and ``below`` are losses at p + epsilon x and p - epsilon x [n].
    """
    with np.errstate(invalid="ignore"):
        found = (above.astype(np.float64) - below.astype(np.float64)) / (2.0 * epsilon)
    return np.where(np.isfinite(found), found, np.nan)


class Zeroth(ScoringSelector):
    """Keep the rows whose loss changes as the target's does under random changes of the parameters."""

    name = "zeroth"
    lacking = "no finite loss"
    card = Card(
        summary="Experimental and noisy: keeps rows by influence on the targets, estimated without backward passes.",
        paper="baseline (simultaneous perturbation of existing DataFlex; no paper)",
        cost="2 F over the pool and the targets per direction (256) and interval; prefer less, which is exact",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ScoringParams):
        """Parameters of the zeroth-order selector."""

        directions: int = param(256, "random directions K; noise falls with 1 / sqrt(K), cost is 2 K F", minimum=1)
        epsilon: float = param(1e-3, "step added to or taken from every parameter", above=0.0)
        similarity: Literal["cosine", "product"] = param(
            "cosine", "compare directions, or inner products, which favour steep rows"
        )
        parameters: str | None = param(
            None, "regular expression of the parameters that move; null: all trainable ones", pattern=True
        )

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        passes = Passes(pool=(2.0 * self.params.directions, 0.0))
        return replace(TOKEN_LOSSES, targets=True, whole_parameters=True, passes=passes)

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self._warned = False

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.floating]:
        """Return estimated influence on the targets [T, N]; DataError where a target has no finite loss."""
        num, targets = self.params.directions, ctx.targets
        if not self._warned:
            self._warned = True
            logger.warning(
                "zeroth is experimental: with %d directions its cosines have a standard error of about %.2f, for %d "
                "forward passes over the pool; less gives them exactly for one forward and one backward pass",
                num,
                num**-0.5,
                2 * num,
            )
        products, squares = np.zeros((len(pool), len(targets))), np.zeros(len(pool))
        target_squares = np.zeros(len(targets))
        for direction in range(num * ctx.interval.index, num * (ctx.interval.index + 1)):
            aims = np.array([self._target_derivative(name, direction, ctx) for name in targets])
            own = self._derivatives(pool, direction, ctx, None)
            products += own[:, None] * aims
            squares += own**2
            target_squares += aims**2
        if self.params.similarity == "product":
            return products.T / num
        return np.asarray(products / np.maximum(np.sqrt(squares[:, None] * target_squares), 1e-30)).T

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return the standard error of the estimate."""
        num = self.params.directions
        how = f"{num} directions, standard error about {num**-0.5:.2f}"
        return f"by estimated influence on {', '.join(ctx.targets)} ({how})"

    def _target_derivative(self, target: str, direction: int, ctx: Context) -> float:
        rows = np.arange(ctx.signals.num_rows(target), dtype=np.int64)
        found = self._derivatives(rows, direction, ctx, target) if len(rows) else np.empty(0)
        if not np.isfinite(found).any():
            raise DataError(f"zeroth: target {target!r} has {len(rows):,} rows, none of which has a finite loss")
        return float(np.nanmean(found))

    def _derivatives(self, rows: Rows, direction: int, ctx: Context, target: str | None) -> NDArray[np.float64]:
        p = self.params
        above, below = (
            ctx.signals(
                PerturbedLoss(seed=ctx.seed, direction=direction, epsilon=step, parameters=p.parameters),
                rows,
                target=target,
            )
            for step in (p.epsilon, -p.epsilon)
        )
        return central_difference(above, below, p.epsilon)
