"""Which rows were chosen, when and why: one line for each row of the pool, in the order of row ids.

``rows.parquet`` holds what is known before training, and is written once; everything else is derived from the record:
``chosen_table`` adds up the plans, and ``chosen.parquet`` is that table as of the step that its metadata name. Arrays
only: no Python object is made for a row. docs/report.md lists the columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dataflex.config.files import MOST_READ_BYTES, FileRecord, row_lines
from dataflex.errors import DataError
from dataflex.plan.domains import Domains, Rows
from dataflex.printable import on_one_line, plain
from dataflex.record.digest import Event, digest, since
from dataflex.record.read import LEDGER, ROW_WEIGHTS, THINNED, StoredPlan, load_plan, read_record, record_dir
from dataflex.state import blake2b, replacing

ROWS = "rows.parquet"
"""Where the rows come from and what is known of them before training, beside the events."""
CHOSEN = "chosen.parquet"
"""The table of chosen rows as of its last writing, beside the events."""

_KEY = b"dataflex"
_IDENTITY = b"identity"
_FORMAT = 1
_CELLS = 1 << 24  # values of the columns of single decisions together
_DECISIONS = 256  # decisions that have columns of their own
_POSITIONS = 1 << 25  # served rows up to which the steps of each are listed
_NOTES = 20
_UNRANKED = 8

_KNOWN = ("dataset", "file", "line", "position", "id", "documents", "domain", "tokens", "supervised_tokens", "same_as")
FIXED = (
    "row",
    *_KNOWN,
    *("times_served", "first_served", "last_served", "served_at"),
    *("decision", "chosen", "place", "score", "rank", "cut", "nearest_target", "nearest_row"),
    *("times_chosen", "times_scored", "weight", "times_weighed"),
)
"""Columns that every table has."""
_LATER = {
    "same_as": pa.int64(),
    "documents": pa.list_(
        pa.struct(
            {"dataset": pa.string(), "file": pa.string(), "line": pa.int64(), "position": pa.int64(), "id": pa.string()}
        )
    ),
}
"""Columns that tables of earlier versions lack, which are read as null."""
_BY_ROW = ("scores", "target", "target_row")
"""Arrays of a plan that have one value for each row of its pool."""
_PREFIXES = ("score_", "rank_", "credit_", "raw_")


@dataclass(frozen=True, kw_only=True)
class Origins:
    """Where the rows of a row space come from, as far as that is known."""

    sources: Sequence[Source]
    source_of: NDArray[np.integer]  # index into ``sources`` of each row [N]
    position: NDArray[np.int64]  # place among the rows of its data set's files, from 0 [N]; -1: not known, or several
    ids: pa.Array | None = None  # id that the data give each row, as text [N]
    documents: tuple[pa.ListArray, Origins] | None = None
    """Of packed rows: which documents each has tokens of [N], in their order, and where all documents come from."""

    def taken(self, rows: Rows) -> Origins:
        """Return the same of some of the rows."""
        ids = None if self.ids is None else self.ids.take(pa.array(rows))
        parts = None if self.documents is None else (self.documents[0].take(pa.array(rows)), self.documents[1])
        return replace(self, source_of=self.source_of[rows], position=self.position[rows], ids=ids, documents=parts)

    @property
    def files_of(self) -> Sequence[Source]:
        """The data sets whose files rows, or the documents in them, are in."""
        return self.sources if self.documents is None else self.documents[1].sources


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set that rows come from."""

    name: str
    paths: Sequence[Path] = ()  # its local files, in the order in which they were read
    rows_read: int = 0  # rows that were read of them
    limited: bool = False  # whether there may be more rows in them
    entry: Mapping[str, Any] | None = None  # what dataset_info.json says of it


# ---- what is known before training


