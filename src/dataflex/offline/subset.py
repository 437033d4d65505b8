"""``dataflex select``: rows of a score table, and files that hold them, in the format of their sources."""

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

from dataflex.config.data import INFO_FILE, REMOTE_KEYS
from dataflex.config.files import FileRecord, SourceRows
from dataflex.config.load import merged
from dataflex.config.mappings import collect, plain
from dataflex.errors import ConfigError, DataError, UnsupportedError, did_you_mean
from dataflex.method import Rows
from dataflex.offline.duplicates import near_duplicates as found_near
from dataflex.printable import Answer, file_name_problem, on_one_line, redacted
from dataflex.score_table import ScoreTable, read_scores
from dataflex.select.choose import Candidates, token_budget
from dataflex.select.rules import RULES, Rule, choose
from dataflex.state import aside, read_json, replacing
from dataflex.storage import place_problem
from dataflex.version import __version__

RANK = ".rank"

_PROVENANCE = "provenance.json"
# What says how many rows to draw, or that they lie elsewhere: they are all in the file beside the entry.
_ELSEWHERE = frozenset({"num_samples", *REMOTE_KEYS})
_AT_HAND = frozenset({"scores", "lengths", "groups", "queries"})
_FORM = re.compile(r"(?P<number>\d[\d_]*(\.\d*)?|\.\d+)\s*(?P<unit>[a-z]*)", re.IGNORECASE)
_EXPECTED = "expected a share of the rows (0.1), a number of rows (500) or a number of tokens (200000tokens)"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A number of rows, or the maximum number of tokens of the chosen rows together."""

    rows: int | None = None
    tokens: int | None = None

    @classmethod
    def read(cls, text: str, num_rows: int) -> Budget:
        """Read a budget; a number with a point is a share of ``num_rows``. ``ConfigError`` for another form or 0."""
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


def score_column(table: ScoreTable, asked: str | None) -> str:
    """Return the column to select by: the one asked for, or that of the only method."""
    known, methods = list(table.columns), table.provenance["methods"]
    if asked is not None and asked not in known:
        raise ConfigError(f"--score: no column {asked!r}{did_you_mean(asked, known)} (columns: {', '.join(known)})")
    if asked is None and len(methods) > 1:
        raise ConfigError(f"--score: name the column to select by (columns: {', '.join(known)})")
    name = str(methods[0]["name"])
    return asked or (name if name in known else name + RANK)


def rule_of(name: str, settings: Sequence[str], budget: Budget) -> Rule:
    """Return the rule with its parameters; with a budget of tokens, ``top_k`` becomes ``token_budget``."""
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


def preferences(table: ScoreTable, column: str, prefer: str | None) -> NDArray[np.floating]:
    """Return what is preferred where it is high [N]: the column's values, or those of ranks turned round.

    ``prefer`` ("high" or "low") says otherwise.
    """
    low = (prefer or ("low" if column.endswith(RANK) else "high")) == "low"
    return table.columns[column] * (-1.0 if low else 1.0)


def near_rows(table: ScoreTable, preferred: NDArray[np.floating], share: float) -> Rows:
    """Return the rows that are near-duplicates of preferred ones, ascending; of equal values the first is preferred."""
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"--near-duplicates: {share:g}: a similarity lies above 0 and is at most 1")
    rows = np.flatnonzero(np.isfinite(preferred))
    rows = rows[np.argsort(-preferred[rows], kind="stable")]
    records = {record["name"]: record for record in table.provenance["data"]["sources"]}
    places, positions = table.dataset_of[rows], table.position[rows]
    sources = [_source(table, place, records[name]) for place, name in enumerate(table.datasets)]
    each = [source.each(positions[places == place]) for place, source in enumerate(sources)]
    texts = (next(each[place]) for place in places)
    return np.sort(rows[found_near(texts, share)])


def chosen_rows(
    table: ScoreTable, column: str, budget: Budget, rule: Rule, *, prefer: str | None, seed: int, without: Rows
) -> Rows:
    """Return the rows of the subset, in order of preference; rows without a value in the column are left out.

    ``prefer`` is that of ``preferences``; rows of ``without`` are not chosen.
    """
    values = preferences(table, column, prefer)
    usable, by_target = np.isfinite(values), None
    usable[without] = False
    if "queries" in rule.needs:
        names = [name for name in table.columns if name.startswith(f"{column}/")]
        found = [preferences(table, name, prefer) for name in names]
        if not found:
            raise ConfigError(
                f"--rule: {rule.name} lets targets take turns, and {column} has no columns by target; score with "
                "several targets, or use another rule"
            )
        by_target = np.stack(found)
        usable &= np.isfinite(by_target).all(axis=0)
    rows = np.flatnonzero(usable).astype(np.int64)
    wanted = len(rows) if budget.rows is None else budget.rows
    if wanted > len(rows) or not len(rows):
        raise DataError(
            f"--budget: {wanted:,} rows are wanted, and {len(rows):,} of {table.num_rows:,} have a value in {column}"
            + (f" and are no near-duplicates ({len(without):,} are)" if len(without) else "")
        )
    candidates = Candidates(
        rows=rows,
        uniforms=Candidates.stream(seed, "select", 0),
        scores=values[rows],
        by_query=None if by_target is None else by_target[:, rows],
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


# ---- files


@dataclass(frozen=True, kw_only=True)
class Part:
    """The chosen rows of one data set."""

    name: str
    rows: Rows  # rows of the table, in the order in which they are written
    tokens: int  # their number of tokens
    path: Path  # the file to write
    source: SourceRows  # the rows of the data set's files
    entry: dict[str, Any]  # the file's entry for dataset_info.json

    def tell(self) -> str:
        """Return it as one line."""
        return f"{len(self.rows):,} rows ({self.tokens:,} tokens) of {self.name} -> {self.path}"

    def told(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"dataset": self.name, "rows": len(self.rows), "tokens": self.tokens, "path": str(self.path)}


def write_subset(
    table: ScoreTable,
    rows: Rows,
    out: Path,
    *,
    order: str,
    provenance: Mapping[str, Any],
    overwrite: bool = False,
    option: str = "--out",
) -> list[Part]:
    """Write the rows, one file for each data set that has any.

    ``out`` is a file; or, without an ending, a folder that takes a file for each data set and can be used as
    ``dataset_dir``; ``option`` named it. The provenance is written first, the files of rows last: if these exist,
    everything does.
    """
    if order == "source":
        rows = np.sort(rows)
    if problem := place_problem(out):
        raise DataError(f"{option}: {problem}")
    in_folder = not out.suffix or out.is_dir()
    used = np.unique(table.dataset_of[rows]).tolist()
    if in_folder and out.is_file():
        raise ConfigError(f"{option}: {out} is a file; name a folder, or a file with the ending of its format")
    if not in_folder and len(used) > 1:
        names = ", ".join(table.datasets[place] for place in used)
        raise ConfigError(
            f"{option}: {out}: the rows are of {len(used)} data sets ({names}); name a folder, which takes a file for "
            "each"
        )
    parts = [_part(table, place, rows[table.dataset_of[rows] == place], out, in_folder, option) for place in used]
    info, told = (out / name if in_folder else out.with_name(f"{out.stem}.{name}") for name in (INFO_FILE, _PROVENANCE))
    entries = {part.name if in_folder else out.stem: part.entry for part in parts}
    paths = [part.path for part in parts]
    before = _listed(told)
    entries = _with_earlier(entries, paths, info, before, told, overwrite=overwrite, option=option)
    left = [path for path in _left_over(table, before, out) if path not in paths] if in_folder else []
    temporaries: list[Path] = []
    try:
        (out if in_folder else out.parent).mkdir(parents=True, exist_ok=True)
        files = []
        for part in parts:
            temporaries.append(aside(part.path))
            temporaries[-1].unlink(missing_ok=True)
            part.source.write(temporaries[-1], table.position[part.rows].tolist())
            about = {"path": part.path.name, "dataset": part.name, "rows": len(part.rows), "tokens": part.tokens}
            files.append({**about, **asdict(FileRecord.of(temporaries[-1])), "path": part.path.name})
        for path, content, indent in ((told, {**provenance, "files": files}, 1), (info, entries, 2)):
            with replacing(path, None) as beside:
                beside.write((json.dumps(content, indent=indent) + "\n").encode())
        for temporary, part in zip(temporaries, parts, strict=True):
            os.replace(temporary, part.path)
        for path in left:
            path.unlink()  # of an earlier subset, whose provenance is gone
    except OSError as error:
        raise DataError(f"{option}: cannot write {out}: {error.strerror or error}") from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
    return parts


def _part(table: ScoreTable, place: int, rows: Rows, out: Path, in_folder: bool, option: str) -> Part:
    name = table.datasets[place]
    record = next(one for one in table.provenance["data"]["sources"] if one["name"] == name)
    source = _source(table, place, record)
    problem = file_name_problem(name) if in_folder else ""
    if problem:
        raise ConfigError(
            f"{option}: the scores name a data set {name[:80]!r}, which {problem} and cannot name a file; name a file "
            f"with {option} instead of a folder"
        )
    path = out / f"{name}{source.ending}" if in_folder else out
    if path.suffix.lower() != source.ending:
        raise ConfigError(f"{option}: {out} must end in {source.ending}, as the file that the rows are from")
    if any(path.absolute() == Path(one["path"]).absolute() for one in record["files"]):
        raise ConfigError(f"{option}: {path} is the file that the rows are from; choose another name")
    entry = {key: value for key, value in (record.get("entry") or {}).items() if key not in _ELSEWHERE}
    tokens = int(table.tokens[rows].sum())
    return Part(name=name, rows=rows, tokens=tokens, path=path, source=source, entry={**entry, "file_name": path.name})


def _source(table: ScoreTable, place: int, record: Mapping[str, Any]) -> SourceRows:
    """Return the rows of a data set's files, which must be those that were read."""
    name, files = record["name"], [Path(scored["path"]) for scored in record["files"]]
    if not files:
        raise UnsupportedError(f"{name}: is not in local files, so its rows cannot be written in their format")
    for path, scored in zip(files, record["files"], strict=True):
        if not path.is_file():
            raise DataError(f"{name}: no such file: {path} (relative to the folder of the command that read it)")
        if FileRecord(**scored).changed():
            raise DataError(
                f"{name}: {path} changed since its rows were read ({scored['size']:,} bytes then, "
                f"{path.stat().st_size:,} now), so that they cannot be told apart; restore it, or score or train again"
            )
    rows = SourceRows(files)
    positions = table.position[table.dataset_of == place]
    if len(positions) and positions.max() >= rows.num_rows:
        raise DataError(f"{name}: row {positions.max():,} of its files is asked for, which hold {rows.num_rows:,}")
    whole = ((record.get("entry") or {}).get("split") or "train") == "train"
    read, limited = record["rows_read"], whole and table.provenance["config"].get("max_samples") is not None
    if rows.num_rows < read or (rows.num_rows > read and not limited):
        raise UnsupportedError(
            f"{name}: {rows.num_rows:,} rows were found in its files, and {read:,} were read from them before, "
            "so that rows cannot be matched"
        )
    return rows


