"""Common ground of mixers that weigh the domains in the loss and leave the sampling as it is.

The weights in force at step t were made from the steps before it: what step t shows acts from step t + 1
on, on every rank alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Context, Mix, Mixer, State
from dataflex.mixers.simplex import logs, softmax
from dataflex.mixers.saved import require, same_domains
from dataflex.plan.domains import DomainStats
from dataflex.plan.proportions import Written, by_domain, normalized, shares

__all__ = ["LossWeightMixer"]

Floats = NDArray[np.float64]


class LossWeightMixer(Mixer):
    """Samples in fixed proportions and moves domain weights alpha in the loss after every step.

    A subclass says what is learned from a step in ``_learn``; ``params`` has ``sampling``: proportions as
    written, or None for equal shares. A domain with a share of 0 is never served and has weight 0.
    """

    observes: ClassVar[bool] = True
    weighs_loss: ClassVar[bool] = True

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.names: tuple[str, ...] = ()
        self.sampling: Floats = np.zeros(0)
        self.log_alpha: Floats = np.zeros(0)
        self.rows: Floats = np.zeros(0)
        """Rows of each domain [K]; empty until proportions were asked for."""
        self.sizes: Floats = np.zeros(0)
        """Size of each domain in the unit of the run [K]; empty until proportions were asked for."""
        self.steps = 0

    @property
    def alpha(self) -> Floats:
        """Weights of the domains [K], summing to 1."""
        return softmax(self.log_alpha)

    def mix(self, ctx: Context) -> Mix:
        """Return the sampling proportions, which never change.

        Raises:
            ConfigError: ``sampling`` has the wrong length, or names that are unknown or missing.
        """
        self._meet(ctx.domains.names)
        self.rows, self.sizes = ctx.domains.num_rows.astype(np.float64), ctx.domains.sizes(ctx.unit)
        return Mix(proportions=self.sampling.copy(), reason=f"sampling: {shares(self.names, self.sampling)}")

    def loss_weights(self) -> Floats:
        """Return alpha [K] for the next step."""
        return self.alpha

    def observe(self, stats: DomainStats) -> None:
        """Move the weights by what one step made of the domains."""
        self._meet(stats.names)
        self._learn(stats)
        self.steps += 1

    def _learn(self, stats: DomainStats) -> None:
        raise NotImplementedError

    def _first(self) -> Floats:
        """Return the first weights alpha [K]; the sampling is known."""
        served = self.sampling > 0
        return np.asarray(served / served.sum())

    def _start(self) -> None:
        """Set what a subclass keeps beside alpha; names and first weights are known."""

    def _meet(self, names: Sequence[str]) -> None:
        """Start on the domains of the run, or make sure that they are those of the state.

        Raises:
            CheckpointError: The state was saved for other domains, or another order of them.
        """
        if self.names:
            same_domains(self.name, self.names, names)
            return
        written: Written | None = self.params.sampling
        if written is None:
            sampling = np.full(len(names), 1.0 / len(names))
        else:
            sampling = normalized(by_domain(written, names, "dynamic.mixer.sampling"))
        self.names, self.sampling = tuple(names), sampling
        self.log_alpha = logs(self._first())
        self._start()

    def state_dict(self) -> State:
        """Everything that the next weights depend on; empty before the first decision."""
        if not self.names:
            return {}
        return {
            "names": list(self.names),
            "sampling": self.sampling,
            "log_alpha": self.log_alpha,
            "rows": self.rows,
            "sizes": self.sizes,
            "steps": self.steps,
        }

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        if not state:
            return
        require(self.name, state, "names", "sampling", "log_alpha", "rows", "sizes", "steps")
        self.names = tuple(state["names"])
        self.sampling = np.asarray(state["sampling"], dtype=np.float64)
        self.log_alpha = np.asarray(state["log_alpha"], dtype=np.float64)
        self.rows = np.asarray(state["rows"], dtype=np.float64)
        self.sizes = np.asarray(state["sizes"], dtype=np.float64)
        self.steps = int(state["steps"])
