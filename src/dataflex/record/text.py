"""Plain text for terminals: numbers without locale, columns that count wide characters as two."""

from __future__ import annotations

import itertools
import re
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import Any

from dataflex.printable import printable

WIDTH = 100
"""Columns of a report's text."""
_MOST_READ = 4096  # characters that are looked at of a text to be cut


def width(text: str) -> int:
    """Terminal columns that ``text`` takes."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def cut(text: str, columns: int) -> str:
    """Shorten ``text`` to at most ``columns`` columns, ``..`` where it was cut; control characters are escaped."""
    text = printable(" ".join(text[:_MOST_READ].split()))
    if len(text) <= _MOST_READ and width(text) <= columns:
        return text
    kept, room = [], columns - 2
    for char in text[:_MOST_READ]:
        room -= width(char)
        if room < 0:
            break
        kept.append(char)
    return "".join(kept) + ".."


def middle(text: str, columns: int) -> str:
    """Shorten ``text`` to at most ``columns`` columns as ``cut`` does, but in its middle."""
    whole = cut(text, _MOST_READ)
    if width(whole) <= columns:
        return whole
    half = (columns - 2) // 2
    return cut(whole, columns - half).removesuffix("..") + ".." + cut(whole[::-1], half + 2).removesuffix("..")[::-1]


def without_prefix(names: Sequence[str], signs: str = "/_-.") -> list[str]:
    """Return the names without what all of them begin with, up to the last of ``signs`` in it; "3.1" stays whole."""
    if len(names) < 2:
        return list(names)
    first, last = min(names), max(names)
    alike = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    whole = {at for at in range(1, alike) if all(re.fullmatch(r"\d\.\d", name[at - 1 : at + 2]) for name in names)}
    length = max((at + 1 for at in range(alike) if first[at] in signs and at not in whole), default=0)
    return [name[length:] or name for name in names]


def number(value: float | None, digits: int = 4) -> str:
    """Write a number with fixed digits, or three significant ones where those would hide it; ``-`` for None."""
    if value is None:
        return "-"
    if value and not 10.0 ** (1 - digits) <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.{digits}f}"


def signed(value: float, digits: int = 4) -> str:
    """Write a number with its sign."""
    return f"{'-' if value < 0 else '+'}{number(abs(value), digits)}"


def percent(share: float, digits: int = 1) -> str:
    """Write a share of one as a percentage."""
    return f"{100 * share:.{digits}f} %"


def duration(seconds: float) -> str:
    """Write seconds as ``12.3 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def short(value: Any) -> str:
    """Write a setting's value on one line: ``[item, item]``, ``{key: value}``, ``true``, ``null``."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {short(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(short(item) for item in value) + "]"
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    return str(value)


def labelled(label: str, items: Sequence[str], indent: int = 12) -> list[str]:
    """Return ``label`` and its items, separated by commas, broken between items at ``WIDTH``."""
    room = WIDTH - indent
    lines: list[str] = []
    for item in items:
        piece = cut(item, room - 1)
        if lines and width(lines[-1]) + width(piece) + 3 <= room:
            lines[-1] += f", {piece}"
        else:
            lines = [*lines[:-1], *(f"{line}," for line in lines[-1:]), piece]
    return [f"{label if not at else '':<{indent}}{line}" for at, line in enumerate(lines)]


def table(rows: Sequence[Sequence[str]], align: str, indent: int = 2) -> list[str]:
    """Return rows of cells as aligned lines; ``align`` has one letter a column: ``<`` left, ``>`` right."""
    columns = [max(map(width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        blanks = [" " * (column - width(cell)) for cell, column in zip(row, columns, strict=True)]
        cells = [
            cell + blank if side == "<" else blank + cell for cell, blank, side in zip(row, blanks, align, strict=True)
        ]
        lines.append((" " * indent + "  ".join(cells)).rstrip())
    return lines


def columns(rows: Sequence[Sequence[str]], indent: int = 2, most: int = 48) -> list[str]:
    """Return rows of cells as lines aligned to the left; cells are wrapped at ``most`` characters."""
    wrapped = [[textwrap.wrap(cell, most) or [""] for cell in row] for row in rows]
    lines = [cells for row in wrapped for cells in itertools.zip_longest(*row, fillvalue="")]
    return table(lines, "<" * len(lines[0]), indent) if lines else []


def rows_of(pairs: Sequence[tuple[str, str]], width: int = 20) -> list[str]:
    """Return ``label  text`` lines with a fixed width of labels."""
    return [f"  {label:<{width}} {text}".rstrip() for label, text in pairs]
