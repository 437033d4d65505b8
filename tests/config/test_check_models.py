"""Models that methods name besides the one under training: whether they are there is told before anything loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.config.split import resolve
from dataflex.errors import ConfigError

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
        {"name": "embed", "targets": ["t"], "encoder": "models/sentences"},
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
