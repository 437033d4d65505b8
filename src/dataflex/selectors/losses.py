"""Rows by their losses, and by how hard they are for the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataflex.errors import ComponentError, DataError
from dataflex.method import Card, Context, Passes, Requires, Rows, param
from dataflex.plan.proportions import whole_part
from dataflex.select.rules import REPLACEMENT, Rule
from dataflex.select.scoring import RULE, Found, ScoringParams, ScoringSelector
from dataflex.selectors._lib import GRADIENTS, TOKEN_LOSSES, RowLosses
from dataflex.signals.kinds import EL2N, AdaptedLoss, GradientNorms, ResponseLoss, TokenLoss
from dataflex.signals.specs import GradientOptions

Focus = Literal["high", "medium", "low"]
Ratio = Literal["loss", "perplexity"]

_EPS = 1e-8  # TACS's guard of the denominator; it matters only when floor is 0
_WEIGHT_FLOOR = 1e-12  # a focus_weight of 0 leaves its rows drawable, after all others
_LONGEST_MARKER = 16  # tokens
_ROWS_LOOKED_AT = 1024


def relative_gain(
    loss_start: NDArray[np.floating], loss_adapted: NDArray[np.floating], floor: float
) -> NDArray[np.float64]:
    """Return ``(l_start - l_adapted) / (max(l_start, floor) + 1e-8)`` [n], NaN where either loss is not finite.

    The floor is not the paper's: without it a row that the model already knows by heart gets a huge score from
    a tiny change.
    """
    start, adapted = _finite(loss_start), _finite(loss_adapted)
    return (start - adapted) / (np.maximum(start, floor) + _EPS)


def _finite(losses: ArrayLike) -> NDArray[np.float64]:
    return np.where(np.isfinite(losses), losses, np.nan).astype(np.float64)


class Tacs(ScoringSelector):
    """Keep the rows whose loss falls most, relatively, on the way to a target.

    TACS reads the model twice: as it is, and with a small low-rank probe trained on the target alone. Rows
    whose loss the probe lowers most, relative to where it was, are kept. Nothing is differentiated on
    the pool. It refuses partitioned parameters, since the probe is added to whole layers.
    """

    name = "tacs"
    lacking = "no finite loss"
    card = Card(
        summary="Keeps the rows whose loss falls most when a small probe is trained on the target.",
        paper="Let the Target Select for Itself: Data Selection via Target-Aligned Paths, arXiv 2605.09404",
        cost="(1 + number of targets) F over the pool per interval, plus depth_steps (F + B) over each target",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ScoringParams):
        """Parameters of TACS; the defaults are the paper's, but for ``floor``."""

        depth_steps: int = param(2, "full-batch steps of the probe on the target", minimum=1)
        learning_rate: float = param(1e-5, "learning rate of the probe", above=0.0)
        rank: int = param(1, "rank of the low-rank probe", minimum=1)
        alpha: float = param(4.0, "LoRA alpha of the probe", above=0.0)
        floor: float = param(0.05, "least loss in the denominator, in nats per token; 0 as published", minimum=0.0)

    params: Params

    def requires(self) -> Requires:
        steps = float(self.params.depth_steps)
        passes = Passes(pool=(1.0, 0.0), pool_by_target=(1.0, 0.0), targets=(steps, steps))
        return replace(TOKEN_LOSSES, targets=True, whole_parameters=True, passes=passes)

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return relative gains by target [T, N]; ComponentError where the probe of a target diverged."""
        start = ctx.signals(TokenLoss(), pool)
        if not np.isfinite(start).any():
            return np.full(len(pool), np.nan)  # no probe can tell them apart
        return np.stack([self._gain(pool, start, target, ctx) for target in ctx.targets])

    def _gain(self, pool: Rows, start: NDArray[np.float32], target: str, ctx: Context) -> NDArray[np.float64]:
        p = self.params
        signal = AdaptedLoss(
            towards=target, depth_steps=p.depth_steps, learning_rate=p.learning_rate, rank=p.rank, alpha=p.alpha
        )
        gain = relative_gain(start, ctx.signals(signal, pool), p.floor)
        if not np.isfinite(gain).any():
            raise ComponentError(
                f"tacs: the probe trained towards {target!r} gives no finite loss. "
                f"Lower learning_rate (now {p.learning_rate:g}) or depth_steps (now {p.depth_steps})."
            )
        return gain


def focused(losses: NDArray[np.floating], focus: Focus, quantiles: tuple[float, float]) -> NDArray[np.bool_]:
    """Return which finite losses [n] lie in the focused bucket.

    With the two quantiles q1 <= q2 (linear interpolation): low is ``loss <= q1``, medium is
    ``q1 < loss <= q2``, high is ``loss > q2``. Ties can leave a bucket empty.
    """
    low, high = np.quantile(losses.astype(np.float64), quantiles)
    return {"low": losses <= low, "medium": (losses > low) & (losses <= high), "high": losses > high}[focus]


def log_weights(in_focus: NDArray[np.bool_], focus_weight: float, temperature: float) -> NDArray[np.float64]:
    """Return unnormalized log probabilities [n]: ``log(w + 1e-12) / T`` with w = focus_weight in focus, else 1."""
    return np.where(in_focus, math.log(focus_weight + _WEIGHT_FLOOR), math.log1p(_WEIGHT_FLOOR)) / temperature


class LossSelector(RowLosses):
    """Draw rows with a preference for high, medium or low loss.

    A baseline without a paper: rows fall into three buckets by quantiles of their current loss, and the
    focused bucket is drawn more often. High loss can mean noise and low loss nothing left to learn, so
    it is a yardstick more than a recommendation. It never chooses rows that have no finite loss.
    """

    name = "loss"
    card = Card(
        summary="Draws rows at random, preferring those whose current loss is high, medium or low.",
        paper="baseline (no paper)",
        cost="1 F over the pool per interval",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ScoringParams):
        """Parameters of the loss selector. The rule draws by the preference, ``gumbel_top_k`` without replacement."""

        rule: Rule = param(Rule.of("gumbel_top_k"), RULE)
        focus: Focus = param("high", "which bucket of losses is preferred")
        focus_weight: float = param(5.0, "how many times likelier a row of the bucket is drawn first", minimum=0.0)
        quantiles: tuple[float, float] = param((0.33, 0.66), "quantiles between buckets", minimum=0.0, maximum=1.0)
        temperature: float = param(1.0, "flattens the preference as it grows; .inf draws uniformly", above=0.0)
        replacement: bool = param(False, REPLACEMENT)

        def __post_init__(self) -> None:
            if len(self.quantiles) != 2 or not 0.0 <= self.quantiles[0] <= self.quantiles[1] <= 1.0:
                raise ValueError(f"quantiles: {list(self.quantiles)} must be two rising numbers from 0 to 1")
            if self.replacement and self.rule != type(self).rule:
                raise ValueError(f"replacement: has no effect beside the rule {self.rule.name}; remove one of the two")

    params: Params

    def requires(self) -> Requires:
        return replace(super().requires(), budget=True)

    @property
    def rule(self) -> Rule:
        """Draws are repeated where ``replacement`` says so."""
        again = self.params.replacement
        return Rule.of("multinomial", weights="softmax", replacement=True) if again else super().rule

    def preference(self, found: Found, ctx: Context) -> NDArray[np.floating]:
        """Return log weights of the draw, by bucket."""
        in_focus = focused(found.scores, self.params.focus, self.params.quantiles)
        return log_weights(in_focus, self.params.focus_weight, self.params.temperature)

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return how many rows are of the focused bucket."""
        focus = self.params.focus
        in_focus = focused(found.scores, focus, self.params.quantiles)
        how = f"drawn, {int(in_focus[kept].sum())} of them of {focus} loss"
        return how if in_focus.any() else f"{how}; no row is of {focus} loss (ties), so the draw was uniform"


