"""LLaMA-Factory's ``get_dataset``, asked for the training data, the evaluation sets or a target.

What is written about the training data alone stays with it. ``_HOW_ROWS_ARE_READ`` names the settings that hold for
every data set; all others are listed with what they are for another set, so that a new one has to be decided upon.
Whatever the loader refuses becomes a ``DataError`` that names the key and the data set.

Upstream names relied upon, each asserted by ``tests/upstream``: ``llamafactory.data.get_dataset`` (public),
``llamafactory.data.loader._load_single_dataset`` (wrapped while loading, to say which data set failed), the fields of
``llamafactory.hparams.DataArguments``, whose ``__post_init__`` takes one from ``cutoff_len`` where packing is asked.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from llamafactory.data import get_dataset as lf_get_dataset
from llamafactory.data import loader as lf_loader
from numpy.typing import NDArray

from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.data import find_sources, target_data_sets
from dataflex.errors import ConfigError, DataError, DataFlexError

_HOW_ROWS_ARE_READ = frozenset(
    {
        "data_shared_file_system",
        "dataset_dir",
        "default_system",
        "enable_thinking",
        "eval_num_beams",
        "eval_on_each_dataset",
        "ignore_pad_token_for_loss",
        "mask_history",
        "media_dir",
        "overwrite_cache",
        "preprocessing_batch_size",
        "preprocessing_num_workers",
        "preserve_thinking",
        "template",
        "tool_format",
        "train_on_prompt",
    }
)
"""Settings that hold for every data set alike."""

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
"""Settings of the training data alone, with what they are for another data set."""


def of_another_set(data_args: Any, names: Sequence[str], *, cutoff_shortened: bool) -> Any:
    """Return LLaMA-Factory's data arguments for data sets that are not trained on, all their rows one by one.

    Args:
        data_args: Those of the run.
        names: The data sets, whose rows follow one another.
        cutoff_shortened: Whether LLaMA-Factory took one token from ``cutoff_len`` for the sake of packing.
    """
    args = copy.copy(data_args)
    for key, value in {**_OF_TRAINING, "dataset": list(names), "eval_dataset": None}.items():
        setattr(args, key, value)
    args.cutoff_len = data_args.cutoff_len + cutoff_shortened
    return args


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Calls ``get_dataset`` as the workflow did, for one part of the data after the other.

    Attributes:
        template: As the workflow gave them, like the four that follow.
        written: LLaMA-Factory's keys as the user wrote them.
    """

    template: Any
    model_args: Any
    data_args: Any
    training_args: Any
    stage: Any
    tokenizer_module: Mapping[str, Any]
    written: LlamaFactoryArgs

    def stock(self) -> dict[str, Any]:
        """Return what the workflow asked for; served rows stay random-access."""
        args = self._changed()
        if self.written.tokenized:
            return self._load(args, tokenized_path=[args.tokenized_path])
        return self._load(args, dataset=args.dataset, eval_dataset=args.eval_dataset)

    def training(self, name: str) -> Any:
        """Return the rows of one of several training sets."""
        args = self._changed(dataset=[name], eval_dataset=None, val_size=0.0)
        return self._load(args, dataset=[name])["train_dataset"]

    def evaluation(self) -> Any:
        """Return what ``eval_dataset`` names, as it is named there, beside any tokenized copy of the training data."""
        args = self._changed(dataset=None, val_size=0.0, tokenized_path=None)
        return self._load(args, eval_dataset=self.data_args.eval_dataset)["eval_dataset"]

    def target(self, name: str) -> Any:
        """Return the rows of a target."""
        shortened = bool(self.written.packing) or self.written.neat_packing
        names = target_data_sets(name)
        args = of_another_set(self.data_args, names, cutoff_shortened=shortened)
        return self._load(args, targets=names)["train_dataset"]

    def _changed(self, **changes: Any) -> Any:
        args = copy.copy(self.data_args)
        for key, value in {"streaming": False, **changes}.items():
            setattr(args, key, value)
        return args

    def _load(self, args: Any, **named: Sequence[str] | None) -> dict[str, Any]:
        """Call ``get_dataset``; ``named`` are the data sets by the key that names them, in the order of loading."""
        with _told([f"{key}: {name!r}" for key, names in named.items() for name in names or ()]):
            module: dict[str, Any] = lf_get_dataset(
                self.template, self.model_args, args, self.training_args, self.stage, **self.tokenizer_module
            )
        return module


@contextmanager
def _told(places: Sequence[str]) -> Iterator[None]:
    """Tell whatever loading refuses by key and data set; ``places`` in the order of loading."""
    original = lf_loader._load_single_dataset
    loaded: list[str] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        dataset = original(*args, **kwargs)
        loaded.append("")
        return dataset

    lf_loader._load_single_dataset = load
    try:
        yield
    except DataFlexError:
        raise
    except Exception as error:
        where = places[len(loaded)] if len(loaded) < len(places) else ", ".join(places)
        raise DataError(f"{where or 'dataset'} cannot be loaded: {_reason(error)}") from error
    finally:
        lf_loader._load_single_dataset = original


