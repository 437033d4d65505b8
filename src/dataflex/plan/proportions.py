"""Proportions of domains: as a user writes them, with floors, and the JSON file that ``mixer: {from: FILE}`` takes.

A user writes a list in the order of the domains, or a mapping by name. The numbers are checked at once, the names when
the domains are known. Numbers need not sum to one (7, 2, 1 is fine); they are divided by their sum.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataflex.errors import ComponentError, ConfigError, DataError, did_you_mean
from dataflex.plan.domains import Floats
from dataflex.printable import plain, redacted
from dataflex.state import read_json, refusals, write_json
from dataflex.version import version_of

FORMAT = 1
_SUM_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class ProportionsFile:
    """What a proportions file holds."""

    names: tuple[str, ...]  # domains, each once [K]
    proportions: tuple[float, ...]  # share of each [K], >= 0, sum 1
    method: str  # what made them, such as "log_linear"
    provenance: Mapping[str, Any] = field(default_factory=dict)  # command, date, versions, settings, digests of inputs
    details: Mapping[str, Any] = field(default_factory=dict)  # numbers of the method, such as predicted losses

    @property
    def by_name(self) -> dict[str, float]:
        """Proportions as a mapping from name to share."""
        return dict(zip(self.names, self.proportions, strict=True))


def write_proportions(path: Path | str, content: ProportionsFile) -> Path:
    """Write a proportions file, whole or not at all, and return its path; DataError if that is impossible."""
    path = Path(path)
    problem = _numbers_problem(content.names, content.proportions)
    assert not problem, problem
    body = {
        "format": FORMAT,
        "method": content.method,
        "names": list(content.names),
        "proportions": [float(share) for share in content.proportions],
        "details": redacted(plain(content.details)),
        "provenance": redacted(plain(content.provenance)),
    }
    with refusals(path, DataError):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, body)
    return path


def read_proportions(path: Path | str, key: str = "from") -> ProportionsFile:
    """Read a proportions file, which the key or option ``key`` names.

    Raises:
        ConfigError: No such file, not JSON, a key is missing, or the numbers are not proportions.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise ConfigError(f"{key}: {what}: {path} (relative to the working directory {Path.cwd()})")
    try:
        body = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {path} cannot be read as JSON: {error}") from error
    wanted = "{names: [...], proportions: [...], method, provenance} as 'dataflex mix propose' writes it"
    if not isinstance(body, dict) or not {"names", "proportions"} <= body.keys():
        raise ConfigError(f"{key}: {path} is no proportions file; expected {wanted}")
    names, shares = body["names"], body["proportions"]
    if not isinstance(names, list) or not isinstance(shares, list):
        raise ConfigError(f"{key}: {path}: names and proportions must be lists")
    problem = _numbers_problem(names, shares)
    if problem:
        raise ConfigError(f"{key}: {path}: {problem}")
    return ProportionsFile(
        names=tuple(names),
        proportions=tuple(float(share) for share in shares),
        method=str(body.get("method", "unknown")),
        provenance=body.get("provenance") or {},
        details=body.get("details") or {},
    )


