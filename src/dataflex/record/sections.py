"""What the page says, as plain values: three sentences, then sections of notes, charts and tables.

``dataflex report --json`` prints the very mapping that the page is made of, so both say the same; docs/report.md lists
its keys. Text out of a record has its control characters escaped and its length limited here, once for both.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dataflex.config.mappings import as_yaml
from dataflex.printable import printable, redacted
from dataflex.record.chart import LISTED, Chart, Json, table
from dataflex.record.cost import cost_section, cost_sentence
from dataflex.record.curves import (
    AGGREGATES,
    at_equal_compute,
    held_out,
    not_yet_measured,
    seconds_at,
    tokens_at,
    tokens_of,
)
from dataflex.record.digest import Run, domain_groups, domain_rows, higher_is_better, since
from dataflex.record.recorded import Recorded
from dataflex.record.text import duration, middle, number, percent, signed, without_prefix
from dataflex.record.warnings import warnings
from dataflex.version import __version__

FORMAT = 1
"""Version of the mapping; keys are added without a new one."""
_TEXT = 2000
_YAML = 60_000
_DIGITS = 6
_SMALL = 0.005


def report_of(runs: Sequence[Recorded], charts: Mapping[str, Chart], rows: Json) -> Json:
    """Return everything that the page of ``runs`` says; ``rows`` is the section of single rows."""
    view = runs[0]
    told = warnings(runs)
    parts = (
        ("loss", "Loss and held-out curves", ("compared", "loss", "heldout", "domain_loss"), _losses(runs)),
        ("mixture", "Mixture over time", ("mixture", "epochs", "composition"), _domains(view)),
        ("rows", "Rows", (), rows),
        ("scores", "Scores", ("scores", "histogram", "ranking", "overlap", "coverage", "repeats"), _decisions(view)),
        ("weights", "Weights, ledger and signals", ("weights", "ledger", "signals"), _accounts(view)),
        ("cost", "Cost", ("seconds",), cost_section(view.run)),
        (
            "warnings",
            f"Warnings ({len(told)})" if told else "Warnings",
            (),
            {"notes": told or ["Nothing that this report looks for was found."]},
        ),
        ("repeat", "How to repeat it", (), _repeat(runs)),
    )
    sections = []
    for key, title, names, content in parts:
        made = [{"key": name, **asdict(charts[name])} for name in names if name in charts]
        section = {"id": key, "title": title, "notes": [], "charts": made, "tables": [], "texts": [], **content}
        if not made and not section["tables"] and not section["notes"]:
            section["notes"] = ["The record has nothing for this section."]
        sections.append(section)
    return clean(
        {
            "format": FORMAT,
            "dataflex": __version__,
            "title": view.title,
            "runs": [_identity(each) for each in runs],
            "sentences": [_decided(view), cost_sentence(view.run), _helped(runs)],
            "missing": [f"{each.title}: {line}" if len(runs) > 1 else line for each in runs for line in each.left_out],
            "sections": sections,
        }
    )


def clean(value: Any, digits: int = _DIGITS) -> Any:
    """Return JSON values with printable text of limited length and numbers of at most ``digits`` significant digits."""
    if isinstance(value, str):
        text = printable(value[: _YAML + 1])
        most = _YAML if "\n" in text else _TEXT
        return text if len(text) <= most else text[: most - 2] + ".."
    if isinstance(value, Mapping):
        return {clean(str(key)): clean(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def _identity(view: Recorded) -> Json:
    run = view.run
    space = run.started.get("row_space") or {}
    return {
        "title": view.title,
        "run": run.started.get("run"),
        "finished": run.finished is not None,
        "steps": run.steps_done,
        "total_steps": run.total_steps,
        "methods": {kind: name for kind, (name, _) in run.methods.items()},
        "fingerprint": space.get("fingerprint"),
        "seconds": run.wall_seconds,
    }


# -- the three sentences -----------------------------------------------------------------------------------------


def _decided(view: Recorded) -> str:
    run = view.run
    names = ", ".join(f"{kind} {name}" for kind, (name, _) in run.methods.items() if kind != "weighter")
    decisions = [event for event in run.planned if event["kind"] == "dynamic"]
    if not run.planned:
        return "What was decided: nothing is recorded of what was served."
    served, pool = sum(run.served.values()), sum(run.pool.values())
    told = f"What was decided{since(run.served_since)}: "
    told += f"{names} decided {len(decisions)} times, and" if names else "no rows;"
    told += f" {served:,.0f} sequences"
    told += f" were served out of {pool:,} rows" if pool else " were served"
    domains = domain_rows(run, 10**9) if served and pool else []
    shares = [
        (rows / served - size / pool, name, rows / served, size / pool)
        for name, (_, rows, size) in zip(without_prefix([name for name, _, _ in domains]), domains, strict=True)
    ]
    if len(shares) > 1:
        ordered = sorted(shares, reverse=True)
        if ordered[0][0] < _SMALL:
            told += ", every domain in its share of the pool"
        else:
            named = [each for each in ordered[:-1][:2] if each[0] >= _SMALL] + ordered[-1:]
            told += "; " + ", ".join(
                f"{middle(name, 40)}{'' if at else ' got'} {percent(now, 0)} instead of {percent(fair, 0)}"
                for at, (_, name, now, fair) in enumerate(named)
            )
    if "weighter" in run.methods:
        ess = run.weight_curve("ess")
        told += f"; weighter {run.methods['weighter'][0]} weighed them"
        told += f", which left {percent(sum(value for _, value in ess) / len(ess), 0)} effective" if ess else ""
    return told + "."


def _helped(runs: Sequence[Recorded]) -> str:
    run = runs[0].run
    key = held_out([run])
    if key is None:
        return "Did it help: nobody knows, since no held-out loss was measured (eval_dataset, eval_steps)."
    curve = run.metrics()[key]
    if len(curve) < 2:
        told = f"Did it help: {key} was measured once, {number(curve[0][1])} at step {curve[0][0]}"
    else:
        verb = "fell" if curve[-1][1] < curve[0][1] else "rose"
        told = f"Did it help: held-out loss ({key}) {verb} from {number(curve[0][1])} at step {curve[0][0]} to "
        told += f"{number(curve[-1][1])} at step {curve[-1][0]}"
        step, best = min(curve, key=lambda point: point[1])
        told += f" (lowest {number(best)} at step {step})" if best < curve[-1][1] else ""
    for other in runs[1:2]:
        shared = held_out([run, other.run])
        if shared is None:
            told += f"; {other.title} has no held-out loss to compare with"
            continue
        mine, theirs = run.metrics()[shared][-1], other.run.metrics()[shared][-1]
        if (mine[0] > 0) != (theirs[0] > 0):
            told += f"; {other.title} was measured at step {theirs[0]} alone, which compares with nothing"
            continue
        gap = mine[1] - theirs[1]
        where = f"step {theirs[0]}" + (f", {shared}" if shared != key else "")
        told += f"; {other.title} ended at {number(theirs[1])} ({where}), so this run is "
        told += f"{number(abs(gap))} {'lower' if gap < 0 else 'higher'}" if gap else "equal"
        if (equal := at_equal_compute([runs[0], other], shared)) is not None:
            by_then, (one, two) = equal
            if one is None or two is None:
                told += f", {not_yet_measured([runs[0], other], equal)}"
            else:
                word = "lower" if one < two else "higher"
                told += f", at equal compute ({duration(by_then)}) {number(abs(one - two))} {word}"
    if len(runs) == 1:
        told += "; against what a plain run would have reached, give that run too"
    return told + "."


# -- sections ----------------------------------------------------------------------------------------------------


def _losses(runs: Sequence[Recorded]) -> Json:
    columns = [("", "text"), ("first", "number"), ("at step", "count"), ("last", "number"), ("at step", "count")]
    columns += [("best", "number"), ("at step", "count")]
    rows = []
    for view in runs:
        curves = {
            "train loss": view.run.logged("loss"),
            "unweighted train loss": view.run.logged("dataflex/plain_loss"),
        }
        metrics = view.run.metrics()
        order = [*(key for key in AGGREGATES if key in metrics), *(key for key in metrics if key not in AGGREGATES)]
        curves |= {key: metrics[key] for key in order}
        for name, curve in curves.items():
            higher = False if name.endswith("loss") else higher_is_better(name)
            best = [] if higher is None or not curve else [(max if higher else min)(curve, key=lambda each: each[1])]
            if curve:
                points = [value for step, value in (curve[0], curve[-1], *best) for value in (value, step)]
                rows.append([*([view.title] if len(runs) > 1 else []), name, *points, *[None] * (6 - len(points))])
    columns = [*([("run", "text")] if len(runs) > 1 else []), *columns]
    notes = []
    for view in runs if len(runs) > 1 else ():
        for what, known in (("tokens", tokens_at(view.run)), ("seconds", seconds_at(view.run))):
            if not known:
                told = f"has no {what} of all its steps in its record"
                notes.append(f"{view.title} {told}, so that it is not compared at equal {what}.")
    tables = [table("Losses and metrics", columns, rows)] if rows else []
    return {"tables": [*tables, *_domain_losses(runs)], "notes": notes}


def _domain_losses(runs: Sequence[Recorded]) -> list[Json]:
    """Return the training loss of each domain as numbers, the most served first."""
    found = [(view, view.run.by_domain("loss"), view.run.served) for view in runs]
    rows = []
    for view, curves, served in found:
        for name, curve in sorted(curves.items(), key=lambda item: -served.get(item[0], 0.0)):
            values = [value for _, value in curve]
            numbers = [values[0], values[-1], values[-1] - values[0], min(values), max(values), len(values)]
            rows.append([*([view.title] if len(runs) > 1 else []), name, *numbers, round(served.get(name, 0.0))])
    columns = [*([("run", "choice")] if len(runs) > 1 else []), ("domain", "text"), ("first", "number")]
    columns += [("last", "number"), ("change", "signed"), ("lowest", "number"), ("highest", "number")]
    columns += [("logs", "count"), ("rows served", "count")]
    note = "Mean token loss between two logs, before any weights."
    return [table("Training loss by domain", columns, rows, note)] if rows else []


def _domains(view: Recorded) -> Json:
    run = view.run
    served, pool = sum(run.served.values()), sum(run.pool.values())
    if not served:
        return {}
    step, all_tokens = (tokens_at(run) or [(0, 0.0)])[-1]
    rows = []
    for (name, count, size), (_, members) in zip(domain_rows(run, LISTED), domain_groups(run, LISTED), strict=True):
        share, fair = count / served, size / pool if pool else None
        tokens = float(tokens_of(run, members, [step])[0]) if all_tokens else None
        rows.append([name, round(count), share, tokens, tokens / all_tokens if tokens else None])
        rows[-1] += [size, fair, share / fair if fair else None, count / size if size else None]
    columns = [("domain", "text"), ("rows served", "count"), ("of rows", "share"), ("tokens", "count")]
    columns += [("of tokens", "share"), ("pool rows", "count"), ("of pool", "share"), ("times its share", "number")]
    columns += [("epochs", "number")]
    note = f"Rows are those served{told}, tokens those of the whole run." if (told := since(run.served_since)) else ""
    tables = [table("Domains: what was served of what there is", columns, rows, note)]
    if view.found is not None:
        last = view.found.details["last"]
        found = sorted(view.found.by_name.items(), key=lambda item: -item[1])
        columns = [("domain", "text"), ("mean over the run", "share"), ("last step", "share")]
        rows = [[name, share, last.get(name)] for name, share in found]
        tables.append(table(f"Proportions found by {view.found.method}", columns, rows))
    return {"tables": tables}


def _decisions(view: Recorded) -> Json:
    planned = view.run.planned
    if not planned:
        return {}
    columns = [("interval", "count"), ("kind", "text"), ("first step", "count"), ("last step", "count")]
    columns += [("rows", "count"), ("pool median", "number"), ("served median", "number"), ("why", "text")]
    rows = []
    for event in planned:
        medians = [(event.get(key) or {}).get("p50") for key in ("scores", "served_scores")]
        reason = event.get("reason")
        rows.append([event["interval"], event["kind"], event["start_step"] + 1, event["stop_step"], event["rows"]])
        rows[-1] += [*medians, reason[:300] if isinstance(reason, str) else ""]
    if len(rows) > LISTED:
        rows = [*rows[: LISTED // 2], *rows[-(LISTED // 2) :]]
    return {"tables": [table(f"Decisions: {len(planned)} intervals, with the methods' own words", columns, rows)]}


def _accounts(view: Recorded) -> Json:
    told, tables = view.run.credited or {}, []
    tokens = told.get("tokens") or {}
    for target, of in (told.get("targets") or {}).items():
        if of.get("now") is None:
            continue
        rows = [
            [name, change, 1e6 * change / tokens[name] if tokens.get(name) else None, tokens.get(name)]
            for name, change in (of.get("domains") or {}).items()
            if change is not None
        ]
        rows = sorted(rows, key=lambda row: row[1])
        others = {**(of.get("others") or {}), "unexplained": of.get("unexplained")}
        rows += [[f"({name})", change, None, None] for name, change in others.items() if change]
        columns = [
            ("domain", "text"),
            ("change of loss", "signed"),
            ("per million tokens", "signed"),
            ("tokens", "count"),
        ]
        note = f"Measured: {number(of.get('before'))} -> {number(of['now'])}"
        note += f" ({signed(of['now'] - (of.get('before') or 0.0))}); negative is a loss that fell."
        tables.append(table(f"Ledger: what changed the loss of {target}", columns, rows, note))
    if view.weighed:
        rows = [
            [end, entry["row"], entry["weight"], entry["times"], entry["domain"], entry["text"][:300]]
            for end in ("most", "least")
            for entry in view.weighed[end]
        ]
        columns = [("", "text"), ("row", "count"), ("weight", "number"), ("times", "count"), ("domain", "text")]
        tables.append(table("Rows that weighed most and least", [*columns, ("text", "text")], rows))
    return {"tables": tables}


def _repeat(runs: Sequence[Recorded]) -> Json:
    view = runs[0]
    tables, texts, notes = [], [], []
    config = _written(view.run)
    if config:
        texts.append({"title": "Resolved configuration", "text": as_yaml(config)})
    notes.append(_commands(runs, config))
    notes += [f"Resumed at step {event['step']} from {event['checkpoint']}." for event in view.run.resumed]
    versions = [each.run.started.get("versions") or {} for each in runs]
    names = list(dict.fromkeys(name for each in versions for name in each))
    facts = [[name, *(str(each.get(name, "-")) for each in versions)] for name in names]
    for name in ("run", "world", "global_batch"):
        facts.append([name, *(str(each.run.started.get(name, "-")) for each in runs)])
    spaces = [each.run.started.get("row_space") or {} for each in runs]
    facts.append(["fingerprint of the rows", *(str(space.get("fingerprint", "-")) for space in spaces)])
    facts.append(["digest of the last plan", *(_last_digest(each.run) for each in runs)])
    titles = [each.title for each in runs] if len(runs) > 1 else ["value"]
    tables.append(table("Versions and fingerprints", [("", "text"), *((title, "text") for title in titles)], facts))
    if len(runs) > 1:
        flat = [_flat(_written(each.run)) for each in runs]
        keys = list(dict.fromkeys(key for each in flat for key in each))
        rows = [[key, *(each.get(key, "-") for each in flat)] for key in keys]
        rows = [row for row in rows if len(set(row[1:])) > 1]
        tables.append(
            table("Differences in configuration", [("key", "text"), *((title, "text") for title in titles)], rows)
        )
    return {"notes": notes, "tables": tables, "texts": texts}


def _written(run: Run) -> dict[str, Any]:
    """Return the configuration as a file has it that begins the run anew."""
    config = dict(redacted(run.config))
    v1 = config.pop("v1", None)
    config = {**v1, "dynamic": config.get("dynamic")} if isinstance(v1, Mapping) else config
    config.pop("resume_from_checkpoint", None)
    return config


def _commands(runs: Sequence[Recorded], config: Mapping[str, Any]) -> str:
    """Return how the first run and this report are made again."""
    again = f"dataflex report {' '.join(shlex.quote(str(each.run_dir)) for each in runs)}"
    if not config:
        return f"The record does not hold the configuration; {again}"
    if not {"model_name_or_path", "model"} & set(config):
        told = (
            "The run was made by a script (dataflex.wrap, or a loop of its own), which is needed again: the record has"
        )
        return f"{told} its settings, below, but neither model nor data; {again}"
    return f"dataflex train FILE output_dir=DIR, with the configuration below in FILE and a new folder as DIR; {again}"


def _last_digest(run: Run) -> str:
    digest = run.planned[-1].get("digest") if run.planned else None
    return digest if isinstance(digest, str) else "-"


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """Return dotted keys and the text of their values."""
    if isinstance(value, Mapping) and value:
        parts = [_flat(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()]
        return {key: text for part in parts for key, text in part.items()}
    return {path: "null" if value is None else str(value)} if path else {}
