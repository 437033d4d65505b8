"""What the steps of ``dataflex mix`` share: names in options, and a result written and printed."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.commands.layout import columns
from dataflex.errors import ConfigError, did_you_mean
from dataflex.mixers.collapse import collapsed
from dataflex.mixing.proportions_file import ProportionsFile, read_proportions, write_proportions

__all__ = ["check_names", "names_of", "write_result"]

Floats = NDArray[np.float64]


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
) -> list[str]:
    """Write a proportions file and return what to print about it.

    Args:
        path: The file.
        names: Domains [K].
        shares: Their proportions [K].
        method: What made them.
        source: Where they are from.
        details: Numbers of the method.
        natural: Natural shares to show beside them [K].
        caps: Largest shares that were allowed [K].

    Raises:
        ConfigError: Something else than proportions lies there.
    """
    if os.path.lexists(path):
        try:
            read_proportions(path, "--out")
        except ConfigError as error:
            raise ConfigError(f"--out: {path} is there and holds no proportions; name another file") from error
    content = ProportionsFile(
        names=tuple(names), proportions=tuple(shares.tolist()), method=method, provenance=source, details=details
    )
    write_proportions(path, content)
    table = [["domain", "proportion", *(["natural"] if natural is not None else []), ""]]
    for k in np.argsort(-shares, kind="stable"):
        at_cap = "at its cap" if caps is not None and caps[k] < 1 and shares[k] >= caps[k] - 1e-9 else ""
        table.append([names[k], f"{shares[k]:.4f}", *([f"{natural[k]:.4f}"] if natural is not None else []), at_cap])
    lines = [f"{method}: written: {path}", f"  use it with 'mixer: {{name: static, from: {path}}}'", *columns(table)]
    most = collapsed(content.by_name)
    if most is not None:
        lines.append(f"warning: {most[0]} has {most[1]:.1%} of the proportions, and the others are hardly served")
    return lines


def check_names(key: str, given: Collection[str], names: Sequence[str], *, every: bool) -> None:
    """Raise unless all of ``given`` are among ``names`` and, with ``every``, the other way round.

    Raises:
        ConfigError: All names that are not, with the nearest spelling.
    """
    problems = [f"{key}: {name}: no such domain{did_you_mean(name, names)}" for name in given if name not in names]
    problems += [f"{key}: {name}: missing" for name in names if every and name not in given]
    if problems:
        raise ConfigError([f"{problem} (domains: {', '.join(names)})" for problem in problems])


def names_of(text: str | None) -> list[str]:
    """Return the names in a text with commas."""
    return [name.strip() for name in text.split(",") if name.strip()] if text else []