def window(num_rows: int, progress: float, size: float, steepness: float) -> tuple[int, int]:
    """Return the first rank of the window over ranked rows and the one past its last; fractions are cut, not rounded.

    ``progress`` is 0 at the first update and 1 at the last; ``size`` is the window's share of the rows.
    """
    place = 1.0 / (1.0 + math.exp(-steepness * (progress - 0.5)))
    start = whole_part(place * (1.0 - size), num_rows)
    return start, start + whole_part(size, num_rows)


class DeltaLoss(RowLosses):
    """Draw rows, preferring those whose loss fell most since the first decision, later those whose loss fell less.

    A method of existing DataFlex without a paper. The first decision records the losses and draws uniformly. Later
    ones rank rows by the fall of their loss since then; a window over the ranks moves from those that fell most to
    those that fell less, along a sigmoid, and rows in it are preferred. Rows whose loss rose are never in the window;
    when none is left in it (small pools, or a model that got worse), the draw is uniform and the reason says so.
    """

    name = "delta_loss"
    saved = ("decisions", "first")
    card = Card(
        summary="Draws rows at random, first preferring those whose loss fell most, later slower ones.",
        paper="baseline (no paper)",
        cost="1 F over the pool per interval",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ScoringParams):
        """Parameters of the delta-loss selector. The rule draws by the weights, keyed by row."""

        rule: Rule = param(Rule.of("gumbel_top_k"), RULE)
        updates: int = param(help="decisions after the first; at the last of them the window is at its end", minimum=1)
        window_size: float = param(0.2, "length of the window, as a share of the pool", above=0.0, maximum=1.0)
        steepness: float = param(10.0, "slope of the sigmoid that moves the window", above=0.0, maximum=100.0)
        outside_weight: float = param(0.025, "weight of rows outside the window, against 1 inside", above=0.0)
        relative: bool = param(False, "divide the fall by the first loss")

    params: Params
    decisions = 0
    first = np.zeros(0, dtype=np.float32)  # first loss of each row [N]; empty before the first decision

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.floating]:
        """Return the fall of each loss since the first decision [N]; a row that joins later counts from its first."""
        losses = super().score(pool, ctx)
        losses = np.where(np.isfinite(losses), losses, np.float32(np.nan))
        if not len(self.first):
            self.first = np.full(ctx.signals.num_rows(), np.nan, dtype=np.float32)
        self.first[pool] = np.where(np.isnan(self.first[pool]), losses, self.first[pool])
        self.decisions += 1
        first = self.first[pool].astype(np.float64)
        return relative_gain(first, losses, 0.0) if self.params.relative else first - losses

    def preference(self, found: Found, ctx: Context) -> NDArray[np.floating]:
        """Return log weights of the draw, by window."""
        return np.where(self._preferred(found.scores)[0], 0.0, math.log(self.params.outside_weight))

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return where the window was and how many rows are of it."""
        in_window, how = self._preferred(found.scores)
        return how.format(int(in_window[kept].sum()))

    def _preferred(self, falls: NDArray[np.floating]) -> tuple[NDArray[np.bool_], str]:
        """Return the rows in the window, and what the reason says, with a place for the number of those kept."""
        p, inside = self.params, np.zeros(len(falls), dtype=np.bool_)
        if self.decisions <= 1:
            return inside, "drawn uniformly while first losses are recorded"
        progress = min(1.0, (self.decisions - 2) / max(1, p.updates - 1))
        start, stop = window(len(falls), progress, p.window_size, p.steepness)
        stop = min(stop, int(np.count_nonzero(falls >= 0)))
        if start >= stop:
            return inside, f"drawn uniformly: no row whose loss fell ranks {start} or later"
        inside[np.argsort(-falls, kind="stable")[start:stop]] = True
        return inside, f"drawn, {{}} of them of ranks {start} to {stop - 1} by the fall of their loss"


class RhoLoss(RowLosses):
    """Keep the rows of largest reducible loss, which the model has not learnt yet and a reference model finds easy.

    RHO-LOSS, "Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt", ICML 2022, arXiv
    2206.07137. A row's score is its loss minus its irreducible loss, that of a reference model trained on held-out or
    clean data; the highest are kept. Noise has a high loss under both, and what is known a low one. Irreducible losses
    are computed once for each row; they are part of the checkpoint.

    The paper picks the best tenth of a large batch at every step: ``candidate_batches: 10`` with
    ``interval_steps: 1``. In general the batch is the pool of an interval, scored when it begins. Losses are means over
    tokens, so the reference must have the run's tokenizer; a model whose context is shorter than the rows gives the
    loss of what fits into it.
    """

    name = "rho_loss"
    saved = ("known", "irreducible")
    card = Card(
        summary="Keeps the rows whose loss is farthest above that of a reference model.",
        paper="Prioritized Training on Points that are Learnable, ICML 2022, arXiv 2206.07137 (RHO-LOSS)",
        cost="1 F over the pool per interval, and 1 F of the reference model over each row once",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ScoringParams):
        reference: str = param(help="folder or hub id of a causal model trained on held-out or clean data")

    params: Params
    irreducible = np.zeros(0, dtype=np.float32)  # of each row [N] where ``known``; both empty at first
    known = np.zeros(0, dtype=np.bool_)

    def requires(self) -> Requires:
        models, passes = {"reference": self.params.reference}, Passes(pool=(1.0, 0.0), pool_once=1.0)
        return replace(TOKEN_LOSSES, whole_parameters=True, models=models, passes=passes)

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return losses minus irreducible ones [N], nats per token; NaN where either is not finite."""
        if not len(self.known):
            self.irreducible = np.full(ctx.signals.num_rows(), np.nan, dtype=np.float32)
            self.known = np.zeros(len(self.irreducible), dtype=np.bool_)
        new = np.sort(pool[~self.known[pool]])
        if len(new):
            self.irreducible[new] = ctx.signals(TokenLoss(model=self.params.reference, same_tokens=True), new)
            self.known[new] = True
        return _finite(super().score(pool, ctx)) - _finite(self.irreducible[pool])

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return the mean excess of the rows kept and of all."""
        how = f"of largest excess over {self.params.reference}"
        if len(kept):
            how += f", mean {found.scores[kept].mean():.3f} against {found.scores.mean():.3f}"
        return how


@dataclass(frozen=True, kw_only=True)
class _Keep(ScoringParams):
    """Which end is kept."""

    keep: Literal["largest", "smallest"] = param("largest", "which rows are kept")


class _Extreme(RowLosses):
    """Prefers one end; scores are recorded as they are."""

    lacking = "no supervised token"
    Params = _Keep
    params: _Keep

    def preference(self, found: Found, ctx: Context) -> NDArray[np.floating]:
        """Return the scores, negative where the smallest are kept."""
        return found.scores if self.params.keep == "largest" else -found.scores

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return which end was kept."""
        return f"with the {self.params.keep} {self.name}"


