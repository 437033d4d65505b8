"""Loads data through LLaMA-Factory's own ``get_dataset`` and says which row came from where.

Upstream names relied upon: the workflows' own reference to ``get_dataset``, the collators' base class
``MultiModalDataCollatorForSeq2Seq``.

One data set: LLaMA-Factory's result is taken as it is. Several: one call each, concatenated, so that
domains are exact ranges and packing stays inside a domain; a validation split is cut afterwards from the
whole, which is the stock split when nothing is packed. A tokenized copy stands for the training data alone.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets
from llamafactory.data import loader as lf_loader
from llamafactory.data.collator import MultiModalDataCollatorForSeq2Seq
from numpy.typing import NDArray

from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.needs import unmet
from dataflex.config.schema import DynamicConfig
from dataflex.errors import ConfigError, DataError, UnsupportedError
from dataflex.llamafactory.evaluation import HeldOut
from dataflex.llamafactory.loading import Loader, RawRows, column, raw_columns, split_rows
from dataflex.llamafactory.streaming import joined, tokenized_when_served
from dataflex.method import RunFacts
from dataflex.plan.domains import Domains, unusable_labels
from dataflex.record.clock import PhaseClock
from dataflex.rng import stream
from dataflex.select.cluster import kmeans
from dataflex.signals.embeddings import load_encoder, text_sweep
from dataflex.signals.model_access import Corpus
from dataflex.signals.sweep import row_pass
from dataflex.train.row_space import Leak, RowSpace, find_leaks, fingerprint, measure, target_corpus

_CHUNK_ROWS = 20_000
_ANSWERS: dict[str, Callable[[NDArray[np.int64]], NDArray[np.bool_]]] = {
    "sft": lambda answers: answers == 1,
    "rm": lambda answers: answers >= 2,
    "dpo": lambda answers: answers >= 2,
    "kto": lambda answers: answers >= 2,
}
"""Which numbers of answers a stage trains on; pre-training takes every row."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What was read of one data set.

    Attributes:
        num_rows: Rows read from its files, from the first on.
        kept: Positions of those that became training rows, ascending.
    """

    num_rows: int
    kept: NDArray[np.int64]


def kept_positions(aligned: Any, stage: str) -> NDArray[np.int64]:
    """Return the positions of the rows that tokenizing keeps, ascending.

    Args:
        aligned: ``datasets.Dataset`` with the columns ``_prompt`` and ``_response``, lists of messages.
        stage: LLaMA-Factory stage.
    """
    if stage not in _ANSWERS:
        return np.arange(len(aligned), dtype=np.int64)
    kept = [np.zeros(0, dtype=np.bool_)]
    for table in aligned.select_columns(["_prompt", "_response"]).with_format("arrow").iter(batch_size=_CHUNK_ROWS):
        turns, answers = (
            pc.fill_null(pc.list_value_length(table.column(name)), 0).to_numpy().astype(np.int64)
            for name in ("_prompt", "_response")
        )
        kept.append((turns % 2 == 1) & _ANSWERS[stage](answers))
    return np.flatnonzero(np.concatenate(kept)).astype(np.int64)


@contextmanager
def watched_origins(stage: str) -> Iterator[list[Origin]]:
    """Give a list that takes the origin of every data set that LLaMA-Factory loads while inside."""
    original = lf_loader.align_dataset
    found: list[Origin] = []

    def watch(dataset: Any, *args: Any, **kwargs: Any) -> Any:
        aligned = original(dataset, *args, **kwargs)
        found.append(Origin(num_rows=len(aligned), kept=kept_positions(aligned, stage)))
        return aligned

    lf_loader.align_dataset = watch
    try:
        yield found
    finally:
        lf_loader.align_dataset = original


FILE_COLUMN = "dataflex_file"
_SAMPLE = 100_000
_BLOCK = 65_536


@contextmanager
def file_numbers(active: bool, files: list[str]) -> Iterator[None]:
    """While inside, rows that LLaMA-Factory loads from files carry the number of their file, see ``files``."""
    if not active:
        yield
        return
    original = lf_loader.load_dataset

    def load(*args: Any, data_files: Any = None, **kwargs: Any) -> Any:
        if not isinstance(data_files, list) or kwargs.get("streaming"):
            return original(*args, data_files=data_files, **kwargs)
        parts = []
        for file in data_files:
            part = original(*args, data_files=[file], **kwargs)
            parts.append(part.add_column(FILE_COLUMN, np.full(len(part), len(files), dtype=np.int32)))
            files.append(str(file))
        return concatenate_datasets(parts)

    lf_loader.load_dataset = load
    try:
        yield
    finally:
        lf_loader.load_dataset = original


def _expression(pattern: str) -> re.Pattern[str]:
    """Return the expression of a glob whose first ``*`` is the domain's name; ``*`` stays within a folder."""
    parts = pattern.split("*")
    text = re.escape(parts[0]) + "([^/]*?)" + "[^/]*".join(re.escape(part) for part in parts[1:])
    return re.compile(f"(?:^|/){text}$")


