"""``dataflex mix propose``: from a fit to the proportions to train with.

Laws: the exact convex minimum near the natural mix and under caps (Olmix, arXiv 2602.12237; KL 0.05).
Trees: the mean of the 128 mixtures of 100,000 Dirichlet draws with the lowest predicted loss (RegMix,
arXiv 2407.01492).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataflex.config.args import data_set_names
from dataflex.errors import ConfigError, did_you_mean
from dataflex.mixing.fit import FIT, Fit, read_fit
from dataflex.mixing.options import Solution, check_names, given, numbers_by_name, write_result
from dataflex.mixing.runs import given_sizes
from dataflex.mixing.swarm import SWARM, Drawer, dirichlet, prior_of, read_swarm
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import provenance
from dataflex.printable import Answer
from dataflex.record.text import columns
from dataflex.rng import stream

KL = 0.05

_BARRIERS = np.geomspace(1.0, 1e-11, 23)
_MOST_NEWTON = 60
_NEVER = 1e-9  # shares below it become 0: the barrier keeps every share above it
_GAP = 1e-6
_DRAWS = 100_000
_BEST = 128
_AT_ONCE = 10_000
_MAX_EPOCHS = 4.0


def caps_of_epochs(sizes_K: Floats, budget: float, max_epochs: float) -> Floats:
    """Return the largest shares [K] with at most ``max_epochs`` epochs: min(k N_j / R, 1) (Olmix).

    ``sizes_K`` N [K] and ``budget`` R, the size of the large run, have one unit.
    """
    return np.minimum(max_epochs * np.asarray(sizes_K, dtype=np.float64) / budget, 1.0)


def check_caps(caps_K: Floats, names: Sequence[str]) -> None:
    """Raise ``ConfigError`` unless some mixture keeps to the caps [K]."""
    total = float(caps_K.sum())
    if total < 1 - 1e-12:
        order = np.argsort(-caps_K, kind="stable")[:4]
        largest = ", ".join(f"{names[k]} {caps_K[k]:.3g}" for k in order)
        raise ConfigError(
            f"caps: cannot be met: the largest shares that they allow sum to {total:.4g}, less than 1 ({largest}); "
            "raise --max-epochs or --cap, or lower --budget"
        )


def kl_projection(q_K: Floats, caps_K: Floats) -> Floats:
    """Return argmin_p KL(p || q) over the simplex with p <= caps: p = min(caps, s q) with the s that sums to 1.

    The caps of those with q above 0 must sum to at least 1; q may have any scale.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(q_K > 0, caps_K / q_K, np.inf)
        order = np.argsort(ratio, kind="stable")  # the scale at which each one reaches its cap
        capped = np.concatenate([[0.0], np.cumsum(caps_K[order])[:-1]])
        free = np.cumsum(q_K[order][::-1])[::-1]
        scales = (1.0 - capped) / free  # with the first n capped, the others at scale x q
    fits = (scales <= ratio[order]) & (free > 0)
    if not fits.any():  # the caps sum to 1 up to rounding
        p = np.where(q_K > 0, caps_K, 0.0)
    else:
        p = np.minimum(caps_K, scales[np.argmax(fits)] * q_K)
    return p / p.sum()


def linear_minimum(gradient_K: Floats, caps_K: Floats) -> Floats:
    """Return argmin_p <gradient, p> over the simplex with p <= caps: the cheapest domains, filled to their caps."""
    p = np.zeros_like(caps_K)
    left = 1.0
    for k in np.argsort(gradient_K, kind="stable"):
        p[k] = min(caps_K[k], left)
        left -= p[k]
        if left <= 0:
            break
    return p


