"""One HTML page that carries everything it needs: the values of ``sections.py``, plots by Bokeh, no network.

Every text is escaped for HTML, JSON inside the page has no ``<``, and the page forbids itself to load anything.
"""

from __future__ import annotations

import html
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataflex.record.chart import Chart, Json
from dataflex.record.plots import COLOURS, GREY
from dataflex.record.text import duration, middle, number, percent, signed

_TEMPLATE = Path(__file__).with_name("page.html")
_HEIGHT, _SMALL = 300, 170
_DASHES = {"dashed": "6 3", "dotted": "2 3"}
_LONG, _WIDE = 40, 300  # characters from which a cell is broken into lines, and is wide
_FILTERED = 8  # lines from which a table has a filter
_MATH = re.compile(r"(\$)(?=\$)|(\\)(?=[\[(])")


def page(told: Json, charts: Mapping[str, Chart], renewed_after: float | None = None) -> str:
    """Return the page of what ``report_of`` says, with the plots of ``charts``.

    ``renewed_after``: seconds after which the page loads itself anew; None: it does not.
    """
    plots: list[Json] = []
    sections = [_section(at, section, charts, plots) for at, section in enumerate(told["sections"])]
    contents = "".join(
        f'<li><a href="#{_text(section["id"])}">{_text(section["title"])}</a></li>' for section in told["sections"]
    )
    parts = {
        "title": _text(f"DataFlex run {told['title']}"),
        "head": _head(told),
        "contents": contents,
        "body": "\n".join(sections),
        "foot": _foot(told),
        "renewed": f"{renewed_after or 0:.0f}",
        "report": in_script(told),
        "plots": in_script(plots),
        "bokeh": _bokeh("server/static/js/bokeh.min.js").replace("</script", "<\\/script"),
    }
    template = _TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found.group(1)], template)


def in_script(value: Any) -> str:
    """Return JSON that can stand inside a script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _bokeh(name: str) -> str:
    """Return a file of the installed Bokeh."""
    spec = importlib.util.find_spec("bokeh")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / name).read_text(encoding="utf-8")


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _head(told: Json) -> str:
    sentences = "".join(f"<li>{_text(sentence)}</li>" for sentence in told["sentences"])
    runs = []
    for run in told["runs"]:
        of = f" of {run['total_steps']}" if run["total_steps"] else ""
        methods = ", ".join(f"{kind} {name}" for kind, name in run["methods"].items()) or "no method"
        state = "finished" if run["finished"] else "not finished"
        runs.append(f"<li>{_text(run['title'])}: {_text(methods)}; {state}, step {run['steps']}{_text(of)}</li>")
    missing = "".join(f"<li>{_text(line)}</li>" for line in told["missing"])
    left_out = '<section class="notice" aria-label="Missing"><p>Missing, or left out since it cannot be read:</p>'
    left_out += f"<ul>{missing}</ul></section>"
    return f'<ul class="sentences">{sentences}</ul><ul class="meta">{"".join(runs)}</ul>{left_out if missing else ""}'


def _foot(told: Json) -> str:
    from bokeh import __version__

    licence = f'<pre tabindex="0">{_text(_bokeh("LICENSE.txt"))}</pre>'
    made = f"Written by dataflex {_text(told['dataflex'])}. The page loads nothing from anywhere. "
    made += f"Plots: Bokeh {_text(__version__)}, BSD-3-Clause."
    return f"<p>{made}</p><details><summary>Licence of Bokeh</summary>{licence}</details>"


def _section(at: int, section: Json, charts: Mapping[str, Chart], plots: list[Json]) -> str:
    key = _text(section["id"])
    title = f'<h2 id="{key}-title">{at + 1}. {_text(section["title"])}</h2>'
    parts = [f'<section id="{key}" aria-labelledby="{key}-title">{title}']
    if section["id"] == "warnings":
        parts.append("<ul>" + "".join(f"<li>{_text(note)}</li>" for note in section["notes"]) + "</ul>")
    else:
        parts += [f"<p>{_text(note)}</p>" for note in section["notes"]]
    for which, told in enumerate(section["charts"]):
        parts.append(_chart(f"{at} {which}", told, charts[told["key"]], plots))
    tables = [_table(f"{at} {which}", told) for which, told in enumerate(section["tables"])]
    parts += tables if section["id"] != "rows" else [_tabs(section["tables"], tables)]
    for told in section["texts"]:
        text = f'<pre tabindex="0">{_text(told["text"])}</pre>'
        parts.append(f"<details open><summary>{_text(told['title'])}</summary>{text}</details>")
    return "\n".join([*parts, "</section>"])


def _tabs(told: Sequence[Json], tables: Sequence[str]) -> str:
    if not told:
        return ""
    tabs = "".join(
        f'<button type="button" role="tab" id="tab-{at}" aria-controls="pane-{at}">{_text(each["caption"])}</button>'
        for at, each in enumerate(told)
    )
    panes = "".join(
        f'<div role="tabpanel" id="pane-{at}" aria-labelledby="tab-{at}">{each}</div>' for at, each in enumerate(tables)
    )
    return f'<div role="tablist" aria-label="Rows">{tabs}</div>{panes}'


def _cell(value: Any, kind: str) -> str:
    """Return the text of a table's cell."""
    if value is None:
        return "-"
    if isinstance(value, str) or kind in ("text", "choice"):
        return str(value)
    told = {"count": lambda: f"{value:,.0f}", "share": lambda: percent(value), "seconds": lambda: duration(value)}
    return told.get(kind, lambda: (signed if kind == "signed" else number)(value))()


