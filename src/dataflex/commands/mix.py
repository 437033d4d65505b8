"""``dataflex mix``: proportions from small runs, from one proxy per domain, or from embeddings."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from dataflex.commands.layout import columns
from dataflex.core.redact import left_out_note, passing_on
from dataflex.core.shown import shown
from dataflex.ending import run_child
from dataflex.errors import ConfigError

__all__ = ["mix"]


def mix(options: argparse.Namespace) -> str | int:
    """Run one step and return what to print, or an exit code where runs have printed already.

    Raises:
        ConfigError: Options that cannot work together.
        DataError: Numbers that cannot be used.
    """
    if options.step == "swarm":
        return _swarm(options)
    if options.step in ("fit", "propose"):
        from dataflex.commands import mix_fit

        return mix_fit.fit(options) if options.step == "fit" else mix_fit.propose(options)
    if options.step == "doremi":
        from dataflex.commands.mix_doremi import doremi

        return doremi(options, _train, _say)
    from dataflex.commands import mix_models

    return mix_models.mixmin(options) if options.step == "mixmin" else mix_models.chameleon(options)


def _swarm(options: argparse.Namespace) -> str | int:
    from dataflex.config.load import load_mapping
    from dataflex.mixing.fit import warnings_of
    from dataflex.mixing.runs import run_missing, write_swarm
    from dataflex.mixing.swarm import settings_of

    low, high, count = _strengths(options.strengths)
    settings = settings_of(
        options.style,
        options.runs,
        options.seed,
        least_strength=low,
        most_strength=high,
        strengths=count,
        prior_power=options.prior_power,
        max_ratio=options.max_ratio,
        min_weight=options.min_weight,
        step=options.round,
    )
    mapping = load_mapping(options.config, options.overrides)
    swarm = write_swarm(mapping, options.config.absolute().parent, options.out, settings, options.natural)
    natural = swarm.sizes / swarm.sizes.sum()
    table = [["domain", f"natural ({swarm.unit})", "least", "mean", "most"]]
    for k in np.argsort(-natural, kind="stable")[:32]:
        drawn = swarm.mixtures[:, k]
        table.append([swarm.names[k], *(f"{x:.4f}" for x in (natural[k], drawn.min(), drawn.mean(), drawn.max()))])
    lines = [f"{len(swarm.runs)} mixtures of {len(swarm.names)} domains in {swarm.folder}", *columns(table)]
    lines += [f"note: {line}" for line in warnings_of("log_linear", len(swarm.runs), len(swarm.names))]
    lines += left_out_note(mapping)
    if not swarm.held_out:
        lines.append(
            "note: the configuration has no 'eval_dataset', so the runs measure no held-out losses; add one data set "
            "per domain, or give 'mix fit' your own --metrics"
        )
    if options.run:
        _say("\n".join(lines))
        with passing_on(mapping):
            code = run_missing(swarm, _train, _say)
        return code if code else f"all runs are finished; next: dataflex mix fit {swarm.folder}"
    lines += [
        f"{len(swarm.unfinished())} of them are not run yet: dataflex train {swarm.config(swarm.runs[0])} and so on, "
        "on any machine, or the same command with --run",
        f"then: dataflex mix fit {swarm.folder}",
    ]
    return "\n".join(lines)


def _train(config: Path) -> int:
    """Train one configuration in a process of its own, so that no run inherits anything from another."""
    return run_child([sys.executable, "-m", "dataflex", "train", str(config)])


def _say(line: str) -> None:
    sys.stdout.write(shown(line, sys.stdout) + "\n")
    sys.stdout.flush()


def _strengths(text: str | None) -> tuple[float | None, float | None, int | None]:
    if text is None:
        return None, None, None
    try:
        low, high, count = text.split(",")
        return float(low), float(high), int(count)
    except ValueError as error:
        raise ConfigError(f"--strengths: expected LEAST,MOST,COUNT such as 0.1,5,15, found {text!r}") from error
