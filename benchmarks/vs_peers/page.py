"""Renders what was measured into docs/results.md, between two marks."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs/results.md"
_MARKED = re.compile(r"(<!-- peers -->\n).*?(<!-- end of peers -->)", re.DOTALL)
GOALS = {
    "loss": 2.5,
    "delta_loss": 2.5,
    "less_1024": 15.0,
    "less_4096": 60.0,
    "icons": 15.0,
    "cluster_less": 10.0,
    **dict.fromkeys(("static", "odm", "doremi", "linupper", "kronfluence", "dattri", "bergson"), 1.0),
}
"""How many times as long as ours the other system is meant to take, at least."""
_HEADINGS = (
    "part",
    "rows",
    "theirs, CPU s",
    "ours, CPU s",
    "theirs / ours",
    "goal",
    "peak MB",
    "written MB",
    "agreement",
)


def _pair(found: dict[str, Any], value: Callable[[dict[str, Any]], float], digits: str) -> str:
    both = (statistics.median(value(pair[who]) for pair in found["pairs"]) for who in ("peer", "ours"))
    return " / ".join(format(number, digits) for number in both)


def ratios(found: dict[str, Any]) -> list[float]:
    """Return how many times as long as ours theirs took, by repeat."""
    return [pair["peer"]["cpu"] / pair["ours"]["cpu"] for pair in found["pairs"]]


def row(part: str, found: dict[str, Any]) -> list[str]:
    """Return the cells of a part."""
    each, goal, first = ratios(found), GOALS.get(part), found["pairs"][0]
    ratio = statistics.median(each)
    more = all(pair["ours"]["peak_mb"] > pair["peer"]["peak_mb"] for pair in found["pairs"])
    judged = "" if goal is None else f"{goal:g}, {'met' if ratio >= goal else '**not met**'}"
    agreed = [first[who].get("fidelity") for who in ("peer", "ours")]
    return [
        f"`{part}`",
        f"{found['rows']} + {found['targets']}",
        _pair(found, lambda one: one["cpu"], ".2f").split(" / ")[0],
        _pair(found, lambda one: one["cpu"], ".2f").split(" / ")[1],
        f"{ratio:.2f} ({min(each):.2f} to {max(each):.2f})",
        judged,
        _pair(found, lambda one: one["peak_mb"], ".0f") + (" **more**" if more else ""),
        _pair(found, lambda one: one["disk_mb"], ".1f"),
        " / ".join("" if one is None else f"{one['spearman']:.3f}" for one in agreed) if any(agreed) else "",
    ]


def table(results: dict[str, Any]) -> str:
    """Return the table of the parts that were measured, by name, and what they were measured on."""
    whole = {}
    for part, found in results.items():
        if pairs := [pair for pair in found["pairs"] if len(pair) == 2]:
            whole[part] = found | {"pairs": pairs}
    lines = [f"| {' | '.join(_HEADINGS)} |", "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |"]
    lines += [f"| {' | '.join(row(*each))} |" for each in whole.items()]
    told = []
    for machine in {json.dumps(found["machine"]): found["machine"] for found in whole.values()}.values():
        versions = ", ".join(f"{key} {value}" for key, value in machine.items() if key != "processor")
        told.append(f"{machine['processor']}, {versions}")
    many = " or ".join(map(str, sorted({len(found["pairs"]) for found in whole.values()})))
    how = "One repeat" if many == "1" else f"Medians of {many} repeats"
    return "\n".join([*lines, "", f"{how}; {'; '.join(told)}."])


def rendered(page: str, results: dict[str, Any]) -> str:
    """Return the page with the table between its marks; ValueError for a page without them."""
    if not _MARKED.search(page):
        raise ValueError("the page has no marks '<!-- peers -->' and '<!-- end of peers -->'")
    return _MARKED.sub(lambda found: f"{found[1]}{table(results)}\n{found[2]}", page)
