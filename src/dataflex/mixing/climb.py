"""``dataflex mix climb``: rounds of small runs, each drawn from what a fit to all runs so far predicts to be best.

CLIMB (Diao et al., arXiv 2504.13161), its search, from notes on the paper: a first round of mixtures from a Dirichlet;
then, again and again, a predictor is fitted, candidates from the same Dirichlet are ranked by it, and the next, smaller
round is drawn at random from the best ones that no run has had. Its mixture at the end is the predictor's best, here
the mean of the 128 best candidates. A reproduction found that one worse than the best mixtures that were measured (of
many predictions the best is the luckiest), so it has to be ahead of them by more than the predictor errs.

The folder is that of a swarm, whose runs grow by round: what is written stays, so the same command goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from dataflex.config.args import data_set_names
from dataflex.config.load import load_mapping
from dataflex.errors import ConfigError
from dataflex.mixing.fit import FIT, Fit, fit_step, read_fit
from dataflex.mixing.options import given, write_result
from dataflex.mixing.propose import asked_caps, best_draws, check_caps, usable_tasks
from dataflex.mixing.runs import RATIOS, losses_of_run, say, without_mixer
from dataflex.mixing.swarm import SWARM, Swarm, asked_swarm, drawer, read_swarm, train_swarm, values_of
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import provenance
from dataflex.printable import Answer, left_out_note
from dataflex.record.text import columns
from dataflex.rng import stream

_AVERAGED = 128  # best candidates at the end
_AT_ONCE = 1000  # candidates that are compared with the runs together
_WIDER = "raise --max-epochs, --cap, or the most of --strengths"


def ranked(fit: Fit, swarm: Swarm, caps_K: Floats, tasks: Sequence[str]) -> Floats:
    """Return the distinct candidates [N, K] within the caps, those of the lowest predicted loss first."""
    draw = drawer(swarm.sizes, swarm.settings)
    drawn, _ = best_draws(fit, draw, caps_K, tasks, swarm.settings.seed, None)
    _, first = np.unique(drawn, axis=0, return_index=True)  # weak concentrations give the same corners again and again
    if not len(first):
        raise ConfigError(f"caps: no candidate keeps to them; {_WIDER}")
    return drawn[np.sort(first)]


def next_round(best_NK: Floats, earlier_RK: Floats, runs: int, top: int, distance: float, seed: int) -> Floats:
    """Draw the mixtures [runs, K] of a round from the ``top`` best candidates that no run has had.

    Args:
        best_NK: Distinct candidates, the best first.
        earlier_RK: Mixtures of the runs so far.
        runs: Mixtures to draw, at most ``top``.
        top: How many of the candidates count as best.
        distance: Candidates at most this far (L1) from a run count as that run.
        seed: Of the draw; the number of earlier runs makes it another one in each round.

    Raises:
        ConfigError: Fewer than ``runs`` candidates are left.
    """
    new = best_NK[:0]
    for start in range(0, len(best_NK), _AT_ONCE):
        part = best_NK[start : start + _AT_ONCE]
        apart = np.abs(part[:, None] - earlier_RK).sum(axis=2).min(axis=1) > distance
        new = np.concatenate([new, part[apart]])[:top]
        if len(new) == top:
            break
    if len(new) < runs:
        told = f"only {len(new)} of {len(best_NK):,} distinct candidates had no run, and the next round has {runs}"
        raise ConfigError(f"--runs: {told}; {_WIDER}")
    return new[stream(seed, "mixing.climb", len(earlier_RK)).choice(len(new), size=runs, replace=False)]


def choose(
    fit: Fit, proposed_K: Floats, mixtures_RK: Floats, losses_R: Floats, tasks: Sequence[str]
) -> tuple[Floats, dict[str, Any]]:
    """Return the proposed mixture [K], or that of the best run unless the proposal is ahead by more than the fit errs.

    ``losses_R`` are measured mean losses of ``tasks``. The margin is the lowest of them minus the predicted mean loss
    of the proposal; it has to be above the mean absolute error on runs that the fit has not seen.
    """
    predicted = float(fit.predict(proposed_K[None], tasks).mean())
    error = float(np.mean([fit.quality[task].error for task in tasks]))
    best = int(np.argmin(losses_R)) if len(losses_R) else None
    details = {"predicted": predicted, "error": error, "measured": None if best is None else float(losses_R[best])}
    if best is None or losses_R[best] - predicted > error:
        return proposed_K, {**details, "chosen": "predicted"}
    return mixtures_RK[best], {**details, "chosen": "measured"}


def _rounds(text: str, top: int) -> list[int]:
    """Return the runs of each round."""
    try:
        rounds = [int(part) for part in text.split(",")]
    except ValueError:
        rounds = []
    if not rounds or min(rounds) < 1:
        raise ConfigError(f"--runs: expected the runs of each round such as 64,32,16, found {text!r}")
    if max(rounds[1:], default=0) > top:
        raise ConfigError(f"--top: a round of {max(rounds[1:])} runs cannot be drawn from the best {top}; raise it")
    return rounds


def _fitted(options: argparse.Namespace) -> tuple[Fit, str]:
    """Fit all runs so far; return the fit and what was told."""
    told = fit_step(argparse.Namespace(**{**vars(options), "folder": options.out, "metrics": None}))
    return read_fit(options.out), told


def _waiting(swarm: Swarm, missing: Sequence[str], number: int, rounds: int, notes: Sequence[str]) -> Answer:
    """Return what is to be run next."""
    configs = [str(swarm.config(run)) for run in missing]
    lines = [
        f"round {number} of {rounds}: {len(missing)} of the {len(swarm.runs)} runs so far are not finished",
        *(f"  dataflex train {config}" for config in configs[:8]),
        *(["  ..."] if len(configs) > 8 else []),
        "run them on any machine, or the same command with --run; then the same command goes on",
        *notes,
    ]
    return Answer("\n".join(lines), {**values_of(swarm), "round": number, "next": configs})


def climb_step(options: argparse.Namespace) -> Answer | int:
    """Go on with the rounds as far as runs are finished (or trained here); return what to print or an exit code."""
    rounds = _rounds(options.runs, options.top)
    mapping = load_mapping(options.config, options.overrides)
    lf, _ = without_mixer(mapping, options.config.absolute().parent)
    if not (lf.eval_sets or lf.val_size > 0):
        raise ConfigError("eval_dataset: missing; rounds are drawn by held-out losses, so name a set for each goal")
    without, ends = data_set_names(options.without), np.cumsum(rounds).tolist()
    added: Floats | None = None
    if (options.out / SWARM).is_file():
        added = read_swarm(options.out).mixtures[rounds[0] :]
    while True:
        swarm = asked_swarm(options, mapping, rounds[0], added)
        number = sum(end < len(swarm.runs) for end in ends[:-1]) + 1
        caps, notes = asked_caps(options, swarm.sizes, swarm.unit, swarm.names)
        check_caps(np.where(swarm.sizes > 0, caps, 0.0), swarm.names)
        if options.run:
            say(f"round {number} of {len(rounds)}: {len(swarm.runs)} runs with those before, in {swarm.folder}")
            code = train_swarm(swarm, mapping, without)
            if code:
                return code
        missing = [run for run in swarm.unfinished() if run not in without]
        if missing:
            return _waiting(swarm, missing, number, len(rounds), left_out_note(mapping))
        fit, told = _fitted(options)
        tasks, _ = usable_tasks(fit, data_set_names(options.tasks))
        upcoming = [end for end in ends if end > len(swarm.runs)]
        if not upcoming:
            return _finish(options, swarm, fit, tasks, caps, [told, *(f"note: {note}" for note in notes)])
        say(told)
        best = ranked(fit, swarm, caps, tasks)
        runs = upcoming[0] - len(swarm.runs)
        drawn = next_round(best, swarm.mixtures, runs, options.top, swarm.settings.distance, swarm.settings.seed)
        added = np.concatenate([swarm.mixtures[rounds[0] :], drawn])


def _finish(
    options: argparse.Namespace, swarm: Swarm, fit: Fit, tasks: Sequence[str], caps: Floats, told: list[str]
) -> Answer:
    """Write the proportions and return what to print."""
    best_NK = ranked(fit, swarm, caps, tasks)[:_AVERAGED]
    mean = best_NK.mean(axis=0)
    found = [losses_of_run(swarm.output_dir(run)) for run in fit.runs]
    losses = np.array([[each[task] for task in tasks] for each in found]).mean(axis=1)
    mixtures = swarm.mixtures[[swarm.runs.index(run) for run in fit.runs]]
    allowed = (mixtures <= caps + 1e-9).all(axis=1)
    shares, details = choose(fit, mean / mean.sum(), mixtures[allowed], losses[allowed], tasks)
    source = provenance(
        "dataflex mix climb",
        inputs=[options.out / FIT, options.out / RATIOS],
        settings=given(options, "runs", "top", "budget", "max_epochs", "cap", "tasks", "natural", "seed"),
        packages=("scipy",),
        config_digest=swarm.config_digest,
    )
    natural = swarm.sizes / swarm.sizes.sum()
    answer = write_result(
        options.out / "proportions.json",
        swarm.names,
        shares,
        method=f"climb ({fit.method})",
        source={**source, "fit": fit.provenance},
        details={**details, "tasks": list(tasks), "averaged": len(best_NK)},
        natural=natural,
        caps=caps,
    )
    table = [["mean held-out loss", ""], ["best run", "none within the caps"]]
    if details["measured"] is not None:
        table[1][1] = f"{details['measured']:.4f}"
    table += [["predicted best", f"{details['predicted']:.4f}"], ["error of the predictor", f"{details['error']:.4f}"]]
    why = (
        "is ahead by more than its error" if details["chosen"] == "predicted" else "is not ahead by more than its error"
    )
    told = [*told, *columns(table), f"the predicted best {why}: the {details['chosen']} mixture is taken", str(answer)]
    return Answer("\n".join(told), {**answer.values, **values_of(swarm), "finished": True})
