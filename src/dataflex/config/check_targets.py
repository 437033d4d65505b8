"""Checks of targets: their data sets, and parameters that are given by target, for all of them and no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dataflex.config.data import count_rows, data_sets, find_sources, target_data_sets
from dataflex.config.needs import parameters
from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.errors import did_you_mean

__all__ = ["by_target_problems", "target_problems", "targets_in_training"]


def by_target_problems(dynamic: DynamicConfig) -> Iterator[str]:
    """Yield what is wrong with the parameters marked ``by_target``, mappings of target names to numbers."""
    for method in dynamic.methods:
        for path, name, params in parameters(method):
            alone = params is not method.params and method.kind == "selector"
            for field in fields(type(params)):
                value = getattr(params, field.name)
                if not field.metadata.get("by_target") or not isinstance(value, Mapping):
                    continue
                if alone:
                    yield f"{path}.{field.name}: {name} is asked about one target at a time here; remove the key"
                else:
                    yield from _misnamed(value, method.targets, f"{path}.{field.name}")


def _data_sets(method: MethodConfig) -> list[str]:
    return [name for target in method.targets for name in target_data_sets(target)]


def _misnamed(value: Mapping[str, Any], targets: tuple[str, ...], path: str) -> Iterator[str]:
    for name in value:
        if name not in targets:
            yield f"{path}.{name}: no such target{did_you_mean(str(name), targets)} (targets: {', '.join(targets)})"
    missing = [name for name in targets if name not in value]
    if missing:
        yield f"{path}: {', '.join(missing)} missing; name every target"


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
