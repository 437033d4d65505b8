"""The version, and those of the packages that a result depends on."""

from __future__ import annotations

import platform
from functools import cache

from dataflex.printable import Answer

__version__ = "0.1.0"
DISTRIBUTION = "dataflex-llm"
"""Name under which the package is installed; ``dataflex`` is another project's."""

TESTED = {"llamafactory": ("0.9.5", "0.9.5"), "transformers": ("5.3.0", "5.6.0")}
"""Oldest and newest version that the tests are run with: ``make test-oldest`` and ``make test``."""


def install(extra: str) -> str:
    """Return the command that installs an extra."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


@cache
def version_of(package: str) -> str | None:
    """Return the installed version of a package, or None; ``dataflex`` is ours, whatever else has that name."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and seldom needed

    if package == "dataflex":
        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def untested() -> list[str]:
    """Return a line for each installed package of a version that is older or newer than those tested."""
    from packaging.version import Version

    told = []
    for package, (oldest, newest) in TESTED.items():
        found = version_of(package)
        if found is None or Version(oldest) <= Version(found) <= Version(newest):
            continue
        tested = oldest if oldest == newest else f"{oldest} to {newest}"
        kind = "older" if Version(found) < Version(oldest) else "newer"
        told.append(f"{package} {found} is {kind} than what dataflex {__version__} is tested with: {tested}")
    return told


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    packages = ("dataflex", "llamafactory", "transformers", "torch", "accelerate", "datasets", "peft", "numpy")
    return {package: version_of(package) or "missing" for package in packages}


def version_lines() -> Answer:
    """Return one ``name version`` line for dataflex, Python and the packages that it stands on."""
    packages = {name: version_of(name) or "is not installed" for name in ("llamafactory", "transformers", "torch")}
    found = {"dataflex": __version__, "python": platform.python_version(), **packages}
    lines = [f"{name} {version}" for name, version in found.items()]
    return Answer("\n".join([*lines, *untested()]), {**found, **versions(), "untested": untested()})
