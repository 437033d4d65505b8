"""Keep, of a batch of candidates, the rows whose logits span most and are unlike those of rows chosen lately.

UDS: "Utility-Diversity Aware Online Batch Selection for LLM Supervised Fine-tuning", ICML 2026, arXiv 2510.16882. A
row's score is the nuclear norm of its logits (positions x vocabulary), plus alpha times the mean distance of a sketch
of them to the sketches of the rows chosen last, a queue of 1,024; nothing is added while the queue is empty. The best
rows are trained on, and their sketches join the queue.

Norms grow with length, so that long rows win. Padding never counts here, and by default only positions that predict
the response do (``tokens: all`` takes the prompt in, which is as published); ``per_length`` divides norms and sketches
by the square root of their number. The record's reason tells the mean length of the chosen rows. Scored in eval mode;
alpha depends on the scale of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Card, Context, Requires, Rows, param
from dataflex.select.scoring import Found, ScoringParams, ScoringSelector
from dataflex.selectors._lib import TOKEN_LOSSES
from dataflex.signals.kinds import LogitFeatures


def mean_distances(vectors: NDArray[np.floating], queue: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the mean distance of each vector [n, D] to those of the queue [q, D]: [n], 0 where it is empty."""
    if not len(queue):
        return np.zeros(len(vectors))
    ours, theirs = vectors.astype(np.float64), queue.astype(np.float64)
    squares = (ours**2).sum(axis=1)[:, None] + (theirs**2).sum(axis=1) - 2.0 * (ours @ theirs.T)
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)).mean(axis=1))


class Uds(ScoringSelector):
    """Keep the candidates of largest nuclear norm and distance to what was chosen lately."""

    name = "uds"
    saved = ("queue",)
    lacking = "no supervised token"
    card = Card(
        summary="Keeps, in every step, candidates whose logits span most and are unlike those of rows chosen lately.",
        paper="Utility-Diversity Aware Online Batch Selection, ICML 2026, arXiv 2510.16882",
        cost="1 F over the candidates and the eigenvalues of a positions x positions matrix each, per interval",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ScoringParams):
        """Parameters of UDS; alpha, queue and sketch are the original code's."""

        alpha: float = param(2.5e-3, "factor of the mean distance to rows chosen lately", minimum=0.0)
        queue_size: int = param(1024, "rows chosen last that distances are taken to", minimum=1)
        tokens: Literal["completion", "all"] = param("completion", "positions whose logits count; all as published")
        per_length: bool = param(False, "divide norms and sketches by the square root of the number of positions")
        sketch_rows: int = param(8, "positions' side of a sketch", minimum=1)
        sketch_columns: int = param(128, "vocabulary's side of a sketch", minimum=1)

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        return replace(TOKEN_LOSSES, signals=frozenset({"logits"}), within_batch=True)

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.queue: NDArray[np.float32] | None = None

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return nuclear norms plus distances to rows chosen lately [N]."""
        p = self.params
        signal = LogitFeatures(
            tokens=p.tokens, per_length=p.per_length, rows=p.sketch_rows, columns=p.sketch_columns, seed=ctx.seed
        )
        found = ctx.signals(signal, pool)
        norms, sketches = found[:, 0], found[:, 1:]
        queue = np.zeros((0, sketches.shape[1]), dtype=np.float32) if self.queue is None else self.queue
        finite = np.isfinite(norms)
        scores = np.full(len(pool), np.nan)
        distances = p.alpha * mean_distances(sketches[finite], queue)
        scores[finite] = norms[finite].astype(np.float64) + distances
        self._asked = pool, queue, sketches
        self._share = distances.mean() / max(abs(float(scores[finite].mean())), 1e-30) if finite.any() else 0.0
        return scores

    def kept(self, found: Found, rows: Rows, budget: int, ctx: Context) -> NDArray[np.int64]:
        """Return the positions kept, and put their sketches into the queue."""
        kept = super().kept(found, rows, budget, ctx)
        _, queue, sketches = self._asked
        chosen = sketches[found.places[kept]].astype(np.float32)
        self.queue = np.concatenate([queue, chosen])[-self.params.queue_size :]
        return kept

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return what distances add to the score, and how long the rows kept are."""
        pool, queue, _ = self._asked
        how = "by nuclear norm"
        if len(queue):
            how += f" and distance to {len(queue)} rows ({self._share:.1%} of the score)"
        lengths = ctx.domains.lengths
        if lengths is not None and len(kept):
            ours = lengths[pool[found.places[kept]]]
            how += f", {ours.mean():.0f} tokens on average against {lengths[pool].mean():.0f}"
        return how
