"""The mixture that a fitted law expects most of, kept near the natural one and under caps.

Olmix (Chen et al., arXiv 2602.12237): min_p mean_i exp(A_i . p) + lambda KL(p || p0) over the
simplex with p_j <= cap_j. Convex and smooth; solved by Newton steps along a logarithmic barrier. The
Frank-Wolfe gap, computed at the end, bounds how far the value is from the best one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataflex.mixing.simplex import kl_projection, linear_minimum

__all__ = ["Solution", "minimise"]

Floats = NDArray[np.float64]

_BARRIERS = np.geomspace(1.0, 1e-11, 23)
_MOST_NEWTON = 60
_NEVER = 1e-9  # shares below it become 0: the barrier keeps every share above it


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What ``minimise`` found.

    Attributes:
        proportions: float64 [K] on the simplex, within the caps.
        value: The objective there.
        gap: Most by which the value exceeds the best one.
        steps: Newton steps taken.
    """

    proportions: Floats
    value: float
    gap: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class _Objective:
    """mean_i exp(A_i . p) + kl x KL(p || natural) over the domains that may be used."""

    slopes_TK: Floats
    natural_K: Floats
    kl: float

    def value(self, p_K: Floats) -> float:
        value = float(np.exp(self.slopes_TK @ p_K).mean())
        if self.kl > 0:
            used = p_K > 0
            value += self.kl * float(p_K[used] @ np.log(p_K[used] / self.natural_K[used]))
        return value

    def gradient(self, p_K: Floats) -> Floats:
        gradient: Floats = np.exp(self.slopes_TK @ p_K) @ self.slopes_TK / len(self.slopes_TK)
        if self.kl > 0:  # at 0 the slope of the divergence is -infinity; a huge number does
            gradient = gradient + self.kl * (np.log(np.maximum(p_K, 1e-300) / self.natural_K) + 1.0)
        return gradient

    def hessian(self, p_K: Floats) -> Floats:
        weights_T = np.exp(self.slopes_TK @ p_K) / len(self.slopes_TK)
        hessian: Floats = (self.slopes_TK * weights_T[:, None]).T @ self.slopes_TK
        return hessian + np.diag(self.kl / p_K)


def minimise(slopes_TK: Floats, natural_K: Floats, *, kl: float, caps_K: Floats | None = None) -> Solution:
    """Minimise mean_i exp(A_i . p) + kl x KL(p || natural).

    Args:
        slopes_TK: A, one row per task [T, K]; an offset of a task may be added to its whole row.
        natural_K: p0 [K], sum 1; a domain with 0 keeps 0 when ``kl`` is above 0.
        kl: Weight of the divergence, >= 0.
        caps_K: Upper bounds [K], summing to at least 1 over the domains that may be used.
    """
    caps = np.ones_like(natural_K) if caps_K is None else np.minimum(caps_K, 1.0)
    usable = caps > 0 if kl == 0 else (caps > 0) & (natural_K > 0)
    bounds = caps[usable]
    goal = _Objective(slopes_TK=slopes_TK[:, usable], natural_K=natural_K[usable], kl=kl)
    p, steps = bounds / bounds.sum(), 0
    if bounds.sum() > 1 + 1e-9 and len(p) > 1:  # else the caps leave one mixture only
        # A cap of 1 binds only where all others are 0, which their own bound already says.
        p, steps = _along_the_barrier(goal, p, np.where(bounds < 1.0, bounds, np.inf))
        p = kl_projection(np.where(p < _NEVER, 0.0, p) if kl == 0 else p, bounds)
    gradient = goal.gradient(p)
    gap = float(gradient @ (p - linear_minimum(gradient, bounds)))
    proportions = np.zeros_like(natural_K)
    proportions[usable] = np.minimum(p, bounds)
    return Solution(proportions=proportions, value=goal.value(p), gap=max(gap, 0.0), steps=steps)


def _along_the_barrier(goal: _Objective, p_K: Floats, bounds_K: Floats) -> tuple[Floats, int]:
    """Minimise goal - mu sum log p - mu sum log(bound - p) for falling mu, from a point inside."""
    capped = np.isfinite(bounds_K)
    steps = 0

    def barrier(p: Floats, mu: float) -> float:
        return goal.value(p) - mu * float(np.log(p).sum() + np.log((bounds_K - p)[capped]).sum())

    for mu in _BARRIERS:
        for _ in range(_MOST_NEWTON):
            room = bounds_K - p_K
            gradient = goal.gradient(p_K) - mu / p_K + mu / room
            scale = np.minimum(p_K, room)  # makes the system well conditioned however near the bounds
            system = scale[:, None] * goal.hessian(p_K) * scale
            system[np.diag_indices_from(system)] += mu * (scale / p_K) ** 2 + mu * (scale / room) ** 2
            solved = np.linalg.solve(system, np.stack([scale * gradient, scale], axis=1))
            multiplier = -(scale @ solved[:, 0]) / (scale @ solved[:, 1])
            move = -scale * (solved[:, 0] + multiplier * solved[:, 1])
            decrease = -float(gradient @ move)
            steps += 1
            if decrease <= 1e-7 * mu:
                break
            with np.errstate(divide="ignore", invalid="ignore"):
                limits = np.where(move < 0, -p_K / move, np.where(move > 0, room / move, np.inf))
            length, before = min(1.0, 0.99 * float(limits.min())), barrier(p_K, mu)
            while length > 1e-10 and barrier(p_K + length * move, mu) > before - 0.1 * length * decrease:
                length /= 2.0
            if length <= 1e-10:  # nothing left to gain in float64
                break
            p_K = p_K + length * move
    return p_K, steps
