"""What the steps of ``dataflex mix`` share: names, numbers and paths in options, and the file that they write."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.errors import ConfigError, did_you_mean
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import ProportionsFile, collapsed, read_proportions, write_proportions
from dataflex.printable import Answer
from dataflex.record.text import columns
from dataflex.storage import place_problem

KEPT = "kept"
"""Name of the virtual domain of ``mix swarm --reuse``, which stands for all that are kept."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A point [K] on the simplex where a convex objective is at most ``gap`` above its minimum."""

    proportions: Floats
    value: float
    gap: float
    steps: int


def given(options: argparse.Namespace, *keys: str) -> dict[str, Any]:
    """Return some options by name."""
    return {key: getattr(options, key) for key in keys}


def by_name(text: str, key: str, expected: str, *, last: bool = False) -> dict[str, str]:
    """Return the value ``web=A,code=B`` of an option as a mapping; ``last``: the last ``=`` divides an entry."""
    found: dict[str, str] = {}
    for entry in text.split(","):
        name, _, value = (part.strip() for part in (entry.rpartition("=") if last else entry.partition("=")))
        if not name or not value:
            raise ConfigError(f"{key}: {entry.strip()!r} is not {expected}")
        if name in found:
            raise ConfigError(f"{key}: {name} is there twice")
        found[name] = value
    return found


def numbers_by_name(text: str, key: str) -> dict[str, float]:
    """Return ``web=9,code=1`` as a mapping to finite numbers of at least 0; ``ConfigError`` for anything else."""
    expected = "name=number with a number of at least 0"
    numbers: dict[str, float] = {}
    for name, text_of_number in by_name(text, key, expected, last=True).items():
        try:
            numbers[name] = float(text_of_number)
        except ValueError:
            numbers[name] = math.nan
        if not 0 <= numbers[name] < math.inf:
            raise ConfigError(f"{key}: {f'{name}={text_of_number}'!r} is not {expected}")
    return numbers


def check_names(key: str, found: Collection[str], names: Sequence[str], *, every: bool) -> None:
    """Raise ``ConfigError`` unless all of ``found`` are domains and, with ``every``, no domain is missing."""
    problems = [f"{key}: {name}: no such domain{did_you_mean(name, names)}" for name in found if name not in names]
    problems += [f"{key}: {name}: missing" for name in names if every and name not in found]
    if problems:
        raise ConfigError([f"{problem} (domains: {', '.join(names)})" for problem in problems])


def check_out(path: Path) -> None:
    """Raise ``ConfigError`` where no proportions can be written, or something else would be replaced."""
    if told := place_problem(path):
        raise ConfigError(f"--out: {told}")
    if os.path.lexists(path):
        try:
            read_proportions(path, "--out")
        except ConfigError as error:
            raise ConfigError(f"--out: {path} is there and holds no proportions; name another file") from error


def check_effective(options: argparse.Namespace, instead: str, *keys: str) -> None:
    """Raise ``ConfigError`` for options that ``instead`` makes superfluous; None means that one was not given."""
    flags = [f"--{key.replace('_', '-')}" for key in keys if getattr(options, key) is not None]
    if flags:
        raise ConfigError([f"{flag}: has no effect with {instead}; remove one of the two" for flag in flags])


def fill_in(options: argparse.Namespace, **defaults: Any) -> None:
    """Set what was not given."""
    for key, value in defaults.items():
        if getattr(options, key) is None:
            setattr(options, key, value)


def write_result(
    path: Path,
    names: Sequence[str],
    shares: Floats,
    *,
    method: str,
    source: dict[str, Any],
    details: dict[str, Any],
    natural: Floats | None = None,
    caps: Floats | None = None,
) -> Answer:
    """Write proportions [K] of domains [K] and return what to print, with natural shares [K] and caps [K]."""
    check_out(path)
    content = ProportionsFile(
        names=tuple(names), proportions=tuple(shares.tolist()), method=method, provenance=source, details=details
    )
    write_proportions(path, content)
    table = [["domain", "proportion", *(["natural"] if natural is not None else []), ""]]
    for k in np.argsort(-shares, kind="stable"):
        at_cap = "at its cap" if caps is not None and caps[k] < 1 and shares[k] >= caps[k] - 1e-9 else ""
        table.append([names[k], f"{shares[k]:.4f}", *([f"{natural[k]:.4f}"] if natural is not None else []), at_cap])
    use = f"use it with 'mixer: {{name: static, from: {path}}}'"
    if KEPT in names:
        use = f"carry it over with 'dataflex mix reuse OLD --shares {path}', OLD what 'swarm --reuse' had"
    lines = [f"{method}: written: {path}", f"  {use}", *columns(table)]
    most = collapsed(content.by_name)
    if most is not None:
        lines.append(f"warning: {most[0]} has {most[1]:.1%} of the proportions, and the others are hardly served")
    return Answer("\n".join(lines), {"out": path, "method": method, "proportions": content.by_name, "details": details})
