"""The version, and those of the packages that a result depends on."""

from __future__ import annotations

import platform

__version__ = "0.1.0"


def version_of(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and seldom needed

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    packages = ("llamafactory", "transformers", "torch", "accelerate", "datasets", "peft", "numpy")
    return {"dataflex": __version__, **{package: version_of(package) or "missing" for package in packages}}


def version_lines() -> str:
    """Return one ``name version`` line for dataflex, Python and the packages that it stands on."""
    lines = [f"dataflex {__version__}", f"python {platform.python_version()}"]
    for package in ("llamafactory", "transformers", "torch"):
        lines.append(f"{package} {version_of(package) or 'is not installed'}")
    return "\n".join(lines)
