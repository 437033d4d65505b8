"""Single rows for a report: most and never served, around the cut, heaviest and lightest, with text and reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from dataflex.errors import DataError
from dataflex.plan.domains import Rows
from dataflex.record.chart import Json, table
from dataflex.record.chosen import FIXED, chosen_notes, row_texts
from dataflex.record.digest import since
from dataflex.record.order import By, floats, order
from dataflex.record.recorded import Recorded, spaced
from dataflex.record.text import number

_ROWS = 30
_TEXT, _END = 600, 250  # characters of a text, and those of its end where it is longer
_TREND = 24
_VALUES = 24
"""Distinct values up to which a raw column is told of value by value."""
_READ_BYTES = 2**30
"""Size of the files up to which texts are looked up."""


def rows_section(view: Recorded) -> Json:
    """Return notes and tables of single rows of a run; a note alone where its record does not tell them."""
    found = view.rows
    if found is None:
        return {"notes": [f"Single rows cannot be shown: {told}" for told in view.no_rows]}
    chosen = {caption: rows for caption, rows in _tabs(found) if len(rows)}
    every = np.unique(np.concatenate(list(chosen.values()))) if chosen else np.zeros(0, np.int64)
    texts, note = _texts(found, every)
    tables = [_table(caption, found, rows, texts) for caption, rows in chosen.items()]
    return {"notes": [note] if note else [], "tables": [*tables, *_by_value(found)]}


def _tabs(found: pa.Table) -> Iterator[tuple[str, Rows]]:
    """Yield a caption and the rows under it, for each order that the record has something for."""
    every = np.arange(found.num_rows, dtype=np.int64)

    def ordered(by: By) -> Rows:
        try:
            return order(found, every, by, every=False)
        except DataError:  # there is nothing to order by: no weights, no cut
            return every[:0]

    near = ordered("near-cut")
    above = floats(found, "score")[near] >= floats(found, "cut")[near]
    never, from_then = ordered("never"), since(chosen_notes(found)["since"])
    yield "Most served", ordered("most")[:_ROWS]
    yield f"Never served{from_then} ({len(never):,})", np.array(spaced(never.tolist(), _ROWS), np.int64)
    yield "Just above the cut", near[above][:_ROWS]
    yield "Just below the cut", near[~above][:_ROWS]
    yield "Heaviest", ordered("heaviest")[:_ROWS]
    yield "Lightest", ordered("lightest")[:_ROWS]


def _raw(found: pa.Table) -> list[str]:
    """Return the names of the raw columns."""
    derived = ("score_", "rank_", "credit_")
    return [name for name in found.column_names if name not in FIXED and not name.startswith(derived)]


def _texts(found: pa.Table, rows: Rows) -> tuple[dict[int, str], str]:
    """Return beginning and end of the text of rows, where answers are, and a note where it is not looked up."""
    size = sum(file.get("size") or 0 for one in chosen_notes(found)["sources"] for file in one["files"])
    if size > _READ_BYTES:
        return {}, f"Texts are not looked up in files of {size / 2**30:.1f} GiB; 'dataflex rows RUN --text' reads them."
    texts = row_texts(found, rows)
    return {
        row: text if len(text) <= _TEXT else f"{text[: _TEXT - _END]} [..] {text[-_END:]}"
        for row, text in texts.items()
    }, ""


def _table(caption: str, found: pa.Table, rows: Rows, texts: dict[int, str]) -> Json:
    """Return one table of rows; columns without a value are left out."""
    part = found.take(pa.array(rows))
    told = {one["interval"]: one for one in chosen_notes(found)["decisions"]}
    intervals = [name for name in found.column_names if name.startswith("score_") and name[6:].isdigit()]
    trends = part.select(spaced(intervals, _TREND)).to_pylist()
    lines = part.select([*FIXED, *_raw(found)]).to_pylist()
    columns: dict[str, tuple[str, list[Any]]] = {"row": ("count", [line["row"] for line in lines])}
    columns["text"] = ("text", [texts.get(line["row"]) for line in lines])
    columns["domain"] = ("choice", [line["domain"] for line in lines])
    columns["why"] = ("text", [_why(line, told) for line in lines])
    columns["served"] = ("count", [line["times_served"] for line in lines])
    columns["last at step"] = ("count", [line["last_served"] for line in lines])
    columns["score"] = ("number", [line["score"] for line in lines])
    columns["percentile"] = ("share", [_percentile(line, told) for line in lines])
    trend = [[value for value in each.values() if value is not None] for each in trends]
    columns["scores over time"] = ("trend", [each if len(each) > 1 else None for each in trend])
    columns["weight"] = ("number", [line["weight"] for line in lines])
    columns["tokens"] = ("count", [line["tokens"] for line in lines])
    for name in _raw(found):
        values = [line[name] for line in lines]
        numbers = all(isinstance(value, int | float) for value in values if value is not None)
        kind = "choice" if len(set(map(str, values))) <= _VALUES else "number" if numbers else "text"
        as_text = kind != "number"
        columns[name] = (kind, [str(value)[:_TEXT] if as_text and value is not None else value for value in values])
    columns["from"] = ("text", [_origin(line) for line in lines])
    kept = {name: of for name, of in columns.items() if any(value is not None for value in of[1])}
    cells = list(zip(*(values for _, values in kept.values()), strict=True))
    return table(caption, [(name, kind) for name, (kind, _) in kept.items()], cells)


def _origin(line: dict[str, Any]) -> str:
    """Return file and line of a row, or its data set and place; of a packed row those of each document."""
    if line.get("documents") is not None:
        return "; ".join(map(_origin, line["documents"]))
    name = str(line["file"]).rpartition("/")[2] if line["file"] else str(line["dataset"])
    place = f":{line['line']}" if line["line"] is not None else ""
    if not place and line["position"] is not None:
        place = f", row {line['position']}"
    return f"{name}{place}" + (f" (id {line['id']})" if line["id"] is not None else "")


def _percentile(line: dict[str, Any], told: dict[int, Json]) -> float | None:
    """Return the share of the scored rows of a row's latest decision whose score is not above its own."""
    scored = told.get(line["decision"], {}).get("scored")
    return None if line["rank"] is None or not scored else 1.0 - (line["rank"] - 1) / scored


