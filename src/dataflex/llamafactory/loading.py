"""Calls LLaMA-Factory's ``get_dataset`` for the training data, the evaluation sets and targets, and keeps the raw rows.

Upstream names relied upon, each asserted by ``tests/upstream``: ``get_dataset``; of its module ``align_dataset``,
``get_dataset_list``, ``load_dataset`` and ``_get_preprocessed_dataset``, which are replaced while loading; the fields
of ``DataArguments``, which take one from ``cutoff_len`` for packing.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets
from llamafactory.data import converter as lf_converter
from llamafactory.data import get_dataset as lf_get_dataset
from llamafactory.data import loader as lf_loader
from numpy.typing import NDArray

from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.data import find_sources, target_data_sets
from dataflex.config.mappings import shown
from dataflex.errors import ConfigError, DataError, DataFlexError
from dataflex.huggingface.loop import replaced
from dataflex.llamafactory.shards import BadShard, BadShards, bottom, load_sound, told
from dataflex.llamafactory.streaming import PieceProcessor, serve
from dataflex.llamafactory.turns import DOCUMENTS, NUMBER, NumberedProcessor, WeighedConverter, WeighedProcessor
from dataflex.plan.domains import WANTED_WEIGHTS, unusable_weight
from dataflex.train.row_space import column_values, refuse_values

logger = logging.getLogger(__name__)

_OF_TRAINING: dict[str, Any] = {
    "buffer_size": 16384,
    "interleave_probs": None,
    "max_samples": None,
    "mix_strategy": "concat",
    "neat_packing": False,
    "packing": False,
    "streaming": False,
    "tokenized_path": None,
    "val_size": 0.0,
}
"""Settings of the training data alone, with their values for another data set."""
FILE_COLUMN = "dataflex_file"
"""Raw column that holds the number of the file of a row, where domains are named by paths."""
_CHUNK_ROWS = 20_000


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The rows that were read of one data set."""

    raw: Dataset  # rows as they were read from its files, from the first on
    aligned: Any  # the same rows with LLaMA-Factory's columns ``_prompt`` and ``_response``, lists of messages
    stage: str  # LLaMA-Factory's stage

    @cached_property
    def kept(self) -> NDArray[np.int64]:
        """Positions of the rows that tokenizing keeps, ascending."""
        return kept_rows(self.aligned, self.stage)


def kept_rows(aligned: Dataset, stage: str) -> NDArray[np.int64]:
    """Return the positions of the rows that tokenizing keeps: those with an answer, for preferences with two."""
    if stage == "pt":
        return np.arange(len(aligned), dtype=np.int64)
    kept = [np.zeros(0, dtype=np.bool_)]
    messages = aligned.select_columns(["_prompt", "_response"]).with_format("arrow")
    for table in messages.iter(batch_size=_CHUNK_ROWS):
        turns, answers = (
            pc.fill_null(pc.list_value_length(table.column(name)), 0).to_numpy().astype(np.int64)
            for name in ("_prompt", "_response")
        )
        kept.append((turns % 2 == 1) & (answers == 1 if stage == "sft" else answers >= 2))
    return np.flatnonzero(np.concatenate(kept)).astype(np.int64)


@contextmanager
def watched_origins(stage: str, found: list[Origin] | None = None) -> Iterator[list[Origin]]:
    """Return a list, ``found`` if given, to which every data set that LLaMA-Factory loads while inside is added."""
    origins = [] if found is None else found
    align = lf_loader.align_dataset

    def watch(dataset: Any, *args: Any, **kwargs: Any) -> Any:
        aligned = align(dataset, *args, **kwargs)
        origins.append(Origin(raw=dataset, aligned=aligned, stage=stage))
        return aligned

    with replaced((lf_loader, "align_dataset", watch)):
        yield origins


