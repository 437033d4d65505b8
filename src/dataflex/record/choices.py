"""Charts of what was chosen and why: scores, how they rank rows, selections, repeats, signals and the ledger."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from dataflex.record.chart import Chart, Panel, Series, corners, line, over_steps
from dataflex.record.digest import Curve, Event, Run, since
from dataflex.record.recorded import Recorded, spaced
from dataflex.record.recorder import scores_of
from dataflex.record.text import cut, middle, number, percent, without_prefix

_BLOCKS = 60
_BARS = 24
_RANKED = 20_000
_SELECTIONS = 16


def scores_chart(runs: Sequence[Recorded]) -> Chart | None:
    """Scores of the pool and of the rows served, in every interval."""
    run = runs[0].run
    scored = [event for event in run.planned if (event.get("scores") or {}).get("p50") is not None]
    if not scored:
        return None
    told = [(event["scores"]["p50"], (event.get("served_scores") or {}).get("p50")) for event in scored]
    headline = f"Median score of the pool {number(told[0][0], 3)} -> {number(told[-1][0], 3)}"
    known = [value for _, value in told if value is not None]
    headline += f", of the rows served {number(known[0], 3)} -> {number(known[-1], 3)}" if known else ""
    shown = spaced(scored, _BLOCKS)
    starts, stops = [event["start_step"] for event in shown], [event["stop_step"] for event in shown]

    def steps(part: str, quantile: str) -> tuple[list[float], list[Any]]:
        return corners(starts, stops, [(event.get(part) or {}).get(quantile) for event in shown])

    series = []
    for low, high in (("p05", "p95"), ("p25", "p75")):
        xs, ys = steps("scores", low)
        name = f"pool, {int(low[1:])} % to {int(high[1:])} %"
        series.append(Series(name=name, x=xs, y=ys, high=steps("scores", high)[1], look="band"))
    for name, part, colour in (("pool, median", "scores", 0), ("served rows, median", "served_scores", 5)):
        xs, ys = steps(part, "p50")
        if any(value is not None for value in ys):
            series.append(Series(name=name, x=xs, y=ys, colour=colour))
    return Chart(headline=headline, y=_score(run), panels=[Panel(series=series)], **over_steps(run))


def _score(run: Run) -> str:
    selector = run.methods.get("selector")
    return f"score (selector {cut(selector[0], 40)})" if selector else "score"


def histogram_chart(runs: Sequence[Recorded]) -> Chart | None:
    """Scores of the last decision whose scores are kept."""
    view = runs[0]
    if not view.scored:
        return None
    event, rows, scores = view.scored[-1]
    served = view.served(event)
    ids = np.zeros(0, np.int64) if served is None else served
    low, high = np.quantile(scores, [0.002, 0.998]) if len(scores) else (0.0, 0.0)
    if not low < high:
        return None
    edges = np.linspace(low, high, 41)
    of_served = scores_of(ids, rows, scores)
    series = []
    for at, (name, values) in enumerate((("pool", scores), ("served rows", of_served))):
        counts = np.histogram(np.clip(values, low, high), edges)[0]
        if counts.sum():
            xs, ys = corners(edges[:-1].tolist(), edges[1:].tolist(), (counts / counts.sum()).tolist())
            series.append(Series(name=name, x=xs, y=ys, colour=-1 if at == 0 else 5))
    cut_at, prefers = _cut_of(view, event)
    if cut_at is not None and low <= cut_at <= high:
        top = max(value for each in series for value in each.y if value is not None)
        series.append(Series(name="cut", x=[cut_at, cut_at], y=[0.0, top], look="dashed", colour=6))
    above = float((scores < np.median(of_served)).mean()) if len(of_served) else 0.0
    told = f"At step {event['start_step']} the median row served scores above {percent(above, 0)} of the pool"
    told += f"; {prefers} scores are kept" if prefers else ""
    return Chart(headline=told, x=_score(view.run), y="share of rows", percent=True, panels=[Panel(series=series)])


def _cut_of(view: Recorded, event: Event) -> tuple[float | None, str | None]:
    """Return the score of the last row that a decision kept, and which scores it keeps: "high" or "low"."""
    if view.rows is None:
        return None, None
    from dataflex.record.chosen import chosen_notes

    for one in chosen_notes(view.rows)["decisions"]:
        if one["interval"] == event["interval"]:
            return one["cut"], one["prefers"]
    return None, None


def ranking_chart(runs: Sequence[Recorded]) -> Chart | None:
    """Rank correlation of the scores of each decision with those of the one shown before it, and of the first."""
    scored = runs[0].scored
    curves: dict[str, Curve] = {"with the decision before": [], "with the first": []}
    for at in range(1, len(scored)):
        for name, other in (("with the decision before", scored[at - 1]), ("with the first", scored[0])):
            (_, rows, a), (_, others, b) = scored[at], other
            if not np.array_equal(rows, others):
                _, mine, theirs = np.intersect1d(rows, others, return_indices=True)
                a, b = a[mine], b[theirs]
            take = slice(None, None, max(1, len(a) // _RANKED))
            a, b = a[take], b[take]
            if len(a) > 2 and np.ptp(a) > 0 and np.ptp(b) > 0:
                curves[name].append((scored[at][0]["start_step"], float(spearmanr(a, b).statistic)))
    before = [value for _, value in curves["with the decision before"]]
    if not before:
        return None
    mean = sum(before) / len(before)
    what = "stands" if mean > 0.8 else "drifts" if mean > 0.3 else "is made anew each time"
    told = f"The ranking {what}: rank correlation {mean:.2f} on average with the decision before"
    told += f", {curves['with the first'][-1][1]:.2f} with the first at the end" if curves["with the first"] else ""
    series = [line(name, curve, at, 2) for at, (name, curve) in enumerate(curves.items()) if curve]
    return Chart(headline=told, y="rank correlation", panels=[Panel(series=series)], **over_steps(runs[0].run))


def overlap_chart(runs: Sequence[Recorded]) -> Chart | None:
    """Share of the distinct rows of one selection (rows of the chart) that are in another (columns)."""
    if len(runs) > 1:
        known = [(each, times) for each in runs if (times := times_served(each)) is not None]
        kept = [(each.title, np.flatnonzero(times)) for each, times in known if times.any()]
        spaces = {(each.run.started.get("row_space") or {}).get("fingerprint") for each, _ in known}
    else:
        events = [event for event in runs[0].run.planned if event["kind"] == "dynamic" and event.get("plan")]
        plans = [(event, runs[0].served(event)) for event in spaced(events, _SELECTIONS)]
        kept = [(f"step {event['start_step']}", np.unique(ids)) for event, ids in plans if ids is not None and len(ids)]
        spaces = set()
    if len(kept) < 2 or len(spaces) > 1:
        return None
    cells = [[float(np.isin(a, b, assume_unique=True).mean()) for _, b in kept] for _, a in kept]
    names = [name for name, _ in kept]
    if len(runs) > 1:
        told = f"{percent(cells[0][1], 0)} of the rows that {names[0]} was served were also served in {names[1]}"
    else:
        beside = [cells[at][at + 1] for at in range(len(kept) - 1)]
        told = f"{percent(sum(beside) / len(beside), 0)} of a selection's rows are in the next one shown, on average"
    return Chart(headline=told, kind="heat", percent=True, names=names, columns=names, cells=cells, x="also in")


def coverage_chart(runs: Sequence[Recorded]) -> Chart | None:
    """Share of the pool that was served at least once by then."""
    view = runs[0]
    pool = sum(view.run.pool.values())
    first = _first_served(view) if pool else None
    if first is None or not view.run.planned:
        return None
    stops = [event["stop_step"] for event in view.run.planned]
    seen = np.searchsorted(np.sort(first), stops) / pool
    curve = [(view.run.planned[0]["start_step"], 0.0), *zip(stops, seen.tolist(), strict=True)]
    told = f"{percent(curve[-1][1])} of the pool has been served at least once{since(view.run.served_since)}"
    by_plans = view.rows is None and len(view.plans) < len(view.run.planned)
    told += " in the intervals whose rows are kept" if by_plans else ""
    series = [line("served at least once", curve, 0)]
    return Chart(
        headline=told, y="share of the pool", percent=True, panels=[Panel(series=series)], **over_steps(view.run)
    )


def _first_served(view: Recorded) -> NDArray[np.int64] | None:
    """Return the steps at which rows were first served [those that were]; None where the record does not say."""
    if view.rows is not None:
        return view.rows.column("first_served").drop_null().to_numpy()
    seen, found = np.zeros(sum(view.run.pool.values()), bool), []
    for event, ids in view.plans:
        found.append(np.full(np.count_nonzero(~seen[np.unique(ids)]), event["start_step"]))
        seen[ids] = True
    return np.concatenate(found) if found else None


def times_served(view: Recorded) -> NDArray[np.int64] | None:
    """Return how often each row of the pool [n] was served; None where the record does not say."""
    if view.rows is not None and not view.rows.column("times_served").null_count:
        return view.rows.column("times_served").to_numpy()
    pool = sum(view.run.pool.values())
    if not pool or not view.plans:
        return None
    return np.bincount(np.concatenate([ids for _, ids in view.plans]), minlength=pool)


def repeats_chart(runs: Sequence[Recorded]) -> Chart | None:
    """How often rows were served."""
    times = times_served(runs[0])
    if times is None or not times.any():
        return None
    counts = np.bincount(np.minimum(times, 10), minlength=11)
    names = ["never", "once", *(f"{at} times" for at in range(2, 10)), "10 or more"]
    last = int(np.flatnonzero(counts)[-1]) + 1
    share = float(times[times > 1].sum()) / float(times.sum())
    told = f"{percent(counts[0] / len(times), 0)} of the pool was never served{since(runs[0].run.served_since)}; "
    told += f"{percent(share, 0)} of what was served were rows served more than once"
    series = [Series(name="rows of the pool", y=(counts[:last] / len(times)).tolist())]
    return Chart(
        headline=told,
        kind="bars",
        x="share of the pool",
        percent=True,
        names=names[:last],
        panels=[Panel(series=series)],
    )


def weights_chart(runs: Sequence[Recorded]) -> Chart | None:
    """Spread of the weights over steps."""
    run = runs[0].run
    curves = {key: run.weight_curve(key) for key in ("ess", "p05", "p50", "p95", "max")}
    panels, told = [], []
    if ess := curves["ess"]:
        panels.append(Panel(title="effective sample size", y="share of sequences", series=[line("", ess, 0, 4)]))
        told.append(f"effective sample size {percent(sum(value for _, value in ess) / len(ess))}")
    if curves["p95"]:
        names = {"p95": "95 %", "p50": "median", "p05": "5 %"}
        series = [line(name, curves[key], at, 4) for at, (key, name) in enumerate(names.items()) if curves[key]]
        panels.append(Panel(title="weights of sequences (1 is equal)", y="weight", series=series))
    if most := curves["max"]:
        panels.append(Panel(title="largest weight", y="weight", series=[line("", most, 5, 4)]))
        told.append(f"largest weight {number(sum(value for _, value in most) / len(most), 2)}")
    return Chart(headline="Weights, on average: " + ", ".join(told), panels=panels) if panels else None


def ledger_chart(runs: Sequence[Recorded]) -> Chart | None:
    """Change of each target's loss by domain."""
    told = runs[0].run.credited or {}
    targets = {name: of.get("domains") or {} for name, of in (told.get("targets") or {}).items()}
    domains = list(dict.fromkeys(name for of in targets.values() for name in of))
    weight = {name: max(abs(of.get(name) or 0.0) for of in targets.values()) for name in domains}
    kept = sorted(domains, key=lambda name: -weight[name])[:_BARS]
    if not kept:
        return None
    cells = [[of.get(name) for of in targets.values()] for name in kept]
    change, name, target = min(
        (of[name] or 0.0, name, target) for target, of in targets.items() for name in kept if name in of
    )
    headline = f"{middle(name, 28)} lowered the loss of {middle(target, 28)} most ({change:+.4f})"
    if change >= 0:
        headline = "No domain lowered the loss of a target"
    return Chart(
        headline=headline, kind="heat", names=without_prefix(kept), columns=list(targets), cells=cells, x="target"
    )


