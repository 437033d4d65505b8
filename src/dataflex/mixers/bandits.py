"""Bandits over domains for reinforcement learning: more prompts of the domains whose groups teach most.

All are one scheme. After each generation a domain of at least ``min_groups`` groups gets a value (of its advantages or
rewards); a rule makes scores of what is remembered of the values, and proportions are their softmax. Values of domains
with fewer groups wait for more. Advantages are TRL's: (r - mean) / (std + 1e-4) of the group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError
from dataflex.method import Card, Context, Mix, Requires, param
from dataflex.method import Params as BaseParams
from dataflex.mixers._lib import NOTHING, LearningMixer, mix_of
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import apply_min_proportion, softmax
from dataflex.plan.rollouts import RolloutStats, advantages


@dataclass(frozen=True, kw_only=True)
class BanditParams(BaseParams):
    """Base of the parameters of bandits."""

    floor: float = param(0.05, "least proportion of any domain", minimum=0.0)
    min_groups: int = param(1, "scored groups of a domain before they make a value", minimum=1)


def answer_values(stats: RolloutStats, what: str) -> Floats:
    """Return the number of each answer that a value is the mean of [P, G], NaN where an answer was not scored.

    ``advantage``: absolute advantage; ``unnormalized``: the same without division by the standard deviation;
    ``reward``: the reward.
    """
    if what == "reward":
        return stats.rewards_PG
    return np.abs(advantages(stats.rewards_PG, "group" if what == "advantage" else "none"))


class Bandit(LearningMixer):
    """Sets proportions by a softmax of scores, after each generation's values of the domains."""

    Params: ClassVar[type[BaseParams]] = BanditParams
    saved: ClassVar[tuple[str, ...]] = ("names", "groups", "sums", "counts")
    groups = sums = counts = NOTHING
    """Of the domains' answers that made no value yet: scored groups, and the answers' sum and number [K]."""

    def requires(self) -> Requires:
        return Requires(signals=frozenset({"rollouts"}), domains=2, needs_interval=True)

    @property
    def what(self) -> str:
        """What a value is the mean of over answers, see ``answer_values``."""
        return "advantage"

    def begin(self, num_domains: int) -> None:
        """Make the memory of ``num_domains`` domains."""
        raise NotImplementedError

    def learn(self, values_K: Floats, held_K: NDArray[np.bool_]) -> None:
        """Take in the domains' new values [K], NaN for none; a generation held the domains ``held_K`` [K]."""
        raise NotImplementedError

    def scores(self) -> Floats:
        """Return the score of each domain, divided by the temperature [K]."""
        raise NotImplementedError

    def told(self) -> Floats:
        """Return what the record says of each domain [K]."""
        return self.scores()

    def meet(self, names: Any) -> bool:
        """Note the domains and make what is remembered of them."""
        new = super().meet(names)
        if new:
            self.groups, self.sums, self.counts = (np.zeros(len(self.names)) for _ in range(3))
            self.begin(len(self.names))
        return new

    def mix(self, ctx: Context) -> Mix:
        """Return the softmax of the scores, each domain's share at least ``floor``."""
        names = ctx.domains.names
        self.meet(names)
        floor = self.params.floor
        if floor * len(names) >= 1.0:
            raise ConfigError(
                f"dynamic.mixer.floor: {floor:g} for each of {len(names)} domains leaves nothing to decide; it must be "
                f"below {1 / len(names):.4g}"
            )
        proportions = apply_min_proportion(softmax(self.scores()), np.full(len(names), floor))
        told = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, self.told().tolist(), strict=True))
        return mix_of(names, proportions, f"values {told}" if len(names) <= 16 else "by values")

    def observe_rollouts(self, stats: RolloutStats) -> None:
        """Gather each domain's answers, and learn from the domains that have enough groups."""
        self.meet(stats.names)
        values, scored = answer_values(stats, self.what), stats.scored_PG.sum(axis=1)
        size = len(stats.names)
        self.groups = self.groups + np.bincount(stats.domains_P[scored > 0], minlength=size)
        self.counts = self.counts + np.bincount(stats.domains_P, weights=scored, minlength=size)
        self.sums = self.sums + np.bincount(stats.domains_P, weights=np.nansum(values, axis=1), minlength=size)
        present = self.groups >= self.params.min_groups
        found = np.divide(self.sums, self.counts, out=np.full(size, np.nan), where=present)
        self.note(stats, values)
        self.learn(found, np.bincount(stats.domains_P, minlength=size) > 0)
        for each in (self.groups, self.sums, self.counts):
            each[present] = 0.0

    def note(self, stats: RolloutStats, values_PG: Floats) -> None:
        """Take in the answers' numbers themselves, where a rule goes by them."""


