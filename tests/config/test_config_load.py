"""Reading files and overrides: what OmegaConf gives LLaMA-Factory, plus clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dataflex.config.load import load_mapping
from dataflex.config.split import resolve
from dataflex.errors import ConfigError

YAML = """
stage: sft
learning_rate: 1e-4
dataset: a,b
dynamic:
  interval_steps: 10
  selector: loss
  mixer: {name: static, proportions: [1, 2]}
"""


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_reads_as_llamafactory_does(tmp_path: Path) -> None:
    # LLaMA-Factory: OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(file), OmegaConf.from_cli(overrides)))
    from omegaconf import OmegaConf

    overrides = ["learning_rate=3e-5", "dataset=c", "dynamic.interval_steps=20", "a.b.c=[1,2]", "empty=", "x=null"]
    file = written(tmp_path, YAML)
    theirs = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(file), OmegaConf.from_cli(overrides)))
    assert load_mapping(file, overrides) == theirs
    assert load_mapping(file)["learning_rate"] == 1e-4  # PyYAML alone would give text


def test_json_is_read_like_yaml(tmp_path: Path) -> None:
    mapping = load_mapping(written(tmp_path, YAML))
    file = written(tmp_path, json.dumps(mapping), "run.json")
    overrides = ["dynamic.selector.focus=high", "dynamic.mixer.proportions=[3,1]"]
    assert load_mapping(file) == mapping
    assert load_mapping(file, overrides) == load_mapping(tmp_path / "run.yaml", overrides)


@pytest.mark.parametrize(
    ("overrides", "selector"),
    [
        (["dynamic.selector.focus=high"], {"name": "loss", "focus": "high"}),
        (["dynamic.selector.name=random"], {"name": "random"}),
        (["dynamic.selector=random"], "random"),
        (["dynamic.selector={name: loss, focus: low}"], {"name": "loss", "focus": "low"}),
        (["dynamic.selector=tacs", "dynamic.selector.targets=[t]"], {"name": "tacs", "targets": ["t"]}),
        (["dynamic.selector.focus=high", "dynamic.selector.temperature=2"], None),
        (["dynamic.selector=null"], "gone"),
    ],
)
def test_override_below_a_bare_name(overrides: list[str], selector: Any, tmp_path: Path) -> None:
    found = load_mapping(written(tmp_path, YAML), overrides)["dynamic"]["selector"]
    if selector is None:
        assert found == {"name": "loss", "focus": "high", "temperature": 2}
    else:
        assert found == (None if selector == "gone" else selector)


def test_override_adds_a_block(tmp_path: Path) -> None:
    file = written(tmp_path, "stage: sft\n")
    assert load_mapping(file, ["dynamic.selector=random"]) == {"stage": "sft", "dynamic": {"selector": "random"}}
    assert load_mapping(file, ["dynamic.selector.name=random"])["dynamic"] == {"selector": {"name": "random"}}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "run.yaml",
            "stage: sft\n  dataset: a\n",
            r"malformed YAML at line 2, column 10: mapping values are not allowed",
        ),
        ("run.yaml", "dynamic: {selector: loss\n", r"malformed YAML at line 2, column 1"),
        ("run.yaml", "a: 1\na: 2\n", r"malformed YAML at line 2, column 1: found duplicate key a"),
        ("run.yaml", "a: 1\n\tb: 2\n", r"malformed YAML at line 2, column 1"),
        ("run.yaml", "- a\n- b\n", "the top level must be a mapping"),
        ("run.yaml", "just text\n", "the top level must be a mapping"),
        ("run.yaml", "", "is empty"),
        ("run.yaml", "a: ${b\n", "run.yaml: "),
        ("run.json", '{"a": 1,\n "b": }', r"malformed JSON at line 2, column 7: Expecting value"),
        ("run.json", '{"a": 1, "a": 2}', "found duplicate key a"),
        ("run.json", "[1, 2]", "the top level must be a mapping"),
        ("run.json", "", "malformed JSON at line 1, column 1"),
        ("run.txt", "a: 1", "a configuration ends in .yaml, .yml, .json"),
    ],
)
def test_malformed_file(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_mapping(written(tmp_path, text, name))


def test_missing_file_folder_and_foreign_bytes(tmp_path: Path) -> None:
    written(tmp_path, YAML)
    with pytest.raises(ConfigError, match=r"ruin.yaml: no such file; did you mean 'run.yaml'\?"):
        load_mapping(tmp_path / "ruin.yaml")
    with pytest.raises(ConfigError, match="nor a folder"):
        load_mapping(tmp_path / "nowhere" / "run.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        load_mapping(tmp_path / "folder.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match="UTF-8"):
        load_mapping(tmp_path / "latin.yaml")


def test_malformed_overrides_are_told_together(tmp_path: Path) -> None:
    overrides = ["stage", "=3", "--stage=sft", "a=[1", "dynamic.interval_steps=3"]
    with pytest.raises(ConfigError) as caught:
        load_mapping(written(tmp_path, YAML), overrides)
    lines = caught.value.problems
    assert len(lines) == 4
    assert lines[0].startswith("override 'stage': expected key=value")
    assert lines[1].startswith("override '=3': expected key=value")
    assert lines[2].startswith("override '--stage=sft': after a configuration file write 'stage=sft'")
    assert lines[3].startswith("override 'a=[1': malformed value: ")


def test_yaml_and_json_mean_the_same_run(project: Path, config: Any) -> None:
    mapping = config(dynamic={"mixer": {"name": "static", "proportions": [1, 3]}, "max_epochs": {"a": 2.5}})
    (project / "run.json").write_text(json.dumps(mapping))
    (project / "run.yaml").write_text(yaml.safe_dump(mapping))
    assert resolve(load_mapping("run.json"), project) == resolve(load_mapping("run.yaml"), project)