def _table(place: str, told: Json) -> str:
    ident = "table-" + place.replace(" ", "-")
    kinds = [column["kind"] for column in told["columns"]]
    sides = ["" if kind in ("text", "choice") else ' class="n"' for kind in kinds]
    head = "".join(
        f'<th scope="col" aria-sort="none"{side}><button type="button">{_text(column["name"] or "name")}</button></th>'
        for column, side in zip(told["columns"], sides, strict=True)
    )
    lines = []
    for row in told["rows"]:
        cells = []
        for at, (value, kind, side) in enumerate(zip(row, kinds, sides, strict=True)):
            if kind == "trend" and value:
                cells.append(f"<td>{_trend(value)}</td>")
                continue
            text = _cell(value, kind)
            wide = " wide" if len(text) > _WIDE else ""
            look = f' class="long{wide}"' if len(text) > _LONG and kind == "text" else side
            cells.append(f'<th scope="row"{look}>{_text(text)}</th>' if at == 0 else f"<td{look}>{_text(text)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    caption = _text(told["caption"])
    tools = [f'<button type="button" class="copy" aria-label="Copy the table: {caption}">Copy</button>']
    if len(lines) >= _FILTERED:
        tools.insert(0, f'<label>Filter <input type="search" aria-label="Filter: {caption}"></label>')
        tools += _choices(told)
    note = f'<p class="how">{_text(told["note"])}</p>' if told["note"] else ""
    return (
        f'<figure class="table" data-table="{place}"><h3 id="{ident}">{caption}</h3>{note}'
        f'<div class="tools">{"".join(tools)}</div><div class="scroll" role="region" tabindex="0" '
        f'aria-labelledby="{ident}"><table aria-labelledby="{ident}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></figure>"
    )


def _choices(told: Json) -> list[str]:
    """Return a choice of one value for each column that rows may be filtered by."""
    found = []
    for at, column in enumerate(told["columns"]):
        known = dict.fromkeys(_cell(row[at], "text") for row in told["rows"]) if column["kind"] == "choice" else {}
        if len(known) > 1:
            name = _text(column["name"])
            options = "".join(f'<option value="{_text(each)}">{_text(middle(each, 40))}</option>' for each in known)
            first = f'<option value="">every {name}</option>'
            found.append(f'<select data-column="{at}" aria-label="{name}">{first}{options}</select>')
    return found


def _trend(values: Sequence[float]) -> str:
    """Return a small curve of numbers."""
    low, high = min(values), max(values)
    points = " ".join(
        f"{80 * at / (len(values) - 1):.1f},{18 - 16 * (value - low) / ((high - low) or 1.0):.1f}"
        for at, value in enumerate(values)
    )
    label = f"{number(values[0])} at first, {number(values[-1])} at last, {number(low)} to {number(high)}"
    line = f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
    title = f"<title>{_text(label)}</title>"
    return f'<svg width="82" height="20" role="img" aria-label="{_text(label)}">{title}{line}</svg>'


def _chart(place: str, told: Json, chart: Chart, plots: list[Json]) -> str:
    ident = "chart-" + place.replace(" ", "-")
    draws = {"bars": _bars, "heat": _heat}
    if chart.kind in draws:
        body = draws[chart.kind](told, ident)
    else:
        body = _plots(told, chart, place, ident, plots)
        body += f'<details class="numbers" data-chart="{place}"><summary>Numbers</summary></details>'
    return f'<figure aria-labelledby="{ident}"><h3 id="{ident}">{_text(told["headline"])}</h3>{body}</figure>'


def _colour(series: Mapping[str, Any]) -> str:
    return GREY if series["colour"] < 0 else COLOURS[series["colour"] % len(COLOURS)]


def _legend(told: Json) -> str:
    """Return the names of the curves beside how they are drawn; each once."""
    several = [panel for panel in told["panels"] if len(panel["series"]) > 1 or len(told["panels"]) == 1]
    every = [series for panel in several for series in panel["series"] if series["name"]]
    named = {series["name"]: series for series in every}
    entries = []
    for name, series in named.items():
        band = series["look"] == "band"
        look = f'stroke="{_colour(series)}" stroke-width="{8 if band else 2}" stroke-opacity="{0.3 if band else 1}"'
        dash = f' stroke-dasharray="{_DASHES[series["look"]]}"' if series["look"] in _DASHES else ""
        sign = f'<svg width="24" height="10" aria-hidden="true"><path d="M0 5H24" {look}{dash}/></svg>'
        entries.append(f'<li title="{_text(name)}">{sign}{_text(middle(name, 48))}</li>')
    if told["level"]:
        entries.append(f"<li>line across: {_text(told['level'][0])} {told['level'][1]:g}</li>")
    entries += ["<li>shaded: warm-up</li>"] if told["spans"] else []
    entries += ["<li>dotted upright: resumed</li>"] if told["marks"] else []
    return f'<ul class="legend">{"".join(entries)}</ul>' if len(entries) > 1 or not several else ""


def _plots(told: Json, chart: Chart, place: str, ident: str, plots: list[Json]) -> str:
    """Return the places of a chart's panels, and add how each is drawn; what it shows are the numbers of the report."""
    small = len(chart.panels) > 3
    panels = []
    for at, (panel, says) in enumerate(zip(chart.panels, told["panels"], strict=True)):
        target = f"{ident}-{at}"
        plots.append(
            {
                "target": target,
                "of": [*map(int, place.split()), at],
                "height": _SMALL if small else _HEIGHT,
                "ticks": 4 if small else 6,
                "x": _plain(panel.x or ("" if small else told["x"]), 60),
                "y": _plain(panel.y or ("" if small else told["y"]), 60),
                "steps": told["x"] == Chart.x,  # or tokens or seconds, which may be many
                "names": [_plain(series["name"] or says["title"], 80) for series in says["series"]],
                "colours": [_colour(series) for series in says["series"]],
            }
        )
        title = (
            f'<h4 title="{_text(says["title"])}">{_text(middle(says["title"], 30 if small else 60))}</h4>'
            if says["title"]
            else ""
        )
        label = ". ".join(filter(None, [told["headline"], says["title"], "Curve; its numbers are below"]))
        panels.append(
            f'<div>{title}<div class="plot" id="{target}" role="img" aria-label="{_text(label)}"></div></div>'
        )
    least, high = ("max(10rem, 22%)", _SMALL) if small else ("22rem", _HEIGHT)
    look = f"--least: {least if len(panels) > 1 else '100%'}; --high: {high}px"
    return f'{_legend(told)}<div class="panels" style="{look}">{"".join(panels)}</div>'


def _plain(text: str, columns: int) -> str:
    """Return a label for Bokeh, which would take what stands between ``$$`` for a formula."""
    return _MATH.sub(lambda found: f"{found.group()}\u2060", middle(text, columns))


def _bars(told: Json, ident: str) -> str:
    every = [series for panel in told["panels"] for series in panel["series"]]
    most = max((value or 0.0 for series in every for value in series["y"]), default=0.0) or 1.0
    rows = []
    for at, name in enumerate(told["names"]):
        bars = []
        for series in every:
            value = series["y"][at] or 0.0
            size = f"{100 * max(value, 0.0) / most:.2f}"
            text = percent(value) if told["percent"] else number(value, 1)
            rect = f'<rect width="{size}%" height="100%" fill="{_colour(series)}"/>'
            bars.append(f'<div title="{_text(series["name"])}"><svg aria-hidden="true">{rect}</svg>{text}</div>')
        rows.append(
            f'<tr><th scope="row" title="{_text(name)}">{_text(middle(name, 32))}</th><td>{"".join(bars)}</td></tr>'
        )
    legend = _legend(told)
    names = " / ".join(series["name"] for series in every)
    names += f" ({told['x']})" if told["x"] != names else ""
    head = f'<thead><tr><th scope="col">name</th><th scope="col">{_text(names)}</th></tr></thead>'
    return f'{legend}<table class="bars" aria-labelledby="{ident}">{head}<tbody>{"".join(rows)}</tbody></table>'


def _heat(told: Json, ident: str) -> str:
    values = [abs(value) for row in told["cells"] for value in row if value is not None]
    most = 1.0 if told["percent"] else max(values, default=0.0) or 1.0
    heads = "".join(f'<th scope="col" title="{_text(name)}">{_text(middle(name, 18))}</th>' for name in told["columns"])
    rows = []
    for name, row in zip(told["names"], told["cells"], strict=True):
        cells = []
        for value in row:
            text = "-" if value is None else percent(value, 0) if told["percent"] else signed(value, 3)
            share = 0.0 if value is None else 55 * abs(value) / most
            tone = COLOURS[0] if told["percent"] or (value or 0.0) < 0 else COLOURS[5]
            cells.append(f'<td style="background: color-mix(in srgb, {tone} {share:.0f}%, transparent)">{text}</td>')
        rows.append(f'<tr><th scope="row" title="{_text(name)}">{_text(middle(name, 28))}</th>{"".join(cells)}</tr>')
    head = f'<thead><tr><th scope="col">{_text(told["x"])}</th>{heads}</tr></thead>'
    return (
        f'<div class="scroll whole" role="region" tabindex="0" aria-labelledby="{ident}"><table class="heat" '
        f'aria-labelledby="{ident}">{head}<tbody>{"".join(rows)}</tbody></table></div>'
    )
