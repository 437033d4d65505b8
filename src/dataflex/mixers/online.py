"""Mixers that learn from the training losses of every step: a softmax of them, ODM by a bandit, ADO by scaling laws."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from dataflex.errors import ConfigError
from dataflex.method import Card, Context, Mix, Requires, param
from dataflex.method import Params as BaseParams
from dataflex.mixers._lib import NOTHING, ONLINE, InitialParams, LearningMixer, first_proportions, mix_of, sizes
from dataflex.plan.domains import DomainStats, Floats
from dataflex.plan.proportions import normalized, softmax


class SoftmaxLoss(LearningMixer):
    """Serve the domains in proportion to exp(L / T), L their mean training loss since the last decision.

    ODM (``odm``) without its bandit: no exploration, no average over the past, and shares that do not fade towards
    equal ones. A domain that was not served keeps its last loss, one that never was has the mean of the others. A floor
    is ``dynamic.min_proportion``. Losses of other languages or kinds of text are not alike from the start: ``relative``
    compares each domain with itself. Training losses tell nothing about overfitting: a small domain that is known by
    heart is served less, one of noise more.
    """

    name = "softmax_loss"
    observes: ClassVar[bool] = True
    saved = ("names", "loss", "first", "loss_sum", "tokens")
    card = Card(
        summary="Serves domains in proportion to the exponential of their training loss since the last decision.",
        paper="ms-swift pull request 9142 (not merged); baseline beside Online Data Mixing, arXiv 2312.02406",
        cost="one reduction of 7 numbers per domain and step",
        note="By the description of the pull request alone, whose defaults are not told there: temperature 1 is ours.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(InitialParams):
        initial: tuple[float, ...] | dict[str, float] | str = param(
            "uniform", "proportions before a loss is known: uniform, size, or numbers as a list or by name"
        )
        temperature: float = param(1.0, "T, nats: small is nearly one-hot, large nearly equal", above=0.0)
        relative: bool = param(False, "whether each loss is divided by the domain's first one")

    params: Params
    loss = first = NOTHING
    """Last and first mean loss of each domain [K], nats per token; NaN where it was never served."""
    loss_sum = tokens = NOTHING
    """Sums since the last decision [K]."""

    def requires(self) -> Requires:
        return ONLINE

    def mix(self, ctx: Context) -> Mix:
        """Return softmax(L / T), or of L / L_first; the first proportions during warm-up and before any loss."""
        names = ctx.domains.names
        if self.meet(names):
            self.loss, self.first = np.full(len(names), np.nan), np.full(len(names), np.nan)
            self.loss_sum, self.tokens = np.zeros(len(names)), np.zeros(len(names))
        first = first_proportions(self.params.initial, ctx, self.name)
        if ctx.interval.kind == "warmup":
            return mix_of(names, first, "before a loss is known")
        self.loss = np.divide(self.loss_sum, self.tokens, out=self.loss.copy(), where=self.tokens > 0)
        self.first = np.where(np.isnan(self.first), self.loss, self.first)
        self.loss_sum, self.tokens = np.zeros(len(names)), np.zeros(len(names))
        known = np.isfinite(self.loss)
        if not known.any():
            return mix_of(names, first, "before a loss is known")
        scale = np.maximum(self.first, 1e-12) if self.params.relative else np.ones(len(names))
        score = np.divide(self.loss, scale, out=np.zeros(len(names)), where=known)
        score[~known] = score[known].mean()
        score[first == 0] = -np.inf
        most = int(np.argmax(score))
        what = "share of its first loss" if self.params.relative else "loss"
        why = f"largest {what} {score[most]:.3g} ({names[most]})"
        return mix_of(names, softmax(score / self.params.temperature), why)

    def observe(self, stats: DomainStats) -> None:
        self.loss_sum = self.loss_sum + stats.loss_sum
        self.tokens = self.tokens + stats.tokens


def exploration(turn: int, num_domains: int, floor: float = 0.0) -> float:
    """Return epsilon at ``turn`` >= 1: min(1 / K, sqrt(ln K / (K turn))), at least ``floor``."""
    return max(min(1.0 / num_domains, math.sqrt(math.log(num_domains) / (num_domains * turn))), floor)


def policy(reward_K: Floats, before: float, now: float, linear: bool) -> Floats:
    """Return (1 - K now) share + now [K]: the share of reward R is R / sum(R) if linear, else softmax(before x R)."""
    if linear:
        share = reward_K / reward_K.sum()
    else:
        share = np.exp(before * (reward_K - reward_K.max()))
        share /= share.sum()
    return normalized((1.0 - len(reward_K) * now) * share + now)


class Odm(LearningMixer):
    """Serve domains with high training loss more often, with exploration that fades.

    Online Data Mixing is a bandit over domains whose reward is the training loss. The authors' paper and code differ,
    hence four variants. ``full_information`` needs no bandit: it reads the mean loss of every domain from mixed
    batches. Its losses differ by little and the exploration that scales them fades, so it stays near equal shares:
    within .02 of them for three domains or more whose losses lie within a nat. The published bandits move far:
    ``variant: paper``, or ``variant: official`` as in the authors' code.
    """

    name = "odm"
    observes: ClassVar[bool] = True
    saved = ("names", "reward", "turn", "updates", "warming")
    card = Card(
        summary="Serves domains by a bandit whose reward is their training loss; near equal shares unless its variant "
        "is a published one.",
        paper="Efficient Online Data Mixing For Language Model Pre-Training (Albalak et al.), 2023, arXiv 2312.02406",
        cost="one reduction of 7 numbers per domain and step",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        variant: Literal["full_information", "paper", "official", "exp3"] = param(
            "full_information",
            "full_information: mixed batches, near equal shares; bandits with one domain per micro-batch: "
            "paper, official (the authors' code), exp3",
        )
        smoothing: float = param(0.9, "weight of the past in the average reward", minimum=0.0, maximum=1.0)
        floor: float = param(0.0, "least proportion of any domain, beside the exploration that fades", minimum=0.0)

    params: Params
    reward = NOTHING
    turn = updates = 0
    warming = False

    def requires(self) -> Requires:
        bandit = self.params.variant != "full_information"  # pulls one domain per micro-batch
        return replace(ONLINE, pure_micro_batches=bandit)

    def mix(self, ctx: Context) -> Mix:
        """Return the policy after the last update; sizes during warm-up, and before the authors' code has a reward."""
        names = ctx.domains.names
        if self.params.floor * len(names) >= 1.0:
            raise ConfigError(
                f"dynamic.mixer.floor: {self.params.floor:g} for each of {len(names)} domains leaves nothing to "
                f"decide; it must be below {1 / len(names):.4g}"
            )
        if self.meet(names):
            self.reward = np.zeros(len(names))
        self.warming = ctx.interval.kind == "warmup"
        if self.warming or (self._iterations and not self.reward.any()):
            return mix_of(names, sizes(ctx, self.name), "by size")
        first = self.params.variant == "exp3" and self.updates == 1  # the authors' epsilon was still 1 / K
        turns = (0 if first else self.turn - 1, self.turn)
        before, now = (exploration(max(turn, 1), len(names), self.params.floor) for turn in turns)
        proportions = policy(self.reward, before, now, linear=self.params.variant == "official")
        return mix_of(names, proportions, f"turn {self.turn}, exploration {now:.3g} each")

    @property
    def _iterations(self) -> bool:
        """Whether turns are optimizer steps, warm-up included, and proportions start by size: the authors' code."""
        return self.params.variant in ("official", "exp3")

    def observe(self, stats: DomainStats) -> None:
        """Update the rewards of the domains that the step held; the others keep theirs.

        With the mean loss L and the proportion p of a domain, and smoothing a:

        - ``full_information``: R = a R + (1 - a) L
        - ``paper``: R = a R + (1 - a) L / p
        - ``official``: R = a R + (1 - a) exp(L)
        - ``exp3``: R = R + L / (10 p)

        A turn is an update; in ``official`` and ``exp3`` it is the optimizer step, warm-up included.
        """
        if self.warming:
            return
        self.turn = stats.step + 1 if self._iterations else self.turn + 1
        self.updates += 1
        present, a = stats.present, self.params.smoothing
        loss = stats.mean_loss()[present]
        if self.params.variant == "exp3":
            self.reward[present] += loss / stats.proportions[present] / 10.0
            return
        if self.params.variant == "paper":
            loss = loss / stats.proportions[present]
        elif self.params.variant == "official":
            loss = np.exp(loss)
        self.reward[present] = a * self.reward[present] + (1.0 - a) * loss


