"""``dataflex mix doremi``: reference, proxy, proportions and final model, all of them or one step alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from dataflex.core.redact import left_out_note, passing_on
from dataflex.errors import ConfigError

__all__ = ["doremi"]


def doremi(options: argparse.Namespace, train: Callable[[Path], int], tell: Callable[[str], None]) -> str | int:
    """Run the steps that are not done yet and return what to print, or the exit code of a run that failed.

    Args:
        options: Parsed options.
        train: Trains one configuration in a process of its own and returns its exit code.
        tell: Takes one line per step, as it happens.

    Raises:
        ConfigError: Options or configurations that cannot work, or a step whose input is not there yet.
    """
    from dataflex.config.load import load_mapping
    from dataflex.mixing.doremi import make_plan
    from dataflex.mixing.doremi_plan import Settings
    from dataflex.mixing.doremi_steps import Steps, table_of
    from dataflex.mixing.proportions_file import read_proportions

    if options.rounds < 1:
        raise ConfigError(f"--rounds: must be at least 1, found {options.rounds}")
    if options.part is None and options.number is not None:
        raise ConfigError("--round: has no effect without --step")
    number = options.number or 1
    if number < 1 or number > max(options.rounds, 1):
        raise ConfigError(f"--round: must be from 1 to {options.rounds} (--rounds), found {number}")
    mapping = load_mapping(options.config, options.overrides)
    small = {} if options.small is None else load_mapping(options.small)
    folder = options.out or mapping.get("output_dir")
    if not folder:
        raise ConfigError("--out: missing, and the configuration has no output_dir; name a folder for all runs")
    settings = Settings(rounds=options.rounds, reference=options.reference, reference_mix=options.reference_mix)
    plan = make_plan(mapping, small, options.config.absolute().parent, Path(folder), settings)
    if options.write:
        lines = [f"dataflex train {at.folder / name}" for at in plan.rounds for name in _names(at.trains_reference)]
        return "\n".join(
            ["written, in the order in which they can be run:", *lines, *_end(plan.folder), *left_out_note(mapping)]
        )
    steps = Steps(plan, train, tell)
    with passing_on({**mapping, **small}):
        code = steps.all() if options.part is None else steps.one(options.part, number)
    if code or options.part is not None:
        return code
    lines = [
        f"the final model is in {plan.final}, its proportions in {plan.proportions}",
        f"  use them with 'mixer: {{name: static, from: {plan.proportions}}}'",
        *table_of(read_proportions(plan.proportions)),
    ]
    return "\n".join(lines)


def _names(trains_reference: bool) -> list[str]:
    return [*(["reference.yaml"] if trains_reference else []), "proxy.yaml"]


def _end(folder: Path) -> list[str]:
    return [
        "(after each proxy: the same command with --step proportions --round N instead of --write)",
        f"dataflex train {folder / 'final.yaml'}",
    ]
