"""The one place of the version, and those of the packages that a result depends on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__", "versions"]

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    found = {"dataflex": __version__}
    for package in ("llamafactory", "transformers", "torch", "accelerate", "datasets", "peft", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found
