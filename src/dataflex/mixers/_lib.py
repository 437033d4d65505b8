"""What mixers share: sizes and held-out losses of the domains, proportions moved by exponentiated scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from dataflex.errors import CheckpointError, ConfigError, DataError, without_loss
from dataflex.method import Context, Mix, Mixer, Params, Passes, Requires, param
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import by_domain, check_numbers, exponentiated, logs, normalized, shares, softmax
from dataflex.signals.kinds import TokenLoss

ONLINE = Requires(domains=2, stages=("pt", "sft"), needs_interval=True)
"""What every mixer requires that learns from the model."""

HELD_OUT_LOSSES = replace(
    ONLINE, signals=frozenset({"losses", "texts"}), targets=True, passes=Passes(targets=(1.0, 0.0))
)
"""What a mixer requires that asks for the loss of one target for each domain (``held_out_losses``)."""

NOTHING: Floats = np.zeros(0)  # numbers of the domains before the first decision


def mix_of(names: Sequence[str], weights: Floats, why: str = "") -> Mix:
    """Return ``weights`` [K] divided by their sum, with the reason ``why: web 0.6, code 0.4``."""
    proportions = normalized(weights)
    told = shares(names, proportions)
    return Mix(proportions=proportions, reason=f"{why}: {told}" if why else told)


def equal(num_domains: int) -> Floats:
    """Return 1 / K for each of K domains."""
    return np.full(num_domains, 1.0 / num_domains)


def even(prior: Floats) -> Floats:
    """Return equal shares of the domains that ``prior`` [K] has above 0, and 0 for the others: 0 means never."""
    return normalized((prior > 0).astype(np.float64))


def sizes(ctx: Context, method: str) -> Floats:
    """Return the size of each domain in ``ctx.unit``, float64 [K]; DataError where all are 0."""
    sizes_K = ctx.domains.sizes(ctx.unit)
    if not sizes_K.any():
        raise DataError(f"{method}: none of the domains {', '.join(ctx.domains.names)} has any {ctx.unit}")
    return sizes_K


def check_targets(ctx: Context, method: str) -> None:
    """Refuse another number of target data sets than one for each domain."""
    names, targets = ctx.domains.names, ctx.targets
    if len(names) != len(targets):
        raise ConfigError(
            f"dynamic.mixer.targets: the {method} mixer compares each domain with held-out data of its own; name one "
            f"data set for each of {', '.join(names)}, in this order (found {len(targets)}: {', '.join(targets)})"
        )


def held_out_losses(ctx: Context) -> Floats:
    """Return the mean token loss of each domain's target data set, in the order of the domains [K] (collective)."""
    losses = []
    for name in ctx.targets:
        rows = np.arange(ctx.signals.num_rows(name), dtype=np.int64)
        means = np.asarray(ctx.signals(TokenLoss(), rows, target=name), dtype=np.float64)
        tokens = np.array([len(part) for part in ctx.signals.tokens(rows, target=name, part="completion")], np.float64)
        known = np.isfinite(means) & (tokens > 0)
        if not known.any():
            raise without_loss(f"target {name!r}", labelled=bool(tokens.any()))
        losses.append(float(np.average(means[known], weights=tokens[known])))
    return np.array(losses)


class LearningMixer(Mixer):
    """A mixer whose state is of the run's domains."""

    saved: ClassVar[tuple[str, ...]] = ("names",)
    names: tuple[str, ...] = ()  # domains of the state; empty before the first decision

    def meet(self, names: Sequence[str]) -> bool:
        """Note the domains of the run and return whether the state must be begun; refuse a state of other domains."""
        new = not self.names
        if not new and self.names != tuple(names):
            raise CheckpointError(
                f"{self.name}: the saved weights are of the domains {', '.join(self.names)}, and the run has "
                f"{', '.join(names)}"
            )
        self.names = tuple(names)
        return new


@dataclass(frozen=True, kw_only=True)
class InitialParams(Params):
    """Parameters that every mixer of exponentiated scores has."""

    initial: tuple[float, ...] | dict[str, float] | str = param(
        "size", "proportions at first: size, uniform, or numbers as a list or by name"
    )

    def __post_init__(self) -> None:
        if not isinstance(self.initial, str):
            check_numbers(self.initial, "initial")
        elif self.initial not in ("size", "uniform"):
            raise ValueError(f"initial: {self.initial!r} is neither 'size' nor 'uniform' nor numbers by domain")


def first_proportions(written: Any, ctx: Context, method: str, key: str = "initial") -> Floats:
    """Return proportions [K] as ``InitialParams.initial`` writes them, or another parameter ``key``."""
    if written == "size":
        return normalized(sizes(ctx, method))
    if written == "uniform":
        return equal(len(ctx.domains.names))
    return by_domain(written, ctx.domains.names, f"dynamic.mixer.{key}")


class ExponentiatedMixer(LearningMixer):
    """Moves proportions once per interval: p <- (1 - c) softmax(log p + eta s) + c / K; a subclass makes the scores s.

    Its parameters have ``initial``, and where needed ``eta`` (else 1) and the smoothing c (else 0).
    """

    saved: ClassVar[tuple[str, ...]] = ("names", "log_shares", "updates")
    log_shares = NOTHING
    updates = 0
    told: ClassVar[str] = ""  # what the reason calls the scores; empty: it does not tell them

    def mix(self, ctx: Context) -> Mix:
        """Return the proportions after one more update; as they are during warm-up."""
        if self.meet(ctx.domains.names):
            self.log_shares = logs(self._initial(ctx))
        why = ""
        if ctx.interval.kind != "warmup":
            scores, smoothing = self._scores(ctx), getattr(self.params, "smoothing", 0.0)
            self.log_shares = exponentiated(self.log_shares, scores, eta=self._eta, smoothing=smoothing)
            self.updates += 1
            if self.told:
                most = int(np.argmax(scores))
                why = f"largest {self.told} {scores[most]:.3g} ({self.names[most]})"
        return mix_of(self.names, softmax(self.log_shares), why)

    @property
    def _eta(self) -> float:
        return float(getattr(self.params, "eta", 1.0))

    def _scores(self, ctx: Context) -> Floats:
        """Return the scores s [K] (collective)."""
        raise NotImplementedError

    def _initial(self, ctx: Context) -> Floats:
        return first_proportions(self.params.initial, ctx, self.name)
