"""Rewards of the answers to prompts, group by group, and what choosing the prompts saved.

A group is the answers to one prompt. It is informative unless its rewards are all equal: the advantages of a group of
equal rewards are 0, so that it was generated for nothing (DAPO, arXiv 2503.14476).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.plan.domains import Floats, Rows
from dataflex.state import State

Scale = Literal["group", "none"]


def advantages(rewards_PG: Floats, scale: Scale = "group") -> Floats:
    """Return the advantages of answers [P, G] as TRL makes them: (r - mean) / (std + 1e-4) of the group, or r - mean.

    The standard deviation has Bessel's correction. NaN rewards are left out of both and stay NaN.
    """
    scored = np.isfinite(rewards_PG)
    count = np.maximum(scored.sum(axis=1, keepdims=True), 1)
    values = np.where(scored, rewards_PG, 0.0)
    gap = np.where(scored, rewards_PG - values.sum(axis=1, keepdims=True) / count, np.nan)
    if scale == "none":
        return np.asarray(gap)
    std = np.sqrt(np.nansum(gap**2, axis=1, keepdims=True) / np.maximum(count - 1, 1))
    return np.asarray(gap / (std + 1e-4))


@dataclass(frozen=True, kw_only=True, eq=False)
class RolloutStats:
    """The rewards of one generation, equal on every rank: P groups of G answers each.

    A reward is the weighted sum of the reward functions; NaN where no function scored the answer.
    """

    rows: Rows  # row id of each group's prompt [P]
    rewards_PG: Floats  # float64, NaN where an answer was not scored
    lengths_PG: NDArray[np.int64]  # tokens of each answer
    truncated_PG: NDArray[np.bool_]  # whether an answer was cut off at the longest length
    domains_P: NDArray[np.int64]  # domain index of each group's prompt
    names: tuple[str, ...]  # names of the domains [K]
    num_rows: int  # prompts of the training set
    step: int  # generation, counted from 0

    @cached_property
    def scored_PG(self) -> NDArray[np.bool_]:
        """Which answers have a reward."""
        return np.isfinite(self.rewards_PG)

    @cached_property
    def informative(self) -> NDArray[np.bool_]:
        """Which groups have two scored answers or more, whose rewards are not all equal [P]."""
        low = np.where(self.scored_PG, self.rewards_PG, np.inf).min(axis=1)
        high = np.where(self.scored_PG, self.rewards_PG, -np.inf).max(axis=1)
        return (self.scored_PG.sum(axis=1) >= 2) & (high > low)

    @cached_property
    def mean_reward(self) -> Floats:
        """Mean reward of the scored answers of each group [P]; NaN where none was scored."""
        return self._mean(self.rewards_PG)

    @cached_property
    def by_prompt(self) -> RolloutStats:
        """The same with one group for each prompt, of all its answers, in the order of rows; NaN fills up groups.

        A generation that holds each prompt once is returned as it is.
        """
        rows, first, which, counts = np.unique(self.rows, return_index=True, return_inverse=True, return_counts=True)
        if len(rows) == len(self.rows):
            return self
        order = np.argsort(which, kind="stable")
        place = np.arange(len(order)) - (np.cumsum(counts) - counts)[which[order]]

        def joined(values_PG: NDArray[Any], nothing: float) -> NDArray[Any]:
            whole = np.full((len(rows), counts.max(), values_PG.shape[1]), nothing, dtype=values_PG.dtype)
            whole[which[order], place] = values_PG[order]
            return whole.reshape(len(rows), -1)

        return replace(
            self,
            rows=rows,
            rewards_PG=joined(self.rewards_PG, np.nan),
            lengths_PG=joined(self.lengths_PG, 0),
            truncated_PG=joined(self.truncated_PG, False),
            domains_P=self.domains_P[first],
        )

    def pass_rate(self, threshold: float | None) -> Floats:
        """Return the share of scored answers whose reward is above ``threshold`` [P]; None: the mean reward, in [0, 1].

        NaN where no answer was scored.
        """
        if threshold is None:
            return np.clip(self.mean_reward, 0.0, 1.0)
        return self._mean(np.where(self.scored_PG, self.rewards_PG > threshold, np.nan))

    def _mean(self, values: Floats) -> Floats:
        count = self.scored_PG.sum(axis=1)
        sums = np.where(self.scored_PG, values, 0.0).sum(axis=1)
        return np.divide(sums, count, out=np.full(len(count), np.nan), where=count > 0)


class RolloutAccount:
    """Counts what a run generated, and how much uniform drawing would have generated for as many informative groups.

    Uniform drawing, with groups of equal rewards dropped, generates I / q groups for I informative ones, where q is the
    share of all prompts that were informative, over the time of the run. It is estimated from the prompts seen so far:
    each one's groups are joined by straight lines over time, the first and the last by level ones. A method that draws
    each prompt once has saved exactly nothing by it. Where informative prompts are drawn more often, or first, q is
    rather too large, so that what is said to be saved is rather too little.
    """

    def __init__(self, num_rows: int) -> None:
        self.newest = np.full(num_rows, -1.0)  # share of a prompt's newest groups that was informative; -1: unseen
        self.at = np.zeros(num_rows, dtype=np.int64)  # generation of that, counted from 1
        self.area = np.zeros(num_rows)  # generations up to it in which the prompt was informative
        self.counts = dict.fromkeys(("groups", "answers", "tokens", "informative", "dropped", "unscored"), 0)
        self.next_step = 0
        """Generation that is not accounted for yet, counted from 0."""
        self.line: dict[str, Any] = {}
        """What the record is told of the newest generation."""

    def take(self, stats: RolloutStats, kept: NDArray[np.bool_]) -> None:
        """Count one generation, of which the groups ``kept`` [P] are trained on."""
        rows, which, counts = np.unique(stats.rows, return_inverse=True, return_counts=True)
        now, share = stats.step + 1, np.bincount(which, weights=stats.informative) / counts
        before = np.where(self.newest[rows] < 0, share, self.newest[rows])
        self.area[rows] += (before + share) / 2.0 * (now - self.at[rows])
        self.newest[rows], self.at[rows], self.next_step = share, now, now
        groups, answers = stats.rewards_PG.shape
        found = {
            "groups": groups,
            "answers": groups * answers,
            "tokens": int(stats.lengths_PG.sum()),
            "informative": int(stats.informative.sum()),
            "dropped": int((~kept).sum()),
            "unscored": int((~stats.scored_PG).sum()),
        }
        for name, count in found.items():
            self.counts[name] += count
        scored = stats.rewards_PG[stats.scored_PG]
        self.line = {
            **found,
            "mean_reward": float(scored.mean()) if scored.size else None,
            "truncated": int(stats.truncated_PG.sum()),
            "uniform_share": self.uniform_share,
            "saved_answers": self.saved_answers,
            "domains": _by_domain(stats),
        }

    @property
    def uniform_share(self) -> float:
        """Estimated share of informative prompts among all, over the time so far; 0 before any is seen."""
        seen = self.newest >= 0
        if not seen.any():
            return 0.0
        areas = self.area[seen] + self.newest[seen] * (self.next_step - self.at[seen])
        return float(areas.mean() / self.next_step)

    @property
    def saved_answers(self) -> float:
        """Answers that uniform drawing would have generated for as many informative groups, less those generated."""
        uniform = self.uniform_share
        if uniform == 0.0:
            return 0.0
        per_group = self.counts["answers"] / self.counts["groups"]
        return per_group * (self.counts["informative"] / uniform - self.counts["groups"])

    def scalars(self) -> dict[str, float]:
        """Return numbers for the training log."""
        return {
            "rollouts/answers": float(self.counts["answers"]),
            "rollouts/informative_share": self.counts["informative"] / max(self.counts["groups"], 1),
            "rollouts/dropped_groups": float(self.counts["dropped"]),
            "rollouts/saved_answers": self.saved_answers,
        }

    def state_dict(self) -> State:
        """Return all counts."""
        arrays = {"newest": self.newest, "at": self.at, "area": self.area}
        return {**arrays, "counts": dict(self.counts), "next_step": self.next_step, "line": dict(self.line)}

    def load_state_dict(self, state: State) -> None:
        """Restore what ``state_dict`` returned."""
        for name in ("newest", "at", "area"):
            setattr(self, name, np.array(state[name], dtype=getattr(self, name).dtype))
        self.counts = {name: int(state["counts"][name]) for name in self.counts}
        self.next_step, self.line = int(state["next_step"]), dict(state["line"])


def _by_domain(stats: RolloutStats) -> dict[str, dict[str, Any]]:
    """Return groups, informative ones and the mean reward of each domain that a generation held."""
    found = {}
    for k in np.unique(stats.domains_P):
        inside = stats.domains_P == k
        rewards = stats.rewards_PG[inside][stats.scored_PG[inside]]
        found[stats.names[k]] = {
            "groups": int(inside.sum()),
            "informative": int(stats.informative[inside].sum()),
            "mean_reward": float(rewards.mean()) if rewards.size else None,
        }
    return found
