"""Keep the rows of highest instruction-following difficulty (IFD) below a threshold.

IFD compares a row's loss on its response given the prompt, l(a | p), with that on the response alone, l(a):
``ratio: loss`` is l(a | p) / l(a) of "From Quantity to Quality" (Cherry LLM), NAACL 2024, arXiv 2308.12032;
``ratio: perplexity`` is exp(l(a | p) - l(a)) of Superfiltering, ACL 2024, arXiv 2402.00530, which takes a small model
as ``scorer``. The two rank differently. Rows at ``threshold`` or above (the prompt does not help: misaligned or cut
off) are dropped, and the highest of the rest are kept.

Both losses are means over the same tokens. Where the tokenizer puts no token before a text by itself, the first
token of a response alone would follow nothing; it is then left out of both. ``prefix_tokens`` keeps the last tokens of
the prompt with the response. Cherry LLM keeps "### Response:", Superfiltering nothing; so does ``null``: under ``ratio:
loss`` it keeps the tokens that all prompts of the pool end with (the template's words before a response, at most 16),
under ``ratio: perplexity``, or with a ``scorer``, whose tokens may be others, none. In rows of several turns each
response is alone for itself. Very short responses have extreme ratios (``min_answer_tokens``). A model already trained
on the pool makes all ratios small, and on large mixed pools IFD can lose to random rows (arXiv 2503.01807).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataflex.errors import DataError
from dataflex.method import Card, Context, Passes, Requires, Rows, param
from dataflex.select.scoring import Found, ScoringParams, ScoringSelector
from dataflex.selectors._lib import TOKEN_LOSSES
from dataflex.signals.kinds import ResponseLoss

Ratio = Literal["loss", "perplexity"]

_LONGEST_MARKER = 16
_ROWS_LOOKED_AT = 1024


def ifd_ratios(given: ArrayLike, alone: ArrayLike, ratio: Ratio) -> NDArray[np.float64]:
    """Return IFD of each row [n]: losses 1.0 and 2.0 give 0.5 by loss and 0.3679 by perplexity.

    Losses of responses under the prompt and without it [n], nats per token. NaN where a loss is not finite, or where
    the loss alone is 0 and divides.
    """
    conditioned, unconditioned = np.asarray(given, dtype=np.float64), np.asarray(alone, dtype=np.float64)
    usable = np.isfinite(conditioned) & np.isfinite(unconditioned)
    if ratio == "loss":
        usable &= unconditioned > 0
    conditioned, unconditioned = np.where(usable, conditioned, 1.0), np.where(usable, unconditioned, 1.0)
    with np.errstate(over="ignore"):
        found = conditioned / unconditioned if ratio == "loss" else np.exp(conditioned - unconditioned)
    return np.where(usable, found, np.nan)


def common_ending(prompts: Sequence[NDArray[np.integer]], most: int = _LONGEST_MARKER) -> int:
    """Return the number of tokens, at most ``most``, that all prompts with a token end with; 0 unless two differ."""
    distinct = {tuple(prompt.tolist()) for prompt in prompts if len(prompt)}
    if len(distinct) < 2:
        return 0
    length = 0
    for column in zip(*(reversed(prompt) for prompt in distinct), strict=False):
        if length == most or len(set(column)) > 1:
            break
        length += 1
    return length


class Ifd(ScoringSelector):
    """Keep the rows of highest instruction-following difficulty below a threshold."""

    name = "ifd"
    lacking = "no ratio"
    card = Card(
        summary="Keeps the rows whose prompt helps least to predict the response, of those where it helps.",
        paper="From Quantity to Quality, NAACL 2024, arXiv 2308.12032; Superfiltering, ACL 2024, arXiv 2402.00530",
        cost="2 F over the pool, of the scorer (once) or of the model under training (every interval)",
        note="Cherry LLM scores a response alone behind its marker, Superfiltering without: prefix_tokens, left out, "
        "does the first under ratio: loss and the second under ratio: perplexity, or with a scorer.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ScoringParams):
        """Parameters of IFD; the defaults are those of Cherry LLM."""

        scorer: str | None = param(None, "folder or hub id of a small causal model; null: the model under training")
        ratio: Ratio = param("loss", "ratio of losses (Cherry LLM) or perplexities")
        threshold: float = param(1.0, "rows at or above this ratio are dropped", above=0.0)
        prefix_tokens: int | None = param(
            None,
            "last tokens of the prompt that the response alone keeps; null: those that all prompts end with under "
            "ratio: loss, else none",
            minimum=0,
        )
        min_answer_tokens: int = param(1, "rows with fewer supervised tokens are dropped", minimum=1)
        fill: bool = param(False, "when too few rows are below the threshold, fill up with the lowest above it")

    params: Params
    _kept_prefix = 0

    def requires(self) -> Requires:
        """State what the run must have."""
        scorer, passes = self.params.scorer, Passes(pool=(2.0, 0.0))
        if scorer is not None:  # it does not change, so no row is scored twice
            passes = Passes(pool_once=2.0, told="2 F of the scorer over each row of the pool, once")
        signals = frozenset({"losses", "texts"})
        return replace(TOKEN_LOSSES, signals=signals, stages=("sft",), models={"scorer": scorer}, passes=passes)

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return ratios [N], NaN where there is none or where the response is too short."""
        p, self._kept_prefix = self.params, self._prefix(pool, ctx)
        given, alone = (
            ctx.signals(ResponseLoss(conditioned=conditioned, model=p.scorer, prefix_tokens=self._kept_prefix), pool)
            for conditioned in (True, False)
        )
        scores = ifd_ratios(given, alone, p.ratio)
        responses = ctx.signals.tokens(pool, part="completion")
        short = np.array([len(response) for response in responses], dtype=np.int64) < p.min_answer_tokens
        return np.where(short, np.nan, scores)

    def preference(self, found: Found, ctx: Context) -> NDArray[np.floating]:
        """Return the ratios below the threshold; of those above it the lowest come next with ``fill``, else none.

        Raises:
            DataError: None is below the threshold.
        """
        p, scores = self.params, found.scores
        below = scores < p.threshold
        if not below.any() and not p.fill:
            raise DataError(
                f"ifd: none of {len(scores):,} rows has a ratio below {p.threshold:g} (the lowest is "
                f"{scores.min():.4g}): to this model no prompt helps to predict its response. Check the template "
                "and the scorer, raise 'threshold', or set 'fill: true'."
            )
        return np.where(below, scores, -scores if p.fill else np.nan)

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return how many rows are below the threshold, and above it."""
        below = found.scores < self.params.threshold
        how = f"highest of {int(below.sum())} with IFD below {self.params.threshold:g}"
        above = int((~below[kept]).sum())
        how += f", and the lowest {above} above" if above else ""
        prefix = self._kept_prefix
        return how + (f"; responses alone keep the last {prefix} tokens of their prompts" if prefix else "")

    def _prefix(self, pool: Rows, ctx: Context) -> int:
        """Return the number of the prompt's tokens that a response alone keeps."""
        if self.params.prefix_tokens is not None:
            return self.params.prefix_tokens
        if self.params.ratio == "perplexity" or self.params.scorer is not None:
            return 0
        places = np.unique(np.linspace(0, len(pool) - 1, min(len(pool), _ROWS_LOOKED_AT)).astype(np.int64))
        return common_ending(ctx.signals.tokens(pool[places], part="prompt"))