def _numbers_problem(names: Sequence[Any], shares: Sequence[Any]) -> str:
    if not names or not all(isinstance(name, str) and name for name in names):
        return "names must be a list of texts, one per domain"
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        return f"names holds {twice!r} twice"
    if len(names) != len(shares):
        return f"{len(shares)} proportions for {len(names)} names"
    for name, share in zip(names, shares, strict=True):
        if not _is_weight(share):
            return f"the proportion of {name!r} is {share!r}, must be a finite number, 0 or more"
    total = math.fsum(shares)
    return "" if abs(total - 1) < _SUM_TOLERANCE else f"proportions sum to {total:.6g}, must sum to 1"


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value, independent of the order of its keys and of its secrets."""
    return hashlib.sha256(json.dumps(redacted(value), sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def provenance(
    command: str,
    *,
    inputs: Iterable[Path] = (),
    settings: Mapping[str, Any] | None = None,
    packages: Sequence[str] = (),
    config_digest: str | None = None,
) -> dict[str, Any]:
    """Return how a result was made: command, date, versions (of ``packages`` too), settings and digests.

    ``inputs`` are files that were read (digested) and folders (named only); ``config_digest`` is of the configuration
    of the small runs.
    """
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version_of(name) for name in ("dataflex", "numpy", *packages)},
        "config_digest": config_digest,
        "inputs": {str(path): file_digest(path) if path.is_file() else None for path in inputs},
        "settings": dict(settings or {}),
    }


Written = tuple[float, ...] | dict[str, float]


def check_numbers(value: Written, key: str) -> None:
    """Raise ``ValueError`` unless ``value`` holds finite numbers >= 0, at least one of them above 0."""
    items = list(value.items()) if isinstance(value, Mapping) else list(enumerate(value))
    if not items:
        raise ValueError(f"{key}: is empty; give one number per domain")
    for place, number in items:
        if not _is_weight(number):
            raise ValueError(f"{key}: {place} is {number!r}, must be a finite number, 0 or more")
    if not any(number > 0 for _, number in items):
        raise ValueError(f"{key}: all are 0; at least one domain needs a proportion above 0")


def by_domain(value: Written, names: Sequence[str], key: str) -> Floats:
    """Return numbers that passed ``check_numbers`` as proportions float64 [K]; otherwise as ``numbers_by_domain``."""
    return normalized(numbers_by_domain(value, names, key, zero=", 0 means never"))


def numbers_by_domain(value: Written, names: Sequence[str], key: str, *, zero: str = "") -> Floats:
    """Return numbers float64 [K] in the order of ``names``, as written in a list or by name.

    ``zero`` is what messages add about a number that is missing.

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
    """Raise ConfigError for names that are no domain's, together with the problems in ``also``."""
    problems = [f"{key}.{name}: no such domain{did_you_mean(name, names)}" for name in given if name not in names]
    problems += also
    if problems:
        raise ConfigError([f"{problem} (domains: {', '.join(names)})" for problem in problems])


def normalized(weights: Floats) -> Floats:
    """Return ``weights`` >= 0 divided by their sum, which must be above 0; as given if that is 1 up to rounding."""
    with np.errstate(over="ignore"):
        total = weights.sum()
    if abs(total - 1.0) < 1e-12:
        return weights
    scaled = weights / weights.max() if np.isinf(total) else weights
    return scaled / scaled.sum()


def shares(names: Sequence[str], proportions: Floats) -> str:
    """Return ``"web 0.6, code 0.4"`` for the record; of many domains only the eight largest."""
    order = np.argsort(-proportions, kind="stable")[:8]
    text = ", ".join(f"{names[k]} {proportions[k]:.3g}" for k in order)
    return text if len(names) <= 8 else f"{text}, {len(names) - 8} more"


def per_domain(given: float | Mapping[str, float], names: Sequence[str], key: str, *, missing: float) -> Floats:
    """Return one number for each domain [K]: the same for all, or by name with ``missing`` for the others.

    ConfigError names what is no domain.
    """
    if not isinstance(given, Mapping):
        return np.full(len(names), float(given))
    refuse_strangers(given, names, key)
    return np.array([float(given.get(name, missing)) for name in names])


Floors = float | dict[str, float]

_KEY = "dynamic.min_proportion"
_SLACK = 1e-9


def floors_by_domain(given: Floors | None, names: Sequence[str]) -> Floats | None:
    """Return the least proportion of each domain [K], ``dynamic.min_proportion``; domains that are not named have 0.

    Raises:
        ConfigError: A name that is no domain, or floors that sum to more than 1.
    """
    if given is None:
        return None
    floors = per_domain(given, names, _KEY, missing=0.0)
    total = math.fsum(floors)
    if total > 1.0 + _SLACK:
        each = "" if isinstance(given, Mapping) else f" ({given:g} for each of {len(names)} domains)"
        raise ConfigError(f"{_KEY}: the floors sum to {total:.6g}{each}, and proportions to 1; lower them")
    return floors


def apply_min_proportion(proportions: Floats, floors: Floats | None) -> Floats:
    """Return max(floor, s p) [K], with the one s for which the sum is 1; None for no floors.

    Domains below their floors are raised to them at the expense of the others, in proportion.
    Proportions that are not below the floors are returned as they are, bit for bit.
    """
    if floors is None or not (proportions < floors).any():
        return proportions
    if floors.sum() >= 1.0 - _SLACK:
        return np.asarray(floors / floors.sum())
    held, scale = np.zeros(len(floors), dtype=np.bool_), 1.0
    while True:  # s only falls and every iteration holds one more domain: at most K iterations
        low = ~held & (scale * proportions < floors)
        if not low.any():
            break
        held |= low
        scale = (1.0 - floors[held].sum()) / proportions[~held].sum()
    found = np.where(held, floors, scale * proportions)
    return np.asarray(found / found.sum())