class Pool(Protocol):
    """What is known of the training rows [N]; ``train.row_space.RowSpace``."""

    @property
    def origins(self) -> Origins | None:
        """Where they come from; None where that is not known."""

    @property
    def domains(self) -> Domains:
        """Their domains."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each."""

    @property
    def supervised(self) -> NDArray[np.int64]:
        """Supervised tokens of each."""

    @property
    def columns(self) -> Mapping[str, NDArray[Any]]:
        """Raw columns that were asked for."""

    @property
    def keys(self) -> NDArray[np.uint64]:
        """A hash of the tokens and labels of each."""

    @property
    def fingerprint(self) -> str:
        """Hash of all tokens and labels."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""


def write_rows(folder: Path, space: Pool) -> bool:
    """Write ``rows.parquet``; the files of the rows are read through once, for their lines and their identity.

    Return False where it is there already, of an earlier start with the same rows.
    """
    origins, domains, identity = space.origins, space.domains, _identity(space)
    if identity and _written(folder / ROWS) == identity:
        return False
    if origins is None:  # of a loop of one's own: its domains are its data sets
        origins = Origins(
            sources=[Source(name=name) for name in domains.names],
            source_of=domains.domain_of,
            position=np.full(space.num_rows, -1, dtype=np.int64),
        )
    arrays: dict[str, Any] = {
        **_origin_columns(origins),
        "documents": _documents(origins),
        "domain": _named(domains.names, domains.domain_of),
        "tokens": pa.array(space.lengths),
        "supervised_tokens": pa.array(space.supervised),
        "same_as": _whole(_same_as(space.keys)),
    }
    for name, values in space.columns.items():
        arrays[f"raw_{name}" if name in FIXED or name.startswith(_PREFIXES) else name] = pa.array(values)
    told = {
        "format": _FORMAT,
        "fingerprint": space.fingerprint,
        "sources": [
            {
                "name": source.name,
                "rows_read": source.rows_read,
                "limited": source.limited,
                "entry": source.entry,
                "files": [asdict(FileRecord.of(path, most_bytes=MOST_READ_BYTES)) for path in source.paths],
            }
            for source in origins.files_of
        ],
    }
    metadata = {_KEY: json.dumps(plain(told), sort_keys=True), _IDENTITY: identity}
    _write(folder / ROWS, pa.table(arrays).replace_schema_metadata(metadata))
    return True


def _origin_columns(origins: Origins) -> dict[str, pa.Array]:
    """Return data set, file, line, place and id of each row."""
    file_of, lines, files = _places(origins)
    return {
        "dataset": _named([source.name for source in origins.sources], origins.source_of),
        "file": _named(files, file_of),
        "line": _whole(lines),
        "position": _whole(origins.position),
        "id": pa.nulls(len(origins.position), pa.string()) if origins.ids is None else origins.ids,
    }


def _documents(origins: Origins) -> pa.Array:
    """Return the same of the documents in each packed row, null for all where rows are not packed."""
    kind = _LATER["documents"]
    if origins.documents is None:
        return pa.nulls(len(origins.position), kind)
    parts, every = origins.documents
    columns = _origin_columns(every)
    table = pa.table({field.name: columns[field.name].cast(field.type) for field in kind.value_type})
    listed = table.take(pc.list_flatten(parts)).to_struct_array().combine_chunks()
    ends = np.cumsum(np.concatenate([[0], pc.list_value_length(parts).to_numpy()]))
    return pa.ListArray.from_arrays(ends.astype(np.int32), listed)


def _identity(space: Pool) -> str:
    """Return a hash of what the table of rows is made of; empty where that would take as long as the table."""
    columns = {name: np.asarray(values) for name, values in space.columns.items()}
    if any(values.dtype.kind not in "biuf" for values in columns.values()):
        return ""
    origins = space.origins
    sources = origins.files_of if origins is not None else ()
    try:
        states = [(path, path.stat()) for source in sources for path in source.paths]
    except OSError:
        return ""
    files = [(str(path), state.st_size, state.st_mtime_ns) for path, state in states]
    packed = origins is not None and origins.documents is not None
    named = repr((_FORMAT, packed, space.fingerprint, files, space.domains.names, list(columns)))
    arrays = (np.ascontiguousarray(each).tobytes() for each in (space.domains.domain_of, *columns.values()))
    return blake2b(named.encode(), *arrays).hex()


def _written(path: Path) -> str:
    """Return that hash as an earlier start wrote it, empty where there is none."""
    try:
        return str((pq.read_schema(path).metadata or {}).get(_IDENTITY, b"").decode())
    except (OSError, ValueError):
        return ""


def _same_as(keys: NDArray[np.uint64]) -> Rows:
    """Return the first row with the key of each row [N], -1 where that is the row itself."""
    _, first, of = np.unique(keys, return_index=True, return_inverse=True)
    return np.where(first[of] == np.arange(len(keys)), -1, first[of])


def _places(origins: Origins) -> tuple[NDArray[np.int32], NDArray[np.int64], list[str]]:
    """Return the file of each row, as an index into the paths returned last, and its line from 1; -1: not known."""
    size = len(origins.position)
    file_of, lines, files = np.full(size, -1, dtype=np.int32), np.full(size, -1, dtype=np.int64), list[str]()
    for k, source in enumerate(origins.sources):
        if len(source.paths) == 1:
            file_of[origins.source_of == k] = len(files)
        files += [str(path) for path in source.paths]
        rows = np.flatnonzero((origins.source_of == k) & (origins.position >= 0))
        if not source.paths or not len(rows):
            continue
        found = [row_lines(path) for path in source.paths]
        counts = [count for count, _ in found]
        known = None if None in counts else np.cumsum([0, *(count or 0 for count in counts)])
        if known is None or source.rows_read > known[-1] or (source.rows_read < known[-1] and not source.limited):
            continue  # not counted, or read in another way than they are counted
        which = np.searchsorted(known, origins.position[rows], side="right") - 1
        file_of[rows] = len(files) - len(source.paths) + which
        for at, (_, numbers) in enumerate(found):
            mine = rows[which == at]
            if numbers is not None:
                lines[mine] = numbers[origins.position[mine] - known[at]]
    return file_of, lines, files


def moved_name(before: str, after: str) -> str:
    """Path of the old row of each row of a pool, relative to the record's folder, by the fingerprints of both pools."""
    return f"plans/moved-{blake2b(before.encode(), after.encode(), size=8).hex()}.npy"


