"""Which prompts are worth generating answers to: by the rewards of the answers that were generated before.

Rewards come from TRL's ``GRPOTrainer`` or ``RLOOTrainer``; a column of pass rates, where there is one, works in every
stage. Numbers are kept for each row and saved with the checkpoint; a draw is a function of (seed, decision, row).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Card, Context, Params, Requires, Rows, Selection, Selector, param
from dataflex.parts import refuse_idle
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import carried_counts, largest_remainder, normalized, softmax, whole_part
from dataflex.plan.rollouts import RolloutStats
from dataflex.rng import keys, uniforms
from dataflex.select.choose import top_k

_NONE: Floats = np.zeros(0)
_THRESHOLD = "reward above which an answer is right; null: rewards are in [0, 1], and their mean is the pass rate"
_COLUMN = "column of pass rates in [0, 1], known before training; null: the rewards of the run alone"
ROLLOUTS = Requires(signals=frozenset({"rollouts"}), needs_interval=True)
"""What every selector requires that learns from rewards."""


def as_rates(values: NDArray[Any]) -> Floats:
    """Return a column of pass rates as float64 [N]; NaN where it has none."""
    return np.array([np.nan if value is None else value for value in values.tolist()], dtype=np.float64)


def unusable_rates(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which values of a column are neither missing nor numbers in [0, 1] [N]."""

    def unusable(value: Any) -> bool:
        if value is None:
            return False
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return not number or not (value != value or 0.0 <= value <= 1.0)

    return np.fromiter((unusable(value) for value in values.tolist()), dtype=np.bool_, count=len(values))


@dataclass(frozen=True, kw_only=True)
class RateParams(Params):
    """Base of the parameters of selectors that go by pass rates."""

    column: str | None = param(None, _COLUMN)
    threshold: float | None = param(0.5, _THRESHOLD)

    def __post_init__(self) -> None:
        if self.column == "":
            raise ValueError("column: must name a column of the data set")


class RateSelector(Selector):
    """Keeps the pass rate of each prompt's newest group."""

    saved: ClassVar[tuple[str, ...]] = ("rates", "seen")
    Params: ClassVar[type[Params]] = RateParams
    rates: Floats = _NONE
    """Newest pass rate of each row [N], over all its groups of a generation; NaN where no answer was scored yet."""
    seen: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    """Generation of each row's newest group [N]; -1 before the first."""

    def requires(self) -> Requires:
        """Require rewards, or the column of pass rates."""
        if self.params.column is None:
            return ROLLOUTS
        return Requires(columns=(self.params.column,), needs_interval=True)

    def refused_values(self, name: str, values: NDArray[Any]) -> tuple[NDArray[np.bool_], str] | None:
        return unusable_rates(values), "pass rates must be numbers from 0 to 1, or missing"

    def observe_rollouts(self, stats: RolloutStats) -> None:
        """Note the pass rates of one generation."""
        stats = stats.by_prompt
        if not self.rates.size:
            self.rates = np.full(stats.num_rows, np.nan)
            self.seen = np.full(stats.num_rows, -1, dtype=np.int64)
        found = stats.pass_rate(self.params.threshold)
        scored = np.isfinite(found)
        self.rates[stats.rows[scored]] = found[scored]
        self.seen[stats.rows] = stats.step

    def _known(self, rows: Rows, ctx: Context) -> tuple[Floats, NDArray[np.bool_]]:
        """Return what is known of rows' pass rates, NaN for nothing, and which were seen in this run [n]."""
        seen = np.isfinite(self.rates[rows]) if self.rates.size else np.zeros(len(rows), dtype=np.bool_)
        rates = self.rates[rows] if self.rates.size else np.full(len(rows), np.nan)
        if self.params.column is not None:
            rates = np.where(seen, rates, as_rates(np.asarray(ctx.columns[self.params.column][rows])))
        return rates, seen

    @staticmethod
    def _scores(rates: Floats) -> Floats:
        """Return rates [n] with the mean of the known ones for those that are not; 1/2 where none is known."""
        known = np.isfinite(rates)
        return np.where(known, rates, rates[known].mean() if known.any() else 0.5)


