"""Tells what a suite came to: as JSON, as Markdown, and as a page in the manner of ``dataflex report``."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.compare.results import HELD, Results, better
from dataflex.config.mappings import as_yaml
from dataflex.printable import printable, redacted
from dataflex.record.chart import Chart, Panel, Series
from dataflex.record.sections import clean, table
from dataflex.record.text import duration, number, percent, signed
from dataflex.state import replacing
from dataflex.version import __version__

FORMAT = 1
_EXACT = 17  # digits that give every number back
DATA, TEXT, PAGE = "results.json", "results.md", "report.html"
_SCALES = {
    "steps": "optimizer step",
    "tokens": "tokens served",
    "compute": "compute with decisions",
    "seconds": "seconds",
}
_HOW = (
    "Differences are those of the arm to the baseline, paired by seed; interval: 95 %, bootstrap over seeds (below "
    "five the t-interval); p: paired t-test, two-sided; Holm: p corrected for the number of arms."
)
_UNIT = "forward passes of one token; a backward pass counts 2, or 1 where adapters alone are trained"


def results_of(results: Results) -> dict[str, Any]:
    """Return everything that is said of a suite, as JSON values."""
    suite = results.suite
    notes = [*suite.notes, *results.changed, *dict.fromkeys([*results.unlike(), *results.left_out()])]
    if suite.lengths != (suite.steps,) and not suite.constant:
        notes.append(
            f"the learning rate depends on the number of steps: at equal compute {suite.baseline} is taken between the "
            f"ends of its runs of {', '.join(map(str, suite.lengths))} steps, and not from within one of them"
        )
    runs = []
    for (arm, steps, seed), each in results.outcomes.items():
        told = {
            "arm": arm,
            "steps": steps,
            "seed": seed,
            "folder": str(each.job.folder),
            "config": str(each.job.config),
        }
        told["command"] = each.job.line(["train", str(each.job.config)])
        runs.append({**told, "metrics": dict(each.metrics), "compute": each.compute, "passes": dict(each.passes)})
    every = [results.compared(metric, at) for metric in results.metrics for at in ("steps", "compute")]
    short = dict.fromkeys(line["note"] for lines in every for line in lines if line.get("note"))
    notes += [f"not compared at equal compute, {note}; name longer baseline_steps" for note in short]
    found = {
        "format": FORMAT,
        "dataflex": __version__,
        "suite": suite.settings.suite,
        "about": suite.settings.about,
        "command": shlex.join(["dataflex", "compare", str(suite.path), *suite.overrides]),
        "baseline": suite.baseline,
        "steps": suite.steps,
        "baseline_steps": list(suite.lengths),
        "seeds": list(suite.seeds),
        "arms": {name: redacted(patch) for name, patch in suite.arms.items()},
        "claims": results.judged(),
        "compared": [line for lines in every for line in lines],
        "costs": results.costs(),
        "notes": notes,
        "missing": results.missing,
        "runs": runs,
    }
    cleaned: dict[str, Any] = clean(json.loads(json.dumps(found, default=str)), _EXACT)
    return cleaned


def write_results(results: Results, folder: Path) -> dict[str, Any]:
    """Write JSON, Markdown, the page and its pictures into a folder; return what the JSON says."""
    from dataflex.record.page import page
    from dataflex.record.plots import draw

    found = results_of(results)
    made = charts(results)
    told = clean(_page(results, found, made))
    contents = {
        DATA: (json.dumps(found, indent=1, allow_nan=False) + "\n").encode(),
        TEXT: markdown(found).encode("utf-8", "backslashreplace"),
        PAGE: page(told, made).encode("utf-8", "backslashreplace"),
        **draw(made),
    }
    for name, content in contents.items():
        with replacing(folder / name) as file:
            file.write(content)
    return found


# -- tables -----------------------------------------------------------------------------------------------------------


def _interval(line: Mapping[str, Any]) -> str:
    return "-" if line.get("low") is None else f"{signed(line['low'])} to {signed(line['high'])}"


def _p(value: float | None) -> str:
    return "-" if value is None else "< .001" if value < 0.001 else f"{value:.3f}"


def _claims_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["claim", "verdict", "difference", "95 % interval", "p (Holm)", "seeds", "why"]
    rows = []
    for line in found["claims"]:
        by = f" by {line['by']:g}" if line["by"] else ""
        if line["by"] < 0:
            by = f", or worse by less than {-line['by']:g}"
        told = f"{line['claim']} ({line['metric']} of {line['arm']} {line['better']} than of {line['than']}{by}, "
        told += f"at equal {line['at']})"
        gap = "-" if line["difference"] is None else signed(line["difference"])
        rows.append([told, line["verdict"].upper() if line["verdict"] != HELD else HELD, gap, _interval(line)])
        rows[-1] += [_p(line["p_holm"]), str(line["pairs"]), line["why"]]
    return head, rows


def _compared_rows(found: Mapping[str, Any], metric: str, at: str) -> tuple[list[str], list[list[str]]]:
    base = found["baseline"]
    head = ["arm", "seeds", "mean", "sd", f"{base} there", "difference", "95 % interval", "p", "Holm"]
    rows = []
    for line in found["compared"]:
        if (line["metric"], line["at"]) != (metric, at):
            continue
        row = [line["arm"], str(line["runs"]), number(line["mean"]), number(line["sd"])]
        if line["arm"] == base:
            rows.append([*row, "", "", "", "", ""])
        elif not line["pairs"]:
            rows.append([*row, line["note"] or "no pair", "", "", "", ""])
        else:
            there = number(line["other"]) + (f" ({line['pairs']} seeds)" if line["pairs"] < line["runs"] else "")
            row += [there, signed(line["difference"]), _interval(line), _p(line["p"]), _p(line["p_holm"])]
            rows.append(row)
    return head, rows


def _cost_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["arm", "steps", "runs", "tokens", "F (tokens)", "B (tokens)", "compute", "times baseline", "of it deciding"]
    head += ["seconds"]
    rows = []
    for line in found["costs"]:
        counts = [f"{line[key]:,.0f}" if line[key] is not None else "-" for key in ("tokens", "forward", "backward")]
        row = [line["arm"], f"{line['steps']:,}", str(line["runs"]), *counts, f"{line['compute']:,.0f}"]
        row += ["-" if line["times"] is None else f"{line['times']:.2f}"]
        row += ["-" if line["deciding"] is None else percent(line["deciding"])]
        rows.append([*row, "-" if line["seconds"] is None else duration(line["seconds"])])
    return head, rows


def _shown(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return metric and scale of each table that has a value."""
    pairs = dict.fromkeys((line["metric"], line["at"]) for line in found["compared"] if line["mean"] is not None)
    reached = {(line["metric"], line["at"]) for line in found["compared"] if line.get("pairs")}
    return [pair for pair in pairs if pair[1] == "steps" or pair in reached]


