"""Models that methods name besides the one under training: whether they are there is told before anything loads."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.config.split import resolve
from dataflex.errors import ConfigError, DataFlexError

Config = Callable[..., dict[str, Any]]


def problems(config: Config, project: Path, selector: dict[str, Any]) -> list[str]:
    try:
        resolve(config(dynamic={"selector": selector, "interval_steps": 5}), project)
    except ConfigError as error:
        return error.problems
    return []


@pytest.fixture
def folders(project: Path) -> Path:
    for name, file in (("scorer", "config.json"), ("sentences", "modules.json"), ("lora", "adapter_config.json")):
        (project / "models" / name).mkdir(parents=True)
        (project / "models" / name / file).write_text("{}")
    (project / "models" / "bare").mkdir()
    return project


@pytest.mark.parametrize("name", ["models/scorer", "./models/scorer", "models/lora"])
def test_a_model_that_is_there(config: Config, folders: Path, name: str) -> None:
    for selector in (
        {"name": "ifd", "scorer": name},
        {"name": "rho_loss", "reference": name},
        {"name": "s2l", "proxies": [name, name]},
        {"name": "coincide", "encoder": name},
        {"represent": {"name": "embed", "encoder": name}, "rule": "k_center"},
        {"name": "ifd"},
    ):
        assert problems(config, folders, selector) == []


@pytest.mark.parametrize(
    ("selector", "told"),
    [
        ({"name": "ifd", "scorer": "./models/scorr"}, "scorer: no such folder: ./models/scorr; did you mean 'scorer'?"),
        ({"name": "rho_loss", "reference": "a/b/c"}, "reference: no such folder: a/b/c"),
        ({"name": "rho_loss", "reference": ""}, "reference: is empty"),
        ({"name": "rho_loss"}, "reference: missing"),
        ({"name": "s2l", "proxies": ["models/scorer", "models/bare"]}, "proxies[1]: models/bare holds no model"),
        ({"name": "embed", "targets": ["t"], "encoder": "/none"}, "encoder: no such folder: /none"),
        ({"name": "near", "targets": ["t"], "encoder": "/none"}, "encoder: no such folder: /none"),
        ({"name": "tsds", "targets": ["t"], "encoder": "/none"}, "encoder: no such folder: /none"),
        ({"name": "rds_plus", "targets": ["t"], "encoder": "/none"}, "encoder: no such folder: /none"),
        ({"name": "coincide", "encoder": "/none"}, "encoder: no such folder: /none"),
        (
            {"represent": {"name": "embed", "encoder": "/none"}, "rule": "k_center"},
            "represent.encoder: no such folder: /none",
        ),
        (
            {"represent": "loss", "vectors": {"name": "embed", "encoder": "/none"}, "rule": "deita"},
            "vectors.encoder: no such folder: /none",
        ),
        ({"represent": {"name": "ifd", "scorer": "/none"}}, "represent.scorer: no such folder: /none"),
    ],
)
def test_a_model_that_is_not_there(config: Config, folders: Path, selector: dict[str, Any], told: str) -> None:
    found = problems(config, folders, selector)
    assert len(found) == 1
    assert found[0].startswith(f"dynamic.selector.{told}")


def test_a_name_on_a_hub(config: Config, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Online it may be there; offline it must be in the cache."""
    selector = {"name": "ifd", "scorer": "someone/small-lm"}
    monkeypatch.setenv("HF_HUB_CACHE", str(folders / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert problems(config, folders, selector) == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "nor is it in the local cache of the hub" in problems(config, folders, selector)[0]
    (folders / "hub" / "models--someone--small-lm").mkdir(parents=True)
    assert problems(config, folders, selector) == []


def test_a_model_of_sentence_transformers_needs_the_package(
    config: Config, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selector = {"name": "embed", "targets": ["t"], "encoder": "models/sentences"}
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert "pip install 'dataflex-llm[encoders]'" in problems(config, folders, selector)[0]
    there = types.ModuleType("sentence_transformers")
    there.__spec__ = importlib.machinery.ModuleSpec("sentence_transformers", None)
    monkeypatch.setitem(sys.modules, "sentence_transformers", there)
    assert problems(config, folders, selector) == []


@pytest.mark.parametrize(
    ("selector", "package", "extra"),
    [
        ({"name": "s2l"}, "sklearn", "cluster"),
        ({"name": "cluster_less", "targets": ["t"]}, "sklearn", "cluster"),
        ({"represent": "embed", "rule": {"name": "cluster_quota", "within": "random"}}, "sklearn", "cluster"),
        ({"name": "tsds", "targets": ["t"], "search": "faiss"}, "faiss", "ann"),
        ({"represent": "embed", "rule": {"name": "facility_location", "search": "faiss"}}, "faiss", "ann"),
        ({"represent": "embed", "targets": ["t"], "rule": {"name": "knn_kde", "search": "faiss"}}, "faiss", "ann"),
    ],
)
def test_a_missing_package_is_told_before_anything_loads(
    config: Config, project: Path, monkeypatch: pytest.MonkeyPatch, selector: dict[str, Any], package: str, extra: str
) -> None:
    """And not at the first decision, which may come after hours of warm-up."""
    dynamic = {"dynamic": {"selector": selector, "interval_steps": 5}}
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataFlexError, match=rf"dataflex-llm\[{extra}\]"):
        resolve(config(**dynamic), project)
    there = types.ModuleType(package)
    there.__spec__ = importlib.machinery.ModuleSpec(package, None)
    monkeypatch.setitem(sys.modules, package, there)
    resolve(config(**dynamic), project)


@pytest.mark.parametrize(
    ("selector", "told"),
    [
        ({"target_proportions": {"tt": 1.0, "t": 1.0}}, "target_proportions.tt: no such target; did you mean 't'?"),
        ({"target_proportions": {"a": 1.0}, "targets": ["a", "t"]}, "target_proportions: t missing"),
    ],
)
def test_numbers_by_target_name_every_target(
    config: Config, project: Path, selector: dict[str, Any], told: str
) -> None:
    found = problems(config, project, {"name": "dsir", "targets": ["t"], **selector})
    assert any(problem.startswith(f"dynamic.selector.{told}") for problem in found), found
    good = {"name": "dsir", "targets": ["t"], "target_proportions": {"t": 1.0}}
    assert problems(config, project, good) == []
    inside = {"represent": {"name": "dsir", "target_proportions": {"t": 1.0}}, "targets": ["t"]}
    found = problems(config, project, inside)
    assert "represent.target_proportions: a selector in represent is asked about one target" in found[0]
