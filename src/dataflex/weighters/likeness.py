"""Weights from the likeness of sequences to the targets: ADAPT and the joint-update-aware weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ComponentError, DataError
from dataflex.method import BatchView, Card, Context, Passes, Requires, Rows, Weighter, WeighterParams, param
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import softmax
from dataflex.signals.kinds import Embedding

if TYPE_CHECKING:
    import torch


class _AnchoredWeighter(Weighter):
    """Compares sequences with the mean embedding of the targets' rows (the anchors), all of which count alike.

    A resumed run weighs with the anchors that were saved until the next pass.
    """

    saved: ClassVar[tuple[str, ...]] = ("anchors",)
    anchors: NDArray[np.float32] | None = None  # mean vector of the anchors

    def due(self, step: int) -> bool:
        return self.anchors is None or step % self.params.refresh_steps == 0

    def prepare(self, ctx: Context, rows: Rows) -> None:
        """Embed every row of the targets with the model as it is (collective; the ranks share the pass)."""
        total, count = np.zeros(0), 0
        for target in ctx.targets:
            anchors = np.arange(ctx.signals.num_rows(target), dtype=np.int64)
            found = ctx.signals(self.params.spec, anchors, target=target) if len(anchors) else np.zeros((0, 1))
            usable = found[np.isfinite(found).all(axis=1)]
            if not len(usable):
                raise DataError(
                    f"{self.name}: target {target!r} has {len(anchors):,} rows, none of which has an embedding. "
                    "Give a target data set with text in it."
                )
            sums = usable.sum(axis=0, dtype=np.float64)
            total, count = sums if count == 0 else total + sums, count + len(usable)
        self.anchors = (total / count).astype(np.float32)

    def _products(self, batch: BatchView, *, unit: bool = False) -> torch.Tensor:
        """Return each sequence's inner product with the anchors' mean vector (divided by its norm: ``unit``) [B]."""
        assert batch.embeddings_BH is not None
        assert self.anchors is not None, "the anchors were not embedded"
        mean = self.anchors / max(float(np.linalg.norm(self.anchors)), 1e-30) if unit else self.anchors
        return batch.embeddings_BH @ batch.embeddings_BH.new_tensor(mean)


class Adapt(_AnchoredWeighter):
    """Weigh sequences by their likeness to the targets, with absolute weights.

    A sequence's vector is the mean of the last hidden states over its tokens, weighted by position (w_t = t / sum of t)
    and divided by its norm; s_i is the mean of its cosines with the anchors' vectors, and w_i = sigmoid(s_i / tau).
    Weights are absolute: the step's loss is divided by the number of tokens, so a cosine of 0 halves the learning rate.
    ``rescale: mean1`` divides them by their mean over the micro-batch of all ranks.

    Vectors of the rows in training come out of the training forward itself (with its dropout); those of the anchors,
    which are the rows of the targets, out of a pass every ``refresh_steps`` steps. Targets that share rows with
    the benchmark that is reported make its result worthless.

    ``similarity: bm25`` compares words instead, once per run: s_i is the mean BM25 score over all anchors. Scores are 0
    or more, so weights begin at 0.5, and ``tau`` is in units of the score. A packed row has one score. The defaults are
    the paper's.
    """

    name = "adapt"
    normalizer = "num_tokens"  # weights are absolute
    card = Card(
        summary="Weighs each sequence by how much it is like the targets' rows, with a weight between 0 and 1.",
        paper="Rethinking Data Curation in LLM Training (ADAPT), ICLR 2026, arXiv 2605.05227",
        cost="1 F over the targets every refresh_steps; the rows in training cost nothing",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(WeighterParams):
        tau: float = param(1.0, "temperature of the sigmoid; small is sharp", above=0.0)
        rescale: Literal["none", "mean1"] = param(
            "none", "none: weights below 1 lower the learning rate; mean1: their mean is made 1"
        )
        similarity: Literal["embedding", "bm25"] = param(
            "embedding", "compare hidden states, or words (BM25, once per run)"
        )
        refresh_steps: int = param(50, "optimizer steps between two passes over the targets", minimum=1)
        clip: float | None = param(None, "largest weight, before rescaling; null: no limit", above=0.0)
        layer: int = param(-1, "layer of the hidden states; -1 is the last, after its norm")
        completion_only: bool = param(False, "average the supervised tokens only, not the prompt's")

        @property
        def spec(self) -> Embedding:
            """How rows in training and anchors are embedded."""
            return Embedding(layer=self.layer, completion_only=self.completion_only)

    params: Params
    _scores: NDArray[np.float32] | None = None  # BM25 score of every training row [N]

    @property
    def _by_words(self) -> bool:
        return self.params.similarity == "bm25"

    def requires(self) -> Requires:
        words = self._by_words
        return Requires(
            signals=frozenset({"texts" if words else "embeddings"}),
            targets=True,
            stages=("pt", "sft"),
            embedding=None if words else self.params.spec,
            passes=Passes(told="none on the device: words are counted once" if words else ""),
        )

    def due(self, step: int) -> bool:
        return self._scores is None if self._by_words else super().due(step)

    def prepare(self, ctx: Context, rows: Rows) -> None:
        """Embed the anchors, or score every training row against their words."""
        if not self._by_words:
            super().prepare(ctx, rows)
            return
        from dataflex.select.words import Okapi, cut_words, pool_texts, target_words

        anchors = [words for rows in target_words(self.name, ctx, "all", cut_words) for words in rows]
        counts = Counter(word for words in anchors for word in words)
        pool = np.arange(len(ctx.domains.domain_of), dtype=np.int64)
        index = Okapi(map(cut_words, pool_texts(pool, ctx, "all")), set(counts))
        query = {word: count / len(anchors) for word, count in counts.items()}
        self._scores = index.scores(query).astype(np.float32)

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return sigmoid(s / tau) [B], 0 without supervised tokens (collective under ``rescale: mean1``)."""
        s = self._products(batch) if self._scores is None else batch.loss_B.new_tensor(self._scores[batch.rows_B])
        weights = (s.float() / self.params.tau).sigmoid()
        if self.params.clip is not None:
            weights = weights.clamp(max=self.params.clip)
        valid = batch.tokens_B > 0
        weights = weights.masked_fill(~valid, 0.0)
        if self.params.rescale == "none":
            return weights
        from dataflex import comm

        return weights * comm.ratio_of_sums(valid.sum(), weights.double().sum()).to(weights.dtype)


