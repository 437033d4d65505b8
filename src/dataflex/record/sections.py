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
from dataflex.record.chart import Chart
from dataflex.record.clock import PHASES
from dataflex.record.curves import AGGREGATES, held_out, seconds_at, tokens_at
from dataflex.record.digest import DECIDING, Run, domain_groups, domain_rows, higher_is_better
from dataflex.record.recorded import Recorded
from dataflex.record.text import duration, middle, number, percent, signed
from dataflex.record.warnings import warnings
from dataflex.version import __version__

FORMAT = 1
"""Version of the mapping; keys are added without a new one."""
_TEXT = 2000
_YAML = 60_000
_ROWS = 200
_DIGITS = 6
_SMALL = 0.005

Json = dict[str, Any]


def table(caption: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[Any]], note: str = "") -> Json:
    """Return a table; a column is a name and what is in it.

    That is text, count, number, share, seconds, signed, choice (a text to filter by) or trend (numbers in order).
    """
    names = [{"name": name, "kind": kind} for name, kind in columns]
    left = len(rows) - _ROWS
    note = f"{note} The first {_ROWS} of {len(rows):,} lines." if left > 0 else note
    return {"caption": caption, "note": note.strip(), "columns": names, "rows": [list(row) for row in rows[:_ROWS]]}


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
        ("cost", "Cost", ("seconds",), _cost(runs)),
        ("warnings", "Warnings", (), {"notes": told or ["Nothing that this report looks for was found."]}),
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
            "sentences": [_decided(view), _costs(view.run), _helped(runs)],
            "missing": [f"{each.title}: {line}" if len(runs) > 1 else line for each in runs for line in each.left_out],
            "sections": sections,
        }
    )


