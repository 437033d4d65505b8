"""What every picture shares: colours, style, axes in optimizer steps, legends beside the plot, PNG bytes.

Figures are made without pyplot, so no back end is chosen for the process and no window can open;
matplotlib is imported when the first figure is drawn. Colours are Okabe and Ito's, safe for colour
blindness; past the seventh domain they come again, hatched.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dataflex.record.digest import Event, Run
from dataflex.record.text import cut

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "DARK",
    "GREY",
    "corners",
    "headline",
    "legend",
    "new_figure",
    "percent_axis",
    "png",
    "short_name",
    "step_axis",
    "styled",
]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
GREY, DARK = "#BBBBBB", "#333333"
_MARKS = 100
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


@contextmanager
def styled() -> Iterator[None]:
    """Draw with our style inside the block; matplotlib's own settings are as before after it."""
    import matplotlib
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in _OTHER_SCRIPTS if name in installed)]
    with matplotlib.rc_context({**_STYLE, "font.family": fonts}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script without a font here
        yield


def png(figure: Figure) -> bytes:
    """Render a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def new_figure(height: float = 4.6, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Make a figure 9 inches wide with ``rows`` axes, one above the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)
    return figure, list(axes[:, 0])


def headline(figure: Figure, text: str) -> None:
    """Set the title over the whole figure, broken where the figure ends."""
    figure.suptitle(textwrap.fill(text, 92), x=0.01, ha="left", fontsize=11, fontweight="bold")


def percent_axis(axis: Axis) -> None:
    """Write the shares of an axis as percentages."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def short_name(name: str, columns: int = 22) -> str:
    """Shorten a name for a legend or an axis."""
    # matplotlib leaves labels that begin with an underscore out of legends.
    return " " * name.startswith("_") + cut(name, columns)


def legend(axes: Axes, handles: Sequence[Any] | None = None) -> None:
    """Put the legend beside the plot, where it hides nothing."""
    handles = axes.get_legend_handles_labels()[0] if handles is None else handles
    axes.legend(handles=list(handles), loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)


def step_axis(axes: Axes, run: Run, last: int) -> None:
    """Make x the optimizer steps from 0 to ``last``, resumes marked."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, max(last, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for at, event in enumerate(run.resumed[-_MARKS:]):
        axes.axvline(event["step"], color=DARK, linewidth=1, linestyle=":", label=None if at else "resumed")


def corners(planned: Sequence[Event], values: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """Corners of a step curve that is flat over each interval and broken where there is no value."""
    xs: list[float] = []
    ys: list[float] = []
    for event, value in zip(planned, values, strict=True):
        if xs and xs[-1] != event["start_step"]:
            xs.append(xs[-1])
            ys.append(math.nan)
        xs += [event["start_step"], event["stop_step"]]
        ys += [math.nan if value is None else value] * 2
    return xs, ys