def of_another_set(data_args: Any, names: Sequence[str], *, cutoff_shortened: bool) -> Any:
    """Return the data arguments for data sets that are not trained on: all their rows, not packed.

    ``cutoff_shortened``: whether LLaMA-Factory took one token from ``cutoff_len`` for packing.
    """
    cutoff = data_args.cutoff_len + cutoff_shortened
    return changed_args(data_args, **_OF_TRAINING, dataset=list(names), eval_dataset=None, cutoff_len=cutoff)


def changed_args(data_args: Any, **changes: Any) -> Any:
    """Return a copy of the data arguments with changes, without streaming unless they say so."""
    args = copy.copy(data_args)
    for key, value in {"streaming": False, **changes}.items():
        setattr(args, key, value)
    return args


@dataclass(frozen=True)
class Loader:
    """Calls ``get_dataset`` as the workflow did, for one part of the data at a time."""

    template: Any  # argument of the workflow's call, like the five that follow
    model_args: Any
    data_args: Any
    training_args: Any
    stage: Any
    tokenizer_module: Mapping[str, Any]
    written: LlamaFactoryArgs  # LLaMA-Factory's keys as the user wrote them
    by_file: bool = False  # whether training rows carry the number of their file, see ``files``
    origins: list[Origin] = field(default_factory=list)  # data sets read: to train on, to evaluate, targets
    files: list[str] = field(default_factory=list)  # paths of the files that were numbered
    skip_bad_shards: bool = False  # whether files that cannot be read are left out
    bad_shards: dict[str, list[BadShard]] = field(default_factory=dict)  # those that were, by data set
    by_document: bool = False  # whether rows that are served are those that LLaMA-Factory packs
    turns: str = ""  # key of the messages' weights, which training rows then have as ``turns.WEIGHTS``
    numbers: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """For ``train`` and ``test``, the position of each tokenized row in the raw rows that ``numbered`` read."""
    documents: list[pa.ChunkedArray] = field(default_factory=list)
    """Of packed rows, positions of those in each among the raw rows; for each loading of training rows."""

    @property
    def test_size(self) -> int | float:
        """Rows that ``val_size`` holds out: a number, a share of all, or 0."""
        size = self.data_args.val_size
        return 0 if size <= 1e-6 else int(size) if size > 1 else size

    @property
    def packs(self) -> bool:
        """Whether rows are packed of several; LLaMA-Factory packs in two stages alone."""
        return self.written.packed and self.stage in ("pt", "sft") and not self.by_document

    def stock(self) -> dict[str, Any]:
        """Return what the workflow asked for."""
        args = self.data_args
        if self.written.tokenized:
            return self._load_training(changed_args(args), tokenized_path=[args.tokenized_path])
        return self._load_training(changed_args(args), dataset=args.dataset, eval_dataset=args.eval_dataset)

    def numbered(self) -> dict[str, Any]:
        """Return what the workflow asked for, as LLaMA-Factory merges, splits and orders it, and fill ``numbers``.

        Packed rows and those of a tokenized copy have none.
        """
        preprocess = lf_loader._get_preprocessed_dataset

        def preprocessed(dataset: Any, *args: Any, is_eval: bool = False, **kwargs: Any) -> Any:
            if dataset is not None:
                kept = kept_rows(dataset, self.stage)
                self.numbers["test" if is_eval else "train"] = column_values(dataset, NUMBER)[kept].astype(np.int64)
                dataset = dataset.remove_columns(NUMBER)
            return preprocess(dataset, *args, is_eval=is_eval, **kwargs)

        if self.packs:
            return self.stock()
        with replaced(
            (lf_loader, "align_dataset", _numbering()), (lf_loader, "_get_preprocessed_dataset", preprocessed)
        ):
            return self.stock()

    def in_pieces(self) -> dict[str, Any]:
        """Return what the workflow asked for, a stream or packed rows, which is not among the ``origins``.

        Packed rows have ``PIECES``.
        """
        args = copy.copy(self.data_args)
        with replaced(*([_marking(PieceProcessor)] if self.packs else [])):
            return replace(self, origins=[])._load(args, dataset=args.dataset, eval_dataset=args.eval_dataset)

    def training(self, name: str) -> Any:
        """Return the rows of one of several training sets."""
        args = changed_args(self.data_args, dataset=[name], eval_dataset=None, val_size=0.0)
        return self._load_training(args, dataset=[name])["train_dataset"]

    def evaluation(self) -> Any:
        """Return what ``eval_dataset`` names, as it is named there, also beside a tokenized copy of training data."""
        args = changed_args(self.data_args, dataset=None, val_size=0.0, tokenized_path=None)
        return self._load(args, eval_dataset=self.data_args.eval_dataset)["eval_dataset"]

    def target(self, name: str) -> Any:
        """Return the rows of a target."""
        names = target_data_sets(name)
        shortened = bool(self.written.packing) or self.written.neat_packing
        args = of_another_set(self.data_args, names, cutoff_shortened=shortened)
        return self._load(args, targets=names)["train_dataset"]

    def _load_training(self, args: Any, **named: Sequence[str] | None) -> dict[str, Any]:
        changes: list[tuple[Any, str, Any]] = []
        if self.by_file:
            changes.append((lf_loader, "load_dataset", self._load_numbered))
        if self.data_args.streaming:
            serves = partial(serve, by_document=self.by_document)
            changes.append((lf_loader, "_get_preprocessed_dataset", serves))
        if self.by_document:
            changes.append((lf_loader, "get_dataset_list", _undrawn))
        packs = self.packs and not self.data_args.streaming and args.tokenized_path is None
        if packs:
            changes.append((lf_loader, "align_dataset", _numbering()))
        if self.turns or packs:
            make = lf_converter.get_dataset_converter
            changes.append(_marking(WeighedProcessor if self.turns else NumberedProcessor))
            if self.turns:
                converts = lambda *given: WeighedConverter(make(*given), self.turns)  # noqa: E731
                changes.append((lf_converter, "get_dataset_converter", converts))
        with replaced(*changes):
            module = self._load(args, **named)
        if packs:
            train = module["train_dataset"]
            self.documents.append(train.select_columns([DOCUMENTS]).with_format("arrow")[:].column(DOCUMENTS))
            module["train_dataset"] = train.remove_columns(DOCUMENTS)
        return module

    def _load_numbered(self, *args: Any, data_files: Any = None, **kwargs: Any) -> Any:
        """Load files one by one, as ``datasets.load_dataset`` does, and add the number of the file to every row."""
        if not isinstance(data_files, list) or kwargs.get("streaming"):
            return _load_dataset(*args, data_files=data_files, **kwargs)
        parts = []
        for file in data_files:
            part = _load_dataset(*args, data_files=[file], **kwargs)
            parts.append(part.add_column(FILE_COLUMN, np.full(len(part), len(self.files), dtype=np.int32)))
            self.files.append(str(file))
        return concatenate_datasets(parts)

    def _load(self, args: Any, **named: Sequence[str] | None) -> dict[str, Any]:
        """Call ``get_dataset`` and add the sets that are read to ``origins``; errors name the key and the data set.

        ``named``: the data sets by the key that names them, in the order of loading.
        """
        listed = [(key, name) for key, names in named.items() for name in names or ()]
        places = [f"{key}: {name!r}" for key, name in listed]
        before, load = len(self.origins), lf_loader.load_dataset

        def load_sound_shards(**given: Any) -> Any:
            rows, bad = load_sound(load, skip=self.skip_bad_shards, **given)
            if bad:
                _, name = listed[len(self.origins) - before]
                self.bad_shards[name] = bad
                for shard in bad:
                    logger.warning("data set %r: %s; it is left out", name, shard.tell())
            return rows

        try:
            with watched_origins(self.stage, self.origins), replaced((lf_loader, "load_dataset", load_sound_shards)):
                module: dict[str, Any] = lf_get_dataset(
                    self.template, self.model_args, args, self.training_args, self.stage, **self.tokenizer_module
                )
        except DataFlexError:
            raise
        except Exception as error:
            at = len(self.origins) - before  # the data set that failed
            where = places[at] if at < len(places) else ", ".join(places) or "dataset"
            raise DataError(f"{where} {self._too_short(error) or f'cannot be loaded: {_reason(error)}'}") from error
        return module

    def _too_short(self, error: BaseException) -> str:
        """Return the reason where packing left no row, which LLaMA-Factory tells as a lack of samples; else nothing."""
        if not (self.written.packed and str(bottom(error)).startswith("Cannot find sufficient samples")):
            return ""
        return (
            f"has fewer tokens than one row of cutoff_len {self.data_args.cutoff_len:,}, so packing leaves no row; "
            "lower cutoff_len, or set 'packing: false'"
        )

    def raw_rows(self, *, held_out: bool = False) -> RawRows:
        """Return the raw rows that are trained on, or those that are held out, in the order of the tokenized rows."""
        names, first, size = self.data_args.dataset, 0, self.test_size
        if held_out and not size:
            names = self.data_args.eval_dataset
            first = len(self.origins) - len(names)  # the last ones that were read so far
        parts = [origin.raw for origin in self.origins[first : first + len(names)]]
        rows = np.arange(sum(map(len, parts)), dtype=np.int64)
        if not first and self.numbers:
            rows = self.numbers["test" if held_out else "train"]
        elif size:
            rows = split_rows(len(rows), size, self.training_args.seed)["test" if held_out else "train"]
        return RawRows(names=names, parts=parts, rows=rows, written=self.written)


