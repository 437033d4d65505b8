"""Laws of the held-out loss as a function of the mixture, fitted to the runs of a swarm.

L_i(p) = exp(c_i) + exp(b_i + A_i . p), one law per task. Two methods share it:

- ``log_linear`` (Olmix, Chen et al., arXiv 2602.12237): b_i = 0.
- ``mixing_law`` (Data Mixing Laws, Ye et al., ICLR 2025, arXiv 2403.16952): c_i + k_i exp(sum_j t_ij r_j)
  with k_i = exp(b_i) fitted too. On the simplex a shift of A_i does what b_i does, so both describe
  the same curves; the fits differ in where they start.

Fitted by L-BFGS on the Huber loss of the residuals in nats (delta 0.02), from 10 values of c in
[-2, 1.5] x 30 random starts; the best one is kept.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.core.rng import stream
from dataflex.errors import DataError

__all__ = ["LAWS", "RESTARTS", "Law", "fit_law", "huber", "predict"]

Floats = NDArray[np.float64]
Law = Literal["log_linear", "mixing_law"]

LAWS: tuple[Law, ...] = ("log_linear", "mixing_law")
RESTARTS = 30

_DELTA = 0.02
_OFFSETS = np.linspace(-2.0, 1.5, 10)
_SEARCH = {"maxiter": 300, "maxfun": 600, "ftol": 1e-9, "gtol": 1e-6}
_POLISH = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-15, "gtol": 1e-10}  # of the best start only
_MOST_EXPONENT = 30.0


def predict(theta: Floats, mixtures_RK: Floats) -> Floats:
    """Return the losses [R] of a law.

    Args:
        theta: c, b, A_1 .. A_K [K + 2].
        mixtures_RK: Mixtures [R, K].
    """
    exponents = theta[1] + np.asarray(mixtures_RK, dtype=np.float64) @ theta[2:]
    return np.exp(theta[0]) + np.exp(np.minimum(exponents, _MOST_EXPONENT))  # bounded as in the fit


def huber(residuals: Floats, delta: float = _DELTA) -> Floats:
    """Return r^2 / 2 up to ``delta``, and delta (|r| - delta / 2) beyond, elementwise."""
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def fit_law(law: Law, mixtures_RK: Floats, losses_R: Floats, *, seed: int = 0, restarts: int = RESTARTS) -> Floats:
    """Fit the law of one task.

    Args:
        law: Which one; ``log_linear`` keeps b at 0.
        mixtures_RK: Mixtures of the runs [R, K].
        losses_R: Held-out losses of the runs [R], finite.
        seed: Seed of the random starts.
        restarts: Random starts per value of c.

    Returns:
        float64 [K + 2]: c, b, A_1 .. A_K. Depends on the arguments only.

    Raises:
        DataError: No start led to a finite law.
    """
    from scipy.optimize import minimize

    design = np.concatenate([np.ones((len(mixtures_RK), 1)), mixtures_RK], axis=1)  # of b and A
    free = np.ones(design.shape[1] + 1, dtype=bool)
    free[1] = law == "mixing_law"
    rng = stream(seed, f"mixing.fit.{law}")
    taken = design[:, free[1:]]

    def descend(start: Floats, options: dict[str, float]) -> Any:
        return minimize(_objective, start, args=(taken, losses_R), jac=True, method="L-BFGS-B", options=options)

    best, best_value = None, np.inf
    for offset in _OFFSETS:
        for slopes in rng.standard_normal((restarts, design.shape[1])):
            start = np.concatenate([[offset], slopes])
            start[~free] = 0.0
            found = descend(start[free], _SEARCH)
            if np.isfinite(found.fun) and np.isfinite(found.x).all() and found.fun < best_value:
                best, best_value = found.x, found.fun
    if best is None:
        raise DataError("the law could not be fitted: no start led to finite numbers; are the losses in nats?")
    theta = np.zeros(len(free))
    theta[free] = descend(best, _POLISH).x
    return theta


def _objective(free_theta: Floats, design: Floats, losses_R: Floats) -> tuple[float, Floats]:
    """Return the mean Huber loss in units of delta^2, and its gradient; exponents are bounded."""
    floor_exponent = min(free_theta[0], _MOST_EXPONENT)
    exponents = design @ free_theta[1:]
    inside = exponents < _MOST_EXPONENT
    floor, rest = np.exp(floor_exponent), np.exp(np.minimum(exponents, _MOST_EXPONENT))
    residuals = floor + rest - losses_R
    slopes = np.clip(residuals, -_DELTA, _DELTA) / (len(losses_R) * _DELTA**2)
    gradient = np.empty_like(free_theta)
    gradient[0] = slopes.sum() * floor * (free_theta[0] < _MOST_EXPONENT)
    gradient[1:] = (slopes * rest * inside) @ design
    return float(huber(residuals).mean() / _DELTA**2), gradient
