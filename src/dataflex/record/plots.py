"""The plots of a run, each made of what the record has for it."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dataflex.record.digest import DECIDING, Curve, Event, Run, domain_groups, domain_rows, domain_shares, running_mean
from dataflex.record.text import cut, duration, number, percent

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


_MIXTURE_DOMAINS, _COMPOSITION_DOMAINS, _EVALS = 12, 24, 6
_SMOOTH_FROM = 120
_PHASES = {"training": COLOURS[0], "evaluation": COLOURS[3], "checkpoint": COLOURS[2], "other": GREY}
_OTHER_PHASES = (COLOURS[5], COLOURS[1], COLOURS[6], COLOURS[4])


@contextmanager
def _styled() -> Iterator[None]:
    """Draw with our style inside the block; matplotlib's own settings are as before after it."""
    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in _OTHER_SCRIPTS if name in installed)]
    with matplotlib.rc_context({**_STYLE, "font.family": fonts}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script without a font here
        yield


def draw(run: Run) -> dict[str, bytes]:
    """Draw every picture that the record has data for; file name -> PNG."""
    with _styled():
        figures = {name: plot(run) for name, plot in PLOTS.items()}
        return {name: png(figure) for name, figure in figures.items() if figure is not None}


def png(figure: Figure) -> bytes:
    """Render a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _new_figure(height: float = 4.6, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Make a figure 9 inches wide with ``rows`` axes, one above the other."""
    figure = Figure(figsize=(9.0, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)
    return figure, list(axes[:, 0])


def _headline(figure: Figure, text: str) -> Figure:
    """Set the title over the whole figure, broken where the figure ends."""
    figure.suptitle(textwrap.fill(text, 92), x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _percent_axis(axis: Axis) -> None:
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def _short_name(name: str, columns: int = 22) -> str:
    # matplotlib leaves labels that begin with an underscore out of legends.
    return " " * name.startswith("_") + cut(name, columns)


def _legend(axes: Axes, handles: Sequence[Any] | None = None) -> None:
    """Put the legend beside the plot, where it hides nothing."""
    handles = axes.get_legend_handles_labels()[0] if handles is None else handles
    axes.legend(handles=list(handles), loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)


def _step_axis(axes: Axes, run: Run, last: int) -> None:
    """Make x the optimizer steps from 0 to ``last``, resumes marked."""
    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, max(last, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for at, event in enumerate(run.resumed[-_MARKS:]):
        axes.axvline(event["step"], color=DARK, linewidth=1, linestyle=":", label=None if at else "resumed")


def _plot(axes: Axes, curve: Curve, **look: Any) -> None:
    axes.plot(*zip(*curve, strict=True), **look)


def _corners(planned: Sequence[Event], values: Sequence[float | None]) -> tuple[list[float], list[float]]:
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


def _loss(run: Run) -> Figure | None:
    train, plain = run.logged("loss"), run.logged("dataflex/plain_loss")
    evals = [(key, curve) for key, curve in run.metrics().items() if key.endswith("loss")][:_EVALS]
    if not train and not evals:
        return None
    figure, (axes,) = _new_figure()
    told = []
    for at, event in enumerate(event for event in run.planned if event["kind"] == "warmup"):
        span = (event["start_step"], event["stop_step"])
        axes.axvspan(*span, color="#EFEFEF", label=None if at else "warm-up", zorder=0)
    if train:
        steps, values = zip(*train, strict=True)
        smooth = len(values) >= _SMOOTH_FROM
        width, alpha = (0.8, 0.3) if smooth else (1.6, 1.0)
        axes.plot(steps, values, color=COLOURS[0], linewidth=width, alpha=alpha, label="train")
        if smooth:
            mean = running_mean(values, len(values) // 60)
            axes.plot(steps, mean, color=COLOURS[0], linewidth=1.8, label="train, running mean")
        told.append(f"Training loss {number(values[0], 3)} -> {number(values[-1], 3)}")
    if plain:
        _plot(axes, plain, color=COLOURS[0], linewidth=1.0, linestyle=(0, (2, 2)), label="train, unweighted")
    for at, (key, curve) in enumerate(evals):
        colour, name = COLOURS[(1 + at) % len(COLOURS)], _short_name(key, 28)
        _plot(axes, curve, color=colour, marker="o", markersize=4, clip_on=False, label=name)
    if evals:
        key, curve = evals[0]
        best_step, best = min(curve, key=lambda point: point[1])
        told.append(f"{cut(key, 28)} {number(curve[0][1], 3)} -> {number(curve[-1][1], 3)}")
        told[-1] += f" (best {number(best, 3)} at step {best_step})" if best_step != curve[-1][0] else ""
    _step_axis(axes, run, max(run.steps_done, run.total_steps or 0))
    axes.set_ylabel("loss (nats per token)" if run.config.get("stage") in ("sft", "pt") else "loss")
    _legend(axes)
    return _headline(figure, "; ".join(told))


def _mixture(run: Run) -> Figure | None:
    planned = [event for event in run.planned if sum((event.get("domain_counts") or {}).values())]
    if not planned:
        return None
    groups = domain_groups(run, _MIXTURE_DOMAINS)
    served, nominal = (
        [_corners(planned, domain_shares(planned, key, members))[1] for _, members in groups]
        for key in ("domain_counts", "proportions")
    )
    xs = _corners(planned, [None] * len(planned))[0]
    figure, (axes,) = _new_figure()
    colours = [GREY if at == _MIXTURE_DOMAINS else COLOURS[at % len(COLOURS)] for at in range(len(groups))]
    names = [_short_name(name) for name, _ in groups]
    areas = axes.stackplot(xs, served, labels=names, colors=colours, edgecolor="white", linewidth=0.6)
    for area in areas[len(COLOURS) : _MIXTURE_DOMAINS]:
        area.set_hatch("///")
    handles: list[Any] = areas[::-1]  # the legend reads from top to bottom, as the areas lie
    if any(event.get("proportions") for event in planned):
        look: dict[str, Any] = {"color": "black", "linewidth": 0.8, "linestyle": (0, (4, 2))}
        borders = [axes.plot(xs, line, label="nominal proportions", **look)[0] for line in np.cumsum(nominal, 0)[:-1]]
        handles += borders[:1]
    _step_axis(axes, run, planned[-1]["stop_step"])
    axes.set_ylim(0, 1)
    _percent_axis(axes.yaxis)
    axes.set_ylabel("share of served rows")
    handles += [handle for handle in axes.get_legend_handles_labels()[0] if handle.get_label() == "resumed"]
    _legend(axes, handles)
    return _headline(figure, f"Served mixture{_mixture_change(run, planned)}")


def _mixture_change(run: Run, planned: Sequence[Event]) -> str:
    if len(planned) == 1:
        return " of the one interval so far"
    counts = [planned[place]["domain_counts"] for place in (0, -1)]
    totals = [sum(rows.values()) for rows in counts]
    ends = [
        (name, *(rows.get(name, 0) / all_ for rows, all_ in zip(counts, totals, strict=True))) for name in run.served
    ]
    name, first, last = max(ends, key=lambda end: abs(end[2] - end[1]))
    if abs(last - first) < 0.01:
        return f": the same in the first and the last of {len(planned)} intervals"
    return f": {cut(name, 28)} {'rose' if last > first else 'fell'} from {percent(first, 0)} to {percent(last, 0)}"


def _scores(run: Run) -> Figure | None:
    scored = [event for event in run.planned if (event.get("scores") or {}).get("p50") is not None]
    if not scored:
        return None
    figure, (axes,) = _new_figure()
    for low, high, colour in (("p05", "p95", "#D6E6F2"), ("p25", "p75", "#9CC4E0")):
        xs, lows = _corners(scored, [event["scores"].get(low) for event in scored])
        highs = _corners(scored, [event["scores"].get(high) for event in scored])[1]
        name = f"pool, {int(low[1:])} % to {int(high[1:])} %"
        axes.fill_between(xs, lows, highs, color=colour, linewidth=0.0, label=name)
    medians = [event["scores"]["p50"] for event in scored]
    axes.plot(*_corners(scored, medians), color=COLOURS[0], linewidth=1.8, label="pool, median")
    told = f"Median score of the pool {number(medians[0], 3)} -> {number(medians[-1], 3)}"
    served = [(event.get("served_scores") or {}).get("p50") for event in scored]
    known = [value for value in served if value is not None]
    if known:
        axes.plot(*_corners(scored, served), color=COLOURS[5], linewidth=1.8, label="served rows, median")
        told += f", of the rows served {number(known[0], 3)} -> {number(known[-1], 3)}"
    _step_axis(axes, run, scored[-1]["stop_step"])
    selector = run.methods.get("selector")
    axes.set_ylabel(f"score (selector {cut(selector[0], 40)})" if selector else "score")
    _legend(axes)
    return _headline(figure, told)


def _composition(run: Run) -> Figure | None:
    all_served, all_pool = sum(run.served.values()), sum(run.pool.values())
    if not all_served or not all_pool:
        return None
    groups = domain_rows(run, _COMPOSITION_DOMAINS)
    shares, fair = [rows / all_served for _, rows, _ in groups], [rows / all_pool for _, _, rows in groups]
    figure, (axes,) = _new_figure(1.4 + 0.45 * len(groups))
    places = list(range(len(groups)))
    axes.barh([place - 0.19 for place in places], shares, 0.36, color=COLOURS[0], label="served rows")
    axes.barh([place + 0.19 for place in places], fair, 0.36, color=GREY, label="pool")
    for place, share, base in zip(places, shares, fair, strict=True):
        text = percent(share) + (f"  ({share / base:.2f} x)" if base else "")
        axes.annotate(text, (share, place - 0.19), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, [_short_name(name, 28) for name, _, _ in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.22 * max(*shares, *fair))
    _percent_axis(axes.xaxis)
    axes.set_xlabel("share of rows")
    _legend(axes)
    ratios = [
        (share / base, cut(name, 24)) for share, base, (name, _, _) in zip(shares, fair, groups, strict=True) if base
    ]
    (most, most_name), (least, least_name) = max(ratios), min(ratios)
    if most < 1.02 and least > 0.98:
        return _headline(figure, "Domains are served in the proportions of the pool")
    told = f"{most_name} is served {most:.2f} times its share of the pool, {least_name} {least:.2f} times"
    return _headline(figure, told)


def _seconds(run: Run) -> Figure | None:
    phases = run.phase_seconds()
    if not phases:
        return None
    total = sum(phases.values())
    figure, (axes,) = _new_figure(2.6)
    spare = iter(_OTHER_PHASES * len(phases))
    left = 0.0
    for phase, seconds in phases.items():
        name = f"{_short_name(phase)}  {duration(seconds)}, {percent(seconds / total)}"
        colour = _PHASES.get(phase) or next(spare)
        axes.barh([0], [seconds], 0.6, left=left, color=colour, edgecolor="white", linewidth=0.8, label=name)
        if seconds / total >= 0.08:
            ink = "white" if phase == "training" else "black"
            axes.annotate(percent(seconds / total, 0), (left + seconds / 2, 0), ha="center", va="center", color=ink)
        left += seconds
    axes.set_yticks([])
    axes.set_xlim(0, total)
    axes.set_xlabel("seconds")
    _legend(axes)
    deciding = sum(phases.get(phase, 0.0) for phase in DECIDING)
    return _headline(figure, f"Deciding took {percent(deciding / total)} of {duration(total)}")


def _weights(run: Run) -> Figure | None:
    curves = {key: run.weight_curve(key) for key in ("ess", "p05", "p50", "p95", "max")}
    panels = [name for name in ("ess", "p95", "max") if curves[name]]
    if not panels:
        return None
    figure, every = _new_figure(1.4 + 1.9 * len(panels), rows=len(panels))
    for axes, name in zip(every, panels, strict=True):
        if name == "p95":
            _spread(axes, curves)
        elif name == "ess":
            _plot(axes, curves[name], color=COLOURS[0], linewidth=1.4)
            axes.set_ylabel("effective sample size\n(share of sequences)")
            _percent_axis(axes.yaxis)
        else:
            _plot(axes, curves[name], color=COLOURS[5], linewidth=1.4)
            axes.set_ylabel("largest weight")
        _step_axis(axes, run, max(run.steps_done, run.total_steps or 0))
        axes.label_outer()
    means = {name: sum(value for _, value in curves[name]) / len(curves[name]) for name in panels}
    said = [f"effective sample size {percent(means['ess'])}"] if "ess" in means else []
    said += [f"largest weight {number(means['max'], 2)}"] if "max" in means else []
    return _headline(figure, "Weights, on average: " + ", ".join(said))


def _spread(axes: Axes, curves: dict[str, Curve]) -> None:
    """Draw quantiles of the weights of sequences; equal weights are 1."""
    low, high = dict(curves["p05"]), dict(curves["p95"])
    steps = [step for step in low if step in high]
    lows, highs = [low[step] for step in steps], [high[step] for step in steps]
    axes.fill_between(steps, lows, highs, color="#9CC4E0", linewidth=0.0, label="5 % to 95 %")
    if curves["p50"]:
        _plot(axes, curves["p50"], color=COLOURS[0], linewidth=1.4, label="median")
    axes.set_ylabel("weights of sequences\n(1 is equal)")
    _legend(axes)


PLOTS: dict[str, Callable[[Run], Figure | None]] = {
    "loss.png": _loss,
    "mixture.png": _mixture,
    "scores.png": _scores,
    "composition.png": _composition,
    "seconds.png": _seconds,
    "weights.png": _weights,
}
"""File name -> what draws it, in the order of the report."""