def path_labels(numbers: NDArray[np.int32], files: Sequence[str], pattern: str) -> NDArray[np.object_]:
    """Return the domain of each row [N].

    Args:
        numbers: File of each row.
        files: Paths.
        pattern: A glob for the end of the path; what its first ``*`` stands for is the domain.

    Raises:
        ConfigError: A file that the pattern does not fit.
    """
    expression, names = _expression(pattern), []
    for file in files:
        match = expression.search(Path(file).as_posix())
        if match is None:
            raise ConfigError(f"dynamic.domain_path: {pattern!r} does not fit the file {file}")
        names.append(match.group(1))
    return np.array(names, dtype=object)[numbers]


def cluster_labels(
    dataset: Any, lengths: NDArray[np.int64], tokenizer: Any, *, clusters: int, encoder: str, seed: int, device: Any
) -> NDArray[np.object_]:
    """Return the cluster of each row's embedding, ``cluster_00``, ``cluster_01``, ... [N] (collective).

    k-means on at most 100,000 rows drawn by the seed; the rest go to the nearest centre. Rows without text
    are a domain of their own, ``cluster_none``.

    Raises:
        ConfigError: No row has a text, or scikit-learn is missing.
        EncoderError: The encoder cannot be loaded.
    """
    rows = np.arange(len(lengths), dtype=np.int64)
    model = load_encoder(encoder, device=device)
    corpus = Corpus(dataset=dataset, lengths=lengths)
    sweep = text_sweep(corpus, rows, tokenizer, token_budget=16384, device=device)
    vectors = row_pass(sweep, model.score, (model.dimension,))
    known = np.flatnonzero(np.isfinite(vectors).all(axis=1))
    if not len(known):
        raise ConfigError("dynamic.domain_clusters: no row has a text that could be embedded")
    rng = stream(seed, "domain clusters", 0)
    drawn = known if len(known) <= _SAMPLE else np.sort(rng.choice(known, size=_SAMPLE, replace=False))
    _, centres = kmeans(vectors[drawn], clusters, rng)
    labels = np.full(len(rows), "cluster_none", dtype=object)
    names = np.array([f"cluster_{k:02d}" for k in range(len(centres))], dtype=object)
    squares = (centres**2).sum(axis=1)
    for start in range(0, len(known), _BLOCK):
        part = known[start : start + _BLOCK]
        labels[part] = names[np.argmin(squares - 2.0 * vectors[part] @ centres.T, axis=1)]
    return labels


logger = logging.getLogger(__name__)

CLUSTERS = "dataflex_cluster"