def write_moved(folder: Path, before: str, after: str, found: Rows) -> None:
    """Write the row of pool ``before`` that each row of pool ``after`` was [N], -1 for new ones."""
    with replacing(folder / moved_name(before, after)) as file:
        np.save(file, found)


# ---- what the record adds


def write_chosen(folder: Path) -> None:
    """Write ``chosen.parquet`` from the record in a folder, as of its last event."""
    _write(folder / CHOSEN, chosen_table(folder))


def chosen_table(run_dir: Path | str, read: tuple[Sequence[Event], Sequence[str]] | None = None) -> pa.Table:
    """Return one line for each row of the pool, from the record of a run that goes on, has ended or was killed.

    Columns are those of docs/report.md, "chosen.parquet". ``chosen_notes`` gives what the metadata hold.

    Args:
        run_dir: The run's ``output_dir``, or the ``dataflex`` folder in it.
        read: What ``read_record`` gives, where it was asked before.

    Raises:
        DataError: No record, one without rows, or of a newer version. Parts that are damaged are left out and told in
            the notes.
    """
    folder = record_dir(run_dir)
    events, left_out = read or read_record(folder)
    notes = list(left_out)
    if not events:
        raise DataError(f"{folder} holds no event that can be read; the run had not begun to train")
    run = digest(events)
    if run.served_since:
        notes.append(f"rows that were served before are not known: plans are recorded{since(run.served_since)}")
    steps, targets, config = dict[int, int](), dict[int, list[str]](), dict[str, Any]()
    for event in events:
        if event["event"] == "run_started":
            config = event.get("config") or {}
        elif event["event"] == "planned":
            steps[event["interval"]] = event["stop_step"] - event["start_step"]
            targets[event["interval"]] = _targets(config)
    plans = Plans(folder, events, run.planned)
    known, told = _known(folder, plans.fingerprint)
    size = known.num_rows
    served, decided = _Served(size), _Decided(size)
    stock = not run.planned
    for event in run.planned:
        try:
            plan = plans.of(event, size)
        except DataError as error:
            notes.append(str(error))
            continue
        first, stop = event["start_step"], min(event["stop_step"], run.steps_done)
        served.add(plan.rows, first, stop, steps[event["interval"]])
        if plan.kept is not None or plan.scores is not None:
            decided.add(plan, event, targets[event["interval"]])
    columns: dict[str, Any] = {"row": pa.array(np.arange(size, dtype=np.int64))}
    columns |= {name: known.column(name) for name in _KNOWN}
    columns |= served.columns(known=not stock or not run.steps_done)
    columns |= decided.columns()
    weights = {"weight": pa.float64(), "times_weighed": pa.int64()}
    columns |= _of_rows(folder / ROW_WEIGHTS, told["fingerprint"], size, weights, notes)
    columns |= {name: known.column(name) for name in known.column_names if name not in _KNOWN}
    columns |= decided.columns_by_decision()
    columns |= _of_rows(folder / LEDGER, told["fingerprint"], size, None, notes)
    about = {
        "format": _FORMAT,
        "fingerprint": told["fingerprint"],
        "step": run.steps_done,
        "since": run.served_since,
        "sources": told["sources"],
        "decisions": decided.told,
        "notes": [on_one_line(note)[:400] for note in notes[:_NOTES]],
    }
    return pa.table(columns).replace_schema_metadata({_KEY: json.dumps(plain(about), sort_keys=True)})


def chosen_notes(table: pa.Table) -> dict[str, Any]:
    """Return the metadata of a table of chosen rows: step, data sets, decisions, and what could not be read."""
    return dict(json.loads(table.schema.metadata[_KEY]))


