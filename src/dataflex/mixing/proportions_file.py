"""The proportions file: names, proportions, the method that made them, and from what.

JSON, so that a person can read and a version control system can compare it. ``mixer: {name: static,
from: FILE}`` takes it. Imports nothing heavy: a configuration is checked with it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dataflex.errors import ConfigError
from dataflex.method import ProportionsFile
from dataflex.printable import redacted

__all__ = ["ProportionsFile", "digest_of", "file_digest", "provenance", "read_proportions", "write_proportions"]

FORMAT = 1
_SUM_TOLERANCE = 1e-6


def write_proportions(path: Path | str, content: ProportionsFile) -> Path:
    """Write a proportions file, whole or not at all, and return its path.

    Raises:
        DataError: The place cannot be written.
        ValueError: The proportions are none (a defect of the caller).
    """
    from dataflex.record.values import plain, replacing

    path = Path(path)
    problem = _numbers_problem(content.names, content.proportions)
    if problem:
        raise ValueError(problem)
    body = {
        "format": FORMAT,
        "method": content.method,
        "names": list(content.names),
        "proportions": [float(share) for share in content.proportions],
        "details": redacted(plain(content.details)),
        "provenance": redacted(plain(content.provenance)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(body, indent=1).encode() + b"\n")
    return path


def read_proportions(path: Path | str, key: str = "from") -> ProportionsFile:
    """Read a proportions file.

    Args:
        path: The file, from the working directory.
        key: What names the file, for messages.

    Raises:
        ConfigError: No such file, not JSON, a key is missing, or the numbers are not proportions.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise ConfigError(f"{key}: {what}: {path} (relative to the working directory {Path.cwd()})")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, OSError) as error:
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
        if isinstance(share, bool) or not isinstance(share, int | float) or not math.isfinite(share) or share < 0:
            return f"the proportion of {name!r} is {share!r}, must be a finite number, 0 or more"
    total = math.fsum(shares)
    return "" if abs(total - 1) < _SUM_TOLERANCE else f"proportions sum to {total:.6g}, must sum to 1"


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value, the same for every order of its keys and whatever its secrets are."""
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
    """Return where a result is from.

    Args:
        command: The command that made it.
        inputs: Files that were read (digested) and folders (named only).
        settings: The method's settings.
        packages: Packages beside dataflex and numpy whose versions matter.
        config_digest: Digest of the configuration that the small runs were made from.
    """
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in ("dataflex", "numpy", *packages)},
        "config_digest": config_digest,
        "inputs": {str(path): file_digest(path) if path.is_file() else None for path in inputs},
        "settings": dict(settings or {}),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
