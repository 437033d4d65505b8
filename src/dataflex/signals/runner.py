"""Asks a model about rows: the one place where signals become values.

Two methods that ask for the same at the same step pay once; values up to ``max_age_steps`` old may be given again;
with a store, an interrupted pass goes on where it stopped. A pass leaves parameters, gradients, optimizer, random
states and modes as they were.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex import comm
from dataflex.errors import UnsupportedError
from dataflex.plan.domains import Rows
from dataflex.signals.generate import Generator
from dataflex.signals.kinds import Signal
from dataflex.signals.model_access import ModelAccess
from dataflex.signals.model_parts import is_partitioned
from dataflex.signals.specs import Generation, GenerationSpec, Part
from dataflex.signals.store import ArrayStore, CacheKey, ResumablePass
from dataflex.signals.sweep import Collector, Share, preserve_state
from dataflex.signals.texts import row_texts, row_tokens
from dataflex.state import State, blake2b

logger = logging.getLogger(__name__)

T = TypeVar("T")
_AGELESS = -1  # step of values of models that do not change

SignalValue = NDArray[np.float32]


def rows_digest(rows: Rows) -> str:
    """Return a hash of row ids."""
    return blake2b(np.ascontiguousarray(rows).tobytes()).hex()


@dataclass(kw_only=True)
class SignalCache:
    """Gives values again; those of a model that does not change are kept row by row, for the whole run."""

    max_age_steps: int = 0  # age of the oldest values that are given again, in optimizer steps
    store: ArrayStore | None = None  # where passes write as they go; None keeps values in memory only
    store_bytes: int = 10 * 2**30  # oldest stored arrays are dropped beyond this size
    model_identity: Callable[[], str] = lambda: ""  # asked once a step, only with a store (collective)
    surroundings: Callable[[str], dict[str, Any]] = lambda _: {}  # what else values of a corpus depend on, JSON
    step: int = 0  # optimizer step that values belong to
    _kept: dict[str, tuple[int, SignalValue]] = field(default_factory=dict)
    _identity: tuple[int, str] | None = None

    def begin(self, step: int) -> None:
        """Forget values that are too old for ``step``."""
        self.step = step
        self._kept = {
            key: kept for key, kept in self._kept.items() if kept[0] == _AGELESS or step - kept[0] <= self.max_age_steps
        }

    def get(self, key: dict[str, Any]) -> SignalValue | None:
        """Return the caller's own copy of what is kept under ``key``, JSON values; None for nothing."""
        kept = self._kept.get(json.dumps(key, sort_keys=True))
        return None if kept is None else kept[1].copy()

    def keep(self, key: dict[str, Any], values: SignalValue) -> SignalValue:
        """Keep values for the step, and return the caller's own copy."""
        self._kept[json.dumps(key, sort_keys=True)] = (self.step, values)
        if self.store is not None:
            self.store.evict(self.store_bytes)
        return values.copy()

    def table(self, key: dict[str, Any], num_rows: int, numbers: int) -> SignalValue:
        """Return what a model that does not change gives every row: numbers, and whether they are known [N, n + 1]."""
        empty = (_AGELESS, np.zeros((num_rows, numbers + 1), dtype=np.float32))
        return self._kept.setdefault(json.dumps(key, sort_keys=True), empty)[1]

    def work(
        self, method: str, parameters: dict[str, Any], *, model: str, data: str, corpus: str, shape: tuple[int, ...]
    ) -> ResumablePass:
        """Open the stored array of a pass (collective); only with a store.

        ``method`` and ``parameters`` (JSON values) say what is computed, ``model`` names a model that does not change
        ("" for the model under training), ``data`` the rows, and ``corpus`` their target ("" for the training set).
        """
        assert self.store is not None
        if not model:
            if self._identity is None or self._identity[0] != self.step:
                self._identity = (self.step, self.model_identity())
            model = self._identity[1]
        key = CacheKey(model=model, data=data, method=method, parameters={**parameters, **self.surroundings(corpus)})
        return ResumablePass(self.store, key, shape=shape, dtype=np.float32)

    def state_dict(self) -> State:
        """Return values that a later step may be given again, so that a resumed run gives the same ones."""
        kept = {key: kept for key, kept in self._kept.items() if self.max_age_steps or kept[0] == _AGELESS}
        return {"answers": {key: {"step": step, "values": values} for key, (step, values) in kept.items()}}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self._kept = {key: (int(kept["step"]), np.array(kept["values"])) for key, kept in state["answers"].items()}


