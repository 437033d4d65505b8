"""Answers that were paid for: kept for the step they belong to, for a while, or on disk as they come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.method import Rows, State
from dataflex.signals.store import ArrayStore, Fingerprint, ResumablePass

__all__ = ["Answer", "Question", "SignalCache"]

_AGELESS = -1  # step of answers of models that stay as they are

Answer = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Question:
    """Everything that an answer depends on, besides the model.

    Attributes:
        method: What is computed.
        parameters: How: JSON values.
        rows: Row ids [n].
        corpus: Which rows those are: "" for the training set, or a target's name.
        data: Fingerprint of the corpus.
        tail: Shape of one row's answer.
        model: Identity of a model that stays as it is; "" for the model under training.
    """

    method: str
    parameters: dict[str, Any]
    rows: Rows
    corpus: str
    data: str
    tail: tuple[int, ...] = ()
    model: str = ""

    @property
    def rows_digest(self) -> str:
        """Hash of the row ids."""
        return hashlib.blake2b(np.ascontiguousarray(self.rows).tobytes(), digest_size=16).hexdigest()

    @property
    def key(self) -> str:
        """Name of the answer in memory."""
        other = [self.model] if self.model else []
        return json.dumps([self.method, self.parameters, self.corpus, self.rows_digest, *other], sort_keys=True)


@dataclass(kw_only=True)
class SignalCache:
    """Gives answers again.

    Those of a model that stays as it is are kept row by row: no row is computed twice in a run.

    Attributes:
        max_age_steps: Oldest answer, in optimizer steps, that is given again.
        store: Where passes write as they go; None keeps answers in memory only.
        store_bytes: Oldest stored answers are dropped beyond this size.
        model_identity: Names the model; asked once a step, and only with a store (collective).
        surroundings: What else answers about a corpus come from, as JSON values: precision, batches, tokenizer.
        step: Optimizer step that answers belong to.
    """

    max_age_steps: int = 0
    store: ArrayStore | None = None
    store_bytes: int = 10 * 2**30
    model_identity: Callable[[], str] = lambda: ""
    surroundings: Callable[[str], dict[str, Any]] = lambda _: {}
    step: int = 0
    _kept: dict[str, tuple[int, Answer]] = field(default_factory=dict)
    _identity: tuple[int, str] | None = None

    def begin(self, step: int) -> None:
        """Forget answers that are too old for ``step``."""
        self.step = step
        self._kept = {
            key: kept for key, kept in self._kept.items() if kept[0] == _AGELESS or step - kept[0] <= self.max_age_steps
        }

    def once(self, name: str, rows: Rows, num_rows: int, compute: Callable[[Rows], Answer]) -> Answer:
        """Return a number for each row by a model that stays as it is [len(rows)] (collective).

        Args:
            name: Names the number: the model, and how it is asked.
            rows: Row ids.
            num_rows: Rows of the corpus.
            compute: Gives the numbers of rows that were not asked for before, ascending.
        """
        if name not in self._kept:
            self._kept[name] = (_AGELESS, np.zeros((num_rows, 2), dtype=np.float32))  # number, whether it is known
        table = self._kept[name][1]
        new = np.unique(rows[table[rows, 1] == 0])
        if len(new):
            table[new] = np.stack([compute(new), np.ones(len(new))], axis=1)
        return table[rows, 0]

    def give(
        self, question: Question, compute: Callable[[ResumablePass | None], Answer], device: torch.device
    ) -> Answer:
        """Return the answer [n, *tail], computing it if need be (collective). Callers get their own copy.

        Args:
            question: What is asked.
            compute: Makes the pass, writing into the resumable one where there is one.
            device: Where ranks exchange tensors.
        """
        if question.key not in self._kept:
            answer = np.array(compute(self._work(question, device)), dtype=np.float32)
            if question.model:  # ``once`` keeps what is made of it
                return answer
            self._kept[question.key] = (self.step, answer)
            if self.store is not None:
                self.store.evict(self.store_bytes)
        return self._kept[question.key][1].copy()

    def _work(self, question: Question, device: torch.device) -> ResumablePass | None:
        if self.store is None:
            return None
        model = question.model
        if not model:
            if self._identity is None or self._identity[0] != self.step:
                self._identity = (self.step, self.model_identity())
            model = self._identity[1]
        return ResumablePass(
            self.store,
            Fingerprint(
                model=model,
                data=f"{question.data} {question.corpus or 'training rows'} {question.rows_digest}",
                method=question.method,
                parameters={**question.parameters, **self.surroundings(question.corpus)},
            ),
            shape=(len(question.rows), *question.tail),
            dtype=np.float32,
            device=device,
        )

    def state_dict(self) -> State:
        """Return answers that a later step may be given again, so that a resumed run gives the same ones."""
        kept = {key: kept for key, kept in self._kept.items() if self.max_age_steps or kept[0] == _AGELESS}
        return {"answers": {key: {"step": step, "values": values} for key, (step, values) in kept.items()}}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self._kept = {key: (int(kept["step"]), np.array(kept["values"])) for key, kept in state["answers"].items()}