def _known(folder: Path, fingerprint: Any) -> tuple[pa.Table, dict[str, Any]]:
    """Return what is known of the rows before training, and its metadata."""
    path = folder / ROWS
    if not path.is_file():
        raise DataError(
            f"{folder} has no {ROWS}, which says what its rows are: the run had not loaded its data, or an older "
            "version wrote the record; a run that is resumed with this version writes it"
        )
    try:
        table = pq.read_table(path)
        told = json.loads((table.schema.metadata or {})[_KEY])
        version = told["format"]
        if version == _FORMAT:
            for name, kind in _LATER.items():
                if name not in table.column_names:
                    table = table.append_column(name, pa.nulls(table.num_rows, kind))
            missing = [name for name in _KNOWN if name not in table.column_names]
            if missing or not isinstance(told["sources"], list) or not all(_is_source(one) for one in told["sources"]):
                raise ValueError(f"it lacks {', '.join(missing) or 'the data sets of the rows'}")
            table = table.cast(_schema(table))
    except Exception as error:  # arrow has many kinds of its own
        problem = on_one_line(str(error))[:200]
        raise DataError(f"{path} is damaged: {type(error).__name__}: {problem}; move it away") from error
    if version != _FORMAT:
        raise DataError(f"{path} has format {version!r}, written by another version; this one reads {_FORMAT}")
    if fingerprint is not None and told["fingerprint"] != fingerprint:
        raise DataError(f"{path} is of other rows than the events beside it; it belongs to another run")
    return table, told


def _is_source(one: Any) -> bool:
    return (
        isinstance(one, dict)
        and isinstance(one.get("name"), str)
        and isinstance(one.get("files"), list)
        and all(isinstance(file, dict) and isinstance(file.get("path"), str) for file in one["files"])
    )


def _schema(table: pa.Table) -> pa.Schema:
    text, number = pa.dictionary(pa.int32(), pa.string()), pa.int64()
    kinds = {"dataset": text, "file": text, "domain": text, "id": pa.string(), **_LATER}
    return pa.schema(
        [pa.field(f.name, kinds.get(f.name, number if f.name in _KNOWN else f.type)) for f in table.schema]
    )


def _targets(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the selector's targets."""
    block: Any = config.get("dynamic")
    for key in ("selector", "targets"):
        block = block.get(key) if isinstance(block, Mapping) else None
    return [str(name) for name in block] if isinstance(block, list | tuple) else []


def _stored(folder: Path, event: Mapping[str, Any]) -> StoredPlan:
    """Return the arrays of an interval; DataError where they are missing or damaged."""
    span, what = event.get("thinned"), f"plan of interval {event['interval']}"
    if span is None:
        return load_plan(folder, event["interval"])
    try:
        start, count = (int(number) for number in span)
        served = np.fromfile(folder / THINNED, dtype="<i4", count=count, offset=4 * start)
    except (OSError, TypeError, ValueError) as error:
        raise DataError(f"{THINNED}, {what}: {error}") from error
    if len(served) != count:
        raise DataError(f"{THINNED} ends before the {what}")
    return StoredPlan(rows=served.astype(np.int64))


def _checked(plan: StoredPlan, event: Mapping[str, Any], size: int) -> StoredPlan:
    """Return a plan of a pool of ``size`` rows; DataError where its arrays are of others, or do not fit together."""
    what, lines = f"plan of interval {event['interval']}", size if plan.pool is None else len(plan.pool)
    for name in ("rows", "pool", "kept"):
        rows: Any = getattr(plan, name)
        if rows is None:
            continue
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer) or (len(rows) and rows.max() >= size):
            raise DataError(f"{what}: {name} are no rows of the {size:,} of this run")
        if len(rows) and rows.min() < (-1 if name == "rows" else 0):
            raise DataError(f"{what}: {name} hold negative rows")
    for name in _BY_ROW:
        values: Any = getattr(plan, name)
        if values is not None and (values.shape != (lines,) or values.dtype.kind not in "fiu"):
            raise DataError(f"{what}: {name} are not one for each of its {lines:,} rows")
    return plan


