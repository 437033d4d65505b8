"""``dataflex rows``: which rows of a run's pool were chosen, printed or written as files to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dataflex.errors import ConfigError, DataError
from dataflex.method import Rows
from dataflex.offline.subset import write_subset
from dataflex.printable import Answer, on_one_line
from dataflex.record.chosen import chosen_notes, chosen_table, places_of, row_texts
from dataflex.record.digest import since
from dataflex.record.order import By, floats, order
from dataflex.record.text import WIDTH, cut, number, table, width
from dataflex.record.where import where as fulfil
from dataflex.score_table import ScoreTable
from dataflex.version import __version__

_TOLD: dict[By, str] = {
    "most": ", served most often first",
    "never": "",
    "near-cut": ", those nearest to the cut of their latest decision",
    "heaviest": ", largest mean weight first",
    "lightest": ", smallest mean weight first",
}
_SHOWN = 20
_END = 40  # columns for the end of a text


def rows(
    run_dir: Path,
    *,
    by: By | None = None,
    where: str | None = None,
    limit: int | None = None,
    text: bool = False,
    export: Path | None = None,
    overwrite: bool = False,
) -> Answer:
    """Return what ``dataflex rows`` prints: the rows that a condition and an order ask for.

    Args:
        run_dir: The run's ``output_dir``, or the ``dataflex`` folder in it.
        by: Which rows and in which order; None: the most served first, with ``where`` all that fulfil it.
        where: A condition on columns, see ``record.where``.
        limit: Most rows; None: 20 to print, all to export.
        text: Whether the rows' text is read from their files.
        export: File, or folder for several data sets, to write the rows to as they stand in their files.
        overwrite: Whether files that no earlier export wrote are replaced.

    Raises:
        DataError: No record, or nothing to order by.
        ConfigError: A condition that cannot be read, or rows that cannot be exported.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit: expected a number of at least 1, found {limit}")
    if overwrite and export is None:
        raise ConfigError("--overwrite: has no effect without --export; remove it")
    if text and export is not None:
        raise ConfigError("--text: has no effect with --export, which writes rows whole; remove it")
    found = chosen_table(run_dir)
    about = chosen_notes(found)
    known = np.arange(found.num_rows, dtype=np.int64)
    if where is not None:
        known = known[fulfil(found, where).to_numpy(zero_copy_only=False)]
    ordered = order(found, known, by or "most", every=where is not None and by is None)
    most = limit or (len(ordered) if export is not None else _SHOWN)
    chosen = ordered[:most]
    if by == "near-cut":
        chosen = chosen[np.argsort(floats(found, "rank")[chosen], kind="stable")]
    if export is not None:
        return _exported(found, about, chosen, export, {"by": by, "where": where, "limit": limit}, overwrite)
    texts = row_texts(found, chosen) if text else None
    that = [f"fulfil {on_one_line(where)}"] if where else []
    that += [f"were never served{since(about['since'])}"] if by == "never" else []
    told = f"{len(chosen):,} of {len(ordered):,} rows{' that ' * bool(that)}{' and '.join(that)}{_TOLD[by or 'most']}:"
    lines = [*_head(found, about), told, *_lines(found, chosen, texts)]
    values = _values(found, about, run_dir, chosen, len(ordered), texts)
    return Answer("\n".join([*lines, *(f"note: {note}" for note in about["notes"])]), values)


# ---- what is printed


def _head(found: pa.Table, about: dict[str, Any]) -> list[str]:
    """Return the finding in one line, and the latest decision in another."""
    times = floats(found, "times_served")
    lines = [f"after step {about['step']:,}, what was served is not known"]
    if not np.isnan(times).any():
        size, served, again = len(times), int((times > 0).sum()), int((times > 1).sum())
        told = f"after step {about['step']:,}: {served:,} of {size:,} rows were served ({served / max(size, 1):.1%})"
        told += since(about["since"])
        lines = [f"{told}, {again:,} of them more than once, up to {int(times.max(initial=0)):,} times"]
    for last in about["decisions"][-1:]:
        told = f"interval {last['interval']}: {last['kept']:,} of {last['pool']:,} rows were kept, "
        told += f"{last['scored']:,} scored"
        if last["cut"] is not None:
            told += f"; the cut is at {last['cut']:.6g}, {last['prefers']} scores are kept"
            told += f", with {last['exceptions']:,} exceptions" if last["exceptions"] else ""
        lines.append(told)
    return [*lines, ""]