_SIGNALS = {"correlation": "rank correlation of predictions", "trust": "trust", "coverage": "coverage"}
_TOLD = re.compile(r"\b(correlation|trust|coverage) (-?[0-9][0-9.e+-]*)(?=[,;]|$)")


def signal_quality(run: Run) -> dict[str, Curve]:
    """Return what the decisions' reasons say of their signals: how well predictions of scores ranked the rows."""
    found: dict[str, Curve] = {}
    for event in run.planned:
        reason = event.get("reason")
        for name, value in _TOLD.findall(reason[:2000]) if isinstance(reason, str) else ():
            try:
                found.setdefault(name, []).append((event["start_step"], float(value)))
            except ValueError:
                continue
    return found


def signals_chart(runs: Sequence[Recorded]) -> Chart | None:
    """How well predicted scores ranked rows, by the decisions' own words."""
    found = {name: curve for name, curve in signal_quality(runs[0].run).items() if len(curve) > 1}
    if "correlation" not in found:
        return None
    values = [value for _, value in found["correlation"]]
    told = f"Predicted scores ranked rows with a correlation of {sum(values) / len(values):.2f} on average"
    told += f", {values[-1]:.2f} at the end"
    series = [line(_SIGNALS[name], curve, at, 3) for at, (name, curve) in enumerate(found.items())]
    return Chart(headline=told, y="1 is best", panels=[Panel(series=series)], **over_steps(runs[0].run))
