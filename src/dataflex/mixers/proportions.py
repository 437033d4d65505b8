"""Proportions as a user writes them: a list in the order of the domains, or a mapping by name.

Checked in two steps, since the numbers can be judged at once and the names only when the domains
are known. Numbers need not sum to one (7, 2, 1 is fine); they are divided by their sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError, did_you_mean

__all__ = [
    "Written",
    "by_domain",
    "check_numbers",
    "normalized",
    "numbers_by_domain",
    "refuse_strangers",
    "shares",
]

Written = tuple[float, ...] | dict[str, float]


def check_numbers(value: Written, key: str) -> None:
    """Raise ``ValueError`` unless ``value`` holds finite numbers >= 0, at least one of them above 0."""
    items = list(value.items()) if isinstance(value, Mapping) else list(enumerate(value))
    if not items:
        raise ValueError(f"{key}: is empty; give one number per domain")
    for place, number in items:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"{key}: {place} is {number!r}, must be a number")
        if not math.isfinite(number) or number < 0:
            raise ValueError(f"{key}: {place} is {number}, must be a finite number, 0 or more")
    if not any(number > 0 for _, number in items):
        raise ValueError(f"{key}: all are 0; at least one domain needs a proportion above 0")


def by_domain(value: Written, names: Sequence[str], key: str) -> NDArray[np.float64]:
    """Return proportions float64 [K], summing to one, in the order of ``names``.

    Args:
        value: Numbers that passed ``check_numbers``.
        names: Names of the run's domains.
        key: Path of the key in the configuration, for messages.

    Raises:
        ConfigError: Wrong length, or names that are not exactly those of the domains.
    """
    return normalized(numbers_by_domain(value, names, key, zero=", 0 means never"))


def numbers_by_domain(value: Written, names: Sequence[str], key: str, *, zero: str = "") -> NDArray[np.float64]:
    """Return numbers float64 [K] in the order of ``names``, as written.

    Args:
        value: A list in the order of ``names``, or a mapping by name.
        names: Names of the run's domains.
        key: Path of the key in the configuration, for messages.
        zero: What messages add about a number that is missing.

    Raises:
        ConfigError: Wrong length, or names that are not exactly those of the domains.
    """
    if isinstance(value, Mapping):
        refuse_strangers(
            value,
            names,
            key,
            also=[f"{key}.{name}: missing; every domain needs a number{zero}" for name in names if name not in value],
        )
        return np.array([value[name] for name in names], dtype=np.float64)
    if len(value) != len(names):
        raise ConfigError(
            f"{key}: {len(value)} numbers for {len(names)} domains; give one for each of {', '.join(names)}"
        )
    return np.array(value, dtype=np.float64)


def refuse_strangers(given: Iterable[str], names: Sequence[str], key: str, *, also: Sequence[str] = ()) -> None:
    """Make sure that every name given is a domain's.

    Args:
        given: Names as a user wrote them.
        names: Names of the run's domains.
        key: Path of the key in the configuration, for messages.
        also: Further problems, told with the rest.

    Raises:
        ConfigError: Some are not, or there are further problems.
    """
    problems = [f"{key}.{name}: no such domain{did_you_mean(name, names)}" for name in given if name not in names]
    problems += also
    if problems:
        raise ConfigError([f"{problem} (domains: {', '.join(names)})" for problem in problems])


def normalized(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``weights`` >= 0 divided by their sum, which must be above 0; as given if that is 1 up to rounding."""
    with np.errstate(over="ignore"):
        total = weights.sum()
    if abs(total - 1.0) < 1e-12:
        return weights
    scaled = weights / weights.max() if np.isinf(total) else weights
    return scaled / scaled.sum()


def shares(names: Sequence[str], proportions: NDArray[np.float64]) -> str:
    """Return ``"web 0.6, code 0.4"`` for the record; of many domains the eight largest."""
    order = np.argsort(-proportions, kind="stable")[:8]
    text = ", ".join(f"{names[k]} {proportions[k]:.3g}" for k in order)
    return text if len(names) <= 8 else f"{text}, {len(names) - 8} more"
