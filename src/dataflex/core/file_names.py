"""Names that stand in files as names of files to be: one part of a path, never a path."""

from __future__ import annotations

import re

from dataflex.core.printable import on_one_line

__all__ = ["MOST_BYTES", "file_name_problem"]

MOST_BYTES = 200
"""Bytes of a name: most file systems take 255, with an ending and what is written aside."""

_FORBIDDEN = re.compile(r'[/\\:*?"<>|]')
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def file_name_problem(name: object) -> str:
    """Return why a text that was read from a file cannot be the name of a file on every system, or an empty text."""
    if not isinstance(name, str):
        return f"is not text but {type(name).__name__}"
    if not name.strip(". "):
        return "is empty, or dots alone"
    if found := _FORBIDDEN.search(name):
        return f"holds {found.group()!r}"
    if on_one_line(name) != name:
        return "holds a control character"
    if name[0] in ".~-" or name[-1] in ". " or name[0] == " ":
        return f"begins or ends with {name[0] if name[0] in '.~- ' else name[-1]!r}"
    if _DEVICES.fullmatch(name):
        return "is the name of a device"
    if len(name.encode()) > MOST_BYTES:
        return f"has {len(name.encode())} bytes, more than {MOST_BYTES}"
    return ""
