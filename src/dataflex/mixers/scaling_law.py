"""Per-domain scaling laws from a run's own losses, as ADO fits them: L(n) = exp(e) + exp(a) n^-alpha."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

__all__ = ["PowerLaw", "fit_power_law"]

Floats = NDArray[np.float64]

_HUBER = 1e-3
_WINDOW, _ORDER = 101, 3
_EVERY = 10
_GRID = 8
_REFINED = 8
"""How many of the grid's best points are followed down; the authors follow all 512 to the same optimum."""


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """L(n) = exp(e) + exp(a) n^-alpha, nats per token over n samples."""

    e: float
    a: float
    alpha: float

    def reducible(self, n: float) -> float:
        """Return exp(a) n^-alpha."""
        return float(np.exp(self.a - self.alpha * np.log(n)))

    def slope(self, n: float, least_alpha: float = 0.05) -> float:
        """Return -dL/dn = alpha (L - exp(e)) / n, with alpha at least ``least_alpha``."""
        return max(self.alpha, least_alpha) * self.reducible(n) / n


def fit_power_law(
    samples: Floats, losses: Floats, *, skip: int = 0, least_e: float = 0.5, most_a: float = 6.5
) -> PowerLaw | None:
    """Fit a law to losses that were smoothed (Savitzky-Golay, 101 points, cubic), then cut and thinned to every tenth.

    Huber loss (1e-3) between log losses; 0 < alpha <= 0.8, e >= ``least_e``, a <= ``most_a``.

    Args:
        samples: n [T], rising, above 0.
        losses: L [T], above 0.
        skip: Losses at the beginning that are smoothed with the others and then left out.
        least_e: Least log of the irreducible loss.
        most_a: Largest a.

    Returns:
        The law, or None with fewer than 101 points after those left out, or without a finite fit.
    """
    from scipy.optimize import minimize
    from scipy.signal import savgol_filter

    if len(losses) - skip < _WINDOW:
        return None
    smooth = savgol_filter(losses, _WINDOW, _ORDER)[skip::_EVERY]
    log_n, log_loss = np.log(samples[skip::_EVERY]), np.log(np.maximum(smooth, 1e-8))

    def objective(theta: Floats) -> tuple[float, Floats]:
        e, a, alpha = theta
        rest = a - alpha * log_n
        predicted = np.logaddexp(e, rest)
        error = predicted - log_loss
        clipped = np.clip(error, -_HUBER, _HUBER)
        value = float(np.mean(clipped * (error - 0.5 * clipped)))
        part = np.exp(rest - predicted)  # share of the reducible loss
        slopes = np.array([np.mean(clipped * (1.0 - part)), np.mean(clipped * part), -np.mean(clipped * part * log_n)])
        return value, slopes

    bounds = [(least_e, None), (None, most_a), (1e-4, 0.8)]
    top_e = max(float(log_loss.min()), least_e)
    grid = product(np.linspace(least_e, top_e, _GRID), np.linspace(-1.0, most_a, _GRID), np.linspace(0.1, 0.8, _GRID))
    starts = sorted((np.array(point) for point in grid), key=lambda point: objective(point)[0])[:_REFINED]
    best: tuple[float, Floats] | None = None
    for start in starts:
        # The objective is of the order of 1e-6, below the optimizer's own idea of convergence.
        found = minimize(
            lambda theta: tuple(1e6 * np.asarray(part) for part in objective(theta)),
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": 200},
        )
        if np.isfinite(found.fun) and np.isfinite(found.x).all() and (best is None or found.fun < best[0]):
            best = (float(found.fun), np.asarray(found.x))
    if best is None:
        return None
    e, a, alpha = (float(value) for value in best[1])
    return PowerLaw(e=e, a=a, alpha=alpha)
