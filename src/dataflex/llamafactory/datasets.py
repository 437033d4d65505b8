"""Loads the rows of a run through LLaMA-Factory's own ``get_dataset``, and builds the row space from them.

One data set: LLaMA-Factory's result is taken as it is. Several: one call each, concatenated, so that domains are
exact ranges and packing stays inside a domain; a validation split is cut afterwards from the whole, which is the stock
split when nothing is packed. A tokenized copy replaces the training data alone.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray

from dataflex import comm
from dataflex.clock import PhaseClock
from dataflex.config.check import recorded_by_document
from dataflex.config.needs import unmet
from dataflex.config.schema import DynamicConfig
from dataflex.errors import ConfigError, DataError
from dataflex.huggingface.evaluation import HeldOut
from dataflex.llamafactory.copies import Copied, Part, TokenizedCopy, joined_columns, scalar_columns
from dataflex.llamafactory.loading import FILE_COLUMN, Loader, RawRows, changed_args, split_rows
from dataflex.llamafactory.origins import origins_of
from dataflex.llamafactory.streaming import JoinedRows, ServedRows
from dataflex.llamafactory.turns import WEIGHTS
from dataflex.method import RunFacts
from dataflex.plan.domains import WANTED_LABELS, Domains, unusable_labels
from dataflex.rng import stream
from dataflex.select.cluster import kmeans
from dataflex.signals.embeddings import load_encoder, text_sweep
from dataflex.signals.model_access import Corpus
from dataflex.signals.sweep import row_pass
from dataflex.train.row_space import Leak, RowSpace, TokenColumn, find_leaks, fingerprint, measure, target_corpus

logger = logging.getLogger(__name__)

_SAMPLE = 100_000
_BLOCK = 65_536


class DataLoading:
    """The loading of all data of one run.

    Args:
        config: The dynamic block.
        loader: Calls LLaMA-Factory.
        clock: Takes the time of looking for leaks.
    """

    def __init__(self, config: DynamicConfig, loader: Loader, clock: PhaseClock) -> None:
        if config.eval_by_domain and loader.data_args.eval_dataset is not None and config.domain_column is None:
            loader = replace(loader, data_args=copy.copy(loader.data_args))
            loader.data_args.eval_on_each_dataset = True
        self._config, self._loader, self._clock = config, loader, clock
        self._names: list[str] = list(loader.data_args.dataset)  # sources of rows
        self._source_of = np.zeros(0, dtype=np.int32)  # source of each training row [N]
        self._held_sources: list[str] | None = None  # source of each row that 'val_size' holds out of several sets
        self._documents_per_row: NDArray[np.float64] | None = None  # by source [K]; None where every row is one
        self._copied: Copied | None = None  # a tokenized copy that tells where its rows are from
        self._own: Any = None  # LLaMA-Factory's own training rows, where the row space has documents

    def load(self) -> tuple[dict[str, Any], RowSpace]:
        """Return LLaMA-Factory's data set module and the row space."""
        config, module, loader = self._config, self._module(), self._loader
        served = isinstance(module["train_dataset"], ServedRows)
        if config.eval_by_domain:
            module["eval_dataset"] = self._held_out(module.get("eval_dataset"))
        train = module["train_dataset"]
        columns = self._columns(train)
        of_tokens = self._token_weights(module)
        train = module["train_dataset"]
        targets = {name: target_corpus(name, loader.target(name)) for name in config.targets}
        with self._clock.phase("leakage"):
            leaks = {} if served else find_leaks(train, {name: target.dataset for name, target in targets.items()})
        kept = self._without_leaks(leaks, len(train))
        origins = origins_of(loader, self._names, self._source_of, train)
        if kept is not None:
            origins = origins.taken(kept)
            train = module["train_dataset"] = train.select(kept)
            columns = {name: values[kept] for name, values in columns.items()}
            of_tokens = None if of_tokens is None else of_tokens.take(kept)
            self._source_of = self._source_of[kept]
        counts = np.bincount(self._source_of, minlength=len(self._names)).tolist()
        sources: dict[str, int] = dict(zip(self._names, counts, strict=True))
        for name, count in sources.items():
            if count == 0 and not config.stock:
                raise DataError(f"domain {name!r} has no rows: nothing can be drawn from it")
        copied = self._copied
        if copied is not None and kept is None:
            measures = copied.measures
        else:
            measures = train.measures() if served else measure(train)
        known = fingerprint(sources, self._source_of, measures.fingerprint)
        comm.agree("dataset", known)  # nodes may list a folder of their own in another order
        space = RowSpace(
            dataset=train,
            sources=sources,
            domains=self._domains(columns, Corpus(dataset=train, lengths=measures.lengths)),
            supervised=measures.supervised,
            fingerprint=known,
            columns={name: columns[name] for name in config.columns},
            token_weights=of_tokens,
            targets=targets,
            leaks=leaks,
            bad_shards={name: [shard.tell() for shard in bad] for name, bad in loader.bad_shards.items()},
            origins=origins,
        )
        if not config.stock:
            space.check_supervised()
        if self._own is not None:
            module["train_dataset"] = self._own
        return module, space

    def _module(self) -> dict[str, Any]:
        """Load training and evaluation rows."""
        loader, stock = self._loader, self._config.stock
        args, names = loader.data_args, self._names
        there = loader.written.tokenized
        if args.tokenized_path is not None and not loader.written.bare_copy and (there or not stock):
            return self._module_of_copy(Path(args.tokenized_path))
        if stock and (args.streaming or recorded_by_document(self._config, loader.written)):
            module = loader.in_pieces()
            # What is held out, drawn and packed together is not known: all documents are counted.
            counted = changed_args(args, streaming=True, val_size=0.0)
            self._loader = loader = replace(loader, data_args=counted, by_document=True)
            parts = [loader.training(name) for name in names]
            self._own = module["train_dataset"]
            self._source_of = np.repeat(np.arange(len(names), dtype=np.int32), [len(part) for part in parts])
            return {**module, "train_dataset": JoinedRows(parts)}
        if stock and not there:
            return self._merged()
        if not there and len(names) > 1:
            return self._load_each([loader.training(name) for name in names])
        module = loader.stock()
        if args.tokenized_path is not None:
            if args.eval_dataset is not None:
                module["eval_dataset"] = loader.evaluation()
            if "train_dataset" not in module:
                raise DataError(f"tokenized_path: {args.tokenized_path!r} holds no training rows")
            if len(names) > 1:
                self._names = ["all"]
        self._source_of = np.zeros(len(module["train_dataset"]), dtype=np.int32)
        return module

    def _merged(self) -> dict[str, Any]:
        """Load training sets as LLaMA-Factory merges them, and find out the source of each row.

        A tokenized copy that LLaMA-Factory makes of them is described, so that the next start knows the same.
        """
        loader, path = self._loader, self._loader.data_args.tokenized_path
        copy = None if path is None else TokenizedCopy(Path(path), loader.written, loader.tokenizer_module["tokenizer"])
        module = loader.numbered()
        if len(self._names) == 1:
            self._source_of = np.zeros(len(module["train_dataset"]), dtype=np.int32)
        elif not loader.numbers:
            self._names, self._source_of = ["all"], np.zeros(len(module["train_dataset"]), dtype=np.int32)
            return module
        else:
            self._find_sources()
        if copy is not None and loader.data_args.mix_strategy == "concat":
            self._describe(copy, module)
        return module

    def _find_sources(self) -> None:
        """Find out the source of each row from the numbers of the raw rows."""
        loader = self._loader
        ends = np.cumsum([len(origin.raw) for origin in loader.origins[: len(self._names)]])
        names, numbers = np.array(self._names, dtype=object), loader.numbers
        if "test" in numbers and loader.test_size:
            self._held_sources = names[np.searchsorted(ends, numbers["test"], side="right")].tolist()
        there, which = np.unique(np.searchsorted(ends, numbers["train"], side="right"), return_inverse=True)
        self._names, self._source_of = names[there].tolist(), which.astype(np.int32)  # the others have no rows left

    def _describe(self, copy: TokenizedCopy, module: Mapping[str, Any]) -> None:
        """Describe a copy that LLaMA-Factory has made."""
        loader, train = self._loader, module["train_dataset"]

        held = module.get("eval_dataset") if loader.test_size else None
        copy.annotate(
            Copied(
                names=self._names,
                train=train,
                source_of=self._source_of,
                measures=measure(train),
                documents_per_row=None,
                columns=_dataset(self._copied_columns(loader.raw_rows(), len(train))),
                held=held,
                held_source_of=np.array([self._names.index(k) for k in self._held_sources or ()], dtype=np.int32),
                held_columns=_dataset(
                    None if held is None else self._copied_columns(loader.raw_rows(held_out=True), len(held))
                ),
            )
        )

    def _module_of_copy(self, path: Path) -> dict[str, Any]:
        """Load a tokenized copy, made first where it is not there; named evaluation rows are loaded beside it."""
        loader = replace(self._loader, data_args=changed_args(self._loader.data_args, tokenized_path=None))
        self._loader = loader
        copy = TokenizedCopy(path, loader.written, loader.tokenizer_module["tokenizer"])
        if not copy.is_there:
            self._make_copy(copy)
            loader.origins.clear()
            loader.files.clear()
        found = self._copied = copy.read()
        self._copy_path = path
        self._names, self._source_of = found.names, found.source_of
        if loader.data_args.packing or loader.data_args.neat_packing:
            self._documents_per_row = found.documents_per_row
        module = {"train_dataset": found.train}
        if found.held is not None:
            module["eval_dataset"] = found.held
            self._held_sources = [found.names[k] for k in found.held_source_of] or None
        elif loader.data_args.eval_dataset is not None:
            module["eval_dataset"] = loader.evaluation()
        return module

    def _make_copy(self, copy: TokenizedCopy) -> None:
        """Tokenize the data sets one by one, keep each that is finished, and write the copy."""
        loader, names, columns_of = self._loader, self._names, self._copied_columns
        copy.begin()

        def part(name: str) -> Part:
            rows, origin = loader.training(name), loader.origins[-1]
            raw = RawRows(names=[name], parts=[origin.raw], rows=np.arange(len(origin.raw)), written=loader.written)
            return Part(rows=rows, columns=columns_of(raw, len(rows)), documents=len(origin.kept))

        held_columns = documents = None
        if len(names) > 1:
            parts = [copy.part(number, partial(part, name)) for number, name in enumerate(names)]
            module = self._load_each([each.rows for each in parts])
            documents = np.array([each.documents / max(len(each.rows), 1) for each in parts])
            columns = joined_columns([each.columns for each in parts])
            if self._held_sources is not None and columns is not None:
                rows = split_rows(len(columns), loader.test_size, loader.training_args.seed)
                columns, held_columns = columns.take(rows["train"]), columns.take(rows["test"])
        else:
            module = loader.stock()
            columns = columns_of(loader.raw_rows(), len(module["train_dataset"]))
            if loader.test_size:
                held_columns = columns_of(loader.raw_rows(held_out=True), len(module["eval_dataset"]))
            self._source_of = np.zeros(len(module["train_dataset"]), dtype=np.int32)
        train, named = module["train_dataset"], module.get("eval_dataset")
        held = named if loader.test_size else None
        evaluation = named if isinstance(named, dict) else {} if named is None or held is not None else {"": named}
        copy.write(
            Copied(
                names=names,
                train=train,
                source_of=self._source_of,
                measures=measure(train),
                documents_per_row=documents,
                columns=_dataset(columns),
                held=held,
                held_source_of=np.array([names.index(name) for name in self._held_sources or ()], dtype=np.int32),
                held_columns=_dataset(held_columns),
            ),
            {f"validation_{name}".rstrip("_"): rows for name, rows in evaluation.items()},
        )

    def _copied_columns(self, raw: RawRows, num_rows: int) -> pa.Table | None:
        """Return raw columns in the order of ``num_rows`` rows, where each raw row became one."""
        if len(raw.rows) != num_rows or self._loader.data_args.packing:
            return None
        asked = [*self._config.columns, FILE_COLUMN]
        table = joined_columns([scalar_columns(part, asked) for part in raw.parts])
        if table is None:
            return None
        table = table.take(raw.rows)
        if FILE_COLUMN in table.column_names:  # numbers mean nothing in another process
            files = pa.array(self._loader.files).take(table.column(FILE_COLUMN).combine_chunks())
            table = table.set_column(table.column_names.index(FILE_COLUMN), FILE_COLUMN, files)
        return table

    def _raw_rows(self, *, held_out: bool = False) -> RawRows:
        """Return the raw rows of the training rows, or of those held out; of a copy those columns that it keeps."""
        copied, loader = self._copied, self._loader
        if copied is None or (held_out and copied.held is None):
            return loader.raw_rows(held_out=held_out)
        columns = copied.held_columns if held_out else copied.columns
        rows = np.arange(0 if columns is None else len(columns), dtype=np.int64)
        name = f"tokenized copy {self._copy_path}"
        if columns is None:
            raise ConfigError(
                f"tokenized_path: the {name} keeps no columns: rows are packed, or some were dropped as invalid"
            )
        if loader.by_file and not held_out:
            if FILE_COLUMN not in columns.column_names:
                raise ConfigError(f"dynamic.domain_path: the {name} does not keep the paths of files; remove it")
            files = columns.data.column(FILE_COLUMN).combine_chunks().dictionary_encode()
            loader.files[:] = files.dictionary.to_pylist()
            columns = columns.remove_columns(FILE_COLUMN).add_column(FILE_COLUMN, files.indices.to_numpy())
        return RawRows(names=[name], parts=[columns], rows=rows, written=loader.written)

    def _load_each(self, parts: list[Any]) -> dict[str, Any]:
        """Concatenate the rows of several training sets, and load evaluation rows or split them off."""
        loader, names = self._loader, self._names
        args, size, seed = loader.data_args, loader.test_size, loader.training_args.seed
        counts = np.array([len(part) for part in parts])
        packs = (args.packing or args.neat_packing) and len(loader.origins) == len(names)
        if self._config.unit == "documents" and packs:
            documents = [float(len(origin.kept)) for origin in loader.origins]
            self._documents_per_row = np.array(documents) / np.maximum(counts, 1)
        whole: Any = JoinedRows(parts) if args.streaming else concatenate_datasets(parts)
        self._source_of = np.repeat(np.arange(len(names), dtype=np.int32), counts)
        if args.eval_dataset is not None:
            return {"train_dataset": whole, "eval_dataset": loader.evaluation()}
        if not size:
            return {"train_dataset": whole}
        split = whole.train_test_split(test_size=size, seed=seed)
        rows = split_rows(len(whole), size, seed)
        self._held_sources = [names[k] for k in self._source_of[rows["test"]]]
        self._source_of = self._source_of[rows["train"]]
        return {"train_dataset": split["train"], "eval_dataset": split["test"]}

    def _held_out(self, held: Any) -> HeldOut:
        """Return the evaluation rows as one data set per domain, in the order of first appearance.

        Raises:
            ConfigError: A tokenized copy has nothing held out, or nothing to tell domains apart.
            DataError: A row without a domain.
        """
        by = self._config.domain_column
        whole = concatenate_datasets([*held.values()]) if isinstance(held, dict) else held
        if by is None and isinstance(held, dict):
            return HeldOut(held, whole)
        labels: Any = self._held_sources
        if by is not None:
            raw = self._raw_rows(held_out=True)
            labels = raw.column(by, len(whole))
            _check_labels(raw, by, labels)
        elif held is None or labels is None:
            raise ConfigError(
                "dynamic.eval_by_domain: the tokenized copy holds no held-out rows of several domains; name an "
                "'eval_dataset'"
            )
        rows_of: dict[str, list[int]] = {}
        for row, label in enumerate(labels):
            rows_of.setdefault(label, []).append(row)
        return HeldOut({label: whole.select(rows) for label, rows in rows_of.items()}, whole)

    def _columns(self, train: Any) -> dict[str, NDArray[Any]]:
        """Return the raw columns of the training rows; values that a method cannot use are refused."""
        config, loader = self._config, self._loader
        names = [*config.columns, *([FILE_COLUMN] if loader.by_file else [])]
        if not names:
            return {}
        raw = self._raw_rows()
        if loader.data_args.streaming:
            raw = replace(raw, rows=raw.rows[train.raw_rows])
        found = {name: raw.column(name, len(train)) for name in names}
        if config.domain_column is not None:
            _check_labels(raw, config.domain_column, found[config.domain_column])
        for chosen in config.methods:
            method = chosen.build()
            for name in chosen.requires.columns:
                raw.check(f"dynamic.{chosen.kind}", name, found[name], method.refused_values(name, found[name]))
        return found

    def _token_weights(self, module: dict[str, Any]) -> TokenColumn | None:
        """Take the weights of tokens out of the training rows, which a collator could not take.

        Raises:
            ConfigError: A tokenized copy, or the messages, have none.
            DataError: One cannot be used.
        """
        asked = self._config.requires.token_weights
        if asked is None:
            return None
        key, (level, name) = "dynamic.weighter", asked
        if level == "turn":
            self._loader.raw_rows().check_turns(key, name)
        stored, train = WEIGHTS if level == "turn" else name, module["train_dataset"]
        if stored not in train.column_names:
            known = ", ".join(train.column_names)
            raise ConfigError(f"{key}.column: the tokenized copy has no column {name!r} (columns found: {known})")
        weights = TokenColumn(train, stored)
        for part, rows in module.items():
            if stored in (getattr(rows, "column_names", None) or ()):
                module[part] = rows.remove_columns(stored)
        if level == "token":
            lengths = measure(module["train_dataset"]).lengths
            weights.refuse_unusable(key, lengths, lambda row: f"row {row + 1:,} of the tokenized copy")
        return weights

    def _without_leaks(self, leaks: Mapping[str, Leak], num_rows: int) -> NDArray[np.int64] | None:
        """Report target rows that lie in the training pool; return the rows to keep where these are to be dropped.

        Raises:
            DataError: ``leakage: error``, or nothing would be left.
        """
        told = [f"target {name!r}: {leak.tell()}" for name, leak in leaks.items() if leak.num_rows]
        drop = self._config.leakage == "drop"
        if told and self._config.leakage == "error":
            raise DataError("\n".join(f"dynamic.leakage: {line}" for line in told))
        for line in told:
            logger.warning("%s%s", line, "; they leave the pool" if drop else "")
        if not told or not drop:
            return None
        rows = np.unique(np.concatenate([leak.pool_rows for leak in leaks.values()]))
        kept = np.setdiff1d(np.arange(num_rows, dtype=np.int64), rows)
        if not len(kept):
            raise DataError("dynamic.leakage: every training row is also a target row; nothing is left to train on")
        return kept

    def _domains(self, columns: Mapping[str, NDArray[Any]], corpus: Corpus) -> Domains:
        """Return the domains of the rows.

        Raises:
            DataError: A method needs more of them.
        """
        config = self._config
        labels: NDArray[Any] | None = None
        if config.domain_column is not None:
            labels = columns[config.domain_column]
        elif config.domain_path is not None:
            labels = self._path_labels(columns[FILE_COLUMN], config.domain_path)
        elif config.domain_clusters is not None:
            labels = self._cluster_labels(corpus, config.domain_clusters)
        if labels is not None:
            domains = Domains.from_labels(labels, lengths=corpus.lengths)
        else:
            domains = Domains(
                names=tuple(self._names),
                domain_of=self._source_of,
                lengths=corpus.lengths,
                documents_per_row=self._documents_per_row,
            )
        lacking = list(unmet(self._config, RunFacts(num_domains=len(domains.names))))
        if lacking:
            raise DataError("\n".join(lacking))
        return domains

    def _path_labels(self, numbers: NDArray[np.int32], pattern: str) -> NDArray[np.object_]:
        """Return the domain of each row [N], from the number of its file.

        The pattern is a glob for the end of a path, in which ``*`` stays within a folder; the first one is the domain.
        """
        first, *rest = map(re.escape, pattern.split("*"))
        expression = re.compile(f"(?:^|/){first}([^/]*?){'[^/]*'.join(rest)}$")
        names = []
        for file in self._loader.files:
            match = expression.search(Path(file).as_posix())
            if match is None:
                raise ConfigError(f"dynamic.domain_path: {pattern!r} does not fit the file {file}")
            names.append(match.group(1))
        return np.array(names, dtype=object)[numbers]

    def _cluster_labels(self, corpus: Corpus, clusters: int) -> NDArray[np.object_]:
        """Return the k-means cluster of each row's embedding, ``cluster_00``, ``cluster_01``, ... [N] (collective).

        Centres are those of at most 100,000 rows drawn by the seed. Rows without text are ``cluster_none``.
        """
        config, args = self._config, self._loader.training_args
        rows = np.arange(len(corpus.lengths), dtype=np.int64)
        model = load_encoder(str(config.domain_encoder), device=args.device)
        tokenizer = self._loader.tokenizer_module["tokenizer"]
        sweep = text_sweep(corpus, rows, tokenizer, token_budget=16384, device=args.device)
        vectors = row_pass(sweep, model.score, (model.dimension,))
        known = np.flatnonzero(np.isfinite(vectors).all(axis=1))
        if not len(known):
            raise ConfigError("dynamic.domain_clusters: no row has a text that could be embedded")
        rng = stream(args.seed if config.seed is None else config.seed, "domain clusters", 0)
        drawn = known if len(known) <= _SAMPLE else np.sort(rng.choice(known, size=_SAMPLE, replace=False))
        _, centres = kmeans(vectors[drawn], clusters, rng)
        labels = np.full(len(rows), "cluster_none", dtype=object)
        names = np.array([f"cluster_{k:02d}" for k in range(len(centres))], dtype=object)
        squares = (centres**2).sum(axis=1)
        for start in range(0, len(known), _BLOCK):
            part = known[start : start + _BLOCK]
            labels[part] = names[np.argmin(squares - 2.0 * vectors[part] @ centres.T, axis=1)]
        return labels


def _check_labels(raw: RawRows, name: str, labels: NDArray[Any]) -> None:
    raw.check("dynamic.domain_column", name, labels, (unusable_labels(labels), WANTED_LABELS))


def _dataset(table: pa.Table | None) -> Dataset | None:
    return None if table is None else Dataset(table)
