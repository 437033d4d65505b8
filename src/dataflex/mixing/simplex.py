"""The simplex with upper bounds: which caps can be met, projection, linear minimum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError

__all__ = ["caps_of_epochs", "check_caps", "kl_projection", "linear_minimum"]

Floats = NDArray[np.float64]


def caps_of_epochs(sizes_K: Floats, budget: float, max_epochs: float) -> Floats:
    """Return the largest share of each domain [K], so that none is seen more than ``max_epochs`` times.

    Olmix: p_j <= k N_j / R.

    Args:
        sizes_K: What there is of each domain [K].
        budget: What the large run will use, in the same unit.
        max_epochs: Most epochs over any domain.
    """
    return np.minimum(max_epochs * np.asarray(sizes_K, dtype=np.float64) / budget, 1.0)


def check_caps(caps_K: Floats, names: Sequence[str]) -> None:
    """Raise unless some mixture keeps to the caps.

    Raises:
        ConfigError: They sum to less than 1, with the largest ones.
    """
    total = float(caps_K.sum())
    if total < 1 - 1e-12:
        order = np.argsort(-caps_K, kind="stable")[:4]
        largest = ", ".join(f"{names[k]} {caps_K[k]:.3g}" for k in order)
        raise ConfigError(
            f"caps: cannot be met: the largest shares that they allow sum to {total:.4g}, less than 1 ({largest}); "
            "raise --max-epochs or --cap, or lower --budget"
        )


def kl_projection(q_K: Floats, caps_K: Floats) -> Floats:
    """Return argmin_p KL(p || q) over the simplex with p <= caps: p = min(caps, s q) with the s that sums to 1.

    Args:
        q_K: Weights >= 0 [K], any scale; the caps of those above 0 must sum to at least 1.
        caps_K: Upper bounds [K].
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(q_K > 0, caps_K / q_K, np.inf)
    order = np.argsort(ratio, kind="stable")  # the scale at which each one reaches its cap
    caps, q = caps_K[order], q_K[order]
    capped = np.concatenate([[0.0], np.cumsum(caps)[:-1]])
    free = np.cumsum(q[::-1])[::-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = (1.0 - capped) / free  # with the first n capped, the others at scale x q
    fits = (scales <= ratio[order]) & (free > 0)
    if not fits.any():  # the caps sum to 1 up to rounding
        p = np.where(q_K > 0, caps_K, 0.0)
    else:
        p = np.minimum(caps_K, scales[np.argmax(fits)] * q_K)
    return p / p.sum()


def linear_minimum(gradient_K: Floats, caps_K: Floats) -> Floats:
    """Return argmin_p <gradient, p> over the simplex with p <= caps: the cheapest domains, filled to their caps."""
    p = np.zeros_like(caps_K)
    left = 1.0
    for k in np.argsort(gradient_K, kind="stable"):
        p[k] = min(caps_K[k], left)
        left -= p[k]
        if left <= 0:
            break
    return p