_HUBER = 1e-3
_WINDOW, _ORDER = 101, 3
_EVERY = 10
_GRID = 8
_REFINED = 8  # number of the grid's best points that are refined; the authors refine all 512, to the same optimum


class PowerLaw(NamedTuple):
    """L(n) = exp(e) + exp(a) n^-alpha, nats per token over n samples."""

    e: float
    a: float
    alpha: float

    def reducible(self, n: float) -> float:
        """Return exp(a) n^-alpha."""
        return float(np.exp(self.a - self.alpha * np.log(n)))

    def slope(self, n: float, least_alpha: float = 0.05) -> float:
        """Return -dL/dn = alpha (L - exp(e)) / n, with alpha at least ``least_alpha``."""
        return max(self.alpha, least_alpha) * self.reducible(n) / n


def fit_power_law(
    samples: Floats, losses: Floats, *, skip: int = 0, least_e: float = 0.5, most_a: float = 6.5
) -> PowerLaw | None:
    """Fit a law to losses L [T] > 0 after n = ``samples`` [T] > 0, by a Huber loss (1e-3) between log losses.

    Losses that are not finite are filled in by straight lines. Losses are smoothed (Savitzky-Golay, 101 points, cubic),
    then the first ``skip`` are left out and the others thinned
    to every tenth. 0 < alpha <= 0.8, e >= ``least_e``, a <= ``most_a``. None with fewer than 101 points, or without a
    finite fit.
    """
    from scipy.optimize import minimize
    from scipy.signal import savgol_filter

    known = np.flatnonzero(np.isfinite(losses))
    if len(losses) - skip < _WINDOW or not len(known):
        return None
    losses = np.interp(np.arange(len(losses)), known, losses[known])
    smooth = savgol_filter(losses, _WINDOW, _ORDER)[skip::_EVERY]
    log_n, log_loss = np.log(np.maximum(samples[skip::_EVERY], 1.0)), np.log(np.maximum(smooth, 1e-8))

    def objective(theta: Floats) -> tuple[float, Floats]:
        e, a, alpha = theta
        rest = a - alpha * log_n
        predicted = np.logaddexp(e, rest)
        error = predicted - log_loss
        clipped = np.clip(error, -_HUBER, _HUBER)
        value = float(np.mean(clipped * (error - 0.5 * clipped)))
        part = np.exp(rest - predicted)  # share of the reducible loss
        slopes = np.array([np.mean(clipped * (1.0 - part)), np.mean(clipped * part), -np.mean(clipped * part * log_n)])
        return value, slopes

    bounds = [(least_e, None), (None, most_a), (1e-4, 0.8)]
    top_e = max(float(log_loss.min()), least_e)
    grid = product(np.linspace(least_e, top_e, _GRID), np.linspace(-1.0, most_a, _GRID), np.linspace(0.1, 0.8, _GRID))
    starts = sorted((np.array(point) for point in grid), key=lambda point: objective(point)[0])[:_REFINED]
    with threadpool_limits(limits=1, user_api="blas"):  # scipy's: waking threads takes longer than steps this small
        fits = [
            minimize(
                # The objective is of the order of 1e-6, below the optimizer's own idea of convergence.
                lambda theta: tuple(1e6 * np.asarray(part) for part in objective(theta)),
                start,
                jac=True,
                method="L-BFGS-B",
                bounds=bounds,
                options={"maxiter": 200},
            )
            for start in starts
        ]
    finite = [fit for fit in fits if np.isfinite(fit.fun) and np.isfinite(fit.x).all()]
    if not finite:
        return None
    return PowerLaw(*min(finite, key=lambda fit: float(fit.fun)).x.tolist())


