"""Checks of the data sets of targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dataflex.config.data import count_rows, data_sets, find_sources, target_data_sets
from dataflex.config.schema import DynamicConfig, MethodConfig

__all__ = ["target_problems", "targets_in_training"]


def _data_sets(method: MethodConfig) -> list[str]:
    return [name for target in method.targets for name in target_data_sets(target)]


def target_problems(dynamic: DynamicConfig, lf: Mapping[str, Any], base_dir: Path) -> Iterator[str]:
    """Yield the targets that are not defined, whose files are missing, or that have no rows."""
    for method in dynamic.methods:
        key = f"dynamic.{method.kind}.targets"
        sources, problems = find_sources(_data_sets(method), lf, key, base_dir)
        for problem in problems:
            if not problem.startswith("dataset_dir:"):  # told once, for the training data
                yield problem
        for source in sources:
            if source.path is not None and count_rows(source, {}) == 0:
                yield f"{key}: {source.name!r} has no rows ({source.path})"
    if dynamic.leakage == "error":
        for key, name, other in targets_in_training(dynamic, lf, base_dir):
            same = "is also trained on" if name == other else f"has the file of {other!r}, which is trained on"
            yield f"{key}: {name!r} {same}, and dynamic.leakage is 'error'; remove it from one of the two"


def targets_in_training(
    dynamic: DynamicConfig, lf: Mapping[str, Any], base_dir: Path
) -> Iterator[tuple[str, str, str]]:
    """Yield key and name of each target that is a training data set too, and the name of that data set."""
    trained, _ = find_sources(data_sets(lf.get("dataset")), lf, "dataset", base_dir)
    names = {source.name: source.name for source in trained}
    files = {source.path.resolve(): source.name for source in trained if source.path is not None}
    for method in dynamic.methods:
        for source in find_sources(_data_sets(method), lf, "", base_dir)[0]:
            same_file = None if source.path is None else files.get(source.path.resolve())
            other = names.get(source.name, same_file)
            if other is not None:
                yield f"dynamic.{method.kind}.targets", source.name, other
