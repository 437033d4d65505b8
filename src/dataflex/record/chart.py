"""A chart as data: curves, bars or cells, and a headline that states the finding. A table as data.

The page and the PNG files draw the same charts. Curves are thinned so that a chart has some 1,600 points however long
the run was; the extremes stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from dataflex.record.digest import Curve, Run
from dataflex.record.recorded import spaced
from dataflex.record.text import without_prefix

Json = dict[str, Any]
Points = Sequence[float | None]

MOST_IN_ONE = 8
"""Lines in one panel; more have a panel each."""
PANELS = 24
POINTS = 1600
LISTED = 200


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve, or one bar for each name of its chart."""

    name: str
    y: Points
    x: Points = ()
    look: str = "line"  # "line", "faint", "dashed", "dotted", "points", or "band", from y to high
    colour: int = 0  # of the palette; -1 is grey
    high: Points = ()


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A part of a chart with axes of its own."""

    series: Sequence[Series]
    title: str = ""
    x: str = ""  # label of the x-axis where it is not the chart's
    y: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture."""

    headline: str
    panels: Sequence[Panel] = ()
    kind: str = "lines"  # "lines", "bars" (horizontal, one for each name) or "heat" (names x columns)
    x: str = "optimizer step"
    y: str = ""
    percent: bool = False  # values are shares of one
    names: Sequence[str] = ()
    columns: Sequence[str] = ()
    cells: Sequence[Points] = ()
    spans: Sequence[tuple[int, int]] = ()  # warm-up, in steps
    marks: Sequence[int] = ()  # resumes, in steps
    level: tuple[str, float] | None = None  # a line across

    @property
    def series(self) -> list[Series]:
        """The series of all panels."""
        return [series for panel in self.panels for series in panel.series]


def thin(curve: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Return at most about ``most`` points of a curve: both ends, and the extremes of each stretch of it."""
    if len(curve) <= most:
        return list(curve)
    values = np.array([value for _, value in curve])
    kept = {0, len(curve) - 1}
    for low, high in pairwise(np.linspace(0, len(curve), max(most // 2, 1) + 1).astype(int).tolist()):
        kept |= {low + int(values[low:high].argmin()), low + int(values[low:high].argmax())}
    return [curve[at] for at in sorted(kept)]


def line(name: str, curve: Sequence[tuple[float, float]], colour: int, many: int = 1, look: str = "line") -> Series:
    """Return one curve, thinned to its share of the points of a chart with ``many`` of them."""
    points = thin(curve, max(POINTS // max(many, 1), 40))
    return Series(name=name, x=[x for x, _ in points], y=[y for _, y in points], look=look, colour=colour)


def lines(runs: Sequence[tuple[str, dict[str, Curve]]]) -> list[Panel]:
    """Return one panel of the curves of one run, or a panel for each of more than eight, or of several runs.

    Args:
        runs: Title and curves of each run; those of the first one are shown, the others' of the same names beside them.
    """
    (_, curves), *others = runs
    names = spaced(list(curves), PANELS)
    labels = dict(zip(names, without_prefix(names), strict=True))
    many = len(names) * len(runs)
    if not others and many <= MOST_IN_ONE:
        return [Panel(series=[line(labels[name], curves[name], at, many) for at, name in enumerate(names)])]
    panels = []
    for name in names:
        beside = [(title, found[name], at) for at, (title, found) in enumerate(others, 1) if name in found]
        series = [line(runs[0][0] if others else labels[name], curves[name], 0, many)]
        series += [line(title, curve, at, many) for title, curve, at in beside]
        panels.append(Panel(title=labels[name], series=series))
    return panels


def over_steps(run: Run) -> dict[str, Any]:
    """Return what every chart over steps shows beside its curves."""
    warmup = [(event["start_step"], event["stop_step"]) for event in run.planned if event["kind"] == "warmup"]
    return {"spans": spaced(warmup, 8), "marks": [event["step"] for event in run.resumed[-100:]]}


def corners(
    starts: Sequence[int], stops: Sequence[int], values: Sequence[float | None]
) -> tuple[list[float], list[Any]]:
    """Return the corners of a step curve, broken where steps or values are missing."""
    xs: list[float] = []
    ys: list[float | None] = []
    for start, stop, value in zip(starts, stops, values, strict=True):
        value = None if value is None or not np.isfinite(value) else float(value)
        if xs and xs[-1] != start:
            xs.append(xs[-1])
            ys.append(None)
        xs += [start, stop]
        ys += [value, value]
    return xs, ys


def table(caption: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[Any]], note: str = "") -> Json:
    """Return a table; a column is a name and what is in it.

    That is text, count, number, share, seconds, signed, choice (a text to filter by) or trend (numbers in order).
    """
    names = [{"name": name, "kind": kind} for name, kind in columns]
    left = len(rows) - LISTED
    note = f"{note} The first {LISTED} of {len(rows):,} lines." if left > 0 else note
    return {"caption": caption, "note": note.strip(), "columns": names, "rows": [list(row) for row in rows[:LISTED]]}