COLLAPSED_ABOVE = 0.8
"""Share of one domain above which proportions have collapsed."""


def collapsed(shares: Mapping[str, float]) -> tuple[str, float] | None:
    """Return the one of several domains whose share is above ``COLLAPSED_ABOVE``, and its share, if there is one."""
    name, share = max(shares.items(), key=lambda item: item[1])
    return (name, share) if len(shares) > 1 and share > COLLAPSED_ABOVE else None


# ---- exponentiated updates: weights as logarithms; a weight of zero is minus infinity and stays zero


def logs(proportions: Floats) -> Floats:
    """Return the logarithms of ``proportions`` [K] >= 0, minus infinity where they are 0."""
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(proportions, dtype=np.float64))


def softmax(values: Floats) -> Floats:
    """Return exp(values) divided by its sum [K]; minus infinity becomes 0."""
    shifted = np.exp(values - values.max())
    return np.asarray(shifted / shifted.sum())


def exponentiated(log_weights: Floats, scores: Floats, *, eta: float, smoothing: float = 0.0) -> Floats:
    """Return the logarithms of (1 - c) p' + c u with p' ~ p exp(eta s) and u equal over the domains of weight above 0.

    ``log_weights`` are the logarithms of p [K], at least one of them finite; ``scores`` s [K] are finite where p > 0;
    ``smoothing`` is c.
    """
    inside = np.isfinite(log_weights)
    moved = np.where(inside, log_weights + eta * np.where(inside, scores, 0.0), -np.inf)
    top = moved.max()
    assert np.isfinite(top), "no domain is in the simplex"
    moved = np.asarray(moved - (top + np.log(np.exp(moved - top).sum())))
    if smoothing == 0.0:
        return moved
    equal = inside / inside.sum()  # includes weights that underflowed: smoothing raises them again
    return logs((1.0 - smoothing) * softmax(moved) + smoothing * equal)


def running_mean(mean: Floats, count: int, vector: Floats) -> Floats:
    """Return the mean of ``vector`` and ``count`` others of mean ``mean``, which may be empty if there are none."""
    before = mean if count else np.zeros_like(vector)
    return np.asarray((before * count + vector) / (count + 1))


NO_MORE = 1e-9
"""0.29 x 100 is 29, whatever the last bit of the product says."""


def whole_part(share: float, count: float) -> int:
    """Return the whole part of ``share`` x ``count``, a number above 0."""
    return int(share * count + NO_MORE)


def largest_remainder(total: int, proportions: ArrayLike) -> NDArray[np.int64]:
    """Split ``total`` into whole numbers int64 [K] that follow shares [K] >= 0 of any sum (Hamilton), ties by index.

    Each is within 1 of its exact share; a share of 0 gets nothing. A negative or non-finite share, or none above zero,
    raises ComponentError.
    """
    shares = np.asarray(proportions, dtype=np.float64)
    if not np.isfinite(shares).all() or (shares < 0).any() or not (shares > 0).any():
        raise ComponentError(f"proportions must be finite, >= 0 and not all 0, got {shares.tolist()}")
    mass = float(shares.sum())
    exact = (shares if abs(mass - 1.0) < 1e-12 else shares / mass) * total
    counts = np.floor(exact).astype(np.int64)
    fractions = np.where(shares > 0, exact - counts, -1.0)
    counts[np.argsort(-fractions, kind="stable")[: total - int(counts.sum())]] += 1
    return counts


def carried_counts(
    total: int, shares: NDArray[np.float64], carried: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Split ``total`` by shares [K] that sum to 1 and by what splits before were rounded off (``carried`` [K]).

    Returns the counts int64 [K] and what they are rounded off in turn: a share of 0 carries nothing, and what the
    others carry sums to 0. So the counts of many small splits add up to the shares.
    """
    carried = np.where(shares > 0, carried, 0.0)
    wanted = shares * total + carried - carried.sum() * shares
    counts = largest_remainder(total, np.maximum(wanted, 0.0) if carried.any() else shares)
    return counts, wanted - counts
