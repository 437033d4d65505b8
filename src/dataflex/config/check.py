"""Everything that can be found wrong with a configuration without loading LLaMA-Factory or a model.

The checks never stop at the first problem: a user mends a configuration once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataflex.config.check_data import column_problems, data_set_problems, domain_problems
from dataflex.config.check_held_out import by_domain_problems
from dataflex.config.check_run import (
    model_problems,
    output_problems,
    setting_problems,
    stage_problems,
)
from dataflex.config.check_targets import target_problems
from dataflex.config.check_values import number_problems, package_problems
from dataflex.config.data import Source
from dataflex.config.needs import unmet
from dataflex.config.schema import DynamicConfig
from dataflex.config.values import truthy
from dataflex.errors import ConfigError
from dataflex.method import RunFacts

__all__ = ["check", "found_problems"]


def check(dynamic: DynamicConfig | None, lf: Mapping[str, Any], base_dir: Path) -> None:
    """Check a configuration against its data and surroundings.

    Args:
        dynamic: What is decided during training; None for a stock run, of which only the model
            and the data sets are looked at.
        lf: LLaMA-Factory's keys.
        base_dir: Folder of the configuration file.

    Raises:
        ConfigError: All problems, one line each.
    """
    problems = found_problems(dynamic, lf, base_dir)
    if problems:
        raise ConfigError(problems)


def found_problems(dynamic: DynamicConfig | None, lf: Mapping[str, Any], base_dir: Path) -> list[str]:
    """Return what ``check`` would raise."""
    sources: list[Source] = []
    if dynamic is None:
        if not truthy(lf, "do_train"):
            return []  # evaluation and prediction are LLaMA-Factory's own business
        return [*number_problems(lf), *model_problems(lf), *data_set_problems(lf, base_dir, sources)]
    of_stage = [*stage_problems(dynamic, lf)]
    # One mistake is told once: with a wrong stage it does not matter whether the data sets are meant for it.
    staged = {**lf, "stage": None} if of_stage else lf
    return [
        *of_stage,
        *number_problems(lf),
        *package_problems(lf),
        *setting_problems(dynamic, lf),
        *model_problems(lf),
        *unmet(dynamic, RunFacts(), models=True),
        *output_problems(lf),
        *data_set_problems(staged, base_dir, sources),
        *target_problems(dynamic, staged, base_dir),
        *column_problems(dynamic, lf, sources),
        *by_domain_problems(dynamic, lf),
        *domain_problems(dynamic, lf, sources),
    ]
