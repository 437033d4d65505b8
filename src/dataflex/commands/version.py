"""``dataflex version``: which versions work together here, without importing any of them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

from dataflex.version import __version__

__all__ = ["version"]

_PACKAGES = ("llamafactory", "transformers", "torch")


def version() -> str:
    """Return one ``name version`` line for dataflex, Python and the packages that it stands on."""
    lines = [f"dataflex {__version__}", f"python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            lines.append(f"{package} {installed(package)}")
        except PackageNotFoundError:
            lines.append(f"{package} is not installed")
    return "\n".join(lines)
