"""From a fit to the proportions to train with.

Laws: the exact convex minimum near the natural mix and under caps (Olmix, arXiv 2602.12237; KL 0.05).
Trees: the mean of the 128 mixtures of 100,000 Dirichlet draws with the lowest predicted loss (RegMix,
arXiv 2407.01492).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.core.rng import stream
from dataflex.errors import ConfigError, did_you_mean
from dataflex.mixing.convex import minimise
from dataflex.mixing.fit import Fit
from dataflex.mixing.simplex import check_caps
from dataflex.mixing.swarm import dirichlet, prior_of

__all__ = ["KL", "propose", "search"]

Floats = NDArray[np.float64]

KL = 0.05
_DRAWS = 100_000
_BEST = 128
_AT_ONCE = 10_000
_GAP = 1e-6


def propose(
    fit: Fit,
    sizes_K: Floats,
    *,
    tasks: Sequence[str] = (),
    kl: float = KL,
    caps_K: Floats | None = None,
    prior_power: float = 1.0,
    seed: int = 0,
) -> tuple[Floats, dict[str, Any]]:
    """Return proportions [K] for the lowest mean predicted loss, and details.

    Args:
        fit: The fitted models.
        sizes_K: Natural sizes in the order of ``fit.names`` [K], any unit.
        tasks: Tasks to lower the mean of; none means all whose unseen runs are predicted at all.
        kl: Weight of the divergence from the natural mix; laws only.
        caps_K: Largest share of each domain [K].
        prior_power: Power of the natural shares that trees are searched around.
        seed: Seed of that search.

    Raises:
        ConfigError: An unknown task, or one of whose fit nothing is to be had, a negative weight, or caps that
            cannot be met.
    """
    problems = [
        f"--tasks: {task}: was not fitted{did_you_mean(task, fit.tasks)} (fitted: {', '.join(fit.tasks)})"
        for task in tasks
        if task not in fit.tasks
    ]
    useless = [task for task in fit.tasks if task in fit.quality and not fit.quality[task].usable]
    problems += [
        f"--tasks: {task}: its fit is off by {fit.quality[task].error:.3g} nats on runs that it has not seen, which "
        f"spread by {fit.quality[task].spread:.3g}; nothing can be proposed from it. Leave it out, or fit again with "
        "more runs"
        for task in tasks
        if task in useless
    ]
    if not tasks:
        tasks = [task for task in fit.tasks if task not in useless]
        if not tasks:
            problems.append(
                f"no fit predicts a run that it has not seen ({', '.join(useless)}), so nothing can be proposed; fit "
                "again with more runs, or with --method lightgbm"
            )
    if not (np.isfinite(kl) and kl >= 0):
        problems.append(f"--kl: must be a number of at least 0, found {kl:g}")
    if problems:
        raise ConfigError(problems)
    natural = sizes_K / sizes_K.sum()
    caps = np.ones_like(natural) if caps_K is None else np.minimum(caps_K, 1.0)
    names = fit.names
    if fit.theta is not None:
        usable = (natural > 0) | (kl == 0)
        check_caps(np.where(usable, caps, 0.0), names)
        chosen = fit.theta[[fit.tasks.index(task) for task in tasks]]
        slopes = chosen[:, 2:] + chosen[:, 1:2]  # proportions sum to 1, so an offset may be added to every slope
        found = minimise(slopes, natural, kl=kl, caps_K=caps)
        proportions = found.proportions
        details: dict[str, Any] = {"kl": kl, "gap": found.gap, "steps": found.steps}
        if found.gap > _GAP * (1 + abs(found.value)):
            details["warning"] = f"stopped {found.gap:.2g} above the best value at most"
    else:
        check_caps(np.where(natural > 0, caps, 0.0), names)
        proportions, details = search(fit, prior_of(sizes_K, prior_power), caps, tasks=tasks, seed=seed)
    told = list(tasks)
    before, after = fit.predict(np.stack([natural, proportions]), told)
    details["predicted"] = dict(zip(told, after.tolist(), strict=True))
    details["predicted_natural"] = dict(zip(told, before.tolist(), strict=True))
    details["left_out"] = [] if len(told) == len(fit.tasks) else [task for task in useless if task not in told]
    details["natural"] = dict(zip(names, natural.tolist(), strict=True))
    return proportions, details


def search(
    fit: Fit, prior_K: Floats, caps_K: Floats, *, tasks: Sequence[str] = (), seed: int = 0
) -> tuple[Floats, dict[str, Any]]:
    """Return the mean [K] of the best draws from Dirichlet(prior) that keep to the caps, and details.

    Raises:
        ConfigError: Too few draws keep to the caps.
    """
    kept, predicted = [], []
    for batch in range(_DRAWS // _AT_ONCE):
        drawn = dirichlet(stream(seed, "mixing.search", batch), np.broadcast_to(prior_K, (_AT_ONCE, len(prior_K))))
        drawn = drawn[(drawn <= caps_K).all(axis=1)]
        if len(drawn):
            kept.append(drawn)
            predicted.append(fit.predict(drawn, tasks).mean(axis=1))
    num_kept = sum(map(len, kept))
    if num_kept < _BEST:
        raise ConfigError(
            f"caps: only {num_kept} of {_DRAWS:,} drawn mixtures keep to them, and {_BEST} are averaged; raise "
            "--max-epochs or --cap, or fit with --method log_linear, whose minimum is exact under caps"
        )
    mixtures, losses = np.concatenate(kept), np.concatenate(predicted)
    best = np.argsort(losses, kind="stable")[:_BEST]
    mean = mixtures[best].mean(axis=0)
    return mean / mean.sum(), {"draws": _DRAWS, "within_caps": num_kept, "averaged": _BEST}