class DataLoading:
    """Stands in for ``get_dataset`` in LLaMA-Factory's workflows and builds the row space on the way.

    Args:
        config: The dynamic block.
        written: LLaMA-Factory's keys as the user wrote them.
        clock: Takes the time of loading.
    """

    def __init__(self, config: DynamicConfig, written: Mapping[str, Any], clock: PhaseClock | None = None) -> None:
        self._config, self._written = config, LlamaFactoryArgs.read(written)
        self._clock = clock or PhaseClock()
        self.space: RowSpace | None = None

    def __call__(
        self, template: Any, model_args: Any, data_args: Any, training_args: Any, stage: Any, **tokenizer_module: Any
    ) -> dict[str, Any]:
        """Return LLaMA-Factory's data set module; ``space`` is set afterwards."""
        data_args = copy.copy(data_args)
        if self._config.eval_by_domain and data_args.eval_dataset is not None and self._config.domain_column is None:
            data_args.eval_on_each_dataset = True
        loader = Loader(
            template=template,
            model_args=model_args,
            data_args=data_args,
            training_args=training_args,
            stage=stage,
            tokenizer_module=tokenizer_module,
            written=self._written,
        )
        by_file = self._config.domain_path is not None
        columns = tuple(dict.fromkeys([*self._config.columns, *([FILE_COLUMN] if by_file else [])]))
        served = bool(data_args.streaming)
        files: list[str] = []
        names = list(data_args.dataset)
        seen: list[Dataset] = []
        with (
            raw_columns(bool(columns), seen),
            file_numbers(by_file, files),
            self._counted(stage) as origins,
            tokenized_when_served(served),
        ):
            if data_args.tokenized_path is not None:
                module = self._from_copy(loader)
                sizes = {names[0] if len(names) == 1 else "all": len(module["train_dataset"])}
            elif len(names) == 1:
                module = loader.stock()
                sizes = {names[0]: len(module["train_dataset"])}
            else:
                module, sizes = self._load_each(names, data_args, training_args, loader)
        per_row = _documents_per_row(origins, module.pop("_loaded", {}), data_args)
        sources = module.pop("_held_sources", None)
        if self._config.eval_by_domain:
            module["eval_dataset"] = self._held_out(module, sources, seen, data_args, training_args)
        train = module["train_dataset"]
        found = self._columns(columns, seen[: len(names)], train, data_args, training_args) if columns else {}
        labels = _source_labels(sizes, module.pop("_source_of_row", None))
        targets = self._targets(loader)
        with self._clock.phase("leakage"):
            leaked = {} if served else find_leaks(train, {name: target.dataset for name, target in targets.items()})
        if any(leak.num_rows for leak in leaked.values()):
            kept = self._without_leaks(leaked, len(train))
            if kept is not None:
                train = module["train_dataset"] = train.select(kept)
                labels, found = labels[kept], {name: values[kept] for name, values in found.items()}
                sizes = dict(zip(sizes, np.bincount(labels, minlength=len(sizes)).tolist(), strict=True))
                _source_labels(sizes, labels)
        measures = train.measures() if served else measure(train)
        if by_file:
            found[FILE_COLUMN] = path_labels(found[FILE_COLUMN], files, str(self._config.domain_path))
        if self._config.domain_clusters is not None:
            found[CLUSTERS] = cluster_labels(
                train,
                measures.lengths,
                tokenizer_module["tokenizer"],
                clusters=self._config.domain_clusters,
                encoder=str(self._config.domain_encoder),
                seed=training_args.seed if self._config.seed is None else self._config.seed,
                device=training_args.device,
            )
        self.space = RowSpace(
            dataset=train,
            sources=sizes,
            domains=self._domains(sizes, labels, found, measures.lengths, per_row),
            supervised=measures.supervised,
            fingerprint=fingerprint(sizes, labels, measures.fingerprint),
            columns={name: found[name] for name in self._config.columns},
            targets=targets,
            leaks=leaked,
        )
        self.space.check_supervised()
        return module

    def _columns(
        self, names: Sequence[str], seen: list[Dataset], train: Any, data_args: Any, training_args: Any
    ) -> dict[str, NDArray[Any]]:
        """Return the raw columns that ride along, checked, in training order."""
        raw = self._raw_rows(seen, data_args, training_args)
        if data_args.streaming:
            raw = replace(raw, rows=raw.rows[train.raw_rows])
        found = {name: column(name, raw, len(train)) for name in names}
        self._check_columns(raw, found)
        return found

    def _counted(self, stage: str) -> AbstractContextManager[list[Origin]]:
        """Give a list that takes what was read of each data set, where proportions are of documents."""
        return watched_origins(stage) if self._config.unit == "documents" else nullcontext([])

    def _without_leaks(self, leaked: Mapping[str, Leak], num_rows: int) -> NDArray[np.int64] | None:
        """Tell about target rows that lie in the training pool; return the rows to keep where these are to go.

        Raises:
            DataError: ``leakage: error``, or nothing would be left.
        """
        told = [f"target {name!r}: {leak.tell()}" for name, leak in leaked.items() if leak.num_rows]
        if self._config.leakage == "error":
            raise DataError("\n".join(f"dynamic.leakage: {line}" for line in told))
        for line in told:
            logger.warning("%s%s", line, "; they leave the pool" if self._config.leakage == "drop" else "")
        if self._config.leakage != "drop":
            return None
        rows = np.unique(np.concatenate([leak.pool_rows for leak in leaked.values()]))
        kept = np.setdiff1d(np.arange(num_rows, dtype=np.int64), rows)
        if not len(kept):
            raise DataError("dynamic.leakage: every training row is also a target row; nothing is left to train on")
        return kept

    def _from_copy(self, loader: Loader) -> dict[str, Any]:
        """Write or read the tokenized copy of the training data; evaluation sets are those that the user names."""
        module = loader.stock()
        if loader.data_args.eval_dataset is not None:
            module["eval_dataset"] = loader.evaluation()
        names, path = loader.data_args.dataset, loader.data_args.tokenized_path
        if "train_dataset" not in module:
            raise DataError(f"tokenized_path: {path!r} holds no training rows")
        if len(names) > 1 and self._config.domains_are_sources:
            logger.warning(
                "tokenized_path: %s does not say which of %s a row is from: all rows are one domain, 'all'",
                path,
                ", ".join(names),
            )
        return module

    def _check_columns(self, raw: RawRows, found: Mapping[str, NDArray[Any]]) -> None:
        """Refuse values that a method could not use, before anything is trained.

        Raises:
            DataError: By the place of the first of them.
        """
        domains = self._config.domain_column
        if domains is not None:
            _check_labels(raw, domains, found[domains])
        for config in self._config.methods:
            method = config.build()
            for name in config.requires.columns:
                raw.check(f"dynamic.{config.kind}", name, found[name], method.refused_values(name, found[name]))

    def _load_each(
        self, names: list[str], data_args: Any, training_args: Any, loader: Loader
    ) -> tuple[dict[str, Any], dict[str, int]]:
        if data_args.val_size > 1e-6 and training_args.predict_with_generate:
            raise UnsupportedError(
                "val_size with predict_with_generate over several data sets: name an 'eval_dataset' instead"
            )
        parts = {name: loader.training(name) for name in names}
        sizes = {name: len(part) for name, part in parts.items()}
        if data_args.streaming and data_args.val_size > 1e-6:
            raise UnsupportedError("val_size with streaming over several data sets: name an 'eval_dataset' instead")
        whole: Any = joined(list(parts.values())) if data_args.streaming else concatenate_datasets([*parts.values()])
        module: dict[str, Any] = {"train_dataset": whole, "_loaded": sizes}
        if data_args.eval_dataset is not None:
            module["eval_dataset"] = loader.evaluation()
        elif data_args.val_size > 1e-6:
            size = int(data_args.val_size) if data_args.val_size > 1 else data_args.val_size
            split = whole.train_test_split(test_size=size, seed=training_args.seed)
            module = {"train_dataset": split["train"], "eval_dataset": split["test"], "_loaded": sizes}
            source = np.repeat(np.arange(len(sizes), dtype=np.int32), list(sizes.values()))
            held = source[split_rows(len(whole), size, training_args.seed, part="test")]
            module["_held_sources"] = [list(sizes)[k] for k in held]
            source = source[split_rows(len(whole), size, training_args.seed)]
            module["_source_of_row"] = source
            sizes = dict(zip(sizes, np.bincount(source, minlength=len(sizes)).tolist(), strict=True))
        return module, sizes

    def _held_out(
        self, module: dict[str, Any], sources: list[str] | None, seen: list[Dataset], data_args: Any, training_args: Any
    ) -> Any:
        """Return the evaluation rows as one data set per domain, in the order of first appearance.

        Raises:
            ConfigError: There is nothing held out, or nothing that could be told apart.
            DataError: A row without a domain.
        """
        held, by = module.get("eval_dataset"), self._config.domain_column
        if held is None:
            raise ConfigError("dynamic.eval_by_domain: no rows are held out; name an 'eval_dataset', or set 'val_size'")
        if isinstance(held, dict) and by is None:
            return HeldOut(held, concatenate_datasets([*held.values()]))
        if by is None and sources is None:
            raise ConfigError(
                "dynamic.eval_by_domain: the held-out rows are of one data set; name a 'domain_column', or several "
                "data sets"
            )
        labels: Any = sources
        if by is not None:
            if isinstance(held, dict):
                held = concatenate_datasets(list(held.values()))
            raw = self._raw_held_out(seen, data_args, training_args)
            labels = column(by, raw, len(held))
            _check_labels(raw, by, labels)
        rows_of: dict[str, list[int]] = {}
        for row, label in enumerate(labels):
            rows_of.setdefault(label, []).append(row)
        return HeldOut({label: held.select(rows) for label, rows in rows_of.items()}, held)

    def _raw_held_out(self, seen: list[Dataset], data_args: Any, training_args: Any) -> RawRows:
        """Return the raw rows that are held out, in their order."""
        names = list(data_args.dataset)
        if data_args.val_size > 1e-6:
            return self._raw_rows(seen[: len(names)], data_args, training_args, part="test")
        parts = seen[len(names) :]
        rows = np.arange(sum(map(len, parts)), dtype=np.int64)
        return RawRows(names=data_args.eval_dataset, parts=parts, rows=rows, written=self._written)

    def _raw_rows(self, parts: list[Dataset], data_args: Any, training_args: Any, part: str = "train") -> RawRows:
        """Return which raw rows went into training (or were held out), in that order."""
        total = sum(len(each) for each in parts)
        rows = np.arange(total, dtype=np.int64)
        if data_args.val_size > 1e-6:
            size = int(data_args.val_size) if data_args.val_size > 1 else data_args.val_size
            rows = split_rows(total, size, training_args.seed, part=part)
        return RawRows(names=data_args.dataset, parts=parts, rows=rows, written=self._written)

    def _domains(
        self,
        sizes: dict[str, int],
        labels: NDArray[np.int32],
        columns: dict[str, NDArray[Any]],
        lengths: NDArray[np.int64],
        documents_per_row: NDArray[np.float64] | None,
    ) -> Domains:
        """Return the domains of the rows.

        Raises:
            DataError: A method needs more of them.
        """
        by = next(
            (n for n in (self._config.domain_column, FILE_COLUMN, CLUSTERS) if n is not None and n in columns), None
        )
        if by is not None:
            domains = Domains.from_labels(columns[by], lengths=lengths)
        else:
            domains = Domains(
                names=tuple(sizes), domain_of=labels, lengths=lengths, documents_per_row=documents_per_row
            )
        lacking = list(unmet(self._config, RunFacts(num_domains=len(domains.names))))
        if lacking:
            raise DataError("\n".join(lacking))
        return domains

    def _targets(self, loader: Loader) -> dict[str, Corpus]:
        return {name: target_corpus(name, loader.target(name)) for name in self._config.targets}