class Plans:
    """Reads the plans of a run as ones of its present pool, which is another one where a resumed run had other rows."""

    def __init__(self, folder: Path, events: Sequence[Event], planned: Sequence[Event]) -> None:
        """``events`` are all of the record; ``planned`` are those in force, in order."""
        self._folder = folder
        self.fingerprint: str | None = None
        """Of the present pool."""
        pools: dict[int, str | None] = {}
        for event in events:
            if event["event"] == "run_started":
                self.fingerprint = (event.get("row_space") or {}).get("fingerprint")
            elif event["event"] == "planned":
                pools[event["interval"]] = self.fingerprint
        self._place: dict[int, int] = {}  # of each interval's pool in the chain of pools
        chain: list[str | None] = []
        for interval in (event["interval"] for event in planned):
            chain += [pools[interval]] if not chain or chain[-1] != pools[interval] else []
            self._place[interval] = len(chain) - 1
        chain += [self.fingerprint] if chain and chain[-1] != self.fingerprint else []
        self._to_now: list[Rows | str | None] = [None] * len(chain)  # None: its rows are those of now; or what is wrong
        for place in reversed(range(len(chain) - 1)):
            self._to_now[place] = self._step(folder, chain[place], chain[place + 1], self._to_now[place + 1])

    def of(self, event: Event, size: int) -> StoredPlan:
        """Return the plan of an interval, in rows of the present pool of ``size``; rows that left it are left out.

        Raises:
            DataError: The plan is missing or damaged, or of another pool whose rows are not known in this one.
        """
        try:
            return _checked(self._moved(event["interval"], _stored(self._folder, event)), event, size)
        except DataError as error:
            told = str(error).removeprefix(f"{self._folder}/")
            raise DataError(f"{told}; its rows are not counted") from error

    @staticmethod
    def _step(folder: Path, before: str | None, after: str | None, onwards: Rows | str | None) -> Rows | str:
        path = folder / moved_name(before or "", after or "")
        try:
            with path.open("rb") as file:
                found = np.load(file, allow_pickle=False)
            if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
                raise ValueError("it holds no rows")
        except Exception as error:  # noqa: BLE001 - numpy has several kinds for broken files
            return f"is of another pool of rows, and {path.name} cannot be read ({type(error).__name__})"
        if isinstance(onwards, str):
            return onwards
        to_now = np.full(int(found.max(initial=-1)) + 1, -1, dtype=np.int64)
        there = np.flatnonzero(found >= 0)
        to_now[found[there]] = there if onwards is None else _looked_up(onwards, there)
        return to_now

    def _moved(self, interval: int, plan: StoredPlan) -> StoredPlan:
        to_now = self._to_now[self._place[interval]]
        if to_now is None:
            return plan
        if isinstance(to_now, str):
            raise DataError(f"the plan {to_now}")
        values = {name: getattr(plan, name) for name in _BY_ROW if getattr(plan, name) is not None}
        pool = plan.pool
        if pool is None and values:
            pool = np.arange(min(len(each) for each in values.values()), dtype=np.int64)
        if pool is not None:
            pool = _looked_up(to_now, pool)
            there = np.flatnonzero(pool >= 0)
            pool, values = pool[there], {name: each[there] for name, each in values.items()}
        kept = None if plan.kept is None else _looked_up(to_now, plan.kept)
        return StoredPlan(
            rows=_looked_up(to_now, plan.rows), pool=pool, kept=None if kept is None else kept[kept >= 0], **values
        )


def _looked_up(to_now: Rows, rows: Rows) -> Rows:
    """Return where rows are now, -1 for those that are not there."""
    inside = (rows >= 0) & (rows < len(to_now))
    return np.where(inside, to_now[np.where(inside, rows, 0)] if len(to_now) else -1, -1)


