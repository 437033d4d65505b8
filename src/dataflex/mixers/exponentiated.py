"""Common ground of mixers that move sampling proportions by exponentiated scores, once per interval.

p <- (1 - c) softmax(log p + eta s) + c / K. A subclass makes the scores s.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Context, Mix, Mixer, State
from dataflex.method import Params as BaseParams
from dataflex.mixers import simplex
from dataflex.mixers.proportions import Written, by_domain, check_numbers, normalized, shares
from dataflex.mixers.saved import require, same_domains
from dataflex.mixers.sizes import sizes

__all__ = ["ExponentiatedMixer", "InitialParams"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class InitialParams(BaseParams):
    """Parameters that every mixer of the family has."""

    initial: tuple[float, ...] | dict[str, float] | str = field(
        default="size",
        metadata={
            "help": "proportions at first: size, uniform, or numbers as a list or by name",
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.initial, str):
            if self.initial not in ("size", "uniform"):
                raise ValueError(f"initial: {self.initial!r} is neither 'size' nor 'uniform' nor numbers by domain")
        else:
            check_numbers(self.initial, "initial")


class ExponentiatedMixer(Mixer):
    """Keeps log proportions; ``params`` has ``initial``."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.names: tuple[str, ...] = ()
        self.log_shares: Floats = np.zeros(0)
        self.updates = 0

    def mix(self, ctx: Context) -> Mix:
        """Return the proportions after one more update; as they are during warm-up."""
        self._meet(ctx)
        told = ""
        if ctx.interval.kind != "warmup":
            self.log_shares, told = self._moved(ctx)
            self.updates += 1
        proportions = normalized(simplex.weights(self.log_shares))
        reason = shares(self.names, proportions)
        return Mix(proportions=proportions, reason=f"{told}: {reason}" if told else reason)

    def _moved(self, ctx: Context) -> tuple[Floats, str]:
        """Return the next log proportions [K] and a word on why."""
        raise NotImplementedError

    def _meet(self, ctx: Context) -> None:
        names = ctx.domains.names
        if self.names:
            same_domains(self.name, self.names, names)
            return
        self.names = names
        self.log_shares = simplex.logs(self._initial(ctx, self.params.initial))

    def _initial(self, ctx: Context, written: Written | str) -> Floats:
        if written == "size":
            return normalized(sizes(ctx, self.name))
        if written == "uniform":
            return np.full(len(ctx.domains.names), 1.0 / len(ctx.domains.names))
        assert not isinstance(written, str)
        return by_domain(written, ctx.domains.names, "dynamic.mixer.initial")

    def state_dict(self) -> State:
        """Everything that the next proportions depend on; empty before the first decision."""
        if not self.names:
            return {}
        return {"names": list(self.names), "log_shares": self.log_shares, "updates": self.updates}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        if not state:
            return
        require(self.name, state, "names", "log_shares", "updates")
        self.names = tuple(state["names"])
        self.log_shares = np.array(state["log_shares"], dtype=np.float64)
        self.updates = int(state["updates"])
