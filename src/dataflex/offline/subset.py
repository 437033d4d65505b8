"""Which rows of a score table are chosen, and files that hold them, in the format of their sources."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.config.collect import collect
from dataflex.config.data import INFO_FILE, REMOTE_KEYS
from dataflex.config.load import merged
from dataflex.errors import ConfigError, DataError, UnsupportedError, did_you_mean
from dataflex.method import Rows
from dataflex.offline.files import FileRecord, SourceRows
from dataflex.offline.table import ScoreTable
from dataflex.printable import file_name_problem, on_one_line
from dataflex.select.choose import Candidates, token_budget
from dataflex.select.rules import RULES, Rule, choose
from dataflex.state import aside, replacing

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


_FORM = re.compile(r"(?P<number>\d[\d_]*(\.\d*)?|\.\d+)\s*(?P<unit>[a-z]*)", re.IGNORECASE)
_EXPECTED = "expected a share of the rows (0.1), a number of rows (500) or a number of tokens (200000tokens)"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What was asked for, one of the two.

    Attributes:
        rows: Number of rows.
        tokens: Tokens of the chosen rows together, at most.
    """

    rows: int | None = None
    tokens: int | None = None

    @classmethod
    def read(cls, text: str, num_rows: int) -> Budget:
        """Read a budget; a number with a point is a share of ``num_rows``.

        Raises:
            ConfigError: Not of such a form, or nothing at all.
        """
        match = _FORM.fullmatch(text.strip())
        if match is None or match["unit"].lower() not in ("", "row", "rows", "token", "tokens"):
            raise ConfigError(f"--budget: {text!r}: {_EXPECTED}")
        number, unit = match["number"].replace("_", ""), match["unit"].lower()
        if "." in number:
            share = float(number)
            if unit or not 0.0 < share <= 1.0:
                raise ConfigError(f"--budget: {text!r}: a share lies above 0 and is at most 1.0; {_EXPECTED}")
            return cls(rows=max(1, round(share * num_rows)))
        if int(number) == 0:
            raise ConfigError(f"--budget: {text!r} is nothing; {_EXPECTED}")
        return cls(tokens=int(number)) if unit.startswith("token") else cls(rows=int(number))


_AT_HAND = frozenset({"scores", "lengths", "groups", "queries"})
RANK = ".rank"


def score_column(table: ScoreTable, asked: str | None) -> str:
    """Return the column to select by: the one asked for, or that of the only method.

    Raises:
        ConfigError: No such column, or several to choose from.
    """
    known = list(table.columns)
    if asked is not None:
        if asked not in known:
            raise ConfigError(f"--score: no column {asked!r}{did_you_mean(asked, known)} (columns: {', '.join(known)})")
        return asked
    methods = table.provenance["methods"]
    if len(methods) > 1:
        raise ConfigError(f"--score: name the column to select by (columns: {', '.join(known)})")
    name = str(methods[0]["name"])
    return name if name in known else name + RANK


def rule_of(name: str, settings: Sequence[str], budget: Budget) -> Rule:
    """Return the rule with its parameters; a budget of tokens makes the best rows those that it holds.

    Raises:
        ConfigError: Unknown rule or parameter, or a rule that needs more than scores.
    """
    given: dict[str, Any] = merged({}, settings)
    if name == "top_k" and budget.tokens is not None:
        name = "token_budget"
    if name == "token_budget":
        if budget.tokens is None:
            raise ConfigError("--budget: the rule token_budget wants a number of tokens, such as 200000tokens")
        given.setdefault("tokens", budget.tokens)
    if name not in RULES:
        raise ConfigError(f"--rule: unknown rule {name!r}{did_you_mean(name, list(RULES))} (known: {', '.join(RULES)})")
    problems: list[str] = []
    params = collect(RULES[name], given, "", problems, subject=f"rule {name}")
    if params is None:
        raise ConfigError([f"--rule {name}: {problem.removeprefix(': ')}" for problem in problems])
    rule = Rule(name=name, params=params)
    missing = sorted(rule.needs - _AT_HAND)
    if missing:
        fitting = [other for other, spec in RULES.items() if spec.always <= _AT_HAND]
        raise ConfigError(
            f"--rule: {name} needs {', '.join(missing).replace('query_vectors', 'vectors of target rows')}, which "
            f"scores do not hold; let it choose while scoring ('dataflex score DATA --method compose --budget ROWS "
            f"compose.rule={name}'), and select by the column compose.rank "
            f"(rules for scores: {', '.join(fitting)})"
        )
    if budget.tokens is not None and name != "token_budget" and not RULES[name].ranks:
        raise ConfigError(f"--budget: the rule {name} wants a number of rows or a share, not tokens")
    return rule


def chosen_rows(table: ScoreTable, column: str, budget: Budget, rule: Rule, *, prefer: str | None, seed: int) -> Rows:
    """Return the rows of the subset, in order of preference.

    Args:
        table: The scores.
        column: Whose values count; rows without one are left out.
        budget: How much.
        rule: How they are chosen.
        prefer: "high" or "low"; by default high, and low for ranks.
        seed: Of rules that draw; draws are keyed by row.

    Raises:
        DataError: More rows are wanted than have a score.
        ConfigError: Turns over targets without columns by target.
    """
    values = table.columns[column]
    sign = -1.0 if (prefer or ("low" if column.endswith(RANK) else "high")) == "low" else 1.0
    by_target = {name: found for name, found in table.columns.items() if name.startswith(f"{column}/")}
    usable = np.isfinite(values)
    if "queries" in rule.needs:
        if not by_target:
            raise ConfigError(
                f"--rule: {rule.name} lets targets take turns, and {column} has no columns by target; score with "
                "several targets, or use another rule"
            )
        usable &= np.isfinite(np.stack(list(by_target.values()))).all(axis=0)
    rows = np.flatnonzero(usable).astype(np.int64)
    wanted = len(rows) if budget.rows is None else budget.rows
    if wanted > len(rows) or not len(rows):
        raise DataError(
            f"--budget: {wanted:,} rows are wanted, and {len(rows):,} of {table.num_rows:,} have a value in {column}"
        )
    candidates = Candidates(
        rows=rows,
        uniforms=Candidates.stream(seed, "select", 0),
        scores=sign * values[rows],
        by_query=_stacked(by_target, rows, sign) if "queries" in rule.needs else None,
        lengths=table.tokens[rows],
        groups=table.domain_of[rows],
    )
    chosen = choose(rule, candidates, wanted)
    if budget.tokens is not None and rule.name != "token_budget":
        order = -np.arange(len(chosen), dtype=np.float64)
        chosen = chosen[token_budget(order, table.tokens[rows[chosen]], budget.tokens, len(chosen))]
    if not len(chosen):
        raise DataError(f"--budget: no row fits ({rule.name} chose none of {len(rows):,})")
    return rows[chosen]


def _stacked(columns: Mapping[str, NDArray[Any]], rows: Rows, sign: float) -> NDArray[np.floating]:
    return np.stack([sign * values[rows] for values in columns.values()])
