"""Plain text in columns."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence

__all__ = ["columns", "rows_of"]


def columns(table: Sequence[Sequence[str]], indent: int = 2, most: int = 48) -> list[str]:
    """Return the lines of ``table``; cells are wrapped at ``most`` characters and padded to their column."""
    if not table:
        return []
    wrapped = [[textwrap.wrap(cell, most) or [""] for cell in row] for row in table]
    widths = [max(len(line) for cell in column for line in cell) for column in zip(*wrapped, strict=True)]
    lines = []
    for row in wrapped:
        for cells in itertools.zip_longest(*row, fillvalue=""):
            padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
            lines.append((" " * indent + "  ".join(padded)).rstrip())
    return lines


def rows_of(pairs: Sequence[tuple[str, str]], width: int = 20) -> list[str]:
    """Return ``label  text`` lines with a fixed width of labels."""
    return [f"  {label:<{width}} {text}".rstrip() for label, text in pairs]
