"""The schema for editors accepts what the configuration does, and refuses what one key alone shows to be wrong."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import yaml

from dataflex.cli import main
from dataflex.commands.methods import example
from dataflex.commands.schema import schema_of_a_configuration
from dataflex.config.build import parse_dynamic
from dataflex.errors import DataFlexError
from dataflex.registry import KINDS, find, names
from tests.docs.pages import EXAMPLES
from tests.random_configurations import configurations

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
FILES = [file for file in sorted(EXAMPLES.rglob("*.yaml")) if "\ndynamic:" in file.read_text()]


@cache
def made():
    """When it is first asked for: tests of other files add methods."""
    return schema_of_a_configuration()


def told(mapping):
    return [error.message[:300] for error in jsonschema.Draft202012Validator(made()).iter_errors(mapping)]


def test_it_is_a_schema():
    """A part of it, in which every kind of key and form is: the whole takes seconds."""
    defs = {name: made()["$defs"][name] for name in ("selector", "selector/compose", "weighter/product", "By/column")}
    keys = {name: made()["properties"][name] for name in ("dynamic", "adam_beta1", "dataset", "lr_scheduler_type")}
    jsonschema.Draft202012Validator.check_schema({**made(), "$defs": defs, "properties": keys})


def test_what_is_printed_is_the_schema(capsys):
    """Also below keys that are called like secrets."""
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == made()
    assert "hf_hub_token" in made()["properties"]


def test_every_example_is_accepted():
    assert len(FILES) > 60
    assert {file.name: found for file in FILES if (found := told(yaml.load(file.read_text(), LOADER)))} == {}


def test_the_example_of_every_method_is_accepted():
    every = {f"{kind}/{name}": example(find(kind, name)) for kind in KINDS for name in names(kind)}
    assert {name: found for name, mapping in every.items() if (found := told(mapping))} == {}


def test_what_the_block_accepts_is_accepted(tmp_path):
    """Of random configurations, half of them mutated."""
    seen = 0
    for mapping in configurations(3, 60, tmp_path, tmp_path):
        block = mapping.get("dynamic")
        try:
            parse_dynamic(copy.deepcopy(block), Path("."))
        except DataFlexError:
            continue
        seen += 1
        assert told({"dynamic": block}) == [], block
    assert seen > 5


@pytest.mark.parametrize(
    "block",
    [
        {"selektor": "loss"},
        {"selector": "lss"},
        {"selector": {"name": "lss"}},
        {"selector": {"name": "loss", "focus": "hi"}},
        {"selector": {"name": "loss", "fokus": "high"}},
        {"selector": {"name": "less", "targets": 3}},
        {"selector": {"represent": "embed", "rule": "no_such"}},
        {"mixer": {"name": "skill_it"}},
        {"mixer": {"name": "temperature", "temperature": -1.0}},
        {"interval_steps": 0},
        {"interval_steps": "10"},
        {"keep_ratio": 1.5},
        {"signals": {"pool_fraction": 0.0}},
        {"weighter": ["column", {"name": "slm"}]},
        {"orderer": {"name": "sorting", "by": {"name": "column"}}},
        {"ledger": {}},
    ],
)
def test_mistakes_are_seen(block):
    assert told({"dynamic": block}) != []


def test_names_of_plugins_pass_where_there_is_a_plugin():
    block = {"selector": {"name": "of_mine", "k": 3}}
    assert told({"dynamic": block}) != []
    assert told({"dynamic": {**block, "plugins": ["mine.py"]}}) == []


def test_the_keys_of_llamafactory_are_known():
    assert told({"learning_rate": "fast"}) != []
    assert told({"lr_scheduler_type": "cosin"}) != []
    assert told({"learning_rate": 1.0e-4, "a_key_of_a_newer_version": 1}) == []