@dataclass(frozen=True, kw_only=True)
class _Objective:
    """mean_i exp(A_i . p) + kl x KL(p || natural) over the domains that may be used."""

    slopes_TK: Floats
    natural_K: Floats
    kl: float

    def value(self, p_K: Floats) -> float:
        value = float(np.exp(self.slopes_TK @ p_K).mean())
        if self.kl > 0:
            used = p_K > 0
            value += self.kl * float(p_K[used] @ np.log(p_K[used] / self.natural_K[used]))
        return value

    def gradient(self, p_K: Floats) -> Floats:
        gradient: Floats = np.exp(self.slopes_TK @ p_K) @ self.slopes_TK / len(self.slopes_TK)
        if self.kl > 0:  # at 0 the slope of the divergence is -infinity; a huge number does
            gradient = gradient + self.kl * (np.log(np.maximum(p_K, 1e-300) / self.natural_K) + 1.0)
        return gradient

    def hessian(self, p_K: Floats) -> Floats:
        weights_T = np.exp(self.slopes_TK @ p_K) / len(self.slopes_TK)
        hessian: Floats = (self.slopes_TK * weights_T[:, None]).T @ self.slopes_TK
        return hessian + np.diag(self.kl / p_K)


def minimize(slopes_TK: Floats, natural_K: Floats, *, kl: float, caps_K: Floats | None = None) -> Solution:
    """Minimize mean_i exp(A_i . p) + kl x KL(p || natural).

    Args:
        slopes_TK: A, one row per task [T, K]; an offset of a task may be added to its whole row.
        natural_K: p0 [K], sum 1; a domain with 0 keeps 0 when ``kl`` is above 0.
        kl: Weight of the divergence, >= 0.
        caps_K: Upper bounds [K], summing to at least 1 over the domains that may be used.
    """
    caps = np.ones_like(natural_K) if caps_K is None else np.minimum(caps_K, 1.0)
    usable = caps > 0 if kl == 0 else (caps > 0) & (natural_K > 0)
    bounds = caps[usable]
    goal = _Objective(slopes_TK=slopes_TK[:, usable], natural_K=natural_K[usable], kl=kl)
    p, steps = bounds / bounds.sum(), 0
    if bounds.sum() > 1 + 1e-9 and len(p) > 1:  # else the caps leave one mixture only
        # A cap of 1 binds only where all others are 0, which their own bound already says.
        p, steps = _along_the_barrier(goal, p, np.where(bounds < 1.0, bounds, np.inf))
        p = kl_projection(np.where(p < _NEVER, 0.0, p) if kl == 0 else p, bounds)
    gradient = goal.gradient(p)
    gap = float(gradient @ (p - linear_minimum(gradient, bounds)))
    proportions = np.zeros_like(natural_K)
    proportions[usable] = np.minimum(p, bounds)
    return Solution(proportions=proportions, value=goal.value(p), gap=max(gap, 0.0), steps=steps)


def _along_the_barrier(goal: _Objective, p_K: Floats, bounds_K: Floats) -> tuple[Floats, int]:
    """Minimize goal - mu sum log p - mu sum log(bound - p) for falling mu, from a point inside."""
    capped = np.isfinite(bounds_K)
    steps = 0

    def barrier(p: Floats, mu: float) -> float:
        return goal.value(p) - mu * float(np.log(p).sum() + np.log((bounds_K - p)[capped]).sum())

    for mu in _BARRIERS:
        for _ in range(_MOST_NEWTON):
            room = bounds_K - p_K
            gradient = goal.gradient(p_K) - mu / p_K + mu / room
            scale = np.minimum(p_K, room)  # makes the system well conditioned however near the bounds
            system = scale[:, None] * goal.hessian(p_K) * scale
            system[np.diag_indices_from(system)] += mu * (scale / p_K) ** 2 + mu * (scale / room) ** 2
            solved = np.linalg.solve(system, np.stack([scale * gradient, scale], axis=1))
            multiplier = -(scale @ solved[:, 0]) / (scale @ solved[:, 1])
            move = -scale * (solved[:, 0] + multiplier * solved[:, 1])
            decrease = -float(gradient @ move)
            steps += 1
            if decrease <= 1e-7 * mu:
                break
            with np.errstate(divide="ignore", invalid="ignore"):
                limits = np.where(move < 0, -p_K / move, np.where(move > 0, room / move, np.inf))
            length, before = min(1.0, 0.99 * float(limits.min())), barrier(p_K, mu)
            while length > 1e-10 and barrier(p_K + length * move, mu) > before - 0.1 * length * decrease:
                length /= 2.0
            if length <= 1e-10:  # nothing left to gain in float64
                break
            p_K = p_K + length * move
    return p_K, steps