def clean(value: Any) -> Any:
    """Return JSON values with printable text of limited length and numbers of six significant digits."""
    if isinstance(value, str):
        text = printable(value[: _YAML + 1])
        most = _YAML if "\n" in text else _TEXT
        return text if len(text) <= most else text[: most - 2] + ".."
    if isinstance(value, Mapping):
        return {clean(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
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
    told = f"What was decided: {names} decided {len(decisions)} times, and" if names else "What was decided: no rows;"
    told += f" {served:,.0f} sequences"
    told += f" were served out of {pool:,} rows" if pool else " were served"
    shares = [
        (rows / served - size / pool, name, rows / served, size / pool)
        for name, rows, size in domain_rows(run, 10**9)
        if served and pool
    ]
    if len(shares) > 1:
        most, least = max(shares), min(shares)
        if most[0] < _SMALL:
            told += ", every domain in its share of the pool"
        else:
            told += f"; {middle(most[1], 40)} got {percent(most[2], 0)} instead of {percent(most[3], 0)}"
            told += f", {middle(least[1], 40)} {percent(least[2], 0)} instead of {percent(least[3], 0)}"
    if "weighter" in run.methods:
        ess = run.weight_curve("ess")
        told += f"; weighter {run.methods['weighter'][0]} weighed them"
        told += f", which left {percent(sum(value for _, value in ess) / len(ess), 0)} effective" if ess else ""
    return told + "."


_ASIDE = ("ledger", "reference")  # phases that are neither training nor a decision


def steps_bought(run: Run) -> float | None:
    """Return the training steps that the seconds beside training would have bought; None where that is not known."""
    spent = run.phase_seconds()
    training, beside = spent.get("training", 0.0), sum(spent.get(phase, 0.0) for phase in (*DECIDING, *_ASIDE))
    return beside * run.steps_done / training if training and run.steps_done else None


def _costs(run: Run) -> str:
    spent = run.phase_seconds()
    if not spent:
        return "What it cost: the record has no times."
    deciding, bought = sum(spent.get(phase, 0.0) for phase in DECIDING), steps_bought(run)
    told = f"What it cost: deciding took {duration(deciding)}, {percent(deciding / run.wall_seconds)} of the run's "
    told += duration(run.wall_seconds)
    told += "".join(f", the {phase} {duration(spent[phase])}" for phase in _ASIDE if phase in spent)
    if bought is not None:
        told += f"; that would have bought {bought:.0f} more training steps beside the {run.steps_done} done"
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
        gap = mine[1] - theirs[1]
        told += f"; {other.title} ended at {number(theirs[1])} (step {theirs[0]}), so this run is "
        told += f"{number(abs(gap))} {'lower' if gap < 0 else 'higher'}" if gap else "equal"
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
                notes.append(f"{view.title} has no {what} in its record, so that it is not compared at equal {what}.")
    return {"tables": [table("Losses and metrics", columns, rows)] if rows else [], "notes": notes}


def _domains(view: Recorded) -> Json:
    run = view.run
    served, pool = sum(run.served.values()), sum(run.pool.values())
    if not served:
        return {}
    logged = run.stepped[-1] if run.stepped else {}
    all_tokens = sum(value or 0.0 for key, value in logged.items() if key.startswith("dataflex/tokens/"))
    rows = []
    for (name, count, size), (_, members) in zip(domain_rows(run, _ROWS), domain_groups(run, _ROWS), strict=True):
        share, fair = count / served, size / pool if pool else None
        tokens = [logged.get(f"dataflex/tokens/{each}") for each in members]
        known = sum(tokens) if tokens and None not in tokens else None  # type: ignore[arg-type]
        rows.append([name, round(count), share, known, known / all_tokens if known and all_tokens else None])
        rows[-1] += [size, fair, share / fair if fair else None, count / size if size else None]
    columns = [("domain", "text"), ("rows served", "count"), ("of rows", "share"), ("tokens", "count")]
    columns += [("of tokens", "share"), ("pool rows", "count"), ("of pool", "share"), ("times its share", "number")]
    columns += [("epochs", "number")]
    tables = [table("Domains: what was served of what there is", columns, rows)]
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
    if len(rows) > _ROWS:
        rows = [*rows[: _ROWS // 2], *rows[-(_ROWS // 2) :]]
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


def _cost(runs: Sequence[Recorded]) -> Json:
    run = runs[0].run
    spent = run.phase_seconds()
    if not spent:
        return {}
    meant = {"training": PHASES["train"], "evaluation": PHASES["evaluate"]}
    rows = [
        [name, seconds, seconds / run.wall_seconds, meant.get(name, PHASES.get(name, ""))]
        for name, seconds in spent.items()
    ]
    rows.append(["all", run.wall_seconds, 1.0, "the phases add up to it"])
    columns = [("phase", "text"), ("seconds", "seconds"), ("share", "share"), ("what it is", "text")]
    notes = []
    if (bought := steps_bought(run)) is not None:
        each = spent["training"] / run.steps_done
        notes.append(
            f"Deciding would have bought {bought:.1f} training steps at {each:.3g} s each, "
            f"{percent(bought / run.steps_done)} of the {run.steps_done} that were done."
        )
    tables = [table("Seconds by phase", columns, rows)]
    passes = _passes(run)
    if passes:
        columns = [
            ("passes over", "text"),
            ("sequences", "count"),
            ("F", "count"),
            ("B", "count"),
            ("how counted", "text"),
        ]
        tables.append(table("Passes of single sequences (F forward, B backward)", columns, passes))
    return {"notes": notes, "tables": tables}


def _passes(run: Run) -> list[list[Any]]:
    """Return the forward and backward passes of training and, where a pool was scored, of the selector."""
    from dataflex.config.build import method_block

    served = round(sum(run.served.values()))
    if not served:
        return []
    rows: list[list[Any]] = [["training", served, served, served, "each sequence served"]]
    scored = sum(round((event.get("scores") or {}).get("scored") or 0) for event in run.planned)
    selector, signals = run.dynamic.get("selector"), run.dynamic.get("signals")
    budget = signals.get("budget") if isinstance(signals, Mapping) else None
    if not scored or not isinstance(selector, Mapping):
        return rows
    if budget is not None:
        return [*rows, [f"selector {selector.get('name')}", None, None, None, f"within {budget} of the training's own"]]
    problems: list[str] = []
    given = {key: value for key, value in selector.items() if value is not None}
    method = method_block("selector", given, "selector", problems)
    if problems or method is None:
        return [*rows, [f"selector {selector.get('name')}", scored, None, None, "rows that were given a score"]]
    forward, backward = method.requires.passes.over_pool(len(method.targets))
    told = f"rows that were given a score; {method.cost}"
    return [*rows, [f"selector {method.name}", scored, round(scored * forward), round(scored * backward), told]]


def _repeat(runs: Sequence[Recorded]) -> Json:
    view = runs[0]
    tables, texts, notes = [], [], []
    config = redacted(view.run.config)
    if config:
        texts.append({"title": "Resolved configuration", "text": as_yaml(config)})
        notes.append(
            f"dataflex train FILE, with the configuration below in FILE; dataflex report {shlex.quote(view.title)}"
        )
    else:
        notes.append("The record does not hold the configuration.")
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
        flat = [_flat(redacted(each.run.config)) for each in runs]
        keys = list(dict.fromkeys(key for each in flat for key in each))
        rows = [[key, *(each.get(key, "-") for each in flat)] for key in keys]
        rows = [row for row in rows if len(set(row[1:])) > 1]
        tables.append(
            table("Differences in configuration", [("key", "text"), *((title, "text") for title in titles)], rows)
        )
    return {"notes": notes, "tables": tables, "texts": texts}


def _last_digest(run: Run) -> str:
    digest = run.planned[-1].get("digest") if run.planned else None
    return digest if isinstance(digest, str) else "-"


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """Return dotted keys and the text of their values."""
    if isinstance(value, Mapping) and value:
        parts = [_flat(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()]
        return {key: text for part in parts for key, text in part.items()}
    return {path: "null" if value is None else str(value)} if path else {}
