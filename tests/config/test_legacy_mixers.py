"""Mixer components of existing DataFlex: the same method, in our words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.config.components import ComponentReader
from dataflex.config.split import resolve
from dataflex.errors import ConfigError
from dataflex.mixers.loss_weights import DoReMi, GroupDro

Config = Callable[..., dict[str, Any]]


@pytest.fixture
def flat(project: Path, config: Config) -> Callable[[str], dict[str, Any]]:
    (project / "reference").mkdir()
    (project / "reference" / "config.json").write_text("{}", encoding="utf-8")

    def written(params: str) -> dict[str, Any]:
        content = f"mixers: {{doremi: {{name: doremi, params: {{{params}}}}}}}\n"
        (project / "components.yaml").write_text(content, encoding="utf-8")
        return config(
            dynamic=None,
            components_cfg_file="components.yaml",
            train_type="dynamic_mix",
            component_name="doremi",
            warmup_step=2,
            update_step=3,
            update_times=2,
        )

    return written


def test_doremi(flat: Any, project: Path) -> None:
    reference = str(project / "reference")
    parts = resolve(flat(f"reference_model_path: {reference}, reweight_eta: 0.5, num_eval_samples: 10"), project)
    assert parts.dynamic is not None
    assert parts.dynamic.mixer is not None
    assert parts.dynamic.mixer.params == DoReMi.Params(reference=reference, eta=0.5, smoothing=0.001)
    assert parts.dynamic.initial_proportions == (1.0, 1.0)
    assert any("num_eval_samples: no effect here" in note for note in parts.notes)
    assert any("the weights act in the loss" in note for note in parts.notes)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("reweight_eta: 1.0", "reference_model_path: missing; train a reference model (its step 1)"),
        ("reference_model_path: nowhere", "dynamic.mixer.reference: no such folder: nowhere"),
        ("reference_model_path: reference, reweight_etta: 1", "reweight_etta: unknown key"),
    ],
)
def test_doremi_without_a_reference_is_refused(flat: Any, project: Path, params: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve(flat(params), project)
    assert message in str(refused.value)


def test_what_doremi_leaves_out_has_the_value_that_it_has_there(flat: Any, project: Path) -> None:
    parts = resolve(flat(f"reference_model_path: {project / 'reference'}"), project)
    assert parts.dynamic is not None
    assert parts.dynamic.mixer is not None
    assert (parts.dynamic.mixer.params.eta, parts.dynamic.mixer.params.smoothing) == (1.0, 1e-3)


def test_doremi_with_a_null_reference_is_group_dro(flat: Any, project: Path) -> None:
    parts = resolve(flat("reference_model_path: null, reweight_eps: 0.02, eval_batch_size: 4"), project)
    assert parts.dynamic is not None
    assert parts.dynamic.mixer is not None
    assert parts.dynamic.mixer.name == "group_dro"
    assert parts.dynamic.mixer.params == GroupDro.Params(eta=1.0, smoothing=0.02)
    assert any("this is not DoReMi but the hardest domains first" in note for note in parts.notes)


@pytest.mark.parametrize(
    ("name", "given", "domains", "ours", "noted"),
    [
        ("odm", {}, 2, {"floor": 0.03}, ["2,000 more steps"]),
        ("odm", {"min_exploration_rate": 0.0, "warmup_steps": 0}, 2, {"floor": 0.0}, ["warmup_steps: no effect here"]),
        ("odm", {"alpha": 0.5}, 40, {"smoothing": 0.5}, ["every domain's mean loss counts"]),
        ("dynamic_moe", {"c": 0.1, "collect_steps": 5}, 2, {"smoothing": 0.1}, ["collect_steps: no effect here"]),
    ],
)
def test_mixer_params(name: str, given: dict[str, Any], domains: int, ours: dict[str, Any], noted: list[str]) -> None:
    problems: list[str] = []
    notes: list[str] = []
    reader = ComponentReader(
        kind="mixer", file="", base_dir=Path(), problems=problems, notes=notes, num_domains=domains
    )
    assert reader.translated(name, given) == (name, ours)
    assert not problems
    for part in noted:
        assert any(part in note for note in notes)


def test_a_mixer_without_targets_is_told_its_own_key(flat: Any, project: Path) -> None:
    keys = flat("")
    (project / "components.yaml").write_text("mixers: {doremi: {name: dynamic_moe}}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"dynamic_moe needs a target; flat keys take it from mixer_eval_dataset"):
        resolve(keys, project)