_load_dataset, _get_dataset_list = lf_loader.load_dataset, lf_loader.get_dataset_list


def _marking(marks: Callable[..., Any]) -> tuple[Any, str, Any]:
    """Return the change after which ``marks`` wraps LLaMA-Factory's processors of training rows."""
    preprocess, processor = lf_loader._get_preprocessed_dataset, lf_loader._get_dataset_processor

    def marked(*args: Any, is_eval: bool = False, **kwargs: Any) -> Any:
        tokenizes = processor if is_eval else lambda *given, **named: marks(processor(*given, **named))
        with replaced((lf_loader, "_get_dataset_processor", tokenizes)):
            return preprocess(*args, is_eval=is_eval, **kwargs)

    return lf_loader, "_get_preprocessed_dataset", marked


def _undrawn(*args: Any, **kwargs: Any) -> Any:
    """Return what ``get_dataset_list`` does without ``num_samples``, which LLaMA-Factory's streams do not heed."""
    found = _get_dataset_list(*args, **kwargs)
    for each in found:
        each.num_samples = None
    return found


def _numbering() -> Callable[..., Any]:
    """Return ``align_dataset`` with ``NUMBER`` as a column, counted over all data sets that it is called for."""
    align, read = lf_loader.align_dataset, 0

    def aligned(*args: Any, **kwargs: Any) -> Any:
        nonlocal read
        found = align(*args, **kwargs)
        first, read = read, read + len(found)
        return found.add_column(NUMBER, np.arange(first, read, dtype=np.int64))

    return aligned


