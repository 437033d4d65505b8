"""Least proportions of domains (``dynamic.min_proportion``), held whatever a mixer answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError
from dataflex.mixers.proportions import refuse_strangers

__all__ = ["Floors", "floors_by_domain", "raised"]

Floors = float | dict[str, float]

_KEY = "dynamic.min_proportion"
_SLACK = 1e-9


def floors_by_domain(given: Floors | None, names: Sequence[str]) -> NDArray[np.float64] | None:
    """Return the least proportion of each domain [K]; domains that are not named have none.

    Args:
        given: One number for every domain, or numbers by name; None for no floors.
        names: Names of the run's domains.

    Raises:
        ConfigError: A name that is no domain, or floors that sum to more than 1.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        refuse_strangers(given, names, _KEY)
        floors = np.array([float(given.get(name, 0.0)) for name in names])
    else:
        floors = np.full(len(names), float(given))
    total = math.fsum(floors)
    if total > 1.0 + _SLACK:
        each = "" if isinstance(given, Mapping) else f" ({given:g} for each of {len(names)} domains)"
        raise ConfigError(f"{_KEY}: the floors sum to {total:.6g}{each}, and proportions to 1; lower them")
    return floors


def raised(proportions: NDArray[np.float64], floors: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Return max(floor, s p) [K], with the one s for which the sum is 1.

    So domains below their floors are raised to them, and what that takes comes from the others in proportion.
    Proportions that keep to the floors are returned as they are, bit for bit.

    Args:
        proportions: p [K], >= 0, sum 1.
        floors: Least proportions [K], >= 0, sum at most 1; None for none.
    """
    if floors is None or not (proportions < floors).any():
        return proportions
    if floors.sum() >= 1.0 - _SLACK:
        return np.asarray(floors / floors.sum())
    held, scale = np.zeros(len(floors), dtype=np.bool_), 1.0
    while True:  # s only falls and every turn holds one more domain: at most K turns
        low = ~held & (scale * proportions < floors)
        if not low.any():
            break
        held |= low
        scale = (1.0 - floors[held].sum()) / proportions[~held].sum()
    found = np.where(held, floors, scale * proportions)
    return np.asarray(found / found.sum())
