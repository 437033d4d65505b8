"""Renders what the suites came to into docs/results.md, between the marks of each; what was not run says so.

By hand: python evidence/render.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/results.md"
_MARKED = re.compile(r"(<!-- suite (\w+) -->\n).*?(<!-- end of suite -->)", re.DOTALL)


def rendered(page: str, runs: Path) -> str:
    """Return the page with the results that lie in ``runs``; a suite without any keeps its text."""

    def table(found: re.Match[str]) -> str:
        results = runs / found[2] / "results.md"
        if not results.is_file():
            return found[0]
        text = re.sub(r"(?m)^### .*\n+", "", results.read_text(encoding="utf-8"), count=1).strip()
        return f"{found[1]}{text}\n{found[3]}"

    return _MARKED.sub(table, page)


def main() -> int:
    """Render the page."""
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), Path("runs/compare")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
