"""Subset rules on scores, and exact counts: from scores to positions, from proportions to whole numbers.

Pure functions. Positions point into the array that was given; a score that is NaN or -inf is never
chosen; ties go to the smaller position, on every machine. Random numbers are given as uniforms, which come
from ``dataflex.rng``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataflex.errors import DataError
from dataflex.plan.domains import Rows
from dataflex.plan.proportions import largest_remainder
from dataflex.rng import uniforms

HALVED_BY: Final = 2  # servings after which a row that leads is worth half
_WINDOW = 256  # positions of a query turned into Python numbers at a time


def top_k(scores: ArrayLike, k: int) -> NDArray[np.int64]:
    """Return the positions of the ``k`` largest scores [n], best first, ties by position: int64 [min(k, eligible)].

    NaN and -inf are never chosen. Linear in the number of scores, plus sorting the chosen ones.
    """
    values = np.asarray(scores)
    if not np.issubdtype(values.dtype, np.floating):
        values = values.astype(np.float64)
    clean = np.where(np.isnan(values), -np.inf, values)
    k = min(k, int(np.count_nonzero(clean > -np.inf)))
    if k == 0:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(clean, clean.size - k)[clean.size - k]
    above = np.flatnonzero(clean > threshold)
    tied = np.flatnonzero(clean == threshold)[: k - above.size]
    order = np.argsort(-clean[above], kind="stable")
    return np.concatenate([above[order], tied]).astype(np.int64, copy=False)


def worn(scores: NDArray[np.floating], times: NDArray[np.integer]) -> NDArray[np.floating]:
    """Return scores [n] whose lead over their mean counts 1 / (1 + (t / 2)^2) after t servings, of the same type.

    ``times`` [n] is how often each row was served: .8 of a lead is left after one serving, .5 after two, .2 after four.
    What is below the mean stays; NaN is no score and remains one.
    """
    known = np.flatnonzero(np.isfinite(scores))
    if not len(known):
        return scores
    mean = float(scores[known].mean(dtype=np.float64))
    leading, found = known[scores[known] > mean], scores.copy()
    found[leading] = mean + (scores[leading] - mean) / (1 + (times[leading] / HALVED_BY) ** 2)
    return found


def gumbel_top_k(log_weights: ArrayLike, k: int, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """Draw ``k`` positions without replacement with probability proportional to exp(log_weights).

    The k largest of log w_i + G_i with G = -ln(-ln U) are distributed as sequential draws without replacement (Kool
    et al.: Stochastic Beams and Where to Find Them, ICML 2019, arXiv 1903.06059, section 2.3). Log weights [n] have any
    offset; -inf and NaN are never taken. ``uniforms`` [n] are in (0, 1), best drawn by row id, so that the result does
    not depend on ranks. Positions int64 [min(k, weights above 0)] come in the order of the draw.
    """
    clipped = np.clip(np.asarray(uniforms, dtype=np.float64), 1e-20, 1 - 1e-7)
    return top_k(np.asarray(log_weights, dtype=np.float64) - np.log(-np.log(clipped)), k)


def weighted_with_replacement(weights: ArrayLike, k: int, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """Sample ``k`` positions independently with probability proportional to ``weights`` [n] >= 0, one of them above 0.

    ``uniforms`` is one number in (0, 1) per draw [k]. A position of weight 0 is never drawn.
    """
    values = np.asarray(weights, dtype=np.float64)
    if k == 0:
        return np.empty(0, dtype=np.int64)
    cumulative = np.cumsum(values)
    positions = np.searchsorted(cumulative, np.asarray(uniforms) * cumulative[-1], side="right")
    return np.minimum(positions, np.flatnonzero(values)[-1]).astype(np.int64)


def take_turns(queues: Iterable[Iterable[int]], k: int, *, lose_turn: bool = False) -> NDArray[np.int64]:
    """Let queues take turns, each giving its next position that is not yet taken; at most ``k``, in the order taken.

    Queues are in order of preference, without repeats. With ``lose_turn`` a queue whose next position is taken gives
    nothing in this turn, instead of the one after it.
    """
    waiting = [iter(queue) for queue in queues]
    taken: dict[int, None] = {}
    while waiting and len(taken) < k:
        going_on = []
        for queue in waiting:
            position = next((each for each in queue if lose_turn or each not in taken), None)
            if position is None:
                continue
            going_on.append(queue)
            taken[position] = None
            if len(taken) == k:
                break
        waiting = going_on
    return np.fromiter(taken, dtype=np.int64, count=len(taken))


def _best_first(scores: NDArray[np.floating], first: int) -> Iterator[int]:
    """Yield eligible positions best first; the sorted list is extended only when it runs out."""
    done, size = 0, first
    while True:
        top = top_k(scores, size)
        for start in range(done, top.size, _WINDOW):
            yield from top[start : start + _WINDOW].tolist()
        if top.size < size:
            return
        done, size = size, 4 * size


def round_robin(scores_QN: NDArray[np.floating], k: int, *, lose_turn: bool = False) -> NDArray[np.int64]:
    """Let queries take turns, each taking its best position that is not yet taken.

    The rule of RDS+ (Ivison et al.: Large-Scale Data Selection for Instruction Tuning, arXiv 2503.01807). ``lose_turn``
    is that of ``take_turns``. Positions int64 [min(k, positions eligible for some query)] come in the order taken,
    which depends on the order of the queries.
    """
    limit = min(k, scores_QN.shape[1])
    first = 2 * limit // len(scores_QN) + 16
    return take_turns([_best_first(one, first) for one in scores_QN], limit, lose_turn=lose_turn)


Uniforms = Callable[[str, NDArray[np.int64]], NDArray[np.float64]]
"""(what for, ids [n]) to numbers in (0, 1) [n] that depend on each id alone."""

ABSENT: Any = None
"""Default of arrays that only some rules read; a rule's ``needs`` says which."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Rows to choose from, and what is known about them: what the rule needs; anything else may be None."""

    rows: Rows  # row ids [n]; draws are keyed by them
    uniforms: Uniforms  # random numbers by id
    scores: NDArray[np.floating] = ABSENT  # larger is better, finite [n]
    by_query: NDArray[np.floating] | None = None
    """Score of every row for every query that takes turns, or task, finite [Q, n]; None: the ``queries`` take turns."""
    vectors: NDArray[np.float32] = ABSENT  # one vector a row, finite, float32 [n, D]
    queries: NDArray[np.float32] = ABSENT  # vectors of the targets' rows, finite, float32 [M, D]
    lengths: NDArray[np.int64] = ABSENT  # tokens of each row [n]
    groups: NDArray[np.integer] = ABSENT  # group of each row, as its domain, int [n]

    @staticmethod
    def stream(seed: int, name: str, index: int, unnamed: Collection[str] = ()) -> Uniforms:
        """Return the random numbers of one decision: stream ``name.purpose``, or ``name`` for ``unnamed`` purposes."""
        return lambda what, ids: uniforms(seed, name if what in unnamed else f"{name}.{what}", index, ids)


