"""Renders the results of ``python -m benchmarks.gpu`` as a Markdown page."""

from __future__ import annotations

from typing import Any

COMMAND = "python -m benchmarks.gpu"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def page(results: dict[str, Any]) -> str:
    """Return the page of some results."""
    hardware = results["hardware"]
    lines = ["# Results on a GPU", ""]
    if results["scale"] != "full":
        lines += ["**Toy models: these numbers show that the checks work, and say nothing about speed.**", ""]
    lines += [f"One run of `{COMMAND}`, random weights.", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in hardware.items()]
    for check in results["checks"]:
        state = {True: "met", False: "**not met**", None: "-"}[check["passed"]]
        lines += ["", f"## {check['name'].replace('_', ' ')}", ""]
        lines += [line for line in (check.get("what", ""), "") if check.get("what")]
        if check["problem"]:
            lines += [check["problem"], ""]
        if check["goal"]:
            lines += [f"Goal: {check['goal']} {state if not check['problem'] else ''}".rstrip(), ""]
        if check["values"]:
            lines += ["| what | measured |", "| --- | ---: |"]
            lines += [f"| {name} | {_shown(value)} |" for name, value in check["values"].items()]
    return "\n".join(lines).rstrip() + "\n"