class GradNorm(_Extreme):
    """Keep the rows with the largest gradients.

    GraNd of "Deep Learning on a Data Diet", NeurIPS 2021, arXiv 2107.07075; scores are the norms. Where few rows are
    kept, the hardest are often noise; ``keep: smallest`` keeps the others.
    """

    name = "grad_norm"
    card = Card(
        summary="Keeps the rows whose loss has the largest gradient.",
        paper="Deep Learning on a Data Diet, NeurIPS 2021, arXiv 2107.07075",
        cost="1 F + 1 B over the pool per interval",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(GradientOptions, _Keep):
        precondition: Literal["none", "true_adam", "sign"] = param("none", "measure the optimizer's direction instead")

    params: Params

    def requires(self) -> Requires:
        preconditions = {"precondition": self.params.precondition}
        return replace(GRADIENTS, targets=False, preconditions=preconditions, budget=True)

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float32]:
        """Return gradient norms [N]."""
        return ctx.signals(GradientNorms(**self.params.options()), pool)


class El2n(_Extreme):
    """Keep the rows whose tokens the model predicts worst.

    EL2N of "Deep Learning on a Data Diet", NeurIPS 2021, arXiv 2107.07075: the norm of softmax(z) - onehot(y), for
    language models averaged over a row's supervised tokens. Where few rows are kept, the hardest are often noise;
    ``keep: smallest`` keeps the others.
    """

    name = "el2n"
    card = Card(
        summary="Keeps the rows whose predicted distributions are furthest from the tokens that follow.",
        paper="Deep Learning on a Data Diet, NeurIPS 2021, arXiv 2107.07075",
        cost="1 F over the pool per interval",
    )

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float32]:
        """Return EL2N [N]."""
        return ctx.signals(EL2N(), pool)


