"""What passes are given: the model under training, the rows, and how to feed them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.errors import DataError, UnsupportedError
from dataflex.plan.domains import Rows
from dataflex.signals.other_models import Scorer
from dataflex.signals.preferences import Preferences, pair_lengths
from dataflex.signals.store import ResumablePass
from dataflex.signals.sweep import Sweep

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A tokenized data set that rows can be taken from."""

    dataset: Any  # features by row id
    lengths: NDArray[np.int64]  # number of tokens of each row
    identity: str = ""  # fingerprint of its content


@dataclass(frozen=True, kw_only=True)
class ModelAccess:
    """The model under training, the rows that it is asked about, and other models that were loaded for them."""

    model: torch.nn.Module  # the module to call; not the DDP or DeepSpeed engine around it
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]  # features to a batch for scoring
    autocast: Callable[[], AbstractContextManager[Any]]  # the Trainer's mixed-precision context
    device: torch.device  # where batches go
    token_budget: int  # largest number of padded tokens in a scoring batch
    gradient_tokens: int = 0  # the same of a batch whose gradients are asked for; 0: token_budget
    one_by_one: bool = False  # whether rows are collated one at a time
    train: Corpus
    targets: Mapping[str, Corpus] = field(default_factory=dict)  # target data sets by name
    seed: int = 0  # of everything random in signals
    tokenizer: Any = None  # of the run; None where it is not known
    optimizer: Callable[[], Any] = lambda: None  # the Trainer's, whose moments precondition gradients
    learning_rate: Callable[[], float] = lambda: 0.0  # of the next step
    backend: Literal["plain", "zero"] = "plain"  # "zero" under DeepSpeed
    release: Callable[[], None] | None = None  # lets go of parameters that a pass left gathered under ZeRO-3
    preferences: Preferences | None = None  # where rows are pairs of answers: stage dpo
    work: Callable[..., ResumablePass] | None = None  # opens a stored array, where there is a store
    loaded: dict[Any, Any] = field(default_factory=dict, repr=False, init=False)  # other models
    for_decision: dict[str, Any] = field(default_factory=dict, repr=False, init=False)  # kept until the next step

    def corpus(self, target: str | None) -> Corpus:
        """Return the rows of a target, or the training rows for None; DataError for an unknown target."""
        if target is None:
            return self.train
        if target not in self.targets:
            raise DataError(f"unknown target {target!r} (known: {', '.join(self.targets) or 'none'})")
        return self.targets[target]

    def data_identity(self, target: str) -> str:
        """Return what names a target's rows."""
        return self.corpus(target).identity or target

    @property
    def gradient_budget(self) -> int:
        """Largest number of padded tokens in a batch whose gradients are asked for."""
        return self.gradient_tokens or self.token_budget

    @property
    def longest(self) -> int:
        """Number of tokens of the longest training row."""
        return int(self.train.lengths.max(initial=1))

    @property
    def longest_pair(self) -> int:
        """Number of tokens of the longest answer of a training pair, with its prompt."""
        corpus = self.train
        lengths = self.once(("pairs", None), lambda: pair_lengths(corpus.dataset, corpus.lengths))
        return int(lengths.max(initial=2)) // 2

    def known_tokenizer(self, what: str) -> Any:
        """Return the tokenizer of the run; UnsupportedError where there is none, and ``what`` needs it."""
        if self.tokenizer is None:
            raise UnsupportedError(f"{what}: the tokenizer of the model is needed, which this run does not have")
        return self.tokenizer

    def sweep(self, rows: Rows, target: str | None, what: str) -> Sweep:
        """Return a pass over rows of the training set or of a target."""
        corpus = self.corpus(target)
        whose = "training rows" if target is None else f"rows of target {target}"
        return Sweep(
            dataset=corpus.dataset,
            rows=rows,
            lengths=corpus.lengths[rows],
            collate=self.collate,
            token_budget=1 if self.one_by_one else self.token_budget,
            device=self.device,
            what=f"{what} of {len(rows):,} {whose}",
        )

    def pairs(self, rows: Rows, target: str | None, what: str) -> Sweep:
        """Return a pass over rows that are pairs, with both answers; UnsupportedError where they are none."""
        preferences, corpus = self.preferences, self.corpus(target)
        if preferences is None:
            raise UnsupportedError(f"{what}: rows are pairs of a chosen and a rejected answer under stage dpo only")
        lengths = self.once(("pairs", target), lambda: pair_lengths(corpus.dataset, corpus.lengths))
        return replace(self.sweep(rows, target, what), collate=preferences.collate, lengths=lengths[rows])

    def trained(self, rows: Rows, target: str | None, what: str) -> Sweep:
        """Return a pass over rows as they are trained on: both answers of a pair, for gradients."""
        sweep = (self.sweep if self.preferences is None else self.pairs)(rows, target, what)
        return sweep if self.one_by_one else replace(sweep, token_budget=self.gradient_budget)

    def target_sweep(self, target: str, rows: Rows | None = None) -> Sweep:
        """Return a pass over some rows of a target, or over all of them, for gradients."""
        everyone = np.arange(len(self.corpus(target).lengths), dtype=np.int64)
        return self.trained(everyone if rows is None else rows, target, "gradients")

    def scorer(self, name: str) -> Scorer:
        """Return another causal model by folder or hub id; its weights are loaded for each pass only."""
        return self.once(name, lambda: Scorer(name, self.known_tokenizer(f"model {name}")))

    def once(self, key: Any, load: Callable[[], T]) -> T:
        """Return what ``load`` gives, which is called once for a key."""
        if key not in self.loaded:
            self.loaded[key] = load()
        loaded: T = self.loaded[key]
        return loaded