def _why(line: dict[str, Any], told: dict[int, Json]) -> str | None:
    """Return why a row was served or not, in words."""
    one = told.get(line["decision"])
    if one is None:
        return "no selector had it in its pool" if told else None
    why = f"kept in {line['times_chosen']} of {len(told)} decisions; in that of step {one['start_step']} "
    why += "kept" if line["chosen"] else "not kept"
    if line["rank"] is not None:
        why += f", rank {line['rank']} of {one['scored']}"
        if one["cut"] is not None:
            why += f", the cut is at {number(one['cut'])} and {one['prefers']} scores are kept"
    if line["nearest_target"] is not None:
        why += f"; nearest to {line['nearest_target']}"
        why += f", row {line['nearest_row']}" if line["nearest_row"] is not None else ""
    served = line["times_served"] or 0
    return why + ("; served beside the selection" if served > 0 and not line["times_chosen"] else "")


def _by_value(found: pa.Table) -> Iterator[Json]:
    """Yield a table for each raw column with few values: how often their rows were served."""
    times = floats(found, "times_served")
    if np.isnan(times).any() or not times.sum():
        return
    for name in _raw(found):
        if pa.types.is_nested(found.column(name).type):  # lists have no few values
            continue
        coded = found.column(name).combine_chunks().dictionary_encode()
        if not 1 < len(coded.dictionary) <= _VALUES:
            continue
        code = coded.indices.fill_null(len(coded.dictionary)).to_numpy(zero_copy_only=False)
        rows = []
        for at, value in enumerate([*coded.dictionary.to_pylist(), None]):
            mine = code == at
            size, served = int(mine.sum()), float(times[mine].sum())
            share, fair = served / float(times.sum()), size / found.num_rows
            if size:
                rows.append(
                    [str(value)[:_TEXT], served, share, size, fair, share / fair, float((times[mine] == 0).mean())]
                )
        columns = [("value", "text"), ("served", "count"), ("of served", "share"), ("rows", "count")]
        columns += [("of pool", "share"), ("times its share", "number"), ("never served", "share")]
        yield table(f"By {name}{since(chosen_notes(found)['since'])}", columns, rows)