class Sec(Bandit):
    """Follow a running mean of each domain's mean absolute advantage, the self-evolving curriculum.

    Q <- (1 - rate) Q + rate v for the domains of a generation, with v the mean over answers of the absolute advantage,
    and proportions softmax(Q / temperature). An absent domain keeps its Q; with ``absent: decay`` its value counts as
    0, as in the authors' code. A domain that is there but waits for ``min_groups`` groups keeps its Q in any case.
    """

    name = "sec"
    saved: ClassVar[tuple[str, ...]] = (*Bandit.saved, "quality", "before")
    card = Card(
        summary="Serves domains by a running mean of their answers' absolute advantages.",
        paper="Self-Evolving Curriculum for LLM Reasoning (Chen et al.), 2025, arXiv 2505.14970",
        cost="none",
        note="The authors' code draws one domain per prompt; here counts follow the proportions. Its absent domains "
        "decay (absent: decay); by the paper's rule for the drawn one they do not, which is the default.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BanditParams):
        rate: float = param(0.5, "weight of the newest value", above=0.0, maximum=1.0)
        temperature: float = param(1.0, "temperature of the softmax (the authors: 1, 0.4 and 0.2)", above=0.0)
        value: Literal["advantage", "unnormalized", "progress"] = param(
            "advantage", "absolute advantage; the same not divided by the deviation; or change of the mean reward"
        )
        absent: Literal["skip", "decay"] = param("skip", "what happens to domains that a generation did not hold")

    params: Params
    quality = before = NOTHING

    @property
    def what(self) -> str:
        return "reward" if self.params.value == "progress" else self.params.value

    def begin(self, num_domains: int) -> None:
        self.quality, self.before = np.zeros(num_domains), np.full(num_domains, np.nan)

    def learn(self, values_K: Floats, held_K: NDArray[np.bool_]) -> None:
        if self.params.value == "progress":
            change = values_K - self.before
            self.before = np.where(np.isfinite(values_K), values_K, self.before)
            values_K = change
        known, a = np.isfinite(values_K), self.params.rate
        moves = known | ~held_K if self.params.absent == "decay" else known  # one that waits for a value stays
        self.quality = np.where(moves, (1.0 - a) * self.quality + a * np.where(known, values_K, 0.0), self.quality)

    def scores(self) -> Floats:
        return np.asarray(self.quality / self.params.temperature)

    def told(self) -> Floats:
        return self.quality


class DumpUcb(Bandit):
    """Follow an upper confidence bound of each domain's mean absolute advantage.

    U = L + sqrt(2 ln(N + 1) / (n + 1)), with L the mean absolute advantage of the domain's last ``window`` answers, n
    its answers so far and N those of all domains; proportions are softmax(U / temperature). At the temperature of 0.1
    the second term rules until each domain has about a hundred answers.
    """

    name = "dump_ucb"
    saved: ClassVar[tuple[str, ...]] = (*Bandit.saved, "seen", "recent", "waiting")
    card = Card(
        summary="Serves domains by an upper confidence bound of their answers' absolute advantages.",
        paper="DUMP: Automated Distribution-Level Curriculum Learning for RL-based LLM Post-training (Wang et al.), "
        "2025, arXiv 2504.09710",
        cost="none",
        note="By the paper's formula, over answers of training groups; the released code takes rewards of validation "
        "runs for advantages and counts those runs.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BanditParams):
        window: int = param(300, "newest answers of a domain that its mean is of", minimum=1)
        temperature: float = param(0.1, "temperature of the softmax", above=0.0)

    params: Params
    seen = recent = waiting = NOTHING
    """Answers of each domain so far [K]; the newest ones' absolute advantages, and those of the newest answers that
    wait for ``min_groups`` groups [K, window], NaN for none."""

    def begin(self, num_domains: int) -> None:
        self.seen = np.zeros(num_domains)
        self.recent, self.waiting = (np.full((num_domains, self.params.window), np.nan) for _ in range(2))

    def note(self, stats: RolloutStats, values_PG: Floats) -> None:
        for k in range(len(self.names)):
            self.waiting[k] = self._newest(self.waiting[k], values_PG[stats.domains_P == k])

    def learn(self, values_K: Floats, held_K: NDArray[np.bool_]) -> None:
        for k in np.flatnonzero(np.isfinite(values_K)):
            self.seen[k] += self.counts[k]
            self.recent[k] = self._newest(self.recent[k], self.waiting[k])
            self.waiting[k] = np.nan

    def _newest(self, before: Floats, values: Floats) -> Floats:
        """Return the newest values [window] of those before and the finite ones of ``values``, the last at the end."""
        return np.concatenate([before, values[np.isfinite(values)]])[-self.params.window :]

    @staticmethod
    def bonus(seen_K: Floats) -> Floats:
        """Return sqrt(2 ln(N + 1) / (n + 1)) [K]."""
        return np.asarray(np.sqrt(2.0 * np.log(seen_K.sum() + 1.0) / (seen_K + 1.0)))

    def bound(self) -> Floats:
        """Return U [K]."""
        known = np.isfinite(self.recent)
        means = np.where(known, self.recent, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
        return np.asarray(means + self.bonus(self.seen))

    def scores(self) -> Floats:
        return np.asarray(self.bound() / self.params.temperature)

    def told(self) -> Floats:
        return self.bound()


def slope(values: Floats) -> float:
    """Return the least-squares slope of values [n] against 0, 1, 2, ...; 0 for fewer than two."""
    if len(values) < 2:
        return 0.0
    place = np.arange(len(values)) - (len(values) - 1) / 2.0
    return float((place * values).sum() / (place**2).sum())


class Tscl(Bandit):
    """Follow how fast each domain's mean reward changes, teacher-student curriculum learning.

    A domain's slope is that of a straight line through its last ``window`` mean rewards; proportions are
    softmax(|slope| / temperature), so that what is forgotten is practised as well as what is being learned, or with
    ``signed`` softmax(max(slope, 0) / temperature).
    """

    name = "tscl"
    saved: ClassVar[tuple[str, ...]] = (*Bandit.saved, "recent")
    card = Card(
        summary="Serves domains by how fast their mean rewards change.",
        paper="Teacher-Student Curriculum Learning (Matiisen et al.), IEEE TNNLS 2020, arXiv 1707.00183",
        cost="none",
        note="temperature is 0.02: slopes of rewards in [0, 1] are .01 to .1 a generation, at which 1 is flat.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BanditParams):
        window: int = param(10, "newest values of a domain that its slope is of", minimum=2)
        temperature: float = param(0.02, "temperature of the softmax", above=0.0)
        signed: bool = param(False, "whether a domain that gets worse counts as one that stands still")

    params: Params
    recent = NOTHING
    """The newest mean rewards of each domain [K, window], NaN for none."""

    @property
    def what(self) -> str:
        return "reward"

    def begin(self, num_domains: int) -> None:
        self.recent = np.full((num_domains, self.params.window), np.nan)

    def learn(self, values_K: Floats, held_K: NDArray[np.bool_]) -> None:
        for k in np.flatnonzero(np.isfinite(values_K)):
            self.recent[k] = np.append(self.recent[k][1:], values_K[k])

    def told(self) -> Floats:
        return np.array([slope(row[np.isfinite(row)]) for row in self.recent])

    def scores(self) -> Floats:
        slopes = self.told()
        return np.asarray((np.maximum(slopes, 0.0) if self.params.signed else np.abs(slopes)) / self.params.temperature)
