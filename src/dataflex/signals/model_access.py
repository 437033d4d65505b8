"""What passes are given: the model under training, the rows, and how to feed them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.errors import DataError, UnsupportedError
from dataflex.plan.domains import Rows
from dataflex.signals.other_models import Scorer
from dataflex.signals.sweep import Sweep


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A tokenized data set that rows can be taken from.

    Attributes:
        dataset: Features by row id.
        lengths: Number of tokens of each row.
        identity: Fingerprint of its content.
    """

    dataset: Any
    lengths: NDArray[np.int64]
    identity: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelAccess:
    """The model under training, the rows that it is asked about, and other models that were loaded for them.

    Attributes:
        model: The module to call; not the DDP or DeepSpeed engine around it.
        collate: Features to a batch for scoring.
        autocast: The Trainer's mixed-precision context.
        device: Where batches go.
        token_budget: Largest number of padded tokens in a scoring batch.
        train: Training rows.
        targets: Target data sets by name.
        seed: Seed of everything random in signals.
        tokenizer: Of the run; None where it is not known.
        optimizer: Gives the Trainer's optimizer, whose moments precondition gradients.
        learning_rate: Gives the learning rate of the next step.
        backend: "zero" under DeepSpeed, else "plain".
        release: Lets go of parameters that a pass left gathered under ZeRO-3.
        loaded: Other models, by how they were asked for.
        for_decision: What signals keep until the next optimizer step, such as mean gradients of targets.
    """

    model: torch.nn.Module
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    autocast: Callable[[], AbstractContextManager[Any]]
    device: torch.device
    token_budget: int
    train: Corpus
    targets: Mapping[str, Corpus] = field(default_factory=dict)
    seed: int = 0
    tokenizer: Any = None
    optimizer: Callable[[], Any] = lambda: None
    learning_rate: Callable[[], float] = lambda: 0.0
    backend: Literal["plain", "zero"] = "plain"
    release: Callable[[], None] | None = None
    loaded: dict[Any, Any] = field(default_factory=dict, repr=False, init=False)
    for_decision: dict[str, Any] = field(default_factory=dict, repr=False, init=False)

    def corpus(self, target: str | None) -> Corpus:
        """Return the rows of a target, or the training rows for None.

        Raises:
            DataError: There is no such target.
        """
        if target is None:
            return self.train
        if target not in self.targets:
            raise DataError(f"unknown target {target!r} (known: {', '.join(self.targets) or 'none'})")
        return self.targets[target]

    def data_identity(self, target: str) -> str:
        """Return what names a target's rows."""
        return self.corpus(target).identity or target

    @property
    def longest(self) -> int:
        """Number of tokens of the longest training row."""
        return int(self.train.lengths.max(initial=1))

    def known_tokenizer(self, what: str) -> Any:
        """Return the tokenizer of the run.

        Raises:
            UnsupportedError: There is none, and ``what`` needs it.
        """
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
            token_budget=self.token_budget,
            device=self.device,
            what=f"{what} of {len(rows):,} {whose}",
        )

    def target_sweep(self, target: str, rows: Rows | None = None) -> Sweep:
        """Return a pass over some rows of a target, or over all of them, for gradients."""
        everyone = np.arange(len(self.corpus(target).lengths), dtype=np.int64)
        return self.sweep(everyone if rows is None else rows, target, "gradients")

    def scorer(self, name: str) -> Scorer:
        """Return another causal model by folder or hub id; its weights are loaded for each pass only."""
        if name not in self.loaded:
            self.loaded[name] = Scorer(name, self.known_tokenizer(f"model {name}"))
        scorer: Scorer = self.loaded[name]
        return scorer