def preference(slopes: Floats, prior: Floats, credit: Floats, exponent: float, floor: float) -> Floats:
    """Return slope x prior x credit^exponent divided by its sum, each at least ``floor``, divided again [K]."""
    score = slopes * prior * credit**exponent
    share = score / score.sum() if score.sum() > 0 else prior
    return normalized(np.maximum(share, floor))


class Ado(LearningMixer):
    """Serve the domains whose scaling laws, fitted during training, promise the most from the next sample.

    The laws are fitted as in the authors' code: losses are smoothed over the whole run, then the first ``ignore_steps``
    are left out.
    """

    name = "ado"
    observes: ClassVar[bool] = True
    saved = ("names", "prior", "average", "credit", "served", "last", "samples", "losses", "laws")
    card = Card(
        summary="Serves domains by how fast their losses still fall, by scaling laws fitted during training.",
        paper="Adaptive Data Optimization: Dynamic Sample Selection with Scaling Laws (Jiang et al.), ICLR 2025, "
        "arXiv 2410.11820",
        cost="one reduction of 7 numbers per domain and step, and a fit per domain every fit_steps",
        note="start_step 1000 and ignore_steps 500 are ours: with the authors' 500 and 1000 the first law is fitted to "
        "one point. Losses are smoothed before the first ones are cut off, as there.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        start_step: int = param(
            1000, "optimizer step of the first fit (the authors' 500, with 1000 ignored, fits one point)", minimum=101
        )
        ignore_steps: int = param(500, "optimizer steps at the beginning that fits leave out", minimum=0)
        fit_steps: int = param(1000, "optimizer steps between fits", minimum=1)
        prior_share: float = param(0.9, "weight of the average of past preferences", minimum=0.0, maximum=1.0)
        credit_exponent: float = param(0.5, "exponent of a domain's share in recent batches", minimum=0.0)
        floor: float = param(0.01, "least preference of a domain", minimum=0.0, maximum=0.5)
        least_e: float = param(0.5, "least log of a domain's irreducible loss, in log nats")

        def __post_init__(self) -> None:
            least = self.ignore_steps + _WINDOW
            if self.start_step < least:
                raise ValueError(
                    f"start_step: a fit needs 101 steps, so it must be at least ignore_steps + 101 = {least}"
                )

    params: Params
    prior = average = credit = served = last = NOTHING

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.samples: list[float] = []
        self.losses: list[Floats] = []
        self.laws: list[PowerLaw] = []  # law of each domain, as e, a and alpha; empty until all are fitted

    def requires(self) -> Requires:
        return ONLINE

    def mix(self, ctx: Context) -> Mix:
        """Return the proportions after the last step; those by size until laws are fitted."""
        if self.meet(ctx.domains.names):
            self.prior = normalized(sizes(ctx, self.name))
            self.average, self.credit, self.served = self.prior.copy(), self.prior.copy(), self.prior.copy()
            self.last = np.full(len(self.names), np.nan)
        return mix_of(self.names, self.served, "laws fitted" if self.laws else "by size, no laws yet")

    def observe(self, stats: DomainStats) -> None:
        """Note the losses, fit when it is time, and move the proportions.

        With the share h of recent batches and the average q of past preferences: score = slope x prior x
        h^(1/2), d = score / sum, p = 0.9 q + 0.1 d, then q <- (1 - 1 / t) q + d / t after t steps.
        """
        loss = stats.mean_loss()
        whole = stats.loss_sum.sum() / stats.tokens.sum() if stats.present.any() else np.nan
        self.last = np.where(stats.present, loss, np.where(np.isnan(self.last), whole, self.last))
        drawn = stats.sequences / max(stats.sequences.sum(), 1.0)
        self.samples.append((self.samples[-1] if self.samples else 0.0) + float(stats.sequences.sum()))
        self.losses.append(self.last.copy())
        self.credit = 0.9 * self.credit + 0.1 * drawn
        step = stats.step + 1
        if step >= self.params.start_step and (step - self.params.start_step) % self.params.fit_steps == 0:
            self._fit()
        if not self.laws:
            return
        n = self.samples[-1]
        slopes = np.array([PowerLaw(*law).slope(n) for law in self.laws])
        wanted = preference(slopes, self.prior, self.credit, self.params.credit_exponent, self.params.floor)
        self.served = normalized(self.params.prior_share * self.average + (1.0 - self.params.prior_share) * wanted)
        self.average = (1.0 - 1.0 / step) * self.average + wanted / step

    def _fit(self) -> None:
        samples, losses, p = np.array(self.samples), np.stack(self.losses), self.params
        found = [fit_power_law(samples, column, skip=p.ignore_steps, least_e=p.least_e) for column in losses.T]
        # A domain whose losses cannot be fitted keeps its law; without laws all must be fitted.
        before: list[PowerLaw | None] = [*self.laws] or [None] * len(found)
        laws = [new or old for new, old in zip(found, before, strict=True)]
        known = [law for law in laws if law is not None]
        self.laws = known if len(known) == len(laws) else []