def propose(
    fit: Fit, sizes_K: Floats, *, tasks: Sequence[str] = (), kl: float = KL, caps_K: Floats | None = None, seed: int = 0
) -> tuple[Floats, dict[str, Any]]:
    """Return proportions [K] for the lowest mean predicted loss of ``tasks`` (none: all usable), and details.

    Sizes [K] have any unit. ``kl`` is the weight of the divergence from the natural mix, for laws only; ``seed`` that
    of the search among mixtures, for trees only.
    """
    tasks, useless = usable_tasks(fit, tasks, kl)
    natural = sizes_K / sizes_K.sum()
    caps = np.ones_like(natural) if caps_K is None else np.minimum(caps_K, 1.0)
    if fit.theta is not None:
        check_caps(np.where((natural > 0) | (kl == 0), caps, 0.0), fit.names)
        chosen = fit.theta[[fit.tasks.index(task) for task in tasks]]
        slopes = chosen[:, 2:] + chosen[:, 1:2]  # proportions sum to 1, so an offset may be added to every slope
        found = minimize(slopes, natural, kl=kl, caps_K=caps)
        proportions = found.proportions
        details: dict[str, Any] = {"kl": kl, "gap": found.gap, "steps": found.steps}
        if found.gap > _GAP * (1 + abs(found.value)):
            details["warning"] = f"stopped {found.gap:.2g} above the best value at most"
    else:
        check_caps(np.where(natural > 0, caps, 0.0), fit.names)
        proportions, details = _search(fit, prior_of(sizes_K, 1.0), caps, tasks, seed)
    before, after = fit.predict(np.stack([natural, proportions]), tasks)
    details["predicted"] = dict(zip(tasks, after.tolist(), strict=True))
    details["predicted_natural"] = dict(zip(tasks, before.tolist(), strict=True))
    details["left_out"] = [] if len(tasks) == len(fit.tasks) else [task for task in useless if task not in tasks]
    details["natural"] = dict(zip(fit.names, natural.tolist(), strict=True))
    return proportions, details


def usable_tasks(fit: Fit, tasks: Sequence[str], kl: float = 0.0) -> tuple[list[str], list[str]]:
    """Return the tasks to lower the mean of, and those without a usable fit."""
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
    chosen = list(tasks) or [task for task in fit.tasks if task not in useless]
    if not chosen:
        problems.append(
            f"no fit predicts a run that it has not seen ({', '.join(useless)}), so nothing can be proposed; fit "
            "again with more runs, or with --method lightgbm"
        )
    if not (np.isfinite(kl) and kl >= 0):
        problems.append(f"--kl: must be a number of at least 0, found {kl:g}")
    if problems:
        raise ConfigError(problems)
    return chosen, useless