def ifd_ratios(given: ArrayLike, alone: ArrayLike, ratio: Ratio) -> NDArray[np.float64]:
    """Return IFD of each row [n]: losses 1.0 and 2.0 give 0.5 by loss and 0.3679 by perplexity.

    Losses of responses under the prompt and without it [n], nats per token. NaN where a loss is not finite, or where
    the loss alone is 0 and divides.
    """
    conditioned, unconditioned = _finite(given), _finite(alone)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if ratio == "perplexity":
            return np.exp(conditioned - unconditioned)
        return np.where(unconditioned > 0, conditioned / unconditioned, np.nan)


def common_ending(prompts: Sequence[NDArray[np.integer]], most: int = _LONGEST_MARKER) -> int:
    """Return the number of tokens, at most ``most``, that all prompts with a token end with; 0 unless two differ."""
    distinct = {tuple(reversed(prompt.tolist())) for prompt in prompts if len(prompt)}
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*distinct, strict=False))
    return min(most, sum(1 for _ in alike)) if len(distinct) > 1 else 0


class Ifd(ScoringSelector):
    """Keep the rows of highest instruction-following difficulty (IFD) below a threshold.

    IFD compares a row's loss on its response given the prompt, l(a | p), with that on the response alone, l(a):
    ``ratio: loss`` is l(a | p) / l(a) of "From Quantity to Quality" (Cherry LLM), NAACL 2024, arXiv 2308.12032;
    ``ratio: perplexity`` is exp(l(a | p) - l(a)) of Superfiltering, ACL 2024, arXiv 2402.00530, which takes a small
    model as ``scorer``. The two rank differently. Rows at ``threshold`` or above (the prompt does not help: misaligned
    or cut off) are dropped, and the highest of the rest are kept.

    Both losses are means over the same tokens. Where the tokenizer puts no token before a text by itself, the first
    token of a response alone would follow nothing; it is then left out of both. ``prefix_tokens`` keeps the last tokens
    of the prompt with the response. Cherry LLM keeps "### Response:", Superfiltering nothing; so does ``null``: under
    ``ratio: loss`` it keeps the tokens that all prompts of the pool end with (the template's words before a response,
    at most 16), under ``ratio: perplexity``, or with a ``scorer``, whose tokens may be others, none. In rows of several
    turns each response is alone for itself. Very short responses have extreme ratios (``min_answer_tokens``). A model
    already trained on the pool makes all ratios small, and on large mixed pools IFD can lose to random rows (arXiv
    2503.01807).
    """

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
            "prompt tokens that the response alone keeps; null: what all prompts end with under ratio: loss, else 0",
            minimum=0,
        )
        min_answer_tokens: int = param(1, "rows with fewer supervised tokens are dropped", minimum=1)
        fill: bool = param(False, "when too few rows are below the threshold, fill up with the lowest above it")

    params: Params
    _kept_prefix = 0

    def requires(self) -> Requires:
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
        """Return the ratios below the threshold, DataError without any; with ``fill`` the lowest of the others next."""
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