def _with_earlier(
    ours: Mapping[str, Any],
    files: Sequence[Path],
    info: Path,
    before: Mapping[str, tuple[Any, Any]],
    told: Path,
    *,
    overwrite: bool,
    option: str,
) -> dict[str, Any]:
    """Return what the file of entries is to hold: ``ours``, and those of other data sets that are in it.

    Refuses to replace files and entries that no earlier subset wrote (``before``: what it did), unless ``overwrite``.
    """
    ours_before = [path for path in files if path.name in before and _identity(path) == before[path.name]]
    foreign = [str(path) for path in files if os.path.lexists(path) and path not in ours_before]
    if os.path.lexists(told) and not before:
        foreign.append(str(told))
    there = _mapping(info)
    if there is None:
        foreign.append(str(info))
    kept = {}
    for name, entry in (there or {}).items():
        file = entry.get("file_name") if isinstance(entry, Mapping) else None
        if isinstance(file, str) and file in before:
            continue
        if name in ours:
            foreign.append(f"{name!r} in {info}")
        else:
            kept[name] = entry
    if foreign and not overwrite:
        raise ConfigError(
            [f"{option}: {on_one_line(what)} is there, and no earlier subset wrote it so" for what in foreign]
            + [f"{option}: name another place, or add --overwrite to replace them"]
        )
    return {**kept, **ours}