def best_draws(
    fit: Fit, draw: Drawer, caps_K: Floats, tasks: Sequence[str], seed: int, count: int | None
) -> tuple[Floats, int]:
    """Return those of 100,000 draws within the caps that have the lowest mean predicted loss of ``tasks``, best first.

    Returns:
        At most ``count`` mixtures [N, K] (None: all), and how many of the draws keep to the caps.
    """
    kept, predicted = [], []
    for batch in range(_DRAWS // _AT_ONCE):
        drawn = draw(stream(seed, "mixing.search", batch), _AT_ONCE)
        drawn = drawn[(drawn <= caps_K).all(axis=1)]
        if len(drawn):
            kept.append(drawn)
            predicted.append(fit.predict(drawn, tasks).mean(axis=1))
    if not kept:
        return np.empty((0, len(caps_K))), 0
    best = np.argsort(np.concatenate(predicted), kind="stable")[:count]
    return np.concatenate(kept)[best], sum(map(len, kept))


def _search(
    fit: Fit, prior_K: Floats, caps_K: Floats, tasks: Sequence[str], seed: int
) -> tuple[Floats, dict[str, Any]]:
    """Return the mean [K] of the best draws from Dirichlet(prior) that keep to the caps, and details."""

    def draw(rng: np.random.Generator, num_draws: int) -> Floats:
        return dirichlet(rng, np.broadcast_to(prior_K, (num_draws, len(prior_K))))

    best, num_kept = best_draws(fit, draw, caps_K, tasks, seed, _BEST)
    if num_kept < _BEST:
        raise ConfigError(
            f"caps: only {num_kept} of {_DRAWS:,} drawn mixtures keep to them, and {_BEST} are averaged; raise "
            "--max-epochs or --cap, or fit with --method log_linear, whose minimum is exact under caps"
        )
    mean = best.mean(axis=0)
    return mean / mean.sum(), {"draws": _DRAWS, "within_caps": num_kept, "averaged": _BEST}


def _sizes(options: argparse.Namespace, names: Sequence[str]) -> tuple[Floats, str]:
    """Return the natural sizes [K] in the order of ``names``, and their unit."""
    if options.natural is not None:
        sizes, unit = given_sizes(options.natural)
    elif (options.folder / SWARM).is_file():
        swarm = read_swarm(options.folder)
        sizes, unit = dict(zip(swarm.names, swarm.sizes.tolist(), strict=True)), swarm.unit
    else:
        raise ConfigError(f"--natural: missing; {options.folder} holds no {SWARM} with the sizes of the domains")
    check_names("--natural", sizes, names, every=True)
    if not any(sizes.values()):
        raise ConfigError("--natural: all sizes are 0")
    return np.asarray([sizes[name] for name in names], dtype=np.float64), unit


def asked_caps(options: argparse.Namespace, sizes: Floats, unit: str, names: Sequence[str]) -> tuple[Floats, list[str]]:
    """Return the largest share of each domain [K], and notes."""
    caps, notes = np.ones(len(names)), []
    epochs = _MAX_EPOCHS if options.max_epochs is None else options.max_epochs
    if options.budget is not None:
        if not options.budget > 0 or not epochs > 0:
            raise ConfigError("--budget and --max-epochs: must be above 0")
        if unit == "shares":
            raise ConfigError("--budget: sizes are known as shares only; give --natural with sizes in a unit")
        caps = caps_of_epochs(sizes, options.budget, epochs)
    elif options.max_epochs is not None:
        raise ConfigError("--max-epochs: has no effect without --budget, what the large run uses in the unit of sizes")
    else:
        notes.append(f"no --budget (in {unit}), so no domain is kept from being repeated too often")
    if options.cap:
        single = numbers_by_name(options.cap, "--cap")
        check_names("--cap", single, names, every=False)
        caps = np.minimum(caps, [single.get(name, 1.0) for name in names])
    return caps, notes


def propose_step(options: argparse.Namespace) -> Answer:
    """Write the proportions file of a fit and return what to print."""
    fit = read_fit(options.folder)
    if fit.method == "lightgbm" and options.kl is not None:
        raise ConfigError("--kl: has no effect with lightgbm, whose search stays near the natural mix by its draws")
    sizes, unit = _sizes(options, fit.names)
    caps, notes = asked_caps(options, sizes, unit, fit.names)
    kl = KL if options.kl is None else options.kl
    tasks = data_set_names(options.tasks)
    shares, details = propose(fit, sizes, tasks=tasks, kl=kl, caps_K=caps, seed=options.seed)
    source = provenance(
        "dataflex mix propose",
        inputs=[options.folder / FIT],
        settings={**given(options, "budget", "max_epochs", "cap", "tasks", "natural", "seed"), "kl": kl},
        packages=("scipy",),
        config_digest=fit.provenance.get("config_digest"),
    )
    told = write_result(
        options.out or options.folder / "proportions.json",
        fit.names,
        shares,
        method=fit.method,
        source={**source, "fit": fit.provenance},
        details={**details, "caps": dict(zip(fit.names, caps.tolist(), strict=True))},
        natural=sizes / sizes.sum(),
        caps=caps,
    )
    table = [["held-out set", "natural mix", "proposed"]]
    for task, after in details["predicted"].items():
        table.append([task, f"{details['predicted_natural'][task]:.4f}", f"{after:.4f}"])
    notes += [details["warning"]] if "warning" in details else []
    if details["left_out"]:
        notes.append(
            f"left out, as unseen runs are not predicted at all (see 'mix fit'): {', '.join(details['left_out'])}"
        )
    lines = [told, "predicted losses", *columns(table), *(f"note: {note}" for note in notes)]
    return Answer("\n".join(lines), {**told.values, "notes": notes})
