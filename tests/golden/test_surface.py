"""The public surface is a committed list: changing it is a decision.

Regenerate on purpose with ``DATAFLEX_WRITE_GOLDEN=1 python -m pytest tests/golden``.
"""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import dataflex
from dataflex.method import BatchView, Card, Context, Mix, Passes, Requires, RunFacts, Selection
from dataflex.registry import KINDS, find, names

GOLDEN = Path(__file__).with_name("surface.txt")


def surface() -> list[str]:
    lines = [f"dataflex.{name}" for name in dataflex.__all__]
    for cls in (Selection, Mix, Requires, Passes, RunFacts, Card, Context, BatchView):
        lines += [f"{cls.__name__}.{field.name}" for field in fields(cls)]
    for kind in KINDS:
        for name in names(kind):
            if not find(kind, name).__module__.startswith("dataflex."):
                continue  # a plugin that another test has loaded
            params = fields(find(kind, name).Params)
            lines.append(f"{kind} {name}({', '.join(field.name for field in params)})")
    return lines


def test_public_surface():
    text = "\n".join(surface()) + "\n"
    if os.environ.get("DATAFLEX_WRITE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), "the public surface changed; see this file's first lines"
