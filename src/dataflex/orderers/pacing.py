"""Curricula that give out more and more of the ranked rows, shuffled, as training goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Card, Problem, RunFacts, param
from dataflex.orderers.patterns import OrderParams, RankedOrderer

Pace = Literal["linear", "quad", "root", "step", "exp", "log", "competence"]

_PACES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda b, x: b + (1 - b) * x,
    "quad": lambda b, x: b + (1 - b) * x**2,
    "root": lambda b, x: b + (1 - b) * math.sqrt(x),
    "step": lambda b, x: b + math.floor(x),
    "exp": lambda b, x: b + (1 - b) * math.expm1(10 * x) / math.expm1(10),
    "log": lambda b, x: b + (1 - b) * (1 + 0.1 * math.log(x + math.exp(-10))),
    "competence": lambda b, x: math.sqrt(x * (1 - b**2) + b**2),
}


def share_at(function: str, start: float, progress: float) -> float:
    """Return the share of the rows that is available, 0 to 1, at ``progress`` t / (a T) of the way to all of them.

    The first six functions are those of Wu et al. (arXiv 2012.03107), with b = ``start``; ``competence`` is the square
    root of Platanios et al. (NAACL 2019, arXiv 1903.09848).
    """
    return 1.0 if progress >= 1.0 else min(1.0, max(0.0, _PACES[function](start, progress)))


class Pacing(RankedOrderer):
    """Serve rows of small values alone at first, and more and more of all as training goes on.

    The rows that are available when an epoch begins, those of smallest values, are served once each in random order;
    then the next epoch begins, with more rows. All are available from ``full_at`` on. Every step is a full one.
    ``descending`` is the anti-curriculum; ``by: random`` is the random curriculum, the control with the same number of
    rows: what a curriculum gains beside it is due to the order, and most of the published gains are not. In a mixture
    each domain is paced, and the step at which an epoch begins is that of the interval's decision.
    """

    name = "pacing"
    paced: ClassVar[bool] = True
    card = Card(
        summary="Serves the rows of smallest values alone at first, then more and more of all, in random order.",
        paper="When Do Curricula Work?, ICLR 2021, arXiv 2012.03107; competence: NAACL 2019, arXiv 1903.09848",
        cost="none; 1 F per row of the pool and interval where it is ordered by the loss",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(OrderParams):
        function: Pace = param("linear", "how the number of available rows grows")
        start: float = param(0.2, "share of the rows that is available at first", above=0.0, maximum=1.0)
        full_at: float = param(0.5, "step at which all rows are available; up to 1, a share of the run", above=0.0)

        def __post_init__(self) -> None:
            if self.start == 1.0:
                raise ValueError("start: all rows are available from the first step on; lower it, or use 'shuffle'")

    params: Any

    def check(self, run: RunFacts) -> Iterator[Problem]:
        """Yield a pace that does not reach all rows within the run."""
        full, total = self.params.full_at, run.total_steps
        if total is not None and full > 1 and full > total:
            yield Problem(
                "full_at",
                f"all rows are available at step {full:g}, and the run has {total:,} steps, so that some are never "
                f"served; write {total:,} or less, or a share of the run, such as 0.5",
            )

    def ranks(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        return rng.permutation(count)

    def available(self, step: int, total_steps: int) -> float:
        """Return the share of the rows at a step, from ``start`` to 1."""
        p = self.params
        full = p.full_at * total_steps if p.full_at <= 1 else p.full_at
        return share_at(p.function, p.start, step / full)

    @property
    def reason(self) -> str:
        """The function, and what rows are ranked by."""
        return f"{super().reason} ({self.params.function} from {self.params.start:.0%})"