def _reason(error: BaseException) -> str:
    """Return in one line what lies at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, StopIteration):
        return "it has no rows"
    if isinstance(error, KeyError):
        return f"{error} is missing in its rows; is it what 'columns' or 'tags' of dataset_info.json say?"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def raw_columns(wanted: bool, seen: list[Dataset]) -> Iterator[None]:
    """Keep a reference to every raw data set that LLaMA-Factory aligns while inside, if columns are wanted."""
    if not wanted:
        yield
        return
    original = lf_loader.align_dataset

    def keep(dataset: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(dataset)
        return original(dataset, *args, **kwargs)

    lf_loader.align_dataset = keep
    try:
        yield
    finally:
        lf_loader.align_dataset = original


def split_rows(total: int, size: int | float, seed: int, part: str = "train") -> NDArray[np.int64]:
    """Return the rows of one part of ``Dataset.train_test_split``, in its order, by letting it split positions."""
    positions = Dataset.from_dict({"row": np.arange(total, dtype=np.int64)})
    split = positions.train_test_split(test_size=size, seed=seed)
    return _values(split[part], "row").astype(np.int64)


def _values(dataset: Dataset, name: str) -> NDArray[Any]:
    # By way of arrow: the data sets' own numpy format imports a video reader that newer torchvisions lack.
    found = dataset.select_columns([name]).with_format("arrow")[:].column(name)
    if found.null_count == 0:
        return np.asarray(found.to_numpy())
    values = np.empty(len(found), dtype=object)  # numpy has no null: a missing number must not become a NaN
    values[:] = found.to_pylist()
    return values


@dataclass(frozen=True, kw_only=True)
class RawRows:
    """Rows as they were read from the files of several data sets, and which of them are meant, in order.

    Attributes:
        names: Names of the data sets.
        parts: Their raw rows.
        rows: Positions in the parts, one after the other [N].
        written: LLaMA-Factory's keys as the user wrote them, for telling places.
    """

    names: Sequence[str]
    parts: Sequence[Dataset]
    rows: NDArray[np.int64]
    written: LlamaFactoryArgs

    def place(self, row: int) -> str:
        """Say where row ``row`` of those meant stands: data set, and the line of its file where that can be known."""
        ends = np.cumsum([len(part) for part in self.parts])
        raw = int(self.rows[row])
        which = int(np.searchsorted(ends, raw, side="right"))
        position = raw - (int(ends[which - 1]) if which else 0)
        name = self.names[which]
        sources, _ = find_sources([name], self.written, "dataset", Path())
        file = sources[0].path if sources else None
        drawn = bool(sources) and sources[0].num_samples is not None
        line = None if file is None or drawn else _line_of(file, position)
        if line is not None:
            return f"data set {name!r}, line {line:,} of {file}"
        told = " drawn by num_samples" if drawn else ""
        return f"data set {name!r}, row {position + 1:,} of {len(self.parts[which]):,}{told}"

    def check(self, key: str, name: str, values: NDArray[Any], refused: tuple[NDArray[np.bool_], str] | None) -> None:
        """Refuse values that cannot be used, by the place of the first.

        Args:
            key: Path of the key that asks for the column.
            name: The column.
            values: Its values [N].
            refused: Which of them cannot be used [N], and what they must be; None where all can.

        Raises:
            DataError: There are such values.
        """
        if refused is None or not refused[0].any():
            return
        bad, wanted = refused
        row = int(np.flatnonzero(bad)[0])
        others = f" (and {int(bad.sum()) - 1:,} more rows)" if bad.sum() > 1 else ""
        raise DataError(f"{key}: {self.place(row)}, has {name} = {_shown(values[row])}{others}; {wanted}")


def _shown(value: Any) -> str:
    plain = value.item() if isinstance(value, np.generic) else value
    return "null" if plain is None else repr(plain) if not isinstance(plain, bool) else str(plain).lower()


def _line_of(file: Path, position: int) -> int | None:
    """Return the line, counted from 1, of an object of a file that has one object a line; else None."""
    if file.suffix not in (".json", ".jsonl") or not file.is_file():
        return None
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if position:
                position -= 1
                continue
            try:
                return number if isinstance(json.loads(line), Mapping) else None
            except ValueError:
                return None
    return None


def column(name: str, raw: RawRows, num_rows: int) -> NDArray[Any]:
    """Return a raw column in the order of the rows meant [num_rows].

    Raises:
        ConfigError: A source lacks the column.
        DataError: Raw rows and tokenized rows do not match one to one.
    """
    if not raw.parts:
        raise DataError(f"column {name!r} is not at hand: the data was loaded already tokenized (tokenized_path)")
    for source, part in zip(raw.names, raw.parts, strict=False):
        if name not in part.column_names:
            known = ", ".join(part.column_names)
            raise ConfigError(f"column {name!r} is not in the data set {source!r} (columns found: {known})")
    if len(raw.rows) != num_rows:
        raise DataError(
            f"column {name!r}: {len(raw.rows):,} raw rows became {num_rows:,} training rows, so that its values cannot "
            "be matched. Turn packing off, and remove rows that LLaMA-Factory drops as invalid."
        )
    return np.concatenate([_values(part, name) for part in raw.parts])[raw.rows]
