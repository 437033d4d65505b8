"""How a row's scores for several targets become one (LESS, ICONS)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError, did_you_mean
from dataflex.method import Params
from dataflex.parts import Part
from dataflex.select.neighbours import best_similarity

__all__ = ["AGGREGATES", "Aggregate", "by_task", "count_votes", "percentile_ranks", "together"]


@dataclass(frozen=True, kw_only=True)
class Plain(Params):
    """An aggregation without parameters."""


@dataclass(frozen=True, kw_only=True)
class Votes(Params):
    """Targets vote for their best rows (ICONS)."""

    vote_percent: float = field(
        default=20.0,
        metadata={"help": "share of the pool that a target votes for, in percent", "above": 0.0, "maximum": 100.0},
    )


def count_votes(influence: NDArray[np.floating], vote_percent: float) -> NDArray[np.int64]:
    """Return each row's number of votes [n].

    Args:
        influence: Influence of each row on each task [n, T], finite, n >= 1.
        vote_percent: p; a task votes for the rows at or above the (100 - p)th percentile of its influences.
    """
    values = np.asarray(influence, dtype=np.float64)
    return (values >= np.percentile(values, 100.0 - vote_percent, axis=0)).sum(axis=1)


def percentile_ranks(influence: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return each row's percentile rank, averaged over tasks [n], in (0, 1).

    In a task it is (rank - 1/2) / n, and equal values share the mean of their ranks. Rows whose ranks add up
    to the same have the same bits.
    """
    values = np.asarray(influence, dtype=np.float64)
    doubled = np.zeros(len(values), dtype=np.int64)  # twice the ranks: whole numbers, whose sums are exact
    for column in values.T:
        _, place, counts = np.unique(column, return_inverse=True, return_counts=True)
        doubled += (2 * (np.cumsum(counts) - counts) + counts)[place.reshape(-1)]
    return doubled / (2.0 * len(values) * values.shape[1])


def _z_max(scores_TN: NDArray[np.float64], _: Params) -> NDArray[np.float64]:
    spread = scores_TN.std(axis=1, keepdims=True)
    centred = scores_TN - scores_TN.mean(axis=1, keepdims=True)
    return (centred / np.where(spread > 0, spread, 1.0)).max(axis=0)


def _votes(scores_TN: NDArray[np.float64], p: Votes) -> NDArray[np.float64]:
    return count_votes(scores_TN.T, p.vote_percent) + percentile_ranks(scores_TN.T)


@dataclass(frozen=True)
class _Spec:
    params: type[Params]
    nearest: bool
    """Whether a row's score for a target is its largest similarity with the target's rows, not the mean one."""
    call: Callable[[NDArray[np.float64], Any], NDArray[np.float64]]


AGGREGATES: Final[dict[str, _Spec]] = {
    "mean": _Spec(Plain, False, lambda scores, _: scores.mean(axis=0)),
    "max": _Spec(Plain, True, lambda scores, _: scores.max(axis=0)),
    "mean_then_max": _Spec(Plain, False, lambda scores, _: scores.max(axis=0)),
    "z_max": _Spec(Plain, False, _z_max),
    "votes": _Spec(Votes, False, _votes),
    "ranks": _Spec(Plain, False, lambda scores, _: percentile_ranks(scores.T)),
    # Targets take turns: the number is for the record only.
    "round_robin": _Spec(Plain, True, lambda scores, _: scores.max(axis=0)),
}


@dataclass(frozen=True)
class Aggregate(Part):
    """An aggregation with its parameters."""

    what = "aggregation"

    @classmethod
    def known(cls) -> list[str]:
        """Return the names of all aggregations."""
        return list(AGGREGATES)

    @classmethod
    def params_of(cls, name: str) -> type[Params]:
        """Return an aggregation's parameters.

        Raises:
            ConfigError: There is no such aggregation.
        """
        if name not in AGGREGATES:
            known = list(AGGREGATES)
            raise ConfigError(f"unknown aggregation {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})")
        return AGGREGATES[name].params


def by_task(
    vectors_ND: NDArray[np.float32], queries: Sequence[NDArray[np.float32]], aggregate: Aggregate
) -> NDArray[np.float64]:
    """Return each row's similarity with each target, float64 [T, N]: the mean over its rows, or the largest."""
    if AGGREGATES[aggregate.name].nearest:
        return np.stack([best_similarity(one, vectors_ND) for one in queries]).astype(np.float64)
    return (np.stack([one.mean(axis=0) for one in queries]) @ vectors_ND.T).astype(np.float64)


def together(scores_TN: NDArray[np.floating], aggregate: Aggregate) -> NDArray[np.float64]:
    """Return one score a row, float64 [N], from finite scores by target [T, N].

    ``mean``: over targets. ``max``, ``mean_then_max``: the best target's (they differ in ``by_task``). ``z_max``:
    the best target's, of scores with mean 0 and standard deviation 1 in each target. ``votes``: votes of targets, ties
    by mean percentile rank (ICONS, arXiv 2501.00654). ``ranks``: the mean percentile rank. ``round_robin``: the best
    target's.
    """
    return AGGREGATES[aggregate.name].call(np.asarray(scores_TN, dtype=np.float64), aggregate.params)
