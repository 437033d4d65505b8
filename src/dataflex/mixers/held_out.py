"""Held-out losses of the domains, one target data set for each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError, DataError
from dataflex.method import Context

__all__ = ["check_targets", "held_out_losses"]


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
