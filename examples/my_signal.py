"""A signal of one's own, and a selector that asks it: rows whose next tokens the model seldom guesses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dataflex import Card, Context, Passes, Requires, Rows, Selection, Selector
from dataflex.select.choose import top_k
from dataflex.signals.kinds import Scorer, Signal
from dataflex.signals.model_access import ModelAccess


@dataclass(frozen=True, kw_only=True)
class GuessedTokens(Signal):
    """Share of each row's supervised tokens that are among the model's ``top`` guesses [n]; NaN without any."""

    name = "guessed tokens"  # in progress lines, in the cache and in the store
    needs = "logits"
    top: int = 1

    @contextmanager
    def open(self, access: ModelAccess) -> Iterator[Scorer]:
        """Give a function of a collated batch; it runs in eval mode, without gradient, in the Trainer's precision."""
        from dataflex.signals.losses import model_inputs

        def score(batch):
            labels = batch["labels"][:, 1:]
            logits = access.model(**model_inputs(batch), use_cache=False).logits[:, :-1]
            supervised = labels.ne(-100)
            guessed = logits.topk(self.top).indices.eq(labels[..., None]).any(dim=-1) & supervised
            return guessed.sum(dim=1) / supervised.sum(dim=1)

        yield score


class SeldomGuessed(Selector):
    """Keep the rows whose tokens are guessed least often."""

    name = "seldom_guessed"
    card = Card(summary="Keeps the rows hardest to guess.", paper="baseline", cost="1 F over the pool per interval")

    def requires(self) -> Requires:
        """State what the run must have: checked before a model is loaded."""
        return Requires(
            signals=frozenset({"logits"}), stages=("pt", "sft"), needs_interval=True, passes=Passes(pool=(1.0, 0.0))
        )

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Return at most ``budget`` rows, best first, and a score for every row of the pool."""
        scores = -ctx.signals(GuessedTokens(top=5), pool)
        return Selection(rows=pool[top_k(scores, budget)], scores=scores, reason="tokens that are seldom guessed")