class _Served:
    """How often each row was served, and when."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._times = np.zeros(size, dtype=np.int64)
        self._first, self._last = np.full(size, -1, dtype=np.int64), np.full(size, -1, dtype=np.int64)
        self._rows: list[Rows] | None = []
        self._steps: list[NDArray[np.int32]] = []
        self._positions = 0

    def add(self, rows: Rows, first: int, stop: int, steps: int) -> None:
        """Count the rows of a plan of ``steps`` optimizer steps that begins at step ``first``, up to step ``stop``."""
        if not steps or stop <= first or not len(rows):
            return
        batch = -(-len(rows) // steps)
        rows = rows[: (stop - first) * batch]
        at = np.minimum(first + np.arange(len(rows), dtype=np.int64) // batch, np.iinfo(np.int32).max).astype(np.int32)
        at, rows = at[rows >= 0], rows[rows >= 0]
        self._times += np.bincount(rows, minlength=self._size)
        self._last[rows] = at  # of repeated ones the last counts
        new = self._first[rows] < 0
        self._first[rows[new][::-1]] = at[new][::-1]
        self._positions += len(rows)
        if self._positions > _POSITIONS:
            self._rows = None
        if self._rows is not None:
            self._rows.append(rows)
            self._steps.append(at)

    def columns(self, *, known: bool) -> dict[str, pa.Array]:
        """Return the columns; nulls where it is not ``known`` what was served."""
        steps = pa.list_(pa.int32())
        if not known:
            nulls = {name: pa.nulls(self._size, pa.int64()) for name in ("times_served", "first_served", "last_served")}
            return {**nulls, "served_at": pa.nulls(self._size, steps)}
        listed = pa.nulls(self._size, steps)
        if self._rows is not None:
            rows = np.concatenate([np.zeros(0, dtype=np.int64), *self._rows])
            values = np.concatenate([np.zeros(0, dtype=np.int32), *self._steps])
            offsets = np.concatenate([[0], np.cumsum(self._times)]).astype(np.int32)
            listed = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values[np.argsort(rows, kind="stable")]))
        return {
            "times_served": pa.array(self._times),
            "first_served": _whole(self._first),
            "last_served": _whole(self._last),
            "served_at": listed,
        }


class _Decided:
    """What the selector made of each row: in the latest decision that had it in its pool, and in each decision."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._targets: dict[str, int] = {}  # numbers of all targets, which a resumed run may change
        self.told: list[dict[str, Any]] = []
        """Each decision: interval, steps, rows in the pool, scored and kept, cut, and which side of it was kept."""
        self._decision = np.full(size, -1, dtype=np.int64)
        self._chosen = np.zeros(size, dtype=np.bool_)
        self._score, self._cut = np.full(size, np.nan, dtype=np.float32), np.full(size, np.nan, dtype=np.float32)
        self._place, self._rank = np.full(size, -1, dtype=np.int64), np.full(size, -1, dtype=np.int64)
        self._target, self._target_row = np.full(size, -1, dtype=np.int32), np.full(size, -1, dtype=np.int64)
        self._times_chosen, self._times_scored = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        self._to_rank: list[tuple[int, Rows, NDArray[np.float32]]] = []  # decisions whose ranks are not counted yet
        self._every = 1  # of the decisions, each second, fourth, ... has columns of its own, so that they stay few
        self._most = int(np.clip(_CELLS // max(size, 1), 4, _DECISIONS))
        self._own: dict[int, tuple[int, NDArray[np.float32], NDArray[np.int32]]] = {}

    def add(self, plan: StoredPlan, event: Mapping[str, Any], targets: Sequence[str]) -> None:
        """Add a decision; ``targets`` are the selector's at that time."""
        size = self._size
        pool = np.arange(size) if plan.pool is None else plan.pool
        kept = np.unique(plan.rows[plan.rows >= 0]) if plan.kept is None else plan.kept
        is_kept = np.zeros(size, dtype=np.bool_)
        is_kept[kept] = True
        self._decision[pool], self._chosen[pool] = event["interval"], is_kept[pool]
        self._place[pool] = -1
        self._place[kept[::-1]] = np.arange(len(kept), 0, -1)
        self._times_chosen[is_kept] += 1
        for values in (self._score, self._cut):
            values[pool] = np.nan
        self._rank[pool] = self._target[pool] = self._target_row[pool] = -1
        told = {key: event[key] for key in ("interval", "start_step", "stop_step")}
        told |= {
            "pool": len(pool),
            "kept": int(is_kept.sum()),
            "scored": 0,
            "cut": None,
            "prefers": None,
            "exceptions": 0,
        }
        told["reason"] = event.get("reason") if isinstance(event.get("reason"), str) else ""
        if plan.scores is not None:
            scores = plan.scores.astype(np.float32)
            known = np.flatnonzero(np.isfinite(scores))
            rows = pool[known]
            cut, prefers, exceptions = _cut(scores[known], is_kept[rows])
            told |= {"scored": len(known), "cut": cut, "prefers": prefers, "exceptions": exceptions}
            self._score[rows] = scores[known]
            # Ranks of a decision over the whole pool are those of no row once another one has come.
            if len(pool) == size:
                self._to_rank = []
            elif len(self._to_rank) == _UNRANKED:
                self._rank_rows()
            self._to_rank.append((event["interval"], rows, scores[known]))
            self._cut[rows] = np.nan if cut is None else cut
            self._times_scored[rows] += 1
            if len(self.told) % self._every == 0:
                own_scores, own_ranks = np.full(size, np.nan, dtype=np.float32), np.zeros(size, dtype=np.int32)
                own_scores[rows], own_ranks[rows] = scores[known], _ranks(scores[known])
                self._own[event["interval"]] = (len(self.told), own_scores, own_ranks)
                if len(self._own) > self._most:
                    self._every *= 2
                    self._own = {key: one for key, one in self._own.items() if one[0] % self._every == 0}
        if plan.target is not None and plan.target_row is not None:
            numbers = np.array([*(self._targets.setdefault(name, len(self._targets)) for name in targets), -1])
            inside = (plan.target >= 0) & (plan.target < len(targets))
            self._target[pool] = numbers[np.where(inside, plan.target, -1).astype(np.int64)]
            self._target_row[pool] = plan.target_row
        self.told.append(told)

    def _rank_rows(self) -> None:
        for interval, rows, scores in self._to_rank:
            latest = self._decision[rows] == interval
            self._rank[rows[latest]] = _ranks(scores)[latest]
        self._to_rank = []

    def columns(self) -> dict[str, pa.Array]:
        """Return the columns of the latest decision of each row."""
        self._rank_rows()
        return {
            "decision": _whole(self._decision),
            "chosen": pa.array(self._chosen, mask=self._decision < 0),
            "place": _whole(self._place),
            "score": _real(self._score),
            "rank": _whole(self._rank),
            "cut": _real(self._cut),
            "nearest_target": _named(list(self._targets), self._target),
            "nearest_row": _whole(self._target_row),
            "times_chosen": pa.array(self._times_chosen),
            "times_scored": pa.array(self._times_scored),
        }

    def columns_by_decision(self) -> dict[str, pa.Array]:
        """Return score and rank of each row in single decisions, which are spread over the run where there are many."""
        found: dict[str, pa.Array] = {}
        for interval, (_, scores, ranks) in self._own.items():
            found |= {f"score_{interval}": _real(scores), f"rank_{interval}": pa.array(ranks, mask=ranks == 0)}
        return found


def _ranks(scores: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return the place of each score [n], 1 for the highest; of equal ones the first comes first."""
    ranks = np.empty(len(scores), dtype=np.int32)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1, dtype=np.int32)
    return ranks


def _cut(scores: NDArray[np.float32], kept: NDArray[np.bool_]) -> tuple[float | None, str | None, int]:
    """Return the score of the last row kept, the side that was kept ("high" or "low"), and how many rows it misplaces.

    ``kept`` [n] says which rows were kept; the cut is that of as many rows as were kept. None where the choice does not
    follow the scores: where that misplaces half as many rows as chance would.
    """
    count, size = int(kept.sum()), len(kept)
    if not 0 < count < size:
        return None, None, 0
    (highest, high), (lowest, low) = _ends(scores, kept, count), _ends(-scores[::-1], kept[::-1], count)
    exceptions = min(high, low)
    if 2 * exceptions * size >= count * (size - count):
        return None, None, exceptions
    return (highest, "high", high) if high <= low else (-lowest, "low", low)


def _ends(scores: NDArray[np.float32], kept: NDArray[np.bool_], count: int) -> tuple[float, int]:
    """Return the lowest of the ``count`` highest scores, and how many of their rows were not kept; first ones first."""
    last = np.partition(scores, len(scores) - count)[len(scores) - count]
    above, equal = scores > last, scores == last
    found = int(kept[above].sum()) + int(kept[equal][: count - int(above.sum())].sum())
    return float(last), count - found


def _of_rows(
    path: Path, fingerprint: str, size: int, wanted: Mapping[str, pa.DataType] | None, notes: list[str]
) -> dict[str, pa.Array]:
    """Return columns of a file that has a line for some of the rows; those not in it are null.

    ``wanted``: its columns, which are all null where it is missing; None: those that begin with "credit_".
    """
    found: dict[str, pa.Array] = {}
    try:
        if path.is_file():
            table = pq.read_table(path)
            told = table.schema.metadata or {}
            rows = table.column("row").to_numpy()
            if told.get(b"fingerprint") != fingerprint.encode():
                raise ValueError("it is of other rows")
            if len(rows) and not 0 <= rows.min() <= rows.max() < size:
                raise ValueError(f"it names rows that are none of the {size:,}")
            names = [name for name in table.column_names if name.startswith("credit_")] if wanted is None else wanted
            for name in names:
                values = np.full(size, np.nan)
                values[rows] = table.column(name).to_numpy()
                there = np.isfinite(values)
                kind = pa.float64() if wanted is None else wanted[name]
                found[name] = pa.array(np.where(there, values, 0.0), mask=~there).cast(kind)
    except Exception as error:  # noqa: BLE001 - arrow has many kinds of its own
        notes.append(f"{path.name} cannot be read: {on_one_line(str(error))[:200]}")
        found = {}
    return {**{name: pa.nulls(size, kind) for name, kind in (wanted or {}).items()}, **found}


# ---- arrays


def _named(names: Sequence[str], index: NDArray[np.integer]) -> pa.DictionaryArray:
    """Return texts by their index, null for -1."""
    return pa.DictionaryArray.from_arrays(
        pa.array(index.astype(np.int32), mask=index < 0), pa.array(list(names), type=pa.string())
    )


def _whole(values: NDArray[np.integer]) -> pa.Array:
    return pa.array(values.astype(np.int64), mask=values < 0)


def _real(values: NDArray[np.floating]) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def _write(path: Path, table: pa.Table) -> None:
    named = [column.name for column in table.schema if pa.types.is_dictionary(column.type)]
    named += [f"documents.list.element.{name}" for name in ("dataset", "file")]
    with replacing(path) as file:
        pq.write_table(table, file, compression="zstd", use_dictionary=named)


def raw_rows(table: pa.Table, rows: Rows) -> Iterator[tuple[int, bytes]]:
    """Yield rows of a table of chosen rows with their bytes in their file; those that cannot be found are left out.

    The order is that of the files; a packed row is there once for each of its documents. docs/report.md tells which
    rows have a place in a file.
    """
    yield from ((row, content) for (row, _), content in _found_in_files(table, rows))


def places_of(table: pa.Table, rows: Rows) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield rows of a table of chosen rows, or each document of packed ones: row, its number there, and its place.

    A place has the keys ``dataset``, ``file``, ``line``, ``position`` and ``id``.
    """
    part = table.select(["dataset", "file", "line", "position", "id", "documents"]).take(pa.array(rows))
    for row, place in zip(rows.tolist(), part.to_pylist(), strict=True):
        documents = place.pop("documents")
        yield from ((row, at, each) for at, each in enumerate([place] if documents is None else documents))


def _found_in_files(table: pa.Table, rows: Rows) -> Iterator[tuple[tuple[int, int], bytes]]:
    """Yield row, number of its document and bytes, in the order of the files."""
    from dataflex.config.files import SourceRows

    sources = {one["name"]: one for one in chosen_notes(table)["sources"]}
    by_file: dict[str, dict[int, list[tuple[int, int]]]] = {}
    by_place: dict[str, dict[int, list[tuple[int, int]]]] = {}
    for row, at, place in places_of(table, rows):
        if place["file"] is not None and place["line"] is not None:
            by_file.setdefault(place["file"], {}).setdefault(place["line"], []).append((row, at))
        elif place["position"] is not None:
            by_place.setdefault(place["dataset"], {}).setdefault(place["position"], []).append((row, at))
    for path, wanted in by_file.items():
        left = set(wanted)
        with _opened(path, sources) as stream:
            for number, content in enumerate(stream, start=1):
                if number in left:
                    left.remove(number)
                    yield from ((row, content.rstrip(b"\r\n")) for row in wanted[number])
                    if not left:
                        break
    for name, places in by_place.items():
        paths = [Path(file["path"]) for file in sources[name]["files"]]
        if not paths or not all(_is_as_it_was(path, sources) for path in paths):
            continue
        source = SourceRows(paths)
        for position, ids in places.items():
            if position < source.num_rows:
                yield from ((row, source.row(position)) for row in ids)


def _opened(path: str, sources: Mapping[str, Any]) -> Any:
    """Open a file that rows come from; an empty one where it is missing, or has another size than it had."""
    import io

    file = Path(path)
    return file.open("rb") if _is_as_it_was(file, sources) else io.BytesIO()


def _is_as_it_was(file: Path, sources: Mapping[str, Any]) -> bool:
    """Whether a file is there, with the size that it had."""
    sizes = {each["path"]: each.get("size") for one in sources.values() for each in one["files"]}
    return file.is_file() and file.stat().st_size == sizes.get(str(file))


def row_texts(table: pa.Table, rows: Rows) -> dict[int, str]:
    """Return the text of rows of a table of chosen rows, without those that cannot be found in their files.

    The documents of a packed row stand in their order, with ``||`` between them.
    """
    texts: dict[int, list[str]] = {}
    for (row, _), content in sorted(_found_in_files(table, rows), key=lambda each: each[0]):
        texts.setdefault(row, []).append(text_of(content))
    return {row: " || ".join(documents) for row, documents in texts.items()}


def text_of(content: bytes) -> str:
    """Return a row of a file as text: the values of an object with their keys, anything else as it stands."""
    text = content.decode("utf-8", "replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(value, dict):
        return text
    told = {key: one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for key, one in value.items()}
    return " | ".join(f"{key}: {one}" for key, one in told.items() if one not in ("", "null"))
