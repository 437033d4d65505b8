"""Starts the commands, unless another package answers to the import name ``dataflex``.

The distribution ``dataflex`` on PyPI (OpenDCAI's) is another project whose files go by the same import name. Beside
ours in one folder they replace some of ours, ``cli.py`` among them; in another folder, the one that is searched first
hides the other. So this module lies outside of the package and imports nothing of it before it has looked.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.metadata import Distribution

OURS, THEIRS = "dataflex-llm", "dataflex"
_FAILED, _MISTAKE = 1, 2
_AGAIN = f"pip install --force-reinstall --no-deps {OURS}"
_HOME = Path(__file__).resolve().parent


def main() -> int:
    """Run the command that the process's arguments name, and return its exit code."""
    try:
        run = _command()
    except KeyboardInterrupt:  # numpy is imported until then
        sys.stderr.write("dataflex: interrupted\n")
        return _FAILED
    return _MISTAKE if run is None else run()


def _command() -> Callable[[], int] | None:
    """Return what runs the command, or tell why there is none."""
    told, is_theirs = other_package()
    if told and (is_theirs or os.environ.get("RANK", "0") == "0"):
        sys.stderr.write(f"dataflex: {'' if is_theirs else 'warning: '}{told}\n")
    if is_theirs:
        return None
    from dataflex.cli import main as run

    return run


def other_package() -> tuple[str, bool]:
    """Return a line about another package of our import name, or an empty one; and whether its files are imported."""
    theirs, spec = _installed(THEIRS), importlib.util.find_spec("dataflex")
    ours, found = _HOME / "dataflex", _HOME / "dataflex"
    if theirs is None and not ((ours / "__init__.py").is_file() and (ours / "cli.py").is_file()):
        return f"files of {OURS} are missing in {ours}, as uninstalling another 'dataflex' leaves it: {_AGAIN}", True
    if spec is not None and spec.origin is not None:
        found = Path(spec.origin).resolve().parent
    if theirs is None and found == ours:
        return "", False
    name = "another package" if theirs is None else f"PyPI's 'dataflex' {theirs.version}, which is another project's,"
    if found != ours:
        mend = "Take its folder from PYTHONPATH" if theirs is None else "Uninstall it: pip uninstall dataflex"
        return f"'import dataflex' finds {name} in {found}, before {OURS} in {ours}. {mend}.", True
    assert theirs is not None
    mend = "pip uninstall dataflex"
    replaced: list[str] = []
    if Path(str(theirs.locate_file("dataflex"))).resolve() == ours:
        replaced = _replaced(theirs)
        mend += f" && {_AGAIN}"  # uninstalling it takes files of ours away
    wins = f"Its files replace {len(replaced)} of {OURS}, such as {replaced[0]}" if replaced else "Ours are imported"
    return f"{name} is installed too, with the same import name. {wins}: {ours}. Uninstall it: {mend}", bool(replaced)


def _installed(name: str) -> Distribution | None:
    begins = f"{name.replace('-', '_')}-"
    for folder in sys.path:
        with suppress(OSError):
            if any(each.startswith(begins) and each.endswith(".dist-info") for each in os.listdir(folder or ".")):
                from importlib.metadata import distribution  # slow to import, and seldom needed

                return distribution(name)
    return None


def _replaced(theirs: Distribution) -> list[str]:
    """Return our files that another distribution of the same folder has, where they are not as we installed them."""
    import base64
    import hashlib

    mine = _installed(OURS)
    known = {str(file): file.hash for file in (mine.files if mine is not None else None) or ()}
    other = {str(file): file.hash for file in theirs.files or ()}
    changed = []
    for name in known.keys() & other.keys():
        hashed, file = known[name], _HOME / name
        if hashed is None or not name.startswith("dataflex/") or not file.is_file():
            continue
        digest = base64.urlsafe_b64encode(hashlib.new(hashed.mode, file.read_bytes()).digest()).decode()
        if digest.rstrip("=") != hashed.value:
            changed.append(name)
    return sorted(changed)