def _lines(found: pa.Table, chosen: Rows, texts: dict[int, str] | None) -> list[str]:
    if not len(chosen):
        return []
    part = found.take(pa.array(chosen)).to_pylist()
    shown: dict[str, str] = {"row": ">", "from": "<", "domain": "<", "tokens": ">", "served": ">", "last at": ">"}
    optional = {"score": "score", "rank": "rank", "kept": "chosen", "weight": "weight", "nearest": "nearest_target"}
    shown |= {name: ">" for name, column in optional.items() if any(row[column] is not None for row in part)}
    cells = [list(shown)]
    for row in part:
        places = [_place(each) for each in row["documents"] or [row]]
        origin = cut(str(row["dataset"]), 24) + (f":{places[0]}" if places[0] is not None else "")
        origin += f" and {len(places) - 1} more" if len(places) > 1 else ""
        nearest = "-" if row["nearest_target"] is None else row["nearest_target"]
        if row["nearest_row"] is not None:
            nearest += f" {row['nearest_row']}"
        told = {
            "row": f"{row['row']}",
            "from": origin,
            "domain": cut(str(row["domain"]), 24),
            "tokens": f"{row['tokens']}",
            "served": _or_dash(row["times_served"]),
            "last at": _or_dash(row["last_served"]),
            "score": number(row["score"]),
            "rank": _or_dash(row["rank"]),
            "kept": {True: "yes", False: "no", None: "-"}[row["chosen"]],
            "weight": number(row["weight"], 3),
            "nearest": cut(nearest, 24),
        }
        cells.append([told[name] for name in shown])
    lines = table(cells, "".join(shown.values()))
    if texts is None:
        return lines
    with_text = [lines[0]]
    for line, row in zip(lines[1:], part, strict=True):
        known = any(_place(each) is not None for each in row["documents"] or [row])
        without = "its file is missing, or changed since" if known else "its place in a file is not known"
        with_text += [line, f"      {_excerpt(texts.get(row['row'], f'(no text: {without})'))}"]
    return with_text


def _excerpt(text: str) -> str:
    """Return the beginning and the end of a text, which is where an answer is."""
    text = " ".join(text.split())
    if width(text) <= WIDTH - 6:
        return cut(text, WIDTH - 6)
    end = text[-_END:]
    while width(on_one_line(end)) > _END:
        end = end[1:]
    return f"{cut(text, WIDTH - 7 - _END)} {on_one_line(end)}"


def _place(found: dict[str, Any]) -> int | None:
    """Return the line of a row or document, or its place in the files from 1."""
    if found["line"] is not None:
        return int(found["line"])
    return None if found["position"] is None else int(found["position"]) + 1


def _or_dash(value: Any) -> str:
    return "-" if value is None else f"{value}"


def _values(
    found: pa.Table, about: dict[str, Any], run_dir: Path, chosen: Rows, matching: int, texts: dict[int, str] | None
) -> dict[str, Any]:
    lines = found.take(pa.array(chosen)).to_pylist()
    if texts is not None:
        lines = [{**line, "text": texts.get(line["row"])} for line in lines]
    told = {key: about[key] for key in ("step", "decisions", "notes")}
    return {"run": str(run_dir), "pool": found.num_rows, "matching": matching, **told, "rows": lines}


# ---- what is written


def _exported(
    found: pa.Table, about: dict[str, Any], chosen: Rows, out: Path, asked: dict[str, Any], overwrite: bool
) -> Answer:
    """Write rows as they stand in their files, and return one line for each file."""
    if not len(chosen):
        raise DataError("--export: no row is asked for")
    places = list(places_of(found, chosen))
    lost = len({row for row, _, place in places if place["position"] is None})
    if lost:
        raise ConfigError(
            f"--export: {lost:,} of the {len(chosen):,} rows have no place in a file: they come from a hub, a part of "
            "a data set or a tokenized copy, or another loop read them"
        )
    sources = [one for one in about["sources"] if one["files"]]
    names = [one["name"] for one in sources]
    of_row = found.select(["tokens", "supervised_tokens"]).take(pa.array(chosen))
    tokens = {row: tuple(told.values()) for row, told in zip(chosen.tolist(), of_row.to_pylist(), strict=True)}
    # A document that several packed rows have tokens of is written once; the tokens are those of the rows.
    lines: dict[tuple[str, int], NDArray[np.int64]] = {}
    for row, _, place in places:
        counted = lines.setdefault((place["dataset"], place["position"]), np.zeros(2, dtype=np.int64))
        counted += tokens.pop(row, (0, 0))
    counts = np.array(list(lines.values()))
    everything = ScoreTable(
        datasets=tuple(names),
        dataset_of=np.array([names.index(name) for name, _ in lines]),
        domains=(),
        domain_of=np.zeros(0, dtype=np.int64),
        position=np.array([position for _, position in lines]),
        tokens=counts[:, 0],
        supervised_tokens=counts[:, 1],
        columns={},
        provenance={
            "data": {"sources": sources},
            "config": {"max_samples": True} if any(one["limited"] for one in sources) else {},
        },
    )
    provenance = {
        "rows": {**asked, "step": about["step"]},
        "fingerprint": about["fingerprint"],
        "dataflex": __version__,
    }
    parts = write_subset(
        everything,
        np.arange(len(lines)),
        out,
        order="preference",
        provenance=provenance,
        overwrite=overwrite,
        option="--export",
    )
    return Answer("\n".join(part.tell() for part in parts), {"files": [part.told() for part in parts]})