def _caption(found: Mapping[str, Any], metric: str, at: str) -> str:
    when = f"after {found['steps']:,} steps"
    if at == "compute":
        when += f", {found['baseline']} at the same compute (decisions included)"
    return f"{metric} ({better(metric)} is better), {when}"


def markdown(found: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [f"### {found['suite']}", ""]
    lines += [found["about"], ""] if found["about"] else []
    lines += [f"`{found['command']}`: {len(found['arms'])} arms, seeds {', '.join(map(str, found['seeds']))}.", ""]
    if found["claims"]:
        lines += [*_table(*_claims_rows(found)), ""]
    for metric, at in _shown(found):
        lines += [f"{_caption(found, metric, at)}:", "", *_table(*_compared_rows(found, metric, at)), ""]
    lines += [_HOW, ""]
    if found["costs"]:
        lines += [f"Cost, means over seeds (compute: {_UNIT}):", "", *_table(*_cost_rows(found)), ""]
    for title, key in (("Missing", "missing"), ("To be known", "notes")):
        if found[key]:
            lines += [f"{title}:", "", *(f"- {line}" for line in found[key]), ""]
    return printable("\n".join(lines))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(head), "| --- |" + " ---: |" * (len(head) - 1), *map(line, rows)]


# -- the page ---------------------------------------------------------------------------------------------------------


