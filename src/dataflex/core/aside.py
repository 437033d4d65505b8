"""Files that are written beside their place and renamed: how they are named, and what kills left of them.

The name of such a file tells the machine and the process that write it. One whose process is gone was left
by a kill, and the next writer of the same file takes it away. A folder of one run alone is cleared of all
of them when the run begins.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import zlib
from pathlib import Path

__all__ = ["aside", "clear_left", "is_left", "is_unfinished", "owner"]

_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_OWNED = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)(\.|$)")
_LEFT = re.compile(r"\..+(\.tmp|\.new-aside|\.old-aside|\.[0-9a-f]{8}\.(npy|ready))")


def owner() -> str:
    """Return the part of a name that tells this machine and process."""
    return f"{_HOST}-{os.getpid()}"


def aside(path: Path) -> Path:
    """Return the name under which ``path`` is written before it is renamed; leftovers of the same file go."""
    path = Path(path)
    with os.scandir(path.parent) as entries:
        left = [entry.path for entry in entries if entry.name.startswith(f".{path.name}.") and is_left(entry.name)]
    for name in left:
        Path(name).unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{owner()}.tmp")


def is_left(name: str) -> bool:
    """Whether a name is that of something unfinished whose process on this machine is gone."""
    owned = _OWNED.match(name)
    if owned is None or owned[1] != _HOST or int(owned[2]) == os.getpid():
        return False
    try:
        os.kill(int(owned[2]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def is_unfinished(name: str) -> bool:
    """Whether a name is one that we give to what is not finished, whoever writes it."""
    return _LEFT.fullmatch(name) is not None


def clear_left(folder: Path) -> None:
    """Remove everything unfinished below a folder that nobody else writes into."""
    for path in sorted(Path(folder).rglob(".*")):
        if is_unfinished(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