_RESIDUAL = 1e-7
_MOST_ITERATIONS = 100_000


def fixed_point(alignment: Floats, gram: Floats, *, beta: float, tau: float) -> Floats:
    """Return the weights w = softmax((s - beta S w) / tau), to a residual below 1e-7; s = ``alignment``, S = ``gram``.

    Each iteration moves the logarithms by the share tau / (tau + beta max |S|). The objective is smooth relative to
    the entropy with constant beta max |S|, so that step always converges (mirror descent: the distance shrinks by at
    least the factor 1 - share), while undamped iterations oscillate.
    """
    logs = np.zeros(len(alignment))
    share = tau / (tau + beta * float(np.abs(gram).max(initial=0.0)))
    for _ in range(_MOST_ITERATIONS):
        weights = softmax(logs)
        aim = (alignment - beta * (gram @ weights)) / tau
        if np.abs(softmax(aim) - weights).max(initial=0.0) < _RESIDUAL:
            return weights
        logs = (1.0 - share) * logs + share * aim
    raise ComponentError(
        f"joint_update_aware: weights do not settle with beta = {beta} and tau = {tau}; raise tau, or look for "
        "embeddings that are not finite"
    )


class JointUpdateAware(_AnchoredWeighter):
    """Weigh the sequences of a micro-batch together: towards the targets, away from similar sequences.

    The weighter of that name in existing DataFlex (no paper is known), with its objective over the weights of the
    micro-batch of all ranks,

        max over the simplex of  s'w - (beta / 2) w'Sw + tau H(w),      w = softmax((s - beta S w) / tau),

    where S holds the inner products of the sequences' vectors and s those with the anchors' mean vector, made
    unit. There, five undamped iterations do not reach the fixed point (two equal sequences beside another one get
    0.259 each instead of 0.293); here the iteration runs until it holds to 1e-7. The other defaults are those of
    existing DataFlex. Vectors of the rows in training come out of the training forward; anchors are all rows of the
    targets.
    """

    name = "joint_update_aware"
    normalizer = "num_sequences"  # weights of the micro-batch sum to one
    card = Card(
        summary="Weighs the sequences of a micro-batch towards the targets and away from one another.",
        paper="baseline (existing DataFlex; no paper)",
        cost="1 F over the targets every refresh_steps, one gather of vectors per micro-batch",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(WeighterParams):
        beta: float = param(0.1, "weight of the likeness among the sequences", minimum=0.0)
        tau: float = param(0.05, "weight of the entropy; small is sharp", above=0.0)
        mode: Literal["full", "align_only", "diverse_only", "uniform"] = param(
            "full", "both terms, only the targets, only the likeness, or neither"
        )
        pooling: Literal["last", "mean", "weighted_mean", "first"] = param(
            "last", "which hidden states make up a sequence's vector"
        )
        completion_only: bool = param(False, "pool the supervised tokens only")
        layer: int = param(-1, "layer of the hidden states; -1 is the last, after its norm")
        normalize: bool = param(True, "whether vectors are divided by their norm")
        refresh_steps: int = param(50, "optimizer steps between two passes over the targets", minimum=1)

        @property
        def spec(self) -> Embedding:
            """How rows in training and anchors are embedded."""
            return Embedding(
                layer=self.layer, pooling=self.pooling, completion_only=self.completion_only, normalize=self.normalize
            )

    params: Params

    def requires(self) -> Requires:
        return Requires(
            signals=frozenset({"embeddings"}), targets=True, stages=("pt", "sft"), embedding=self.params.spec
        )

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return weights [B] that sum to one over the ranks' sequences with supervised tokens (collective).

        Solved on the CPU in float64, by every rank alike; the micro-batch's Gram matrix is copied there.
        """
        import torch

        from dataflex import comm

        p = self.params
        alignment_B = self._products(batch, unit=True)
        assert batch.embeddings_BH is not None
        both, _ = comm.gather_rows(torch.cat([batch.embeddings_BH, alignment_B[:, None]], dim=1).float())
        vectors_MH, alignment_M = both[:, :-1], both[:, -1]
        gram = (vectors_MH @ vectors_MH.T).cpu().double().numpy()
        valid = (batch.tokens_M > 0).cpu().numpy()
        s = alignment_M.cpu().double().numpy() if p.mode in ("full", "align_only") else np.zeros(len(valid))
        beta = p.beta if p.mode in ("full", "diverse_only") else 0.0
        weights = np.zeros(len(valid), dtype=np.float32)
        if valid.any():
            weights[valid] = fixed_point(s[valid], gram[np.ix_(valid, valid)], beta=beta, tau=p.tau)
        return torch.from_numpy(weights[batch.local]).to(batch.loss_B.device)
