"""Writes a subset: the rows of the source files byte for byte, their provenance, and an entry for dataset_info.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.config.data import REMOTE_KEYS
from dataflex.core.aside import aside
from dataflex.core.file_names import file_name_problem
from dataflex.core.protocols import Rows
from dataflex.core.state import atomic_write_text
from dataflex.errors import ConfigError, DataError, UnsupportedError
from dataflex.offline.files import FileRecord, SourceRows
from dataflex.offline.place import Place
from dataflex.offline.table import ScoreTable

__all__ = ["Written", "write_subset"]

# What says how many rows to draw, or that they lie elsewhere: they are all in the file beside the entry.
_ELSEWHERE = frozenset({"num_samples", *REMOTE_KEYS})


@dataclass(frozen=True, kw_only=True)
class Written:
    """One file of a subset: where, from which data set, and how many rows and tokens."""

    path: Path
    dataset: str
    rows: int
    tokens: int


def write_subset(
    table: ScoreTable, rows: Rows, out: Path, *, order: str, provenance: Mapping[str, Any], overwrite: bool = False
) -> list[Written]:
    """Write the rows, one file for each data set that has any.

    The provenance is written first, a file of rows last: where it stands, all of it does.

    Args:
        table: The scores.
        rows: Chosen rows, in order of preference.
        out: A file; or, without an ending, a folder that takes a file for each data set and can be used as
            ``dataset_dir``.
        order: "source" or "preference".
        provenance: JSON values on how the rows were chosen.
        overwrite: Whether to replace what no earlier subset wrote.

    Raises:
        ConfigError: ``out`` does not fit the format or the number of data sets, or holds something of others'.
        DataError: A source changed since it was scored, or is not there.
        UnsupportedError: A source whose rows cannot be written back.
    """
    if order == "source":
        rows = np.sort(rows)
    used = [place for place in range(len(table.datasets)) if (table.dataset_of[rows] == place).any()]
    sources = {place: _source(table, place) for place in used}
    in_folder = not out.suffix or out.is_dir()
    targets = _targets(table, sources, out, in_folder)
    infos, written = {}, []
    for place in used:
        name, path = table.datasets[place], targets[place]
        mine = rows[table.dataset_of[rows] == place]
        written.append(Written(path=path, dataset=name, rows=len(mine), tokens=int(table.tokens[mine].sum())))
        entry = {
            key: value for key, value in (_record(table, place).get("entry") or {}).items() if key not in _ELSEWHERE
        }
        infos[name if in_folder else out.stem] = {**entry, "file_name": path.name}
    at = Place(out=out, in_folder=in_folder)
    infos = at.entries(infos, [file.path for file in written], overwrite=overwrite)
    parts = []
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if in_folder:
            out.mkdir(exist_ok=True)
        for place, file in zip(used, written, strict=True):
            temporary = aside(file.path)
            temporary.unlink(missing_ok=True)
            mine = rows[table.dataset_of[rows] == place]
            sources[place].write(temporary, table.position[mine].tolist())
            parts.append((temporary, file))
        whole = {**provenance, "files": [_described(temporary, file) for temporary, file in parts]}
        atomic_write_text(at.provenance, json.dumps(whole, indent=1) + "\n")
        atomic_write_text(at.info, json.dumps(infos, indent=2) + "\n")
        for temporary, file in parts:
            os.replace(temporary, file.path)
    except OSError as error:
        raise DataError(f"--out: cannot write {out}: {error.strerror or error}") from error
    finally:
        for temporary, _ in parts:
            temporary.unlink(missing_ok=True)
    return written


def _described(path: Path, file: Written) -> dict[str, Any]:
    found = FileRecord.of(path)
    return {
        "path": file.path.name,
        "dataset": file.dataset,
        "rows": file.rows,
        "tokens": file.tokens,
        "size": found.size,
        "blake2b": found.blake2b,
    }


def _record(table: ScoreTable, place: int) -> dict[str, Any]:
    return next(one for one in table.provenance["data"]["sources"] if one["name"] == table.datasets[place])


def _source(table: ScoreTable, place: int) -> SourceRows:
    """Return the rows of a data set's files, which must be those that were scored."""
    record = _record(table, place)
    name = record["name"]
    if not record["files"]:
        raise UnsupportedError(f"{name}: is not in local files, so its rows cannot be written in their format")
    for scored in record["files"]:
        path = Path(scored["path"])
        if not path.is_file():
            raise DataError(f"{name}: no such file: {path} (relative to the folder that 'dataflex score' ran in)")
        if asdict(FileRecord.of(path)) != scored:
            raise DataError(
                f"{name}: {path} changed since it was scored ({scored['size']:,} bytes then, "
                f"{path.stat().st_size:,} now), so that rows cannot be told apart; score it again"
            )
    rows = SourceRows([Path(scored["path"]) for scored in record["files"]])
    positions = table.position[table.dataset_of == place]
    if len(positions) and positions.max() >= rows.num_rows:
        raise DataError(f"{name}: the scores name row {positions.max():,} of its files, which hold {rows.num_rows:,}")
    read, limited = record["rows_read"], table.provenance["config"].get("max_samples") is not None
    if rows.num_rows < read or (rows.num_rows > read and not limited):
        raise UnsupportedError(
            f"{name}: {rows.num_rows:,} rows were found in its files, and {read:,} were read from them when it was "
            "scored, so that rows cannot be matched"
        )
    return rows


def _targets(table: ScoreTable, sources: Mapping[int, SourceRows], out: Path, in_folder: bool) -> dict[int, Path]:
    names = [table.datasets[place] for place in sources]
    if in_folder and out.is_file():
        raise ConfigError(f"--out: {out} is a file; name a folder, or a file with the ending of its format")
    if not in_folder and len(sources) > 1:
        raise ConfigError(
            f"--out: {out}: the rows are of {len(names)} data sets ({', '.join(names)}); name a folder, which "
            "takes a file for each"
        )
    targets = {}
    for place, rows in sources.items():
        problem = file_name_problem(table.datasets[place]) if in_folder else ""
        if problem:
            raise ConfigError(
                f"--out: the scores name a data set {table.datasets[place][:80]!r}, which {problem} and cannot name a "
                "file; name a file with --out instead of a folder"
            )
        path = out / f"{table.datasets[place]}{rows.ending}" if in_folder else out
        if path.suffix.lower() != rows.ending:
            raise ConfigError(f"--out: {out} must end in {rows.ending}, as the file that the rows are from")
        if any(path.absolute() == Path(one["path"]).absolute() for one in _record(table, place)["files"]):
            raise ConfigError(f"--out: {path} is the file that the rows are from; choose another name")
        targets[place] = path
    return targets
