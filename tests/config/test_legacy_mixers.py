"""Mixer components of existing DataFlex: the same method, in our words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.config.split import resolve
from dataflex.errors import ConfigError
from dataflex.mixers.doremi import DoReMi

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
    assert parts.dynamic.mixer.params == DoReMi.Params(reference=reference, eta=0.5, smoothing=0.01)
    assert parts.dynamic.initial_proportions == (1.0, 1.0)
    assert any("num_eval_samples: no effect here" in note for note in parts.notes)
    assert any("the weights act in the loss" in note for note in parts.notes)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("reference_model_path: null", "reference_model_path: is null; without a reference model this is not DoReMi"),
        ("reweight_eta: 1.0", "reference_model_path: missing; without a reference model this is not DoReMi"),
        ("reference_model_path: nowhere", "dynamic.mixer.reference: no such folder: nowhere"),
        ("reference_model_path: reference, reweight_etta: 1", "reweight_etta: unknown key"),
    ],
)
def test_doremi_without_a_reference_is_refused(flat: Any, project: Path, params: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve(flat(params), project)
    assert message in str(refused.value)
