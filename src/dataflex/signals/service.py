"""The service that answers methods' questions about what the model makes of the data.

Two methods that ask for the same rows at the same step pay once; answers up to ``max_age_steps`` old may
be given again; with a store, an interrupted pass goes on where it stopped. A pass leaves parameters,
gradients, optimizer, random states and modes as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from dataflex import comm
from dataflex.errors import ComponentError, DataFlexError, UnsupportedError
from dataflex.method import Rows, State
from dataflex.signals.forward_answers import ForwardAnswers
from dataflex.signals.generate import Generator
from dataflex.signals.gradient_answers import GradientAnswers
from dataflex.signals.moved_answers import MovedAnswers
from dataflex.signals.specs import Generation, GenerationSpec, Part
from dataflex.signals.texts import row_texts, row_tokens

__all__ = ["SignalService"]

T = TypeVar("T")


@dataclass(kw_only=True)
class SignalService(ForwardAnswers, MovedAnswers, GradientAnswers):
    """Implements ``method.Signals`` on a model under training. All calls are collective.

    Attributes:
        handle: The model and how to feed it.
        train: Training rows.
        targets: Target data sets by name.
        seed: Seed of everything random in here.
        book: Answers that were paid for.
        seconds: Time spent in passes since the decision began.
        encoders: Other models that were loaded, by folder or hub id and how they pool.
        target_gradients: Mean gradients of targets that were made in this decision.
        scorers: Other causal models that were asked for, by folder or hub id.
    """

    def begin(self, step: int) -> None:
        """Start a decision at ``step``."""
        self.seconds = 0.0
        self.target_gradients.clear()
        self.book.begin(step)

    def end(self) -> None:
        """Let go of what only this decision needed."""
        self.target_gradients.clear()

    def tokens(self, rows: Rows, *, target: str | None = None, part: Part = "all") -> list[NDArray[np.int64]]:
        """Return the tokens of each row, or of its prompt or completion; nothing is computed."""
        return row_tokens(self._corpus(target).dataset, rows, part)

    def texts(self, rows: Rows, *, target: str | None = None, part: Part = "all") -> list[str]:
        """Return the text of each row, or of its prompt or completion, without special tokens."""
        return row_texts(self._corpus(target).dataset, rows, self._tokenizer("texts"), part)

    def generate(
        self, prompts: Sequence[Sequence[int]], spec: GenerationSpec, *, ids: Rows | None = None
    ) -> list[Generation]:
        """Sample from the model under training; draws depend on (seed, prompt id, sample, position) only."""
        if self.handle.tokenizer is None:
            raise UnsupportedError("generation needs the tokenizer of the model, which this run does not have")
        with self._timed():
            handle = self.handle
            generator = Generator(
                handle.model,
                handle.tokenizer,
                device=handle.device,
                token_budget=handle.token_budget,
                autocast=handle.autocast,
            )
            return generator.sample(prompts, spec, ids=ids)

    def on_one_rank(self, what: str, compute: Callable[[], T]) -> T:
        """Run ``compute`` on rank 0 alone and return its value on every rank, for what must not be done twice.

        Raises:
            ComponentError: On the other ranks, if it fails on rank 0, where its own error is raised.
        """
        with self._timed():
            if comm.rank() != 0:
                failed, value = comm.broadcast_object(("", None))
                if failed:
                    raise ComponentError(failed)
                return cast(T, value)
            outcome: tuple[str, T | None] = (f"{what} failed on rank 0", None)
            try:
                value = compute()
                outcome = ("", value)
                return value
            except DataFlexError as error:
                outcome = (str(error), None)
                raise
            finally:
                comm.broadcast_object(outcome)

    def state_dict(self) -> State:
        """Return what a resumed run needs to give the same answers."""
        return self.book.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self.book.load_state_dict(state)