def _reason(error: BaseException) -> str:
    """Return the error at the bottom of a chain in one line."""
    error = bottom(error)
    if isinstance(error, BadShards):
        return str(error)
    if isinstance(error, StopIteration):
        return "it has no rows"
    if isinstance(error, KeyError):
        return f"{error} is missing in its rows; is it what 'columns' or 'tags' of dataset_info.json say?"
    return told(error)


def split_rows(total: int, size: int | float, seed: int) -> dict[str, NDArray[np.int64]]:
    """Return the positions that ``Dataset.train_test_split`` puts into ``train`` and ``test``, in its order."""
    positions = Dataset.from_dict({"row": np.arange(total, dtype=np.int64)})
    split = positions.train_test_split(test_size=size, seed=seed)
    return {part: column_values(rows, "row").astype(np.int64) for part, rows in split.items()}


@dataclass(frozen=True, kw_only=True)
class RawRows:
    """Rows as they were read from the files of several data sets, in the order of tokenized rows."""

    names: Sequence[str]  # names of the data sets
    parts: Sequence[Dataset]  # their raw rows
    rows: NDArray[np.int64]  # positions in the concatenated parts [N]
    written: LlamaFactoryArgs  # LLaMA-Factory's keys as the user wrote them, to find the files

    def column(self, name: str, num_rows: int) -> NDArray[Any]:
        """Return a raw column in the order of ``num_rows`` tokenized rows [num_rows].

        Raises:
            ConfigError: A data set lacks the column.
            DataError: Raw rows and tokenized rows do not match one to one.
        """
        for source, part in zip(self.names, self.parts, strict=True):
            if name not in part.column_names:
                known = ", ".join(part.column_names)
                raise ConfigError(f"column {name!r} is not in the data set {source!r} (columns found: {known})")
        if len(self.rows) != num_rows:
            raise DataError(
                f"column {name!r}: {len(self.rows):,} raw rows became {num_rows:,} training rows, so that its values "
                "cannot be matched. Turn packing off, and remove rows that LLaMA-Factory drops as invalid."
            )
        return np.concatenate([column_values(part, name) for part in self.parts])[self.rows]

    def check_turns(self, key: str, name: str) -> None:
        """Refuse weights of messages that cannot be used, and data of which no message has one.

        Raises:
            ConfigError: No message has a weight.
            DataError: One cannot be used, with its place.
        """
        there, first = False, 0
        for part in self.parts:
            for column, kind in ((each.name, each.type) for each in part.data.schema):
                item = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else None
                if item is None or not pa.types.is_struct(item) or item.get_field_index(name) < 0:
                    continue
                for start in range(0, len(part), _CHUNK_ROWS):
                    chunk = part.select(range(start, min(start + _CHUNK_ROWS, len(part)))).with_format("arrow")[:]
                    for place, messages in enumerate(chunk.column(column).to_pylist()):
                        given = [each[name] for each in messages or () if each and each[name] is not None]
                        there = there or bool(given)
                        bad = [value for value in given if unusable_weight(value)]
                        if bad:
                            where = replace(self, rows=np.array([first + start + place]))._place(0)
                            raise DataError(f"{key}: {where}, has {name} = {shown(bad[0])}; {WANTED_WEIGHTS}")
            first += len(part)
        if not there:
            listed = ", ".join(map(repr, self.names))
            raise ConfigError(f"{key}.column: no message of {listed} has a {name!r}; name another, or give them one")

    def _place(self, row: int) -> str:
        """Return the data set of a row, and the line of its file where that can be known."""
        ends = np.cumsum([len(part) for part in self.parts])
        which = int(np.searchsorted(ends, self.rows[row], side="right"))
        position = int(self.rows[row]) - (int(ends[which - 1]) if which else 0)
        name = self.names[which]
        sources, _ = find_sources([name], self.written, "dataset", Path())
        file = sources[0].path if sources else None
        drawn = bool(sources) and sources[0].num_samples is not None
        line = None if file is None or drawn or sources[0].split != "train" else _line_of(file, position)
        if line is not None:
            return f"data set {name!r}, line {line:,} of {file}"
        told = " drawn by num_samples" if drawn else ""
        return f"data set {name!r}, row {position + 1:,} of {len(self.parts[which]):,}{told}"

    def check(self, key: str, name: str, values: NDArray[Any], refused: tuple[NDArray[np.bool_], str] | None) -> None:
        """Refuse unusable values of a column, see ``refuse_values``."""
        refuse_values(key, name, values, refused, self._place)


def _line_of(file: Path, position: int) -> int | None:
    """Return the line, counted from 1, of an object of a file that has one object a line; else None."""
    if file.suffix not in (".json", ".jsonl") or not file.is_file():
        return None
    with file.open("rb") as lines:
        filled = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
        number, line = next(islice(filled, position, None), (None, b""))
    try:
        return number if isinstance(json.loads(line), Mapping) else None
    except ValueError:
        return None