def _documents_per_row(
    origins: Sequence[Origin], loaded: Mapping[str, int], data_args: Any
) -> NDArray[np.float64] | None:
    """Return the mean number of documents in the rows of each data set [K]; None where every row is one.

    Args:
        origins: What was read of each data set, in order; others may follow.
        loaded: Rows of each of several data sets as loaded, before any were held out.
        data_args: LLaMA-Factory's.
    """
    if not origins or not loaded or not (data_args.packing or data_args.neat_packing):
        return None
    documents = np.array([len(origin.kept) for origin in origins[: len(loaded)]], dtype=np.float64)
    return documents / np.maximum(list(loaded.values()), 1)


def _check_labels(raw: RawRows, name: str, labels: NDArray[Any]) -> None:
    wanted = "every row's must be text, the domain's name"
    raw.check("dynamic.domain_column", name, labels, (unusable_labels(labels), wanted))


def _source_labels(sizes: dict[str, int], given: NDArray[np.int32] | None) -> NDArray[np.int32]:
    empty = [name for name, size in sizes.items() if size == 0]
    if empty:
        raise DataError(f"domain {empty[0]!r} has no rows: nothing can be drawn from it")
    if given is not None:
        return given
    return np.repeat(np.arange(len(sizes), dtype=np.int32), list(sizes.values()))


_SCORED_COLUMNS = {
    "rm": {"input_ids": "chosen_input_ids", "attention_mask": "chosen_attention_mask", "labels": "chosen_labels"},
    "kto": {"input_ids": "input_ids", "attention_mask": "attention_mask", "labels": "labels"},
}
_SCORED_COLUMNS["dpo"] = _SCORED_COLUMNS["rm"]


def scoring_collator(stage: str) -> Callable[[Any], Callable[[list[dict[str, Any]]], dict[str, Any]]]:
    """Return a maker of collators for scoring passes: preference rows are reduced to the answer that is scored."""

    def make(collator: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        if stage not in _SCORED_COLUMNS:
            return collator
        columns = _SCORED_COLUMNS[stage]

        def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
            plain = [
                {
                    **{ours: feature[theirs] for ours, theirs in columns.items()},
                    **{media: feature[media] for media in ("images", "videos", "audios")},
                }
                for feature in features
            ]
            return MultiModalDataCollatorForSeq2Seq.__call__(collator, plain)

        return collate

    return make
