"""Online Data Mixing: a bandit over domains whose reward is the training loss.

The authors' paper and code differ, hence four variants (see ``Odm.Params``).
``full_information`` needs no bandit: it reads the mean loss of every domain from mixed batches. Its losses differ by
little and the exploration that scales them fades, so it stays near equal shares: within .02 of them for three domains
or more whose losses lie within a nat. What moves far is the published bandit, one key away: ``variant: paper``, or
``variant: official`` as in the authors' code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from dataflex.errors import ConfigError
from dataflex.method import Card, Context, Mix, Requires, param
from dataflex.method import Params as BaseParams
from dataflex.mixers._lib import NOTHING, ONLINE, LearningMixer, mix_of, sizes
from dataflex.plan.domains import DomainStats, Floats
from dataflex.plan.proportions import normalized


def exploration(turn: int, num_domains: int, floor: float = 0.0) -> float:
    """Return epsilon at ``turn`` >= 1: min(1 / K, sqrt(ln K / (K turn))), at least ``floor``."""
    if num_domains < 2:
        return 1.0 / num_domains
    return max(min(1.0 / num_domains, math.sqrt(math.log(num_domains) / (num_domains * turn))), floor)


def policy(reward_K: Floats, before: float, now: float, linear: bool) -> Floats:
    """Return the proportions [K]: (1 - K now) share + now, the share R / sum(R) if linear, else softmax(before x R).

    ``now`` and ``before`` are epsilon at this turn and at the one before, R the rewards.
    """
    if linear:
        share = reward_K / reward_K.sum()
    else:
        share = np.exp(before * (reward_K - reward_K.max()))
        share /= share.sum()
    return normalized((1.0 - len(reward_K) * now) * share + now)


class Odm(LearningMixer):
    """Serve domains with high training loss more often, with exploration that fades."""

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
