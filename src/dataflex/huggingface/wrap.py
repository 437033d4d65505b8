"""The door for Python: a class to use in place of ``transformers.Trainer`` or of one of TRL's trainers.

The block, the trainer's arguments and its data are checked when it is made; rows are measured once, when it trains.
Upstream names relied upon: of the Trainer ``train_dataset``, ``data_collator``, ``_remove_unused_columns``,
``_set_signature_columns_if_needed``; of TRL's trainers their names and modules, ``_prepare_dataset``, ``padding_free``,
``completion_only_loss`` of their collators, ``precompute_ref_log_probs``, ``loss_type`` of SFT, and ``seq_lengths``
of packed rows; of joined batches ``input_ids``, ``labels`` and ``position_ids``.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import DataCollatorWithFlattening, Trainer

from dataflex import checkpoints, comm
from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.build import parse_dynamic
from dataflex.config.check import notes, setting_problems, takes_token_losses
from dataflex.config.forecast import Forecast, row_passes
from dataflex.config.mappings import as_mapping, shown
from dataflex.config.needs import elsewhere
from dataflex.config.schema import DynamicConfig
from dataflex.config.table import table
from dataflex.errors import CheckpointError, ConfigError, DataError, UnsupportedError, did_you_mean
from dataflex.huggingface.loop import preference_loss
from dataflex.huggingface.prompts import PromptMixin, prompt_problems, prompt_space
from dataflex.huggingface.trainer import TrainerMixin
from dataflex.plan.domains import WANTED_LABELS, unusable_labels
from dataflex.preview import foretold, seconds_per_step
from dataflex.signals.sweep import mask_of, padded
from dataflex.signals.texts import SIZES
from dataflex.train.row_space import RowSpace, column_values, refuse_values
from dataflex.train.session import Loop, Setup
from dataflex.version import untested

logger = logging.getLogger(__name__)

_STAGES = {
    **{"SFTTrainer": "sft", "DPOTrainer": "dpo", "RewardTrainer": "rm", "KTOTrainer": "kto"},
    **{"GRPOTrainer": "rl", "RLOOTrainer": "rl"},
}
"""Stage of TRL's trainers."""
_PAIR = {part: (f"{part}_input_ids", f"{part}_ids") for part in ("prompt", "chosen", "rejected")}
"""Columns of a preference, as different versions of TRL name them."""

T = TypeVar("T", bound=Trainer)


def wrap(
    trainer: type[T],
    block: Mapping[str, Any],
    *,
    domains: str | None = None,
    targets: Mapping[str, Dataset] | None = None,
    columns: Sequence[str] = (),
    base_dir: Path | str = ".",
) -> type[T]:
    """Return a subclass of a trainer whose data is decided during training; it is made and used as the trainer is.

    Args:
        trainer: ``transformers.Trainer``, a subclass of it, or TRL's ``SFTTrainer``, ``DPOTrainer``, ``RewardTrainer``,
            ``KTOTrainer``, ``GRPOTrainer`` or ``RLOOTrainer``; of the last two rows are prompts, and steps generations.
        block: The ``dynamic`` block: methods, and when they decide.
        domains: Column of the training set that holds each row's domain, as text; None: all rows are of one domain.
        targets: Target data sets by name. They are tokenized, or rows as the trainer prepares its training set from.
        columns: More columns of the training set that the record keeps.
        base_dir: Folder in which the plugins of the block are looked up.

    Raises:
        ConfigError: All problems of the block.
        UnsupportedError: The trainer's rows cannot be planned.
    """
    for line in untested():
        logger.warning("%s", line)
    config, stage = parse_dynamic(block, Path(base_dir)), _stage(trainer)
    problems = [*elsewhere(config)]
    for key, names in config.targets_by_key.items():
        for name in (name for name in names if name not in (targets or {})):
            problems.append(f"{key}: targets= has no data set {name!r}{did_you_mean(name, [*(targets or {})])}")
    if domains is not None and config.domain_column not in (None, domains):
        problems.append(f"dynamic.domain_column: {config.domain_column}, and domains={domains!r}: give one of them")
    if problems:
        raise ConfigError(problems)
    asked = _Asked(
        trainer=trainer,
        config=config,
        stage=stage,
        domains=domains or config.domain_column,
        targets=dict(targets or {}),
        columns=tuple(columns),
    )
    mixin = PromptMixin if stage == "rl" else TrainerMixin
    return type(f"Dynamic{trainer.__name__}", (mixin, _Door, trainer), {"_dataflex_asked": asked})


