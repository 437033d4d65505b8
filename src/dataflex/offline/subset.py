"""Writes a subset: the rows of the source files byte for byte, their provenance, and an entry for dataset_info.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.config.data import INFO_FILE, REMOTE_KEYS
from dataflex.errors import ConfigError, DataError, UnsupportedError
from dataflex.method import Rows
from dataflex.offline.files import FileRecord, SourceRows
from dataflex.offline.table import ScoreTable
from dataflex.printable import file_name_problem, on_one_line
from dataflex.state import aside, replacing

__all__ = ["Place", "Written", "write_subset"]

_PROVENANCE = "provenance.json"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A file, or a folder that takes a file for each data set.

    Attributes:
        out: As asked for.
        in_folder: Whether it is a folder.
    """

    out: Path
    in_folder: bool

    @property
    def info(self) -> Path:
        """Entries for ``dataset_info.json``: the folder's own, or a file beside the rows."""
        return self._beside(INFO_FILE)

    @property
    def provenance(self) -> Path:
        """Where the rows are from."""
        return self._beside(_PROVENANCE)

    def _beside(self, name: str) -> Path:
        return self.out / name if self.in_folder else self.out.with_name(f"{self.out.stem}.{name}")

    def entries(self, ours: Mapping[str, Any], files: Sequence[Path], *, overwrite: bool) -> dict[str, Any]:
        """Return what the file of entries is to hold: ``ours``, and those of other data sets that are there.

        Args:
            ours: Entries of the subset.
            files: Files of rows that are to be written.
            overwrite: Whether what is not an earlier subset's may be replaced.

        Raises:
            ConfigError: Everything in the way that is not an earlier subset's.
        """
        before = self._earlier()
        foreign = [str(path) for path in files if os.path.lexists(path) and not _is(path, before.get(path.name))]
        if os.path.lexists(self.provenance) and not before:
            foreign.append(str(self.provenance))
        there = _mapping(self.info)
        if there is None:
            foreign.append(str(self.info))
        kept = {}
        for name, entry in (there or {}).items():
            file = entry.get("file_name") if isinstance(entry, Mapping) else None
            if name in ours and not (isinstance(file, str) and file in before):
                foreign.append(f"{name!r} in {self.info}")
            elif not (isinstance(file, str) and file in before):
                kept[name] = entry
        if foreign and not overwrite:
            raise ConfigError(
                [f"--out: {on_one_line(what)} is there, and no earlier subset wrote it so" for what in foreign]
                + ["--out: name another place, or add --overwrite to replace them"]
            )
        return {**kept, **ours}

    def _earlier(self) -> dict[str, tuple[Any, Any]]:
        """Return size and hash of the files that an earlier subset wrote here, by name."""
        told = _mapping(self.provenance) or {}
        files = told.get("files") if "dataflex" in told else None
        found = [file for file in files if isinstance(file, Mapping)] if isinstance(files, list) else []
        return {str(file.get("path")): (file.get("size"), file.get("blake2b")) for file in found}


def _is(path: Path, known: tuple[Any, Any] | None) -> bool:
    if known is None or path.is_symlink() or not path.is_file():
        return False
    found = FileRecord.of(path)
    return (found.size, found.blake2b) == known


def _mapping(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, an empty one where there is no file; None for anything else, links too."""
    if not os.path.lexists(path):
        return {}
    if path.is_symlink() or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


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
        for path, content, indent in ((at.provenance, whole, 1), (at.info, infos, 2)):
            with replacing(path, None) as beside:
                beside.write((json.dumps(content, indent=indent) + "\n").encode())
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
