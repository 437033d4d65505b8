"""Charts over the steps of a run: losses, those of several runs beside each other, and the mixture."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dataflex.record.chart import PANELS, Chart, Panel, Series, corners, line, lines, over_steps
from dataflex.record.digest import DECIDING, Curve, Run, domain_groups, domain_rows, running_mean, since
from dataflex.record.recorded import Recorded, spaced
from dataflex.record.text import duration, middle, number, percent, without_prefix

_BLOCKS = 60
_BARS = 24
_SMOOTH_FROM = 120

AGGREGATES = ("eval_macro_loss", "eval_micro_loss", "eval_token_loss", "eval_loss")
"""Held-out losses over all sets, the one that counts first."""


def held_out(runs: Sequence[Run]) -> str | None:
    """Return the held-out loss that all of the runs have, the one that counts most; None where there is none."""
    metrics = [run.metrics() for run in runs]
    shared = [key for key in metrics[0] if all(key in each for each in metrics)] if metrics else []
    losses = [*(key for key in AGGREGATES if key in shared), *(key for key in shared if key.endswith("loss"))]
    return losses[0] if losses else None


def _unit(run: Run) -> str:
    return "loss (nats per token)" if run.config.get("stage") in ("sft", "pt") else "loss"


def loss_chart(runs: Sequence[Recorded]) -> Chart | None:
    """Training loss of every run, and the held-out loss that counts most of the first one."""
    run, told = runs[0].run, []
    series: list[Series] = []
    for at, each in enumerate(runs):
        train = each.run.logged("loss")
        if not train:
            continue
        name = "train" if len(runs) == 1 else each.title
        smooth = len(train) >= _SMOOTH_FROM
        if at == 0 or not smooth:
            series.append(line(name, train, at, 4 * len(runs), "faint" if smooth else "line"))
        if smooth:
            mean = running_mean([value for _, value in train], len(train) // 60)
            curve = [(step, value) for (step, _), value in zip(train, mean, strict=True)]
            series.append(line(f"{name}, running mean", curve, at, 4 * len(runs)))
        if at == 0:
            told.append(f"Training loss {number(train[0][1], 3)} -> {number(train[-1][1], 3)}")
    if plain := run.logged("dataflex/plain_loss"):
        series.append(line("train, unweighted", plain, 0, 4, "dashed"))
    key = held_out([run])
    if key is not None and (curve := run.metrics()[key]):
        series.append(line(key, curve, 5, 4, "points"))
        best_step, best = min(curve, key=lambda point: point[1])
        told.append(f"{key} {number(curve[0][1], 3)} -> {number(curve[-1][1], 3)}")
        told[-1] += f" (best {number(best, 3)} at step {best_step})" if best_step != curve[-1][0] else ""
    if not series:
        return None
    return Chart(headline="; ".join(told) or "Loss", y=_unit(run), panels=[Panel(series=series)], **over_steps(run))


def heldout_chart(runs: Sequence[Recorded]) -> Chart | None:
    """Held-out losses of each set, those over all sets first."""
    run = runs[0].run
    curves = {key: curve for key, curve in run.metrics().items() if key.endswith("loss") and len(curve) > 1}
    sets = [key for key in curves if key not in AGGREGATES and key.endswith("_token_loss")]
    sets = sets or [key for key in curves if key not in AGGREGATES]
    if not sets:
        return None
    ends = {key: curves[key][-1][1] - curves[key][0][1] for key in sets}
    best, worst = min(sets, key=lambda key: ends[key]), max(sets, key=lambda key: ends[key])
    verb = "fell most" if ends[best] < 0 else "rose least"
    told = f"Held-out loss {verb} on {middle(_set_of(best), 28)} ({ends[best]:+.3f})"
    told += f", least on {middle(_set_of(worst), 28)} ({ends[worst]:+.3f})" if ends[worst] > ends[best] else ""
    whole = {key: curves[key] for key in AGGREGATES if key in curves}
    panels = [Panel(title="all sets", series=[line(k, c, at, 8, "line") for at, (k, c) in enumerate(whole.items())])]
    metrics = [(each.title, each.run.metrics()) for each in runs]
    named = [(title, {_set_of(key): found[key] for key in sets if key in found}) for title, found in metrics]
    return Chart(headline=told, y=_unit(run), panels=[*(panels if whole else []), *lines(named)], **over_steps(run))


def _set_of(key: str) -> str:
    return re.sub(r"^eval_|_(token_)?loss$", "", key) or key


def domain_loss_chart(runs: Sequence[Recorded]) -> Chart | None:
    """Loss of each domain in training."""
    run = runs[0].run
    found = run.by_domain("loss")
    curves = {name: found[name] for name, _ in most_served(run, PANELS) if len(found.get(name, ())) > 1}
    if not curves:
        return None
    change = {name: curve[-1][1] - curve[0][1] for name, curve in curves.items()}
    best, worst = min(change, key=lambda name: change[name]), max(change, key=lambda name: change[name])
    labels = dict(zip(curves, without_prefix(list(curves)), strict=True))
    told = f"In training the loss of {middle(labels[best], 28)} changed by {change[best]:+.3f}"
    told += f", of {middle(labels[worst], 28)} by {change[worst]:+.3f}" if worst != best else ""
    beside = [
        (each.title, {name: curve for name, curve in each.run.by_domain("loss").items() if name in curves})
        for each in runs
    ]
    return Chart(headline=told, y=_unit(run), panels=lines(beside), **over_steps(run))


def most_served(run: Run, most: int) -> list[tuple[str, float]]:
    """Return the most served domains, in the order of the row space, and their rows."""
    served = run.served
    kept = set(sorted(served, key=lambda name: -served[name])[:most])
    return [(name, rows) for name, rows in served.items() if name in kept]


def seconds_at(run: Run) -> Curve:
    """Return the seconds of training and of deciding up to each log: what a run has cost by then.

    Empty where the record does not have them from the first step on.
    """
    if run.first_step:
        return []
    curve: dict[int, float] = {}
    before = 0.0  # of the processes that have ended, each of which has a clock of its own
    for process in run.processes:
        now = 0.0
        for event in process:
            spent = event.get("spent") or {}
            now = sum(spent.get(phase, 0.0) for phase in ("train", "reference", "ledger", *DECIDING)) if spent else now
            if event["event"] in ("stepped", "evaluated", "finished"):
                curve[event["step"]] = before + now
        before += now
    return sorted(curve.items()) if any(curve.values()) else []


def tokens_at(run: Run) -> Curve:
    """Return the tokens served up to each log; empty where the record does not have them."""
    curves = run.by_domain("tokens")
    steps = sorted({step for curve in curves.values() for step, _ in curve})
    return list(zip(steps, tokens_of(run, curves, steps).tolist(), strict=True))


def tokens_of(run: Run, domains: Iterable[str], steps: Sequence[int]) -> NDArray[np.float64]:
    """Return the tokens of domains together, served up to each step [n].

    A domain counts with its last known number, since a log may hold those alone that were trained on since the last.
    """
    curves, total = run.by_domain("tokens"), np.zeros(len(steps))
    for curve in (curves[name] for name in domains if name in curves):
        known = np.searchsorted([step for step, _ in curve], steps, side="right")
        total += np.array([0.0, *(tokens for _, tokens in curve)])[known]
    return total


def compared_chart(runs: Sequence[Recorded]) -> Chart | None:
    """Compare held-out losses at equal steps, equal tokens and equal compute."""
    key = held_out([each.run for each in runs]) if len(runs) > 1 else None
    if key is None:
        return None
    panels = []
    for what, (label, scale) in _SCALES.items():
        found = [(at, each.title, curve) for at, each in enumerate(runs) if (curve := scaled(each.run, key, scale))]
        if len(found) > 1:
            series = [line(title, curve, at, 3 * len(runs)) for at, title, curve in found]
            panels.append(Panel(title=f"at equal {what}", x=label, y=_unit(runs[0].run), series=series))
    last = [(each.run.metrics()[key][-1][1], each.title) for each in runs]
    told = f"{key} ends lowest in {min(last)[1]}, at {number(min(last)[0], 3)}"
    if (equal := at_equal_compute(runs, key)) is not None:
        where, values = equal
        if late := not_yet_measured(runs, equal):
            told += f"; {late}"
        else:
            best = min((value, each.title) for value, each in zip(values, runs, strict=True) if value is not None)
            told += f"; at equal compute ({duration(where)}) it is lowest in {best[1]}, at {number(best[0], 3)}"
    return Chart(headline=told, panels=panels)


_SCALES: dict[str, tuple[str, Callable[[Run], Curve] | None]] = {
    "steps": ("optimizer step", None),
    "tokens": ("tokens served", tokens_at),
    "compute": ("seconds of training and deciding", seconds_at),
}


def scaled(run: Run, key: str, scale: Callable[[Run], Curve] | None) -> list[tuple[float, float]]:
    """Return the curve of a metric over what ``scale`` gives at each step; empty where that is not known."""
    curve = run.metrics()[key]
    if scale is None:
        return [(float(step), value) for step, value in curve]
    known = scale(run)
    if not known:
        return []
    steps, spent = [0.0, *(float(step) for step, _ in known)], [0.0, *(each for _, each in known)]
    return [(float(np.interp(step, steps, spent)), value) for step, value in curve]


def at_equal_compute(runs: Sequence[Recorded], key: str) -> tuple[float, list[float | None]] | None:
    """Return the seconds that the quickest of the runs took, and the metric of each by then; None where not known.

    A run that was not measured by then has no value.
    """
    curves = [scaled(each.run, key, seconds_at) for each in runs]
    if not all(curves) or min(curve[-1][0] for curve in curves) <= 0:
        return None
    where = min(curve[-1][0] for curve in curves)
    return where, [at_compute(curve, where) for curve in curves]


def not_yet_measured(runs: Sequence[Recorded], equal: tuple[float, Sequence[float | None]]) -> str:
    """Return which runs have no value at equal compute, as a part of a sentence; "" where all have one."""
    where, values = equal
    late = [each.title for each, value in zip(runs, values, strict=True) if value is None]
    if not late:
        return ""
    verb = "was" if len(late) == 1 else "were"
    return f"not known at equal compute: {' and '.join(late)} {verb} first measured after {duration(where)}"


def at_compute(curve: Sequence[tuple[float, float]], compute: float) -> float | None:
    """Return a curve of (compute, value) at a compute, between its points; None where it does not reach."""
    points = sorted(curve)
    if not points or not points[0][0] <= compute <= points[-1][0]:
        return None
    xs, ys = zip(*points, strict=True)
    return float(np.interp(compute, xs, ys))


def over_time(
    run: Run, groups: Sequence[tuple[str, Sequence[str]]], most: int = _BLOCKS
) -> tuple[list[int], list[int], NDArray[np.float64], NDArray[np.float64]]:
    """Return the first and last steps of up to ``most`` stretches of intervals, and what was served in them.

    Rows of each group of domains [stretches, groups], and nominal shares [stretches, groups], NaN where there are none.
    """
    planned = [event for event in run.planned if sum((event.get("domain_counts") or {}).values())]
    column = {name: at for at, (_, members) in enumerate(groups) for name in members}
    parts = [part for part in np.array_split(np.arange(len(planned)), min(most, len(planned)) or 1) if len(part)]
    counts, nominal = np.zeros((len(parts), len(groups))), np.full((len(parts), len(groups)), np.nan)
    for at, part in enumerate(parts):
        weight, sums = 0.0, np.zeros(len(groups))
        for event in (planned[place] for place in part):
            for name, rows in event["domain_counts"].items():
                counts[at, column[name]] += rows
            shares = event.get("proportions") or {}
            total = sum(share or 0.0 for share in shares.values())
            if total > 0:
                weight += event["rows"]
                for name, share in shares.items():
                    if name in column:
                        sums[column[name]] += event["rows"] * (share or 0.0) / total
        if weight:
            nominal[at] = sums / weight
    starts, stops = (
        [planned[part[0]]["start_step"] for part in parts],
        [planned[part[-1]]["stop_step"] for part in parts],
    )
    return starts, stops, counts, nominal


def mixture_chart(runs: Sequence[Recorded]) -> Chart | None:
    """Each domain's share of rows and tokens, nominal share and share of the pool."""
    run = runs[0].run
    groups = domain_groups(run, PANELS if len(run.served) <= PANELS else PANELS - 1)
    starts, stops, counts, nominal = over_time(run, groups)
    if not starts:
        return None
    shares = counts / counts.sum(1, keepdims=True)
    pool, labels = sum(run.pool.values()), labels_of(groups)
    tokens = _token_shares(run, groups)
    panels = []
    for at, (_, members) in enumerate(groups):
        xs, ys = corners(starts, stops, shares[:, at].tolist())
        series = [Series(name="rows", x=xs, y=ys)]
        if at in tokens:
            series.insert(0, line("tokens", tokens[at], 4, 40, "faint"))
        if np.isfinite(nominal).any():
            xs, ys = corners(starts, stops, nominal[:, at].tolist())
            series.append(Series(name="nominal", x=xs, y=ys, look="dashed", colour=5))
        if pool:
            natural = sum(run.pool.get(name, 0) for name in members) / pool
            series.append(Series(name="pool", x=[starts[0], stops[-1]], y=[natural] * 2, look="dotted", colour=-1))
        panels.append(Panel(title=labels[at], series=series))
    return Chart(
        headline=f"Served mixture{_change(labels, shares)}", y="share", percent=True, panels=panels, **over_steps(run)
    )


