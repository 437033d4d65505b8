"""ADAPT: the more a sequence is like the targets, the more it counts, with weights that stand for themselves.

"Rethinking Data Curation in LLM Training: Online Reweighting Offers Better Generalization", ICLR 2026,
arXiv 2605.05227. A sequence's vector is the mean of the last hidden states over its tokens, weighted by
position (w_t = t / sum of t) and divided by its norm; s_i is the mean of its cosines with the anchors' vectors,
and w_i = sigmoid(s_i / tau). Weights are absolute: they do not sum to anything, and the step's loss is divided
by the number of tokens, so a cosine of 0 halves the learning rate. ``rescale: mean1`` divides by their mean
over the micro-batch of all ranks instead.

Vectors of the rows in training come out of the training forward itself (with its dropout); those of the anchors,
which are the rows of the targets, out of a pass every ``refresh_steps`` steps. Targets that share rows with
the benchmark that is reported make its result worthless. ``similarity: bm25`` compares words instead, once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ComponentError
from dataflex.method import (
    BatchView,
    Card,
    Context,
    Normalizer,
    Passes,
    Requires,
    Rows,
    State,
    Weighter,
    WeighterParams,
)
from dataflex.signals.specs import EmbeddingSpec
from dataflex.weighters.anchors import Anchors

if TYPE_CHECKING:
    import torch

__all__ = ["Adapt"]


class _Words:
    """Rows of the targets as words: a row's score is the mean of its BM25 scores over all of them.

    Scores are 0 or more, so weights begin at 0.5; ``tau`` is in units of the score. A packed row has one score.
    """

    def __init__(self, method: str) -> None:
        self._method = method
        self._scores: NDArray[np.float32] | None = None

    def due(self, step: int) -> bool:
        """Words are counted once, also by a resumed run."""
        return self._scores is None

    def refresh(self, ctx: Context) -> None:
        """Score every training row against all anchors.

        Raises:
            DataError: A target has no row with a word.
        """
        from dataflex.selectors.okapi import Okapi
        from dataflex.selectors.text_features import cut_words, pool_texts, target_words

        anchors = [words for rows in target_words(self._method, ctx, "all", cut_words) for words in rows]
        counts = Counter(word for words in anchors for word in words)
        pool = np.arange(len(ctx.domains.domain_of), dtype=np.int64)
        index = Okapi(map(cut_words, pool_texts(pool, ctx, "all")), set(counts))
        query = {word: count / len(anchors) for word, count in counts.items()}
        self._scores = index.scores(query).astype(np.float32)

    def products(self, batch: BatchView) -> torch.Tensor:
        """Return each sequence's score, fp32 [B]."""
        if self._scores is None:
            raise ComponentError(f"{self._method}: the words of the rows were never counted")
        scores: torch.Tensor = batch.loss_B.new_tensor(self._scores[batch.rows_B])
        return scores

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        if state:
            raise ValueError(f"{self._method} by words keeps no state, but was given {sorted(state)}")


class Adapt(Weighter):
    """Weigh sequences by their likeness to the targets."""

    name = "adapt"
    card = Card(
        summary="Weighs each sequence by how much it is like the targets' rows, with a weight between 0 and 1.",
        paper="Rethinking Data Curation in LLM Training (ADAPT), ICLR 2026, arXiv 2605.05227",
        cost="1 F over the targets every refresh_steps; the rows in training cost nothing",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(WeighterParams):
        """Parameters of ADAPT; the defaults are the paper's."""

        tau: float = field(default=1.0, metadata={"help": "temperature of the sigmoid; small is sharp", "above": 0.0})
        rescale: Literal["none", "mean1"] = field(
            default="none",
            metadata={"help": "none: weights below 1 lower the learning rate; mean1: their mean is made 1"},
        )
        similarity: Literal["embedding", "bm25"] = field(
            default="embedding", metadata={"help": "compare hidden states, or words (BM25, once per run)"}
        )
        refresh_steps: int = field(
            default=50, metadata={"help": "optimizer steps between two passes over the targets", "minimum": 1}
        )
        clip: float | None = field(
            default=None, metadata={"help": "largest weight, before rescaling; null: no limit", "above": 0.0}
        )
        layer: int = field(default=-1, metadata={"help": "layer of the hidden states; -1 is the last, after its norm"})
        completion_only: bool = field(
            default=False, metadata={"help": "average the supervised tokens only, not the prompt's"}
        )

        @property
        def spec(self) -> EmbeddingSpec:
            """How rows in training and anchors are embedded."""
            return EmbeddingSpec(layer=self.layer, completion_only=self.completion_only)

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        words = self.params.similarity == "bm25"
        return Requires(
            signals=frozenset({"texts" if words else "embeddings"}),
            targets=True,
            stages=("pt", "sft"),
            embedding=None if words else self.params.spec,
            passes=Passes(told="none on the device: words are counted once" if words else ""),
        )

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        words = params.similarity == "bm25"
        self._anchors = _Words(self.name) if words else Anchors(self.name, params.spec, params.refresh_steps)

    @property
    def normalizer(self) -> Normalizer:
        """The loss is divided by the number of supervised tokens: weights are absolute."""
        return "count"

    def due(self, step: int) -> bool:
        """Whether the anchors are to be embedded anew, or their words were not counted yet."""
        return self._anchors.due(step)

    def prepare(self, ctx: Context, rows: Rows) -> None:
        """Embed the anchors, or count their words."""
        self._anchors.refresh(ctx)

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return sigmoid(s / tau) [B], 0 without supervised tokens (collective under ``rescale: mean1``)."""
        valid = batch.tokens_B > 0
        weights = (self._anchors.products(batch).float() / self.params.tau).sigmoid()
        if self.params.clip is not None:
            weights = weights.clamp(max=self.params.clip)
        weights = weights.masked_fill(~valid, 0.0)
        if self.params.rescale == "none":
            return weights
        from dataflex import comm

        return weights * comm.ratio_of_sums(valid.sum(), weights.double().sum()).to(weights.dtype)

    def state_dict(self) -> State:
        """Return the anchors' mean vector; nothing for words, whose scores follow from the data."""
        return self._anchors.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self._anchors.load_state_dict(state)
