"""The pages of the project as text, and what is taken out of them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *EXAMPLES.rglob("*.md")])
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language):
    """Return page and content of every fenced block in a language."""
    return [(page, code) for page, text in TEXTS.items() for kind, code in BLOCK.findall(text) if kind == language]


def prose(text):
    """Return a page without its fenced blocks."""
    return BLOCK.sub("", text)
