"""A run in at most a hundred columns of text: what ran, how far it got, where time and data went.

Deterministic: the same record gives the same text, whatever the locale, the clock or the terminal.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from dataflex.plan.proportions import ProportionsFile
from dataflex.record.digest import Curve, Event, Run, domain_rows, higher_is_better, since
from dataflex.record.text import WIDTH, cut, duration, labelled, number, percent, short, signed, table, width

_SETTINGS = (
    "model_name_or_path",
    "stage",
    "finetuning_type",
    "dataset",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "cutoff_len",
    "seed",
)
_FIRST, _LAST = 10, 5
_DOMAINS = 40
_BAR = 30
_SAMPLES = 5
_PROBLEMS = 20


def summary(
    run: Run,
    title: str,
    weighed: Mapping[str, Any] | None = None,
    found: ProportionsFile | None = None,
    left_out: Sequence[str] = (),
) -> str:
    """Render the summary of a run; ``left_out`` says what of the record could not be read, one line each."""
    sections = (
        _head(run, title),
        _losses(run),
        _time(run),
        _intervals(run),
        _composition(run),
        _domain_losses(run),
        _ledger(run),
        _found(found),
        _weights(run),
        _weighed(weighed),
        _left_out(left_out),
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _head(run: Run, title: str) -> list[str]:
    started = run.started
    headline = cut(f"DataFlex run {title}", WIDTH)
    lines = [headline, "=" * width(headline)]
    for kind, (name, told) in run.methods.items():
        lines += labelled(kind, [name, *(f"{key} {short(value)}" for key, value in told.items())])
    ledger = run.dynamic.get("ledger")
    if isinstance(ledger, Mapping):
        lines += labelled("ledger", [f"{key} {short(value)}" for key, value in ledger.items() if value is not None])
    settings = {key: run.config.get(key) for key in _SETTINGS}
    for label, values in (("settings", settings), ("schedule", started.get("schedule") or {})):
        lines += labelled(label, [f"{key} {short(value)}" for key, value in values.items() if value is not None])
    data = [f"{sum(run.pool.values()):,} rows in {len(run.pool)} domains"]
    space = started.get("row_space") or {}
    tokens = space.get("tokens")
    tokens = sum(tokens.values()) if isinstance(tokens, Mapping) else tokens
    data += [f"{tokens:,} tokens"] if tokens else []
    data += [f"fingerprint {space['fingerprint']}"] if space.get("fingerprint") else []
    lines += labelled("data", data)
    ranks = [("", started.get("world")), ("global batch ", started.get("global_batch"))]
    lines += labelled("ranks", [f"{what}{short(value)}" for what, value in ranks if value is not None])
    lines += labelled("versions", [f"{name} {version}" for name, version in (started.get("versions") or {}).items()])
    first, *later = run.started_times
    lines += labelled("started", [_utc(first), *([f"again {_utc(later[-1])}"] if later else [])])
    of = f" of {run.total_steps}" if run.total_steps else ""
    state = "finished" if run.finished else "still running, or stopped,"
    lines += labelled("state", [f"{state} at step {run.steps_done}{of}"])
    resumes = [f"at step {event['step']} from {event['checkpoint']}" for event in run.resumed]
    many = [f"{len(resumes)} times, most recently"] if len(resumes) > _LAST else []
    return lines + labelled("resumed", many + resumes[-_LAST:])


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(int(seconds), tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _curve(name: str, curve: Curve, higher: bool | None) -> list[str]:
    cells = [cut(name, 36)]
    best = [] if higher is None else [(max if higher else min)(curve, key=lambda point: point[1])]
    for step, value in (curve[0], curve[-1], *best):
        cells += [number(value), str(step)]
    return cells + [""] * (7 - len(cells))


def _losses(run: Run) -> list[str]:
    train = {"train loss": run.logged("loss"), "unweighted train loss": run.logged("dataflex/plain_loss")}
    rows = [["", "first", "at step", "last", "at step", "best", "at step"]]
    rows += [_curve(name, curve, False) for name, curve in train.items() if curve]
    rows += [_curve(name, curve, higher_is_better(name)) for name, curve in run.metrics().items()]
    lines = table(rows, "<>>>>>>") if len(rows) > 1 else []
    broken = [event for event in run.stepped if "loss" in event.get("nonfinite", ())]
    if broken:
        first = broken[0]["step"]
        lines.append(f"  train loss was not finite in {len(broken)} of {len(run.stepped)} logs, first at step {first}")
    return ["Loss and evaluation", *(lines or ["  nothing logged yet"])]


def _time(run: Run) -> list[str]:
    phases, rows = run.phase_seconds(), []
    for name, seconds in phases.items():
        share = seconds / sum(phases.values())
        rows.append([cut(name, 30), duration(seconds), percent(share), "#" * round(_BAR * share)])
    return [f"Time{since(run.first_step)}: {duration(run.wall_seconds)}", *table(rows, "<>><")] if rows else []


def _intervals(run: Run) -> list[str]:
    planned = run.planned
    if not planned:
        return [] if run.stock else ["Intervals", "  none decided yet"]
    shown = planned if len(planned) <= _FIRST + _LAST + 1 else [*planned[:_FIRST], *planned[-_LAST:]]
    scored = any(event.get("scores") for event in planned)
    rows = [["#", "kind", "steps", "rows", *(["score p50", "served p50"] if scored else [])]]
    for event in shown:
        # Steps are shown as the Trainer logs them: counted from 1, both ends included.
        steps = f"{event['start_step'] + 1}-{event['stop_step']}"
        scores = [number((event.get(key) or {}).get("p50"), 3) for key in ("scores", "served_scores")]
        cells = [str(event["interval"]), cut(str(event["kind"]), 10), steps, f"{event['rows']:,}"]
        rows.append(cells + scores if scored else cells)
    lines = table(rows, "><>>>>"[: len(rows[0])])
    column = max(width(line) for line in lines) + 2
    tails = ["most served domains", *(_most_served(event, WIDTH - column) for event in shown)]
    lines = [(line + " " * (column - width(line)) + tail).rstrip() for line, tail in zip(lines, tails, strict=True)]
    if len(shown) < len(planned):
        lines.insert(1 + _FIRST, f"  ... {len(planned) - len(shown)} more")
    return [f"Intervals: {len(planned)}", *lines]


def _most_served(event: Event, room: int) -> str:
    counts = event.get("domain_counts") or {}
    total = sum(counts.values())
    told = ""
    for name, rows in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        item = f"{', ' if told else ''}{cut(name, 16)} {percent(rows / total if total else 0.0, 0)}"
        if not rows or width(told + item) > room:
            break
        told += item
    return told


def _composition(run: Run) -> list[str]:
    all_served, all_pool = sum(run.served.values()), sum(run.pool.values())
    if not all_served:
        return []
    rows = [["domain", "rows served", "share", "pool rows", "share", "times", "epochs"]]
    for name, count, size in domain_rows(run, _DOMAINS):
        share, fair = count / all_served, size / all_pool if all_pool else 0.0
        times = f"{share / fair:.2f} x" if fair else "-"
        epochs = f"{count / size:.2f}" if size else "-"
        rows.append([cut(name, 28), f"{round(count):,}", percent(share), f"{size:,}", percent(fair), times, epochs])
    return [f"Composition of the served rows{since(run.served_since)}", *table(rows, "<>>>>>>")]


def _domain_losses(run: Run) -> list[str]:
    """Show the unweighted training loss of each domain, most served first."""
    curves, served = run.by_domain("loss"), run.served
    missing = next((event["no_loss_by_domain"] for event in reversed(run.stepped) if "no_loss_by_domain" in event), "")
    told = [f"  not known: {cut(str(missing), WIDTH - 13)}"] if missing else []
    if not curves:
        return ["Training loss by domain", *told] if told else []
    order = sorted(curves, key=lambda name: -served.get(name, 0.0))
    rows = [["", "first", "at step", "last", "at step", "best", "at step"]]
    rows += [_curve(name, curves[name], False) for name in order[:_DOMAINS]]
    more = [f"  ... {len(order) - _DOMAINS} more"] if len(order) > _DOMAINS else []
    return ["Training loss by domain, before any weights", *table(rows, "<>>>>>>"), *more, *told]


def _found(found: ProportionsFile | None) -> list[str]:
    """Show the result of a mixer that looks for proportions: their mean over the run, not those of its last step."""
    if found is None:
        return []
    last, warning = found.details["last"], found.details["warning"]
    rows = [["domain", "mean over the run", "last step"]]
    for name, share in sorted(found.by_name.items(), key=lambda item: -item[1])[:_DOMAINS]:
        rows.append([cut(name, 28), percent(share), percent(last[name]) if name in last else "-"])
    told = textwrap.wrap(f"Warning: {warning}", WIDTH - 2) if warning else []
    return [f"Proportions found by {cut(found.method, 28)}", *table(rows, "<>>"), *(f"  {line}" for line in told)]


def _ledger(run: Run) -> list[str]:
    """Show what each domain did to each target's loss, what else did, and what is unexplained."""
    told = run.credited or {}
    targets = {name: of for name, of in (told.get("targets") or {}).items() if of.get("now") is not None}
    if not targets:
        return []
    tokens, looks = told.get("tokens") or {}, told.get("looks", 0)
    lines = [f"What helped: change of the targets' losses up to step {told.get('looked_at', 0)}, {looks} looks"]
    for name, of in targets.items():
        domains = {domain: change for domain, change in (of.get("domains") or {}).items() if change is not None}
        order = sorted(domains, key=lambda domain: domains[domain])
        kept = order if len(order) <= _DOMAINS else [*order[: _DOMAINS // 2], *order[-(_DOMAINS // 2) :]]
        rows = [[cut(name, 36), "change", "per million tokens", "tokens"]]
        for domain in kept:
            change, count = domains[domain], tokens.get(domain) or 0
            rate = signed(1e6 * change / count) if count else "-"
            rows.append([f"  {cut(domain, 34)}", signed(change), rate, f"{count:,}"])
        if rest := [domain for domain in order if domain not in kept]:
            change, count = sum(domains[domain] for domain in rest), sum(tokens.get(domain) or 0 for domain in rest)
            rate = signed(1e6 * change / count) if count else "-"
            rows.append([f"  {len(rest)} between them", signed(change), rate, f"{count:,}"])
        others = {line: change for line, change in (of.get("others") or {}).items() if change}
        rows += [[f"  {line}", signed(change), "", ""] for line, change in others.items()]
        measured, unexplained = (of["now"] or 0.0) - (of.get("before") or 0.0), of.get("unexplained") or 0.0
        share = f" ({percent(abs(unexplained / measured))})" if measured else ""
        rows.append(["  unexplained", signed(unexplained), share.strip(), ""])
        rows.append([f"  measured: {number(of.get('before'))} -> {number(of['now'])}", signed(measured), "", ""])
        lines += table(rows, "<>>>")
        if of.get("clipping"):
            lines.append(f"  Clipping took {signed(of['clipping'])} off the domains' changes.")
        if of.get("rows") is not None:
            lines.append(f"  Rows' credits, which are of first order, add up to {signed(of['rows'])}.")
    return lines


def _weights(run: Run) -> list[str]:
    """Show the spread of the weights; equal weights are 1."""
    lines = []
    ess, largest = run.weight_curve("ess"), run.weight_curve("max")
    if ess:
        step, least = min(ess, key=lambda point: point[1])
        mean = sum(value for _, value in ess) / len(ess)
        told = f"mean {percent(mean)} of the sequences, lowest {percent(least)} (step {step})"
        lines.append(f"  effective sample size  {told}")
    if largest:
        step, most = max(largest, key=lambda point: point[1])
        lines.append(f"  largest weight         {number(most, 2)} (step {step})")
    curves = [run.weight_curve(key) for key in ("p05", "p50", "p95")]
    if all(curves):
        for word, place in (("first", 0), ("last", -1)):
            low, middle, high = (number(curve[place][1], 3) for curve in curves)
            told = f"5 % {low}, median {middle}, 95 % {high} (step {curves[0][place][0]})"
            lines.append(f"  {word + ' weights':<21}  {told}")
    return ["Weights", *lines] if lines else []


def _weighed(weighed: Mapping[str, Any] | None) -> list[str]:
    if not weighed or not weighed["most"]:
        return []
    lines = [f"Rows that weighed most and least, of {weighed['rows']:,} up to step {weighed['step']}"]
    for entry in (*weighed["most"][:_SAMPLES], *weighed["least"][:_SAMPLES]):
        times = "once" if entry["times"] == 1 else f"{entry['times']} times"
        lines.append(f"  {number(entry['weight'], 3)}  row {entry['row']} of {cut(entry['domain'], 40)}, {times}")
        prompt, arrow, answer = str(entry["text"]).partition(" => ")
        lines += [f"    {cut(prompt, WIDTH - 4)}", *([f"    => {cut(answer, WIDTH - 7)}"] if arrow else [])]
    return lines


def _left_out(problems: Sequence[str]) -> list[str]:
    more = [f"  ... {len(problems) - _PROBLEMS:,} more"] if len(problems) > _PROBLEMS else []
    told = [f"  {cut(problem, WIDTH - 2)}" for problem in problems[:_PROBLEMS]]
    return ["Left out, since it is missing or cannot be read", *told, *more] if problems else []