def _left_over(table: ScoreTable, before: Mapping[str, tuple[Any, Any]], folder: Path) -> list[Path]:
    """Return the files of an earlier subset that are as it wrote them, and that no row is read from now."""
    named = [folder / name for name in before if not file_name_problem(name)]
    read = {Path(file["path"]).absolute() for one in table.provenance["data"]["sources"] for file in one["files"]}
    return [path for path in named if path.absolute() not in read and _identity(path) == before[path.name]]


def _listed(told: Path) -> dict[str, tuple[Any, Any]]:
    """Return size and hash of each file that an earlier subset's provenance lists, by name."""
    content = _mapping(told) or {}
    listed = content.get("files") if "dataflex" in content else None
    found = [file for file in listed if isinstance(file, Mapping)] if isinstance(listed, list) else []
    return {str(file.get("path")): (file.get("size"), file.get("blake2b")) for file in found}


def _identity(path: Path) -> tuple[int, str] | None:
    """Return size and hash of a file; None for anything else, links too."""
    if path.is_symlink() or not path.is_file():
        return None
    found = FileRecord.of(path)
    return found.size, found.blake2b


def _mapping(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, an empty one where there is no file; None for anything else, links too."""
    if not os.path.lexists(path):
        return {}
    if path.is_symlink() or not path.is_file():
        return None
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def select(
    scores: Path,
    *,
    column: str | None,
    budget: str,
    rule: str,
    overrides: Sequence[str],
    prefer: str | None,
    order: str,
    seed: int,
    out: Path,
    overwrite: bool,
    near_duplicates: float | None = None,
) -> Answer:
    """Write the subset that the options of ``dataflex select`` describe and return what to print.

    Raises:
        DataFlexError: An option that does not fit, a budget that exceeds the rows, or a source that changed.
    """
    table = read_scores(scores)
    column = score_column(table, column)
    wanted = Budget.read(budget, table.num_rows)
    how = rule_of(rule, overrides, wanted)
    without = np.zeros(0, dtype=np.int64)
    if near_duplicates is not None:
        without = near_rows(table, preferences(table, column, prefer), near_duplicates)
    rows = chosen_rows(table, column, wanted, how, prefer=prefer, seed=seed, without=without)
    provenance = {
        "scores": asdict(FileRecord.of(scores)),
        "column": column,
        "budget": budget,
        "rule": {"name": how.name, **plain(how.params)},
        "prefer": prefer,
        "near_duplicates": near_duplicates,
        "order": order,
        "seed": seed,
        "dataflex": __version__,
        "scored": dict(table.provenance),
    }
    parts = write_subset(table, rows, out, order=order, provenance=redacted(provenance), overwrite=overwrite)
    lines = [part.tell() for part in parts]
    if near_duplicates is not None:
        lines.append(f"{len(without):,} near-duplicates of preferred rows were left out")
    if wanted.rows is not None and len(rows) < wanted.rows:
        lines.append(f"{how.name} chose {len(rows):,} rows of the {wanted.rows:,} wanted")
    repeated = len(rows) - len(np.unique(rows))
    if repeated:
        lines.append(f"{repeated:,} rows are there more than once (drawn with replacement)")
    values = {"files": [part.told() for part in parts], "rows": len(rows), "wanted": wanted.rows, "repeated": repeated}
    if near_duplicates is not None:
        values["near_duplicates"] = len(without)
    return Answer("\n".join(lines), values)