def charts(results: Results) -> dict[str, Chart]:
    """Return a chart for each metric that is evaluated during training: its mean over seeds, against what was spent."""
    found: dict[str, Chart] = {}
    for metric in results.metrics:
        panels = [panel for scale, label in _SCALES.items() if (panel := _panel(results, metric, scale, label)).series]
        if panels:
            told = f"{metric} of each arm, mean over seeds; {results.suite.baseline} dashed where it trains for longer"
            found[f"curves_{len(found)}"] = Chart(headline=told, y=metric, panels=panels)
    return found


def _panel(results: Results, metric: str, scale: str, label: str) -> Panel:
    series, suite = [], results.suite
    for arm, steps in dict.fromkeys((run.arm, run.steps) for run in suite.runs):
        curves = [
            curve
            for (name, length, _), each in results.outcomes.items()
            if (name, length) == (arm, steps) and (curve := each.over(metric, scale))
        ]
        size = min(map(len, curves), default=0)
        if not size:
            continue
        points = np.array([curve[:size] for curve in curves])  # [seeds, evaluations, 2]
        xs, ys = points.mean(axis=0).T.tolist()
        longer = steps != suite.steps
        name = f"{arm} ({steps} steps)" if longer else arm
        look = "dashed" if longer else "points" if size < 2 else "line"
        series.append(Series(name=name, x=xs, y=ys, look=look, colour=list(suite.arms).index(arm)))
    return Panel(title=f"at equal {scale}", x=label, y=metric, series=series)


def _page(results: Results, found: Mapping[str, Any], made: Mapping[str, Chart]) -> dict[str, Any]:
    """Return what the page says."""

    def section(key: str, title: str, **content: Any) -> dict[str, Any]:
        return {"id": key, "title": title, "notes": [], "charts": [], "tables": [], "texts": [], **content}

    def told(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> dict[str, Any]:
        return table(caption, [(name, "text") for name in head], rows, note)

    verdicts = [f"{line['verdict']}: {line['claim']}" for line in found["claims"]]
    main = [told(_caption(found, *pair), *_compared_rows(found, *pair)) for pair in _shown(found)]
    plots = [{"key": key, **asdict(chart)} for key, chart in made.items()]
    traces = [
        [each["arm"], str(each["steps"]), str(each["seed"]), each["folder"], each["command"]]
        + [number(each["metrics"].get(metric)) for metric in results.metrics]
        for each in found["runs"]
    ]
    trace_head = ["arm", "steps", "seed", "folder", "command", *results.metrics]
    arms = [{"title": name, "text": as_yaml(patch) if patch else "the base"} for name, patch in found["arms"].items()]
    base = next(iter(results.suite.runs))
    sections = [
        section("claims", "Claims fixed beforehand", tables=[told("Verdicts", *_claims_rows(found))]),
        section("results", "Results", charts=plots, tables=main, notes=[_HOW]),
        section("cost", "Cost", notes=[f"Compute: {_UNIT}."], tables=[told("Means over seeds", *_cost_rows(found))]),
        section("warnings", "To be known", notes=found["notes"] or ["Nothing."]),
        section("traces", "Runs", tables=[told("Where each figure is from", trace_head, traces)]),
        section("repeat", "How to repeat it", notes=[found["command"]], texts=arms),
    ]
    sections[-1]["texts"].append({"title": f"Configuration of {base.title}", "text": as_yaml(redacted(base.mapping))})
    return {
        "format": FORMAT,
        "dataflex": __version__,
        "title": f"suite {found['suite']}",
        "runs": _identities(results),
        "sentences": [sentence for sentence in (found["about"], *verdicts) if sentence] or ["No claim was fixed."],
        "missing": found["missing"],
        "sections": sections if found["claims"] else sections[1:],
    }


def _identities(results: Results) -> list[dict[str, Any]]:
    identities = []
    for arm in results.suite.arms:
        mine = [each for key, each in results.outcomes.items() if key[:2] == (arm, results.suite.steps)]
        methods = {kind: name for each in mine[:1] for kind, (name, _) in each.run.methods.items()}
        done = round(statistics.fmean(each.run.steps_done for each in mine)) if mine else 0
        whole = len(mine) == len(results.suite.seeds)
        told = {"title": f"{arm} ({len(mine)} of {len(results.suite.seeds)} seeds)", "methods": methods}
        identities.append({**told, "finished": whole, "steps": done, "total_steps": results.suite.steps})
    return identities
