"""Slow, obvious oracles: plain Python in double precision, written from the papers' formulas.

They share no code with the methods, so that an implementation can be held against them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def oracle_loss_weights(
    losses: Sequence[float], tokens: Sequence[int], strategy: str, delta: float = 1.0, r: float = 1.0
) -> list[float]:
    """Weights of arXiv 2502.06733, one sequence at a time; sequences without tokens get 0."""
    valid = [loss for loss, n in zip(losses, tokens, strict=True) if n > 0]
    if not valid:
        return [0.0] * len(losses)
    least, most = min(valid), max(valid)
    if most - least < 1e-6:
        return [1.0 / len(valid) if n > 0 else 0.0 for n in tokens]
    shapes = {
        "linupper": lambda h: min(h + delta, delta),
        "quadratic": lambda h: 1 - h * h / (delta * delta),
        "extremes": abs,
        "upper": lambda h: 0.5 * h + 0.5 * delta,
        "softmax_loss": lambda h: h,
    }
    scale = most - least
    raised = [
        math.exp(shapes[strategy](2 * delta * loss / scale - delta * (most + least) / scale) / r) if n > 0 else 0.0
        for loss, n in zip(losses, tokens, strict=True)
    ]
    return [g / sum(raised) for g in raised]


def oracle_temperature(sizes: Sequence[float], tau: float) -> list[float]:
    """Shares size ** (1 / tau), divided by their sum; empty domains get 0."""
    raised = [size ** (1 / tau) if size > 0 else 0.0 for size in sizes]
    return [x / sum(raised) for x in raised]


def oracle_unimax(sizes: Sequence[float], budget: float, max_epochs: float) -> list[float]:
    """Amounts by domain: the water level at which all domains, each up to its cap, hold the budget (bisection)."""
    caps = [max_epochs * size for size in sizes]
    low, high = 0.0, max(caps)
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if sum(min(level, cap) for cap in caps) < budget else (low, level)
    return [min(high, cap) for cap in caps]


def oracle_bucket_weights(
    losses: Sequence[float], focus: str, quantiles: tuple[float, float] = (0.33, 0.66), focus_weight: float = 5.0
) -> list[float]:
    """Return the sampling weight of each row for the loss selector: ``focus_weight`` in the bucket, 0 if not finite."""
    ranked = sorted(loss for loss in losses if math.isfinite(loss))

    def quantile(q: float) -> float:
        place = q * (len(ranked) - 1)
        below = math.floor(place)
        above = min(below + 1, len(ranked) - 1)
        return ranked[below] + (place - below) * (ranked[above] - ranked[below])

    q1, q2 = (quantile(q) for q in quantiles)
    return [
        0.0
        if not math.isfinite(loss)
        else focus_weight
        if ("low" if loss <= q1 else "medium" if loss <= q2 else "high") == focus
        else 1.0
        for loss in losses
    ]


def oracle_relative_gain(loss_start: float, loss_adapted: float, floor: float = 0.05) -> float:
    """Score of one row for TACS (arXiv 2605.09404) with the denominator kept above ``floor``."""
    return (loss_start - loss_adapted) / (max(loss_start, floor) + 1e-8)


def oracle_top_rows(scores: Sequence[float], k: int) -> list[int]:
    """Positions of the ``k`` highest scores, best first, ties by position, NaN never."""
    scored = [i for i, score in enumerate(scores) if not math.isnan(score)]
    return sorted(scored, key=lambda i: (-scores[i], i))[:k]
