"""Needs that methods declare are checked of every kind of method, and of every part of a composed one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.commands.methods import requirements
from dataflex.config.split import resolve
from dataflex.errors import ConfigError
from dataflex.registry import KINDS, find, names

Config = Callable[..., dict[str, Any]]

SEVERAL = [
    (kind, name)
    for kind in KINDS
    for name in names(kind)
    if kind == "mixer" or requirements(find(kind, name)).domains > 1
]


def problems(mapping: dict[str, Any], project: Path) -> list[str]:
    try:
        resolve(mapping, project)
    except ConfigError as error:
        return error.problems
    return []


def block_of(kind: str, name: str) -> dict[str, Any]:
    cls = find(kind, name)
    method: dict[str, Any] = {"name": name, **({"targets": ["t"]} if requirements(cls).targets else {})}
    method.update(
        {
            "static": {"proportions": [1]},
            "doremi": {"reference": "r"},
            "staged": {"stages": [{"start_step": 0, "proportions": [1]}]},
            "sheared": {"target_losses": [1.0]},
            "velocity": {"target_losses": [1.0]},
            "skill_it": {"graph": [[1.0]]},
        }.get(name, {})
    )
    return {kind: method, "interval_steps": 1}


def test_both_kinds_of_methods_are_there() -> None:
    assert {("selector", "random_balanced"), ("weighter", "group"), ("mixer", "uniform")} <= set(SEVERAL)


@pytest.mark.parametrize(("kind", "name"), SEVERAL)
def test_one_domain_is_refused(kind: str, name: str, config: Config, project: Path) -> None:
    found = problems(config(dataset="a", dynamic=block_of(kind, name)), project)
    assert any(f"dynamic.{kind}: {name} needs at least two domains, found 1" in line for line in found), found


@pytest.mark.parametrize("copy", ["new", "there"])
@pytest.mark.parametrize(
    "block", [{"weighter": "group"}, {"selector": "random_balanced"}, {"weighter": ["focal", "group"]}]
)
def test_a_copy_of_several_sets_is_one_domain(block: Any, copy: str, config: Config, project: Path) -> None:
    (project / "there").mkdir()
    (project / "there/dataset_dict.json").write_text("{}")
    found = problems(config(tokenized_path=copy, dynamic=block), project)
    assert any(line.startswith("tokenized_path: a tokenized copy does not say which data set") for line in found), found
    noted = resolve(config(tokenized_path=copy, dynamic={"selector": "all"}), project).notes
    assert noted == ("tokenized_path: a copy does not say which of a, b a row is from: all are one domain, 'all'",)


@pytest.mark.parametrize(
    ("block", "place"),
    [
        ({"selector": {"name": "less", "targets": ["t"]}}, "dynamic.selector.precondition"),
        ({"selector": {"represent": "influence", "targets": ["t"]}}, "dynamic.selector.represent.precondition"),
        ({"selector": {"represent": "gradient", "targets": ["t"]}}, "dynamic.selector.represent.precondition"),
        ({"selector": {"represent": "less", "targets": ["t"]}}, "dynamic.selector.represent.precondition"),
        (
            {"selector": {"represent": "loss", "vectors": "gradient", "rule": "deita"}},
            "dynamic.selector.vectors.precondition",
        ),
        (
            {"selector": {"name": "bm25", "targets": ["t"]}, "signals": {"screen_by": "pilot", "screen_fraction": 0.5}},
            "dynamic.signals.screen_by",
        ),
    ],
)
def test_moments_are_needed_by_parts_as_by_the_whole(block: Any, place: str, config: Config, project: Path) -> None:
    block = {**block, "interval_steps": 5}
    for optimizer in ({"optim": "adafactor"}, {"optim": "ademamix"}, {"use_galore": True}):
        found = problems(config(dynamic=block, **optimizer), project)
        assert [line for line in found if line.startswith(f"{place}: ") and "Adam's moments" in line], found
    assert problems(config(dynamic=block), project) == []


def test_parts_say_what_stages_and_parameters_they_need(config: Config, project: Path) -> None:
    part = {"represent": {"name": "tacs"}, "targets": ["t"]}
    zero3 = {"deepspeed": {"zero_optimization": {"stage": 3}}}
    found = problems(config(dynamic={"selector": part, "interval_steps": 5}, **zero3), project)
    assert any("does not work with partitioned parameters" in line for line in found), found
    found = problems(config(stage="kto", dynamic={"selector": part, "interval_steps": 5}), project)
    assert any("compose does not work under stage kto" in line for line in found), found
    found = problems(config(dynamic={"weighter": ["group", "meta"]}), project)
    assert any("needs a target" in line for line in found), found
    found = problems(
        config(dynamic={"weighter": {"name": "product", "of": ["group", "meta"], "targets": ["t"]}}, **zero3), project
    )
    assert any("does not work with partitioned parameters" in line for line in found), found