def _stage(trainer: type[Trainer]) -> str:
    """Return the stage that a class of trainers is for."""
    if not (isinstance(trainer, type) and issubclass(trainer, Trainer)):
        raise UnsupportedError(f"wrap: {shown(trainer)} is not a class of transformers.Trainer; use dataflex.Session")
    if issubclass(trainer, TrainerMixin):
        raise UnsupportedError(f"wrap: {trainer.__name__} is wrapped already")
    for base in trainer.__mro__:
        if base.__module__.partition(".")[0] == "trl" and issubclass(base, Trainer):
            if base.__name__ in _STAGES:
                stage = _STAGES[base.__name__]
                if stage == "rl" and (found := version("trl")).startswith("0."):
                    raise UnsupportedError(
                        f"wrap: {base.__name__} of TRL {found} is not supported; install 'trl>=1.16'"
                    )
                return stage
            if not base.__name__.startswith("_"):
                known = ", ".join(_STAGES)
                raise UnsupportedError(f"wrap: the rows of TRL's {base.__name__} are not planned (known: {known})")
    return "sft"


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What ``wrap`` was given."""

    trainer: type[Trainer]
    config: DynamicConfig
    stage: str
    domains: str | None  # column of the domains
    targets: Mapping[str, Dataset]
    columns: tuple[str, ...]


class _Door(Trainer):
    """Stands between ``TrainerMixin`` and a trainer: prepares the session's set-up once the trainer is made."""

    _dataflex_asked: _Asked
    _dataflex_loop: Callable[[int], Loop]
    train_dataset: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        asked = self._dataflex_asked
        made = inspect.signature(asked.trainer.__init__).bind_partial(self, *args, **kwargs)
        lf = _keys(self.args, asked.stage)
        self.dataflex_setup = Setup(
            config=asked.config,
            resolved={**lf, "dynamic": as_mapping(asked.config)},
            stage=asked.stage,
            shuffle=not lf.get("disable_shuffling"),
        )
        problems = [*setting_problems(asked.config, LlamaFactoryArgs.read(lf)), *self._dataflex_problems()]
        if problems:
            raise ConfigError(problems)
        rows, formatting = self.train_dataset, made.arguments.get("formatting_func")
        self._set_signature_columns_if_needed()
        if self.args.remove_unused_columns:
            self.train_dataset = self._remove_unused_columns(rows, "training")
        self.dataflex_setup.measure = lambda: self._dataflex_rows(rows, formatting)
        if self._dataflex_joins:
            self.dataflex_setup.joined = True
            self.dataflex_setup.packed = SIZES in self.train_dataset.column_names
            self.dataflex_setup.score_collator = lambda _: self._dataflex_apart
        if asked.stage == "dpo":
            self.dataflex_setup.score_collator = lambda _: partial(self._dataflex_answers, ("chosen",))
            self.dataflex_setup.pair_collator = lambda _: partial(self._dataflex_answers, ("chosen", "rejected"))
        for note in self._dataflex_notes() if comm.rank() == 0 else ():
            logger.warning("%s", note)

    def _dataflex_notes(self) -> list[str]:
        """Return what has no effect, or another one than it seems."""
        setup = self.dataflex_setup
        found = notes(setup.config, LlamaFactoryArgs.read(setup.resolved), Path())
        return [note for note in found if not (setup.packed and note.startswith("dynamic.unit"))]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; ``True`` goes on from the newest complete checkpoint of this run.

        Raises:
            CheckpointError: The named checkpoint is not complete, or there is none.
        """
        found = self._dataflex_checkpoint(resume_from_checkpoint) if resume_from_checkpoint else None
        try:
            return super().train(found, *args, **kwargs)
        finally:
            self.dataflex_setup.recorder.ended()

    def _dataflex_checkpoint(self, asked: str | bool) -> str:
        """Return the checkpoint that is asked for, the same on every rank (collective)."""
        problem, newest = "", None
        if comm.rank() == 0 and asked is True:
            newest, passed_over = checkpoints.find_resumable(Path(self.args.output_dir))
            for line in passed_over:
                logger.warning("not resuming from %s", line)
            if newest is None:
                told = "".join(f"\n  {line}" for line in passed_over)
                problem = f"{self.args.output_dir} holds no complete checkpoint of this run{told}"
        elif comm.rank() == 0 and (reason := checkpoints.broken_reason(Path(str(asked)))) is not None:
            problem = f"{asked} cannot be resumed from: {reason}"
        problem, newest = comm.broadcast_object((problem, newest))
        if problem:
            raise CheckpointError(f"resume_from_checkpoint: {problem}")
        return str(asked if newest is None else newest)

    @property
    def _dataflex_joins(self) -> bool:
        """Whether the collator joins the rows of a micro-batch into one sequence."""
        collator = self.data_collator
        flat = getattr(self, "padding_free", False) or getattr(collator, "padding_free", False)
        return bool(flat) or isinstance(collator, DataCollatorWithFlattening)

    def plan(self) -> str:
        """Return what the run would do and cost, as ``dataflex plan`` tells it; the rows are measured for it."""
        setup, args = self.dataflex_setup, self.args
        batch, space = self._dataflex_loop(1).shape, setup.rows
        per_epoch = batch.steps_per_epoch(space.num_rows)
        view = Forecast(
            dynamic=setup.config,
            batch=batch,
            counts=dict(zip(space.domains.names, space.domains.num_rows.tolist(), strict=True)),
            packs=False,
            rows=space.num_rows,
            steps=self._dataflex_loop(args.max_steps).total_steps
            if args.max_steps > 0
            else math.ceil(args.num_train_epochs * per_epoch),
            targets={name: len(corpus.lengths) for name, corpus in space.targets.items()},
            row_passes=row_passes(setup.stage),
        )
        lf = LlamaFactoryArgs.read(setup.resolved)
        told = foretold(view, lf, seconds_per_step(lf.output_dir, view))
        return "\n".join([*(f"note: {note}" for note in self._dataflex_notes()), told])

    def _dataflex_problems(self) -> Iterator[str]:
        """Yield what of the trainer, its arguments and its data cannot be served."""
        asked, rows = self._dataflex_asked, self.train_dataset
        base, taker = asked.trainer, takes_token_losses(asked.config)
        own = _maker(base, "compute_loss") not in ("transformers", "trl")
        kind = getattr(self.args, "loss_type", "nll") if asked.stage == "sft" else "nll"
        if asked.stage == "rl":
            taker = None  # refused by its stage
            yield from prompt_problems(self, asked.config)
        if taker is not None and (own or self.compute_loss_func is not None):
            what = "a compute_loss of its own" if own else "a compute_loss_func"
            yield f"dynamic.{taker.kind}: {base.__name__} has {what}, which {taker.name} would have no part in"
        elif taker is not None and kind not in ("nll", "chunked_nll"):
            yield f"loss_type: {taker.name} acts on the plain loss of each token, not on {kind!r}; remove it"
        for method in asked.config.methods if asked.stage in ("rm", "kto") else ():
            if signals := sorted(method.requires.signals - {"texts"}):
                yield (
                    f"dynamic.{method.kind}: {method.name} asks for {', '.join(signals)}, which the rows of "
                    f"{base.__name__} do not give"
                )
        for name in () if asked.config.stock else ("get_train_dataloader", "_get_train_sampler", "get_batch_samples"):
            if _maker(base, name) not in ("transformers", "trl"):
                yield f"{base.__name__}: has a {name} of its own, which would have no part in what is served; remove it"
        if self.args.accelerator_config.split_batches:
            yield "accelerator_config.split_batches: per_device_train_batch_size rows are those of one rank; remove it"
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            yield "model: is an encoder-decoder; rows are those of a causal language model"
        if asked.stage != "sft" and self._dataflex_joins:
            yield f"padding_free: which tokens of a batch are of which row is not known for {base.__name__}; remove it"
        if getattr(self.args, "precompute_ref_log_probs", False):
            yield "precompute_ref_log_probs: is done when the trainer opens its loader, which is ours; remove it"
        if asked.stage == "dpo":
            yield from self._dataflex_pair_problems()
        if not isinstance(rows, Dataset):
            kind = "no training set" if rows is None else type(rows).__name__
            yield f"train_dataset: {kind}; give a datasets.Dataset, whose rows can be read in any order"
            return
        if not len(rows):
            yield "train_dataset: has no rows"
        names = (asked.domains, *asked.config.columns, *asked.columns)
        for name in dict.fromkeys(name for name in names if name is not None and name not in rows.column_names):
            known = f"{did_you_mean(name, rows.column_names)} (found: {', '.join(rows.column_names)})"
            yield f"train_dataset: has no column {name!r} once it is prepared, which packing drops{known}"

    def _dataflex_pair_problems(self) -> Iterator[str]:
        """Yield why methods cannot look at both answers of preferences."""
        for method in self._dataflex_asked.config.methods:
            signals = method.requires.signals & {"preference_logps", "gradients"}
            if signals and getattr(self.args, "sync_ref_model", False):
                yield f"sync_ref_model: {method.name} takes the reference model as one that stays as it is; remove it"
            unknown = preference_loss(self).unknown if "gradients" in signals else ""
            if unknown:
                yield f"{unknown}, and {method.name} asks for such gradients"

    def _dataflex_rows(self, rows: Dataset, formatting: Any) -> RowSpace:
        """Measure the prepared training rows and the targets."""
        asked = self._dataflex_asked
        self._dataflex_probe()
        labels, columns = told_of_rows(rows, asked.config, asked.domains, asked.columns)
        if asked.stage == "rl":
            return prompt_space(self, rows, domains=labels, columns=columns)
        space = RowSpace.of(
            _supervised(self.train_dataset, self.data_collator),
            domains=labels,
            columns=columns,
            targets={
                name: self._dataflex_prepared(name, asked.targets[name], formatting) for name in asked.config.targets
            },
        )
        if not self.dataflex_setup.packed:
            return space
        documents = np.bincount(space.domains.domain_of, weights=[*map(len, column_values(rows, SIZES))])
        return replace(space, domains=replace(space.domains, documents_per_row=documents / space.domains.num_rows))

    def _dataflex_probe(self) -> None:
        """Collate two rows; a batch without labels, or of which it is not known where the rows are, is refused."""
        if self._dataflex_asked.stage != "sft":
            return
        features = [self.train_dataset[row] for row in range(min(2, len(self.train_dataset)))]
        with torch.random.fork_rng(devices=[]):
            batch = self.data_collator(features)
        if "labels" not in batch:
            raise DataError("train_dataset: its batches have no labels; use a collator that makes them")
        if self.dataflex_setup.joined:
            self._dataflex_probe_joined(features, batch)
        elif len(batch["labels"]) != len(features):
            raise UnsupportedError(
                f"data_collator: makes {len(batch['labels'])} sequences of {len(features)} rows; use one that pads"
            )

    def _dataflex_probe_joined(self, features: list[dict[str, Any]], batch: dict[str, Any]) -> None:
        """Refuse a batch that is not its rows one after the other, each told by its positions."""
        tokens = [token for feature in features for token in feature["input_ids"]]
        ids, positions = batch["input_ids"], batch.get("position_ids")
        if ids.shape[0] != 1 or ids[0, : len(tokens)].tolist() != tokens:
            raise UnsupportedError("data_collator: joins rows other than one after the other; use one that pads")
        starts = np.cumsum([0, *(len(feature["input_ids"]) for feature in features)])[:-1]
        if positions is None or positions[0, starts].any():
            told = "its joined rows see one another, since no position_ids begin anew"
            raise UnsupportedError(f"data_collator: {told}; set return_position_ids=True, or use one that pads")
        if batch["labels"][0, starts[1:]].ne(-100).any():
            raise UnsupportedError("data_collator: the last token of a row predicts the next row; use one that pads")

    def _dataflex_prepared(self, name: str, rows: Dataset, formatting: Any) -> Dataset:
        """Return a target as the trainer prepares its training set."""
        prepare = getattr(self, "_prepare_dataset", None)
        if prepare is not None and not any(column.endswith("input_ids") for column in rows.column_names):
            known: dict[str, Any] = {
                **{"dataset": rows, "processing_class": self.processing_class, "args": self.args, "packing": False},
                **{"formatting_func": formatting, "dataset_name": f"target {name}"},
            }
            takes = inspect.signature(prepare).parameters
            rows = prepare(**{key: value for key, value in known.items() if key in takes})
        if self.args.remove_unused_columns:
            rows = self._remove_unused_columns(rows, f"target {name}")
        return _supervised(rows, self.data_collator)

    def _dataflex_apart(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows for scoring passes: padded, or a pack, whose documents must not see one another, by itself."""
        alone = [(self.data_collator([feature]), len(feature["input_ids"])) for feature in features]
        if SIZES in features[0]:
            ((pack, size),) = alone
            return {name: _without_padding(value, size) for name, value in pack.items()}
        return _padded([{name: row[name][0, :size] for name in ("input_ids", "labels")} for row, size in alone], 0)

    def _dataflex_answers(self, answers: tuple[str, ...], features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate preferences as their prompts with some of their answers, in turn, for scoring passes."""
        rows, collator = [], self.data_collator
        most, mode = getattr(collator, "max_length", None), getattr(collator, "truncation_mode", "keep_start")
        kept = slice(most) if most is None or mode == "keep_start" else slice(-most, None)
        for feature in features:
            for part in answers:
                prompt, answer = (
                    next(feature[name] for name in _PAIR[each] if name in feature) for each in ("prompt", part)
                )
                labels = [-100] * len(prompt) + [*answer]
                rows.append({"input_ids": [*prompt, *answer][kept], "labels": labels[kept]})
        return _padded(rows, getattr(self.processing_class, "pad_token_id", None) or 0)


def _maker(trainer: type[Trainer], method: str) -> str:
    """Return the package of the class that a trainer has a method from."""
    found = next(base for base in trainer.__mro__ if method in vars(base))
    return found.__module__.partition(".")[0]


def _without_padding(value: Any, size: int) -> Any:
    """Return a part of a pack's batch without what is beyond its ``size`` tokens: of [1, L], or of its boundaries."""
    if not torch.is_tensor(value):
        return value
    return value[:, :size] if value.dim() == 2 else value[value <= size]


def _padded(rows: Sequence[Mapping[str, Any]], filler: int) -> dict[str, torch.Tensor]:
    """Return rows as a padded batch; ``filler`` is the token of the padding."""
    tokens = [row["input_ids"] for row in rows]
    labels = padded([row["labels"] for row in rows], -100)
    return {"input_ids": padded(tokens, filler), "labels": labels, "attention_mask": mask_of(tokens)}


def told_of_rows(
    rows: Dataset, config: DynamicConfig, domains: str | None, more: Sequence[str] = ()
) -> tuple[list[str] | None, dict[str, NDArray[Any]]]:
    """Return the domain of each row [N], and the columns that methods ask for and ``more`` ones, each [N].

    Args:
        rows: Rows that have the columns.
        config: The dynamic block.
        domains: Column of the domains; None: all rows are of one.
        more: Columns that no method asks for.

    Raises:
        DataError: A value cannot be used.
    """
    labels = None if domains is None else column_values(rows, domains)
    if labels is not None:
        refuse_values("domains", domains, labels, (unusable_labels(labels), WANTED_LABELS), _place)
    columns = {name: column_values(rows, name) for name in (*config.columns, *more)}
    for chosen in config.methods:
        for name in chosen.requires.columns:
            refused = chosen.build().refused_values(name, columns[name])
            refuse_values(f"dynamic.{chosen.kind}", name, columns[name], refused, _place)
    return None if labels is None else labels.tolist(), columns


def _place(row: int) -> str:
    return f"row {row} of the training set"


def _supervised(rows: Dataset, collator: Any) -> Dataset:
    """Return rows without the mask that the collator does not apply."""
    idle = "completion_mask" in rows.column_names and not getattr(collator, "completion_only_loss", True)
    return rows.remove_columns("completion_mask") if idle else rows


def _keys(args: Any, stage: str) -> dict[str, Any]:
    """Return a trainer's arguments that differ from their defaults, as the keys of a configuration."""
    known, found = table(), {}
    for each in fields(args):
        value = getattr(args, each.name)
        value = getattr(value, "value", value)
        plain = value is None or isinstance(value, str | bool | int | float)
        if each.init and plain and each.name in known and value != known[each.name].default:
            found[each.name] = value
    if found.get("train_sampling_strategy") == "sequential":
        del found["train_sampling_strategy"]
        found["disable_shuffling"] = True
    dealt = {name: getattr(args.accelerator_config, name) for name in ("dispatch_batches", "even_batches")}
    if dealt != {"dispatch_batches": None, "even_batches": True}:
        found["accelerator_config"] = dealt
    return {**found, "stage": stage, "do_train": True}