def token_budget(
    scores: NDArray[np.floating], lengths: NDArray[np.integer], tokens: int, k: int, *, skip: bool = True
) -> NDArray[np.int64]:
    """Take rows best first while the ``lengths`` [n] of those taken add up to at most ``tokens``; at most ``k`` rows.

    With ``skip`` a row that no longer fits is passed over; without, the walk ends there. NaN and -inf are never chosen.
    """
    order, taken, left = top_k(scores, len(scores)), [np.empty(0, dtype=np.int64)], tokens
    while len(order) and k:
        total = np.cumsum(lengths[order], dtype=np.int64)
        fitting = min(int(np.searchsorted(total, left, side="right")), k)
        taken.append(order[:fitting])
        k -= fitting
        left -= int(total[fitting - 1]) if fitting else 0
        rest = order[fitting:] if skip else order[:0]
        order = rest[lengths[rest] <= left]
    return np.concatenate(taken)


def log_weights(scores: NDArray[np.floating], temperature: float, standardize: bool) -> NDArray[np.float64]:
    """Return ``scores / temperature`` [n], of scores with mean 0 and standard deviation 1 where asked for.

    QuRating (ICML 2024, arXiv 2402.09739) draws with p ~ exp(s / tau) of standardized scores, tau = 2.
    """
    values = np.asarray(scores, dtype=np.float64)
    if standardize and len(values):
        spread = float(values.std())
        values = (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)
    return values / temperature


def multinomial(
    weights: NDArray[np.floating], k: int, rows: Rows, uniforms: Uniforms, *, replacement: bool
) -> NDArray[np.int64]:
    """Draw ``k`` positions with probability proportional to ``weights`` [n].

    Positions int64 come in the order of the draw: [k] with replacement, else [min(k, rows of weight above 0)]. A
    negative weight, or none above 0, raises DataError.
    """
    values = np.asarray(weights, dtype=np.float64)
    if (values < 0).any():
        raise DataError(
            "multinomial: scores are taken for weights, and some are negative. Set 'weights: softmax', or use the "
            "rule gumbel_top_k."
        )
    if not (values > 0).any():
        raise DataError(f"multinomial: the weights of {len(values):,} rows are all 0; there is nothing to draw from.")
    if replacement:
        return weighted_with_replacement(values, k, uniforms("draws", np.arange(k, dtype=np.int64)))
    with np.errstate(divide="ignore"):
        return gumbel_top_k(np.log(values), k, uniforms("gumbel", rows))


Quota = Literal["water_filling", "proportional"]


def water_filling(sizes: ArrayLike, total: int) -> NDArray[np.int64]:
    """Share ``total`` out equally over groups of these sizes [G]; groups too small for their share give all they have.

    Groups ascend by size, ties by index; each gets what is left divided by the groups left, rounded down, or all
    it has (S2L, NeurIPS 2024, arXiv 2403.07384). Sizes (2, 10, 50) and 30 give (2, 10, 18).
    """
    counts = np.asarray(sizes, dtype=np.int64)
    result = np.zeros(len(counts), dtype=np.int64)
    left = int(total)
    for turn, group in enumerate(np.argsort(counts, kind="stable").tolist()):
        result[group] = min(int(counts[group]), left // (len(counts) - turn))
        left -= int(result[group])
    return result


def by_quota(groups: NDArray[np.integer], preference: NDArray[np.floating], k: int, quota: Quota) -> NDArray[np.int64]:
    """Let every group give its quota of ``k`` rows, those of largest preference: positions in order of preference.

    ``groups`` [n] are >= 0; ``preference`` [n] is finite, ties by position.
    """
    sizes, k = np.bincount(groups), min(k, len(groups))
    if k == 0:
        return np.empty(0, dtype=np.int64)
    wanted = water_filling(sizes, k) if quota == "water_filling" else largest_remainder(k, sizes)
    order = np.argsort(-np.asarray(preference, dtype=np.float64), kind="stable")
    grouped = order[np.argsort(groups[order], kind="stable")]
    starts = np.cumsum(sizes) - sizes
    rank = np.empty(len(groups), dtype=np.int64)
    rank[grouped] = np.arange(len(groups)) - starts[groups[grouped]]
    return order[rank[order] < wanted[groups[order]]].astype(np.int64)