class PassBand(RateSelector):
    """Leave out prompts whose answers were all right or all wrong, or whose pass rate lies outside a band.

    DAPO drops, after it has generated them, groups whose rewards are all equal, and generates more; the online
    difficulty filter keeps those of a band. Here a prompt whose newest group was dropped is not generated again for as
    many steps as an epoch takes (``retry_steps``), since the policy moves on; prompts that were not tried yet are drawn
    along with those inside the band, uniformly. A generation is never added to: groups that turn out to lie outside are
    generated and counted (``dropped`` in the record), and have no part in the loss.

    With ``column`` prompts outside the band are left out from the beginning and never drawn: the form for every stage
    of training, for which pass rates of an earlier profile are all that is needed.
    """

    name = "pass_band"
    saved: ClassVar[tuple[str, ...]] = ("rates", "seen", "outside")
    card = Card(
        summary="Leaves out prompts whose answers were all right or all wrong, or outside a band of pass rates.",
        paper="DAPO: An Open-Source LLM Reinforcement Learning System at Scale (Yu et al.), 2025, arXiv 2503.14476; "
        "bands: Online Difficulty Filtering for Reasoning Oriented Reinforcement Learning (Bae et al.), 2025, arXiv "
        "2504.03380",
        cost="none",
        note="retry_steps is ours: the papers generate first and drop afterwards. Dropped groups have advantage 0 and "
        "still count in the loss's number of tokens.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(RateParams):
        low: float = param(0.0, "least pass rate; 0: above 0", minimum=0.0, maximum=1.0)
        high: float = param(1.0, "largest pass rate; 1: below 1", minimum=0.0, maximum=1.0)
        retry_steps: int | None = param(
            None, "steps after which a dropped prompt is tried again; null: those of an epoch", minimum=1
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.low > self.high:
                raise ValueError(f"low: {self.low:g} is above high: {self.high:g}")

    params: Params
    outside: NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)
    """Whether the newest answers of each row, together, would be dropped [N]."""

    def inside(self, rates: Floats) -> NDArray[np.bool_]:
        """Return which pass rates lie in the band [n]; 0 and 1, whose groups teach nothing, never do."""
        return (rates >= self.params.low) & (rates <= self.params.high) & (rates > 0.0) & (rates < 1.0)

    def keeps(self, stats: RolloutStats) -> NDArray[np.bool_]:
        """Return the informative groups whose pass rates lie within the bounds [P]."""
        rates = stats.pass_rate(self.params.threshold)
        return stats.informative & (rates >= self.params.low) & (rates <= self.params.high)

    def observe_rollouts(self, stats: RolloutStats) -> None:
        """Note the pass rates of one generation, and which groups are dropped."""
        stats = stats.by_prompt
        super().observe_rollouts(stats)
        if not self.outside.size:
            self.outside = np.zeros(stats.num_rows, dtype=np.bool_)
        self.outside[stats.rows] = ~self.keeps(stats)

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Draw from untried prompts and those inside the band; fill up with dropped ones, the oldest first."""
        rates, seen = self._known(pool, ctx)
        step, last = ctx.interval.start_step, self.seen[pool] if self.seen.size else np.full(len(pool), -1)
        retry = self.params.retry_steps or -(-len(ctx.domains.domain_of) // max(ctx.global_batch, 1))
        dropped = self.outside[pool] if self.outside.size else np.zeros(len(pool), dtype=np.bool_)
        again = dropped & (step - last >= retry)
        never = ~seen & (last < 0) & np.isfinite(rates) & ~self.inside(rates)  # by the column
        first = ~(dropped & ~again) & ~never
        u = uniforms(ctx.seed, "selector.pass_band", ctx.interval.index, pool)
        order = np.lexsort((u, np.where(first, -1, last), ~first, never))
        order = order[: min(budget, int((~never).sum()))]
        chosen = {
            "inside": int((first & (seen | np.isfinite(rates)) & ~again)[order].sum()),
            "not tried yet": int((first & ~seen & ~np.isfinite(rates) & ~again)[order].sum()),
            "tried again": int(again[order].sum()),
            "dropped before, to fill up": int((~first)[order].sum()),
        }
        told = ", ".join(f"{count} {what}" for what, count in chosen.items() if count) or "none"
        left = int((dropped & ~again).sum()) + int(never.sum())
        return Selection(
            rows=pool[order], scores=self._scores(rates), reason=f"{told}; {left} of {len(pool)} outside the band"
        )


def quotas(
    weights: Floats, counts: NDArray[np.int64], budget: int, carried: Floats
) -> tuple[NDArray[np.int64], Floats]:
    """Return how many of ``budget`` each bin gives [B], by ``weights`` and largest remainders, at most its ``counts``.

    What a bin lacks is shared out among the others in the same way. ``carried`` is what bins were rounded off before
    [B]; it is added, and what is carried on is returned beside.
    """
    given, total = np.zeros(len(counts), dtype=np.int64), min(budget, int(counts.sum()))
    while left := total - int(given.sum()):
        room = counts > given
        share = np.where(room, weights, 0.0)
        share = normalized(share if share.any() else room.astype(np.float64))
        if given.any():
            more = largest_remainder(left, share)
        else:
            more, carried = carried_counts(left, share, carried)
        given = np.minimum(given + more, counts)
    return given, carried


class PassSchedule(RateSelector):
    """Draw prompts whose pass rates follow a target that moves from easy to hard over the run.

    Prompts are put into bins by their pass rates. Bin b, of mean pass rate p_b, gets a share proportional to
    exp(-(p_b - m)^2 / (2 sigma^2)), with the target m moving in a straight line from ``start`` to ``end`` over the run;
    within a bin prompts are drawn without replacement. The density weighs bins, not prompts, so that the histogram of
    the pool has no part in it.

    Pass rates come from ``column``, from the answers of the run, or from both: those of the run are newer. Prompts of
    which nothing is known count as having the mean pass rate of the others.
    """

    name = "pass_schedule"
    card = Card(
        summary="Draws prompts by a target pass rate that moves from easy to hard over the run.",
        paper="Llama-Nemotron: Efficient Reasoning Models (Bercovich et al.), 2025, arXiv 2505.00949, and the report "
        "on Nemotron 3 Nano (NVIDIA), 2025",
        cost="pass rates of the pool, once, where a column gives them",
        note="The reports give neither the width nor the end points nor the bins; sigma, start, end and bins are ours.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(RateParams):
        start: float = param(0.8, "target pass rate at the first step", minimum=0.0, maximum=1.0)
        end: float = param(0.2, "target pass rate at the last step", minimum=0.0, maximum=1.0)
        sigma: float = param(0.15, "width of the target, as a standard deviation of pass rates", above=0.0)
        bins: int = param(10, "bins of equal width between pass rates 0 and 1", minimum=1)
        drop_at: float = param(1.0, "prompts of this pass rate or more are left out", above=0.0)

    params: Params
    saved: ClassVar[tuple[str, ...]] = (*RateSelector.saved, "carried")
    carried: Floats = _NONE
    """What the bins' quotas were rounded off so far [B]."""

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Fill the bins' quotas; prompts left out come last, those of the lowest pass rates first."""
        rates, seen = self._known(pool, ctx)
        scores, p = self._scores(rates), self.params
        gone = np.isfinite(rates) & (rates >= p.drop_at)
        total = ctx.total_sequences / max(ctx.global_batch, 1)
        target = p.start + (p.end - p.start) * min(ctx.interval.start_step / max(total, 1.0), 1.0)
        u = uniforms(ctx.seed, "selector.pass_schedule", ctx.interval.index, pool)
        bins = np.minimum((scores * p.bins).astype(np.int64), p.bins - 1)
        kept = np.flatnonzero(~gone)
        counts = np.bincount(bins[kept], minlength=p.bins)
        means = np.bincount(bins[kept], weights=scores[kept], minlength=p.bins) / np.maximum(counts, 1)
        full = counts > 0
        shares = np.zeros(p.bins)
        if full.any():
            shares[full] = softmax(-((means[full] - target) ** 2) / (2.0 * p.sigma**2))
        carried = self.carried if self.carried.size else np.zeros(p.bins)
        quota, self.carried = quotas(shares, counts, budget, carried)
        order = kept[np.lexsort((u[kept], bins[kept]))]
        place = np.arange(len(order)) - (np.cumsum(counts) - counts)[bins[order]]
        order = order[place < quota[bins[order]]]
        spare = np.flatnonzero(gone & seen)
        filled = spare[np.lexsort((u[spare], scores[spare]))][: budget - len(order)]
        told = ", ".join(f"{means[b]:.2f} x {quota[b]}" for b in np.flatnonzero(quota))
        reason = f"target {target:.3f}: {told or 'no prompt'}; {int(gone.sum())} at {p.drop_at:g} or more left out"
        if len(filled):
            reason += f", {len(filled)} of them taken to fill up"
        return Selection(rows=pool[np.concatenate([order, filled])], scores=scores, reason=reason)


class Mopps(Selector):
    """Draw prompts of middling pass rates by Bayesian estimates and Thompson sampling.

    Each prompt has a Beta(a, b) posterior of its pass rate. A decision draws candidates uniformly (``candidates`` times
    as many as are wanted), draws a pass rate from the posterior of each, and keeps those nearest to ``target``, or any
    between ``low`` and ``high``. After a generation a prompt with success rate s over n answers gets
    a <- f a + (1 - f) a0 + s n and b <- f b + (1 - f) b0 + (1 - s) n, with f = ``discount``.

    With ``forget: steps`` a posterior loses f for every generation that passes, so that prompts not seen for long are
    drawn again; the authors forget only when a prompt is trained on.
    """

    name = "mopps"
    saved: ClassVar[tuple[str, ...]] = ("alpha", "beta", "updated")
    card = Card(
        summary="Draws prompts of middling pass rates, by Bayesian estimates and Thompson sampling.",
        paper="Can Prompt Difficulty be Online Predicted for Accelerating RL Finetuning of Reasoning Models? (Qu et "
        "al.), 2025, arXiv 2507.04632",
        cost="none",
        note="discount is 0.5, as in the authors' scripts without a prior (their code's default is 1); candidates is "
        "8, as there (16 on MATH). forget: steps is ours.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(Params):
        target: float = param(0.5, "pass rate that is wanted", minimum=0.0, maximum=1.0)
        by: Literal["nearest", "band"] = param("nearest", "nearest: nearest to target; band: any from low to high")
        low: float = param(0.3, "with by: band, least pass rate", minimum=0.0, maximum=1.0)
        high: float = param(0.7, "with by: band, largest pass rate", minimum=0.0, maximum=1.0)
        candidates: float | None = param(8.0, "candidates for each prompt wanted; null: the whole pool", minimum=1.0)
        discount: float = param(0.5, "share of a posterior that an update keeps", minimum=0.0, maximum=1.0)
        forget: Literal["updates", "steps"] = param(
            "updates", "when posteriors fade to the prior: updates (of the prompt), steps (every generation)"
        )
        alpha: float = param(1.0, "prior: right answers, plus 1", above=0.0)
        beta: float = param(1.0, "prior: wrong answers, plus 1", above=0.0)
        threshold: float | None = param(0.5, _THRESHOLD)

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ValueError(f"low: {self.low:g} is above high: {self.high:g}")
            refuse_idle(self, ("low", "high") if self.by == "nearest" else ("target",), f"under 'by: {self.by}'")

    params: Params
    alpha: Floats = _NONE
    beta: Floats = _NONE
    updated: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def requires(self) -> Requires:
        return ROLLOUTS

    def posterior(self, rows: Rows, step: int) -> tuple[Floats, Floats]:
        """Return a and b of rows [n] at generation ``step``."""
        p = self.params
        if not self.alpha.size:
            return np.full(len(rows), p.alpha), np.full(len(rows), p.beta)
        alpha, beta = self.alpha[rows], self.beta[rows]
        if p.forget == "steps":
            kept = p.discount ** np.maximum(step - self.updated[rows], 0)
            return kept * alpha + (1.0 - kept) * p.alpha, kept * beta + (1.0 - kept) * p.beta
        return alpha, beta

    def observe_rollouts(self, stats: RolloutStats) -> None:
        """Update the posteriors of one generation's prompts; answers without a reward are left out."""
        p, stats = self.params, stats.by_prompt
        if not self.alpha.size:
            self.alpha, self.beta = np.full(stats.num_rows, p.alpha), np.full(stats.num_rows, p.beta)
            self.updated = np.full(stats.num_rows, -1, dtype=np.int64)
        count = stats.scored_PG.sum(axis=1)
        rows, share, n = stats.rows[count > 0], stats.pass_rate(p.threshold)[count > 0], count[count > 0]
        alpha, beta = self.posterior(rows, stats.step)
        kept = 1.0 if p.forget == "steps" else p.discount
        self.alpha[rows] = kept * alpha + (1.0 - kept) * p.alpha + share * n
        self.beta[rows] = kept * beta + (1.0 - kept) * p.beta + (1.0 - share) * n
        self.updated[rows] = stats.step

    def choose(self, drawn: Floats, u: Floats, budget: int) -> NDArray[np.int64]:
        """Return the positions of ``budget`` drawn pass rates [m]; ``u`` [m] are uniform numbers."""
        p = self.params
        if p.by == "nearest":
            return top_k(-np.abs(drawn - p.target), budget)
        gap = np.maximum(np.maximum(p.low - drawn, drawn - p.high), 0.0)
        return np.lexsort((u, gap))[:budget]

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Draw candidates and a pass rate of each, and keep those that are wanted."""
        from scipy.special import betaincinv

        index, ratio = ctx.interval.index, self.params.candidates
        few = len(pool) if ratio is None else min(len(pool), max(budget, whole_part(ratio, budget)))
        among = np.sort(top_k(uniforms(ctx.seed, "selector.mopps.candidates", index, pool), few))
        rows, step = pool[among], ctx.interval.start_step
        alpha, beta = self.posterior(rows, step)
        drawn = betaincinv(alpha, beta, uniforms(ctx.seed, "selector.mopps", index, rows))
        kept = self.choose(drawn, uniforms(ctx.seed, "selector.mopps.band", index, rows), budget)
        every_a, every_b = self.posterior(pool, step)
        means = every_a / (every_a + every_b)
        told = f"posterior mean {means[among][kept].mean():.3f} (pool {means.mean():.3f})" if len(kept) else "none"
        return Selection(
            rows=rows[kept], scores=means, reason=f"{len(kept)} of {few} candidates by drawn pass rates; {told}"
        )


class Greso(Selector):
    """Pass over prompts whose last groups were all too easy or all too hard, with a probability that grows.

    Prompts are read epoch by epoch, each in a random order. One whose newest z groups were all easy (pass rate at least
    ``easy``) is skipped with probability 1 - max(p^z, 0.01), one of z hard ones (at most ``hard``) likewise with a p of
    its own; it comes back in the next epoch. From the second epoch on both p are adjusted after each generation: they
    fall by 0.01 where the share of groups that were all right is at least a third of ``waste``, that of groups without
    a right answer at least two thirds of it, and rise else, within 0.05 and 0.95.
    """

    name = "greso"
    saved: ClassVar[tuple[str, ...]] = ("easy_runs", "hard_runs", "chances", "epoch", "place")
    card = Card(
        summary="Passes over prompts whose last groups were all too easy or too hard, with a probability that grows.",
        paper="Act Only When It Pays: Efficient Reinforcement Learning for LLM Reasoning via Selective Rollouts (Zheng "
        "et al.), 2025, arXiv 2506.02177",
        cost="none",
        note="The authors' thresholds .98 and .11 are of rewards 0, .1 and 1; here they are of pass rates, and hard "
        "groups without a right answer. They also generate again within a step until the batch is full; here a "
        "generation is never added to.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(Params):
        easy: float = param(0.98, "least pass rate of an easy group", minimum=0.0, maximum=1.0)
        hard: float = param(0.0, "largest pass rate of a hard group", minimum=0.0, maximum=1.0)
        chance: float = param(
            0.5, "p at first: chance that a prompt is read after one easy or hard group", above=0.0, maximum=1.0
        )
        waste: float = param(0.25, "share of uninformative groups that is aimed at", above=0.0, maximum=1.0)
        threshold: float | None = param(0.5, _THRESHOLD)

        def __post_init__(self) -> None:
            if self.hard >= self.easy:
                raise ValueError(f"hard: {self.hard:g} is not below easy: {self.easy:g}")

    params: Params
    easy_runs: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    hard_runs: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    chances: Floats = _NONE
    epoch = place = 0

    def requires(self) -> Requires:
        return ROLLOUTS

    @staticmethod
    def skipping(runs: NDArray[np.int64], chance: float) -> Floats:
        """Return the probability of skipping a prompt after ``runs`` easy (or hard) groups in a row [n]."""
        return np.where(runs > 0, 1.0 - np.maximum(chance ** runs.astype(np.float64), 0.01), 0.0)

    def observe_rollouts(self, stats: RolloutStats) -> None:
        """Note easy and hard groups, and adjust both probabilities."""
        p = self.params
        if not self.easy_runs.size:
            self.easy_runs = np.zeros(stats.num_rows, dtype=np.int64)
            self.hard_runs = np.zeros(stats.num_rows, dtype=np.int64)
        rates = stats.by_prompt.pass_rate(p.threshold)
        known = np.isfinite(rates)
        rows, rates = stats.by_prompt.rows[known], rates[known]
        self.easy_runs[rows] = np.where(rates >= p.easy, self.easy_runs[rows] + 1, 0)
        self.hard_runs[rows] = np.where(rates <= p.hard, self.hard_runs[rows] + 1, 0)
        if not self.chances.size:
            self.chances = np.full(2, p.chance)
        rates = stats.pass_rate(p.threshold)  # the shares are of groups
        rates = rates[np.isfinite(rates)]
        if self.epoch >= 1 and len(rates):
            shares = np.array([(rates == 1.0).mean(), (rates == 0.0).mean()])
            aims = p.waste * np.array([1.0, 2.0]) / 3.0
            self.chances = np.clip(self.chances + np.where(shares >= aims, -0.01, 0.01), 0.05, 0.95)

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Read on in the epoch and skip by chance, until ``budget`` prompts are found."""
        budget = min(budget, len(pool))
        chances = self.chances if self.chances.size else np.full(2, self.params.chance)
        runs = [each[pool] if each.size else np.zeros(len(pool), np.int64) for each in (self.easy_runs, self.hard_runs)]
        skip = np.maximum(self.skipping(runs[0], chances[0]), self.skipping(runs[1], chances[1]))
        taken = np.zeros(len(pool), dtype=np.bool_)
        found: list[NDArray[np.int64]] = []
        passed = 0
        while budget:
            order = np.argsort(keys(ctx.seed, "selector.greso", self.epoch, pool), kind="stable")[self.place :]
            u = uniforms(ctx.seed, "selector.greso.skip", self.epoch, pool)[order]
            reads = (u >= skip[order]) & ~taken[order]
            enough = int(np.searchsorted(np.cumsum(reads), budget)) + 1  # places read until there are enough
            read = order[:enough][reads[:enough]]
            passed += int((~reads[:enough]).sum())
            found.append(read)
            taken[read] = True
            budget -= len(read)
            self.place += min(enough, len(order))
            if self.place >= len(pool):
                self.epoch, self.place = self.epoch + 1, 0
        kept = np.concatenate([np.zeros(0, dtype=np.int64), *found])
        told = f"{len(kept)} read, {passed} skipped in epoch {self.epoch}"
        return Selection(
            rows=pool[kept], scores=1.0 - skip, reason=f"{told}; chance {chances[0]:.2f} easy, {chances[1]:.2f} hard"
        )


def learning_impact(curves_NK: Floats) -> Floats:
    """Return how closely each prompt's curve of mean rewards follows the mean curve [N]; 1: exactly.

    s = 1 - sum_k (r_k - m_k)^2 / sum_k (1 - m_k)^2, with m the mean over the prompts that have all K epochs (arXiv
    2502.11886). A missing epoch has the value of the next one; NaN for prompts that still lack one. All are 1 where the
    mean curve is 1 throughout.
    """
    following = np.concatenate([curves_NK[:, 1:], np.full((len(curves_NK), 1), np.nan)], axis=1)
    curves = np.where(np.isnan(curves_NK), following, curves_NK)
    whole = np.isfinite(curves).all(axis=1)
    if not whole.any():
        return np.full(len(curves), np.nan)
    mean = curves[whole].mean(axis=0)
    room = float(((1.0 - mean) ** 2).sum())
    gaps = ((curves - mean) ** 2).sum(axis=1)
    return np.where(whole, 1.0 - gaps / room if room > 0.0 else 1.0, np.nan)


class Limr(Selector):
    """Keep prompts whose rewards, in an earlier run over all of them, rose as the mean reward did.

    Learning impact measurement: a column holds each prompt's mean rewards, epoch by epoch, as a list of one length for
    all prompts (null where an epoch is missing). The curve of a prompt is compared with the mean curve,
    s = 1 - sum_k (r_k - m_k)^2 / sum_k (1 - m_k)^2, and rows with s of at least ``least`` are drawn from, uniformly.
    """

    name = "limr"
    decides = ("least",)  # what has no bearing on the score
    card = Card(
        summary="Keeps prompts whose rewards in an earlier run rose as the mean reward did.",
        paper="LIMR: Less is More for RL Scaling (Li et al.), 2025, arXiv 2502.11886",
        cost="one earlier run over all prompts",
        note="least is 0.6 as in the authors' script (their code's default is 0.2).",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(Params):
        column: str = param(help="column of each prompt's mean rewards in an earlier run: a list, one number an epoch")
        least: float = param(0.6, "least agreement s with the mean curve", maximum=1.0)

    params: Params

    def requires(self) -> Requires:
        return Requires(columns=(self.params.column,))

    def refused_values(self, name: str, values: NDArray[Any]) -> tuple[NDArray[np.bool_], str] | None:
        curves = [_curve(value) for value in values]
        longest = max((len(curve) for curve in curves if curve is not None), default=0)
        bad = [curve is None or len(curve) != longest for curve in curves]
        return np.array(bad, dtype=np.bool_), f"each must be a list of {longest} numbers or nulls, one for each epoch"

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Draw from the rows that are kept; all rows' curves make the mean."""
        curves = [_curve(value) or [] for value in ctx.columns[self.params.column]]
        scores = learning_impact(np.array(curves, dtype=np.float64))[pool]
        kept = np.flatnonzero(scores >= self.params.least)
        u = uniforms(ctx.seed, "selector.limr", ctx.interval.index, pool[kept])
        chosen = kept[top_k(u, budget)]
        reason = f"{len(chosen)} of {len(kept)} rows with s of {self.params.least:g} or more, of {len(pool)}"
        return Selection(rows=pool[chosen], scores=scores, reason=reason)


def _curve(value: Any) -> list[float] | None:
    """Return a list of numbers, NaN for null; None for anything else."""
    values = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(values, list) or not values:
        return None
    if any(isinstance(each, bool) or not isinstance(each, int | float | None) for each in values):
        return None
    return [np.nan if each is None else float(each) for each in values]