def labels_of(groups: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Return the names of groups of domains, those of single ones without what they share."""
    alone = [name for name, members in groups if list(members) == [name]]
    labels = dict(zip(alone, without_prefix(alone), strict=True))
    return [labels.get(name, name) for name, _ in groups]


def _token_shares(run: Run, groups: Sequence[tuple[str, Sequence[str]]]) -> dict[int, Curve]:
    """Return each group's share of the tokens served between two logs."""
    found: dict[int, Curve] = {}
    logs = spaced(tokens_at(run), _BLOCKS)
    steps, spent = [step for step, _ in logs], np.diff([tokens for _, tokens in logs])
    for at, (_, members) in enumerate(groups):
        own = np.diff(tokens_of(run, members, steps))
        curve = [(step, mine / all_) for step, mine, all_ in zip(steps[1:], own, spent, strict=True) if all_ > 0]
        if curve:
            found[at] = curve
    return found


def _change(labels: Sequence[str], shares: NDArray[np.float64]) -> str:
    if len(shares) == 1:
        return " of the one interval so far"
    moved = shares[-1] - shares[0]
    at = int(np.abs(moved).argmax())
    if abs(moved[at]) < 0.01:
        return ": the same at the beginning and at the end"
    verb = "rose" if moved[at] > 0 else "fell"
    return f": {middle(labels[at], 28)} {verb} from {percent(shares[0, at], 0)} to {percent(shares[-1, at], 0)}"


def epochs_chart(runs: Sequence[Recorded]) -> Chart | None:
    """How often each domain's rows were served by then."""
    run = runs[0].run
    groups = [(name, [name]) for name, _ in most_served(run, PANELS) if run.pool.get(name)]
    rest = [name for name in {**run.pool, **run.served} if name not in dict(groups)]
    starts, stops, counts, _ = over_time(run, [*groups, ("rest", rest)])
    if not starts or not groups:
        return None
    total = counts.cumsum(0)[:, :-1] / np.array([run.pool[name] for name, _ in groups])
    curves = {
        name: [(starts[0], 0.0), *zip(stops, total[:, at].tolist(), strict=True)] for at, (name, _) in enumerate(groups)
    }
    labels, caps, panels = labels_of(groups), run.caps, lines([("", curves)])
    one = len(set(caps.values())) == 1 and len(caps) >= len(run.pool)
    for at, (domain, _) in enumerate(groups) if not one else ():
        if domain in caps:
            own, colour = (at, 0) if len(panels) > 1 else (0, at)
            ends, name = [starts[0], stops[-1]], f"{labels[at]}, cap"
            cap = Series(name=name, x=ends, y=[caps[domain]] * 2, look="dashed", colour=colour)
            panels[own] = replace(panels[own], series=[*panels[own].series, cap])
    level = ("cap", next(iter(caps.values()))) if one else None
    at = int(total[-1].argmax())
    told = f"{middle(labels[at], 28)} was served most often: {total[-1, at]:.2f} times over"
    told += since(run.served_since)
    return Chart(headline=told, y="epochs", panels=panels, level=level, **over_steps(run))


def composition_chart(runs: Sequence[Recorded]) -> Chart | None:
    """Each domain's share of what was served, and of the pool."""
    run = runs[0].run
    all_served, all_pool = sum(run.served.values()), sum(run.pool.values())
    if not all_served or not all_pool:
        return None
    groups = domain_rows(run, _BARS)
    shares, fair = [rows / all_served for _, rows, _ in groups], [rows / all_pool for _, _, rows in groups]
    names = labels_of(domain_groups(run, _BARS))
    series = [Series(name="served rows", y=shares)]
    step, total = (tokens_at(run) or [(0, 0.0)])[-1]
    if total:
        alone = [float(tokens_of(run, group, [step])[0]) / total for _, group in domain_groups(run, _BARS)]
        series.append(Series(name="served tokens", y=alone, colour=4))
    series.append(Series(name="pool rows", y=fair, colour=-1))
    ratios = [(share / base, name) for share, base, name in zip(shares, fair, names, strict=True) if base]
    ratios = sorted(ratios, reverse=True)
    above = [f"{middle(name, 28)} {ratio:.2f}" for ratio, name in ratios[:3] if ratio >= min(ratios[0][0], 1.02)]
    most, (least, least_name) = ratios[0][0], ratios[-1]
    told = f"Times their share of the pool: {', '.join(above)}; least {middle(least_name, 28)} {least:.2f}"
    if most < 1.02 and least > 0.98:
        told = "Domains are served in the proportions of the pool"
    return Chart(headline=told, kind="bars", x="share", percent=True, names=names, panels=[Panel(series=series)])
