"""What mixers share: sizes and held-out losses of domains, checks of a saved state, exponentiated proportions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import CheckpointError, ConfigError, DataError
from dataflex.method import Context, Mix, Mixer, State
from dataflex.method import Params as BaseParams
from dataflex.plan.proportions import Written, by_domain, check_numbers, logs, normalized, shares, softmax

__all__ = [
    "ExponentiatedMixer",
    "InitialParams",
    "check_targets",
    "held_out_losses",
    "require",
    "same_domains",
    "sizes",
]


def require(name: str, state: State, *keys: str) -> None:
    """Make sure that a saved state has ``keys``.

    Raises:
        CheckpointError: Some are missing.
    """
    missing = sorted(set(keys) - state.keys())
    if missing:
        raise CheckpointError(f"{name}: the saved state lacks {', '.join(missing)}")


def same_domains(name: str, saved: Sequence[str], found: Sequence[str]) -> None:
    """Make sure that a state is of the run's domains, in their order.

    Raises:
        CheckpointError: It was saved for others.
    """
    if tuple(saved) != tuple(found):
        raise CheckpointError(
            f"{name}: the saved weights are of the domains {', '.join(saved)}, and the run has {', '.join(found)}"
        )


def sizes(ctx: Context, method: str) -> NDArray[np.float64]:
    """Return the size of each domain in ``ctx.unit``, float64 [K], at least one of them above 0.

    Raises:
        DataError: No domain has a token (or, unit ``tokens``, tokens were not counted).
    """
    sizes_K = ctx.domains.sizes(ctx.unit)
    if not sizes_K.any():
        raise DataError(f"{method}: none of the domains {', '.join(ctx.domains.names)} has any {ctx.unit}")
    return sizes_K


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
        proportions = normalized(softmax(self.log_shares))
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
        self.log_shares = logs(self._initial(ctx, self.params.initial))

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


def check_targets(ctx: Context, method: str) -> None:
    """Make sure that there is one target data set for each domain.

    Raises:
        ConfigError: Too few or too many, with the pairs as they would be.
    """
    names, targets = ctx.domains.names, ctx.targets
    if len(names) != len(targets):
        raise ConfigError(
            f"dynamic.mixer.targets: the {method} mixer compares each domain with held-out data of its own; name one "
            f"data set for each of {', '.join(names)}, in this order (found {len(targets)}: {', '.join(targets)})"
        )


def held_out_losses(ctx: Context) -> NDArray[np.float64]:
    """Return the mean token loss of each domain's target data set, in the order of the domains [K] (collective).

    Raises:
        DataError: A target has no supervised token.
    """
    losses = []
    for name in ctx.targets:
        rows = np.arange(ctx.signals.num_rows(name), dtype=np.int64)
        means = np.asarray(ctx.signals.losses(rows, target=name), dtype=np.float64)
        tokens = np.array([len(part) for part in ctx.signals.tokens(rows, target=name, part="completion")], np.float64)
        known = np.isfinite(means) & (tokens > 0)
        if not known.any():
            raise DataError(f"dynamic.mixer.targets: {name!r} has no row with a finite loss")
        losses.append(float(np.average(means[known], weights=tokens[known])))
    return np.array(losses)