@dataclass(kw_only=True)
class SignalRunner:
    """Implements ``method.Signals`` on a model under training. All calls are collective."""

    access: ModelAccess  # the model, the rows, and how to feed them
    cache: SignalCache = field(default_factory=SignalCache)  # values that were paid for
    seconds: float = 0.0  # time spent in here since the decision began
    forward_rows: float = 0.0  # forward passes of single rows since the decision began, as signals count them
    backward_rows: float = 0.0  # backward passes of single rows, likewise
    instead: Callable[[Signal, Rows], SignalValue | None] | None = None  # asked first about training rows
    share: Callable[[ResumablePass], Share] | None = None  # shares a stored pass among processes that are no ranks

    def begin(self, step: int) -> None:
        """Start a decision at ``step``."""
        self.seconds = self.forward_rows = self.backward_rows = 0.0
        self.access.for_decision.clear()
        self.cache.begin(step)

    def end(self) -> None:
        """Let go of what only this decision needed."""
        self.access.for_decision.clear()
        told = "step %d: signals took %.1f s: %.0f forward and %.0f backward passes of rows"
        logger.debug(told, self.cache.step, self.seconds, self.forward_rows, self.backward_rows)

    def __call__(self, signal: Signal, rows: Rows, *, target: str | None = None) -> SignalValue:
        """Return the signal's value of each row, float32 [len(rows), *tail], equal on every rank.

        Row ids are those of the named target data set, or of the training set for None. DataError where there is no
        such target, UnsupportedError where the signal needs whole parameters and they are partitioned over ranks.
        """
        with self._timed():
            if self.instead is not None and target is None and (known := self.instead(signal, rows)) is not None:
                return known
            corpus, kept = self.access.corpus(target), signal.kept
            if target is not None:
                signal = signal.for_target()
            if kept == "never":
                return self._compute(signal, rows, target, {})
            budgets = {"token_budget": self.access.token_budget, "gradient_budget": self.access.gradient_budget}
            parameters = {**signal.key(self.access), **budgets}
            if signal.code:
                parameters["code"] = signal.code
            key = {"signal": signal.name, "parameters": parameters, "corpus": target or ""}
            if kept == "run":
                shape = signal.run_shape
                named = {**key, "model": signal.model_identity(self.access)}
                table = self.cache.table(named, len(corpus.lengths), math.prod(shape))
                new = np.unique(rows[table[rows, -1] == 0])
                if len(new):
                    found = self._compute(signal, new, target, parameters).reshape(len(new), -1)
                    table[new] = np.column_stack([found, np.ones(len(new))])
                return table[rows, :-1].reshape(len(rows), *shape)
            if self.cache.store is not None:
                parameters.update(signal.state(self.access))
            key["rows"] = rows_digest(rows)
            values = self.cache.get(key)
            return self.cache.keep(key, self._compute(signal, rows, target, parameters)) if values is None else values

    def _compute(self, signal: Signal, rows: Rows, target: str | None, parameters: dict[str, Any]) -> SignalValue:
        access, cache = self.access, self.cache
        if signal.whole_parameters and is_partitioned(access.model):
            raise UnsupportedError(
                f"{signal.name} need whole parameters, but ZeRO-3 or FSDP partitions them over ranks"
            )
        sweep = signal.sweep(access, rows, target)
        sweep = replace(sweep, what=f"step {cache.step}: {sweep.what}")
        tail, work = signal.tail(access), None
        if cache.store is not None and len(sweep.rows) and not signal.joint and signal.kept != "never":
            work = cache.work(
                signal.name,
                parameters,
                model=signal.model_identity(access),
                data=f"{access.corpus(target).identity} {target or 'training rows'} {rows_digest(rows)}",
                corpus=target or "",
                shape=(len(sweep.rows), *tail),
            )
        if work is not None and work.complete:  # stored: nothing that leads up to the pass is needed either
            values = work.finish()
        elif not len(sweep.rows):
            values = np.zeros((0, *tail), dtype=np.float32)
        else:
            self.forward_rows += signal.forward * len(sweep.rows)
            self.backward_rows += signal.backward * len(sweep.rows)
            with preserve_state(access.model), torch.no_grad():
                access.model.eval()
                if signal.joint:
                    values = signal.together(access, sweep)
                else:
                    collector = Collector(sweep, tail, work)
                    done = None if work is None else work.done_at_start
                    share = None if work is None or self.share is None else self.share(work)
                    around = access.autocast if signal.autocast else nullcontext
                    with signal.open(access) as scorer:
                        # The loop is here, and not in a function of its own, so that the way to the model stays short.
                        for turn in sweep.turns(done, share):
                            with around():
                                scored = scorer(turn.batch)
                            collector.take(turn, scored)
                        values = collector.finish()
        values = np.array(values, dtype=np.float32)
        return values if sweep.combine is None else sweep.combine(values)

    def num_rows(self, target: str | None = None) -> int:
        """Return the number of training rows, or of the named target's rows."""
        return len(self.access.corpus(target).lengths)

    def tokens(self, rows: Rows, *, target: str | None = None, part: Part = "all") -> list[NDArray[np.int64]]:
        """Return the tokens of each row, or of its prompt or completion; nothing is computed."""
        return row_tokens(self.access.corpus(target).dataset, rows, part)

    def texts(self, rows: Rows, *, target: str | None = None, part: Part = "all") -> list[str]:
        """Return the text of each row, or of its prompt or completion, without special tokens."""
        return row_texts(self.access.corpus(target).dataset, rows, self.access.known_tokenizer("texts"), part)

    def generate(
        self, prompts: Sequence[Sequence[int]], spec: GenerationSpec, *, ids: Rows | None = None
    ) -> list[Generation]:
        """Sample from the model under training; draws depend on (seed, prompt id, sample, position) only."""
        with self._timed():
            return Generator(self.access).sample(prompts, spec, ids=ids)

    def on_one_rank(self, what: str, compute: Callable[[], T]) -> T:
        """Run ``compute`` on rank 0 alone and return its value on every rank; see ``comm.on_one_rank``."""
        with self._timed():
            return comm.on_one_rank(what, compute)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    def state_dict(self) -> State:
        """Return what a resumed run needs to give the same values."""
        return self.cache.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self.cache.load_state_dict(state)
