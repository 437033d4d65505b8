"""Data as text that a terminal, a log or a picture can show: control characters are written out, not sent."""

from __future__ import annotations

import re

__all__ = ["on_one_line", "printable"]

# C0 and C1 controls and DEL, marks that turn the direction of what follows, line separators, lone surrogates.
_CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
_UNSAFE = re.compile(f"[{_CONTROLS}\U000e0000-\U000e007f]")


def printable(text: str) -> str:
    """Return ``text`` with control characters as escapes of Python's; line ends and tabs stay."""
    return _UNSAFE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def on_one_line(text: str) -> str:
    """Return ``text`` as ``printable`` does, line ends and tabs written out too: for data inside a message."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")
