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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llamafactory.data import get_dataset as lf_get_dataset
from llamafactory.data import loader as lf_loader

from dataflex.config.data import target_data_sets, tokenized
from dataflex.config.values import truthy
from dataflex.errors import DataError, DataFlexError

__all__ = ["Loader", "of_another_set"]

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
    written: Mapping[str, Any]

    def stock(self) -> dict[str, Any]:
        """Return what the workflow asked for; served rows stay random-access."""
        args = self._changed()
        if tokenized(self.written):
            return self._load(args, tokenized_path=[args.tokenized_path])
        return self._load(args, dataset=args.dataset, eval_dataset=args.eval_dataset)

    def training(self, name: str) -> Any:
        """Return the rows of one of several training sets."""
        args = self._changed(dataset=[name], eval_dataset=None, val_size=0.0)
        return self._load(args, dataset=[name])["train_dataset"]

    def evaluation(self) -> Any:
        """Return what ``eval_dataset`` names, as it is named there, beside any tokenised copy of the training data."""
        args = self._changed(dataset=None, val_size=0.0, tokenized_path=None)
        return self._load(args, eval_dataset=self.data_args.eval_dataset)["eval_dataset"]

    def target(self, name: str) -> Any:
        """Return the rows of a target."""
        shortened = truthy(self.written, "packing") or truthy(self.written, "neat_packing")
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
