"""Draws charts as PNG files with matplotlib."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from dataflex.record.chart import Chart, Panel, Points, Series
from dataflex.record.text import middle, number, percent

COLOURS = ("#0072B2", "#C77F00", "#009E73", "#C0659A", "#3A97CF", "#D55E00", "#8674C0", "#8C8000")
"""Safe for colour blindness, after Okabe and Ito, and dark enough for white and light enough for black paper."""
GREY, DARK = "#999999", "#333333"
_OTHER_SCRIPTS = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "SimHei", "Noto Sans CJK JP")
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,
}
_ACROSS, _WIDE = 4, 9.0
_LOOKS: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.6},
    "faint": {"linewidth": 0.9, "alpha": 0.45},
    "dashed": {"linewidth": 1.2, "linestyle": (0, (4, 2))},
    "dotted": {"linewidth": 1.2, "linestyle": (0, (1, 1.5))},
    "points": {"linewidth": 1.2, "marker": "o", "markersize": 4, "clip_on": False},
}


@contextmanager
def _styled() -> Iterator[None]:
    """Draw with our style inside the block; matplotlib's own settings are as before after it."""
    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in _OTHER_SCRIPTS if name in installed)]
    with matplotlib.rc_context({**_STYLE, "font.family": fonts}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script without a font here
        yield


def draw(charts: Mapping[str, Chart]) -> dict[str, bytes]:
    """Draw every chart; file name -> PNG."""
    draws = {"lines": _lines, "bars": _bars, "heat": _heat}
    with _styled():
        return {f"{name}.png": png(_headline(draws[chart.kind](chart), chart)) for name, chart in charts.items()}


def png(figure: Figure) -> bytes:
    """Render a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _broken(chart: Chart) -> str:
    return textwrap.fill(middle(chart.headline, 400), 92)


def _adjust(figure: Figure, high: float, down: int, top: float, bottom: float) -> None:
    """Set the margins around small multiples and between them, in inches."""
    left, right, between, below = 0.6, 0.1, 0.7, 0.5
    wide, tall = (_WIDE - left - right + between) / _ACROSS - between, (high - top - bottom + below) / down - below
    sides = {"left": left / _WIDE, "right": 1 - right / _WIDE, "top": 1 - (top + 0.25) / high, "bottom": bottom / high}
    figure.subplots_adjust(**sides, wspace=between / wide, hspace=below / tall)


def _headline(figure: Figure, chart: Chart) -> Figure:
    """Set the title over the whole figure, broken where the figure ends."""
    figure.suptitle(_broken(chart), x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _figure(height: float, rows: int = 1, columns: int = 1, layout: Any = "constrained") -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDE, height), layout=layout)
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def _colour(series: Series) -> str:
    return GREY if series.colour < 0 else COLOURS[series.colour % len(COLOURS)]


def _name(name: str, columns: int = 22) -> str:
    # matplotlib leaves labels that begin with an underscore out of legends.
    return " " * name.startswith("_") + middle(name, columns)


def _gaps(values: Points) -> NDArray[np.float64]:
    return np.array([math.nan if value is None else value for value in values])


def _percent_axis(axis: Axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def _lines(chart: Chart) -> Figure:
    many = len(chart.panels)
    across = 1 if many == 1 else min(many, _ACROSS)
    down = -(-many // across)
    high = 4.6 if many == 1 else min(1.0 + 1.9 * down, 14.5)
    # Labels of small multiples are short; to measure those of 24 panels takes longer than to draw them.
    fixed = down > 1 and not any(panel.x or panel.y for panel in chart.panels)
    figure, every = _figure(high, down, across, None if fixed else "constrained")
    for axes, panel in zip(every, chart.panels, strict=False):
        _panel(axes, chart, panel, small=across > 1)
    for axes in every[many:]:
        axes.set_axis_off()
    if across > 1:
        handles = {
            handle.get_label(): handle for axes in every[:many] for handle in axes.get_legend_handles_labels()[0]
        }
        rows = -(-len(handles) // 4) if len(handles) > 1 else 0
        if rows:
            figure.legend(handles=list(handles.values()), loc=f"{'' if fixed else 'outside '}lower left", ncols=4)
        if fixed:
            _adjust(figure, high, down, 0.45 + 0.2 * _broken(chart).count("\n"), 0.55 + 0.2 * rows)
        figure.supxlabel(chart.x if not any(panel.x for panel in chart.panels) else "", fontsize=10)
    elif any(series.name for series in chart.series):
        every[0].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
    return figure


def _panel(axes: Axes, chart: Chart, panel: Panel, *, small: bool) -> None:
    for at, span in enumerate(chart.spans):
        axes.axvspan(*span, color="#EFEFEF", label=None if at else "warm-up", zorder=0)
    for series in panel.series:
        label = _name(series.name, 28) or "_"
        xs, ys = np.asarray(series.x), _gaps(series.y)
        if series.look == "band":
            axes.fill_between(xs, ys, _gaps(series.high), color=_colour(series), alpha=0.25, linewidth=0.0, label=label)
        else:
            axes.plot(xs, ys, color=_colour(series), label=label, **_LOOKS[series.look])
    for at, step in enumerate(chart.marks):
        axes.axvline(step, color=DARK, linewidth=1, linestyle=":", label=None if at else "resumed")
    if chart.level is not None:
        axes.axhline(chart.level[1], color=DARK, linewidth=1, linestyle="--", label=chart.level[0])
    axes.xaxis.set_major_locator(
        MaxNLocator(4 if small else 8, steps=[1, 2, 5, 10], integer=chart.x == "optimizer step" and not panel.x)
    )
    axes.yaxis.set_major_locator(MaxNLocator(4 if small else 7, steps=[1, 2, 5, 10]))
    if chart.percent:
        axes.set_ylim(bottom=0)
    axes.set_title(middle(panel.title, 26 if small else 80), fontsize=9, loc="left")
    if panel.x or not small:
        axes.set_xlabel(middle(panel.x or chart.x, 60), fontsize=9 if small else 10)
    if panel.y or not small:
        axes.set_ylabel(middle(panel.y or chart.y, 28 if small else 60), fontsize=8 if small else 10)
    if small:
        axes.tick_params(labelsize=8)
    if chart.percent:
        _percent_axis(axes.yaxis)


def _bars(chart: Chart) -> Figure:
    every = chart.series
    figure, (axes,) = _figure(min(1.4 + 0.25 * (1 + len(every)) * len(chart.names), 14.5))
    high = 0.8 / len(every)
    top = max((value or 0.0 for series in every for value in series.y), default=0.0)
    for at, series in enumerate(every):
        places = [place - 0.4 + high * (at + 0.5) for place in range(len(chart.names))]
        values = [value or 0.0 for value in series.y]
        axes.barh(places, values, 0.9 * high, color=_colour(series), label=_name(series.name))
        for place, value in zip(places, values, strict=True):
            text = percent(value) if chart.percent else number(value, 1)
            axes.annotate(text, (value, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(chart.names)), [_name(name, 28) for name in chart.names])
    axes.set_ylim(len(chart.names) - 0.5, -0.5)
    axes.set_xlim(0, 1.15 * top or 1.0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(chart.x)
    if chart.percent:
        _percent_axis(axes.xaxis)
    if len(every) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
    return figure


def _heat(chart: Chart) -> Figure:
    figure, (axes,) = _figure(min(2.0 + 0.32 * len(chart.names), 14.5))
    cells = np.array([[math.nan if value is None else value for value in row] for row in chart.cells])
    most = float(np.nanmax(np.abs(cells))) if np.isfinite(cells).any() else 1.0
    look: dict[str, Any] = (
        {"cmap": "Blues", "vmin": 0, "vmax": 1} if chart.percent else {"cmap": "RdBu", "vmin": -most, "vmax": most}
    )
    axes.imshow(cells if chart.percent else -cells, aspect="auto", **look)
    for (row, column), value in np.ndenumerate(cells):
        dark = abs(value) > 0.6 * (1.0 if chart.percent else most)
        text = "" if math.isnan(value) else percent(value, 0) if chart.percent else number(value, 3)
        axes.annotate(text, (column, row), ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(range(len(chart.columns)), [_name(name, 16) for name in chart.columns], rotation=45, ha="right")
    axes.set_yticks(range(len(chart.names)), [_name(name, 28) for name in chart.names])
    axes.grid(visible=False)
    axes.set_xlabel(chart.x)
    return figure
