"""How a learning rate goes over a run: how much of it is left for the rows that come last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.config.args import LlamaFactoryArgs

_FALLS: Mapping[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + np.cos(np.pi * done)) / 2,
    "1-sqrt": lambda done: 1 - np.sqrt(done),
}
"""How a learning rate falls, from 1 to 0."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How a learning rate goes over a run, its warm-up not counted: it stays, falls and stays again."""

    falls: str | None = None  # a key of _FALLS; None: it stays throughout
    floor: float = 0.0  # last rate as a part of the highest
    begin: float = 0.0  # shares of the run at which the fall begins and ends
    end: float = 1.0

    @classmethod
    def of(cls, lf: LlamaFactoryArgs) -> Rate:
        """Return the rate of a configuration; what falls in another way is taken for constant."""
        schedule = str(lf.lr_scheduler_type)
        given = lf.settings("lr_scheduler_kwargs")
        if schedule == "warmup_stable_decay":
            return cls._after_a_stay(given, lf.max_steps, thirds=bool(lf.train_sets))
        if schedule in ("linear", "polynomial"):
            return cls(falls="linear")
        if not schedule.startswith("cosine") or schedule == "cosine_with_restarts":
            return cls()
        floor = given.get("min_lr_rate") or (given.get("min_lr") or 0.0) / (lf.learning_rate or 1.0)
        return cls(falls="cosine", floor=float(floor) if "min_lr" in schedule else 0.0)

    @classmethod
    def _after_a_stay(cls, given: Mapping[str, Any], steps: int, *, thirds: bool) -> Rate:
        """Return a rate that falls late: where lengths are left out, ``thirds`` stays for one and falls for two."""
        stay, fall = given.get("num_stable_steps"), given.get("num_decay_steps")
        if (stay is None and fall is None and not thirds) or (steps < 1 and (stay, fall) != (None, None)):
            return cls()
        if not thirds and stay is None and fall is not None:
            stay = steps - fall
        begin = 1 / 3 if stay is None else stay / steps
        end = begin + (2 / 3 if fall is None else fall / steps)
        kind = str(given.get("decay_type", "cosine"))
        floor = float(given.get("min_lr_ratio", 0.0))
        return cls(falls=kind if kind in _FALLS else None, floor=floor, begin=begin, end=end)

    def late_share(self, late: float = 0.25) -> float:
        """Return the share of the rate, summed over a run, that falls to its last part ``late``."""
        done = np.clip((np.arange(1000) / 1000 - self.begin) / max(self.end - self.begin, 1e-9), 0.0, 1.0)
        rates = np.ones(1000) if self.falls is None else self.floor + (1 - self.floor) * _FALLS[self.falls](done)
        return float(rates[round(1000 * (1 - late)) :].sum() / rates.sum())
