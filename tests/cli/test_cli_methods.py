"""``dataflex methods``: what the classes say is what is printed, and the examples work."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from dataflex.commands.methods import example, methods
from dataflex.config.build import parse_dynamic
from dataflex.config.mappings import as_yaml, key_of
from dataflex.errors import ConfigError
from dataflex.registry import KINDS, find, names

BUILT_IN = {*names("selector")}

ALL = [(kind, name) for kind in KINDS for name in names(kind)]


def test_table_names_every_method_under_its_kind() -> None:
    text = methods()
    position = 0
    for kind in KINDS:
        position = text.index(f"{kind}s\n", position)
        for name in names(kind):
            position = text.index(f"\n  {name} ", position)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), ALL)
def test_page_tells_all(kind: str, name: str) -> None:
    cls = find(kind, name)
    text = methods(f"{kind}/{name}")
    flowed = " ".join(text.split())
    assert text.startswith(f"{kind}/{name}\n")
    for told in (cls.card.summary, cls.card.paper, cls.card.cost, cls.card.note):
        assert " ".join(told.split()) in flowed
    for field in dataclasses.fields(cls.Params):
        assert f"\n    {key_of(field)} " in text


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), ALL)
def test_example_is_a_valid_block(kind: str, name: str) -> None:
    cls = find(kind, name)
    block = yaml.safe_load(as_yaml(example(cls)))
    dynamic = parse_dynamic(block["dynamic"], Path("."))
    method = getattr(dynamic, kind)
    assert method.name == name
    text = methods(f"{kind}/{name}")
    printed = text[text.index("    dynamic:") :]
    assert yaml.safe_load(printed) == block


def test_a_name_of_several_kinds_shows_all() -> None:
    text = methods("loss")
    assert text.index("selector/loss\n") < text.index("\nweighter/loss\n")
    assert "weighter/loss" not in methods("selector/loss")


def test_page_of_a_method_with_ranges_choices_and_targets() -> None:
    text = methods("tacs")
    assert "losses signal, targets, stage pt or sft, whole parameters (no ZeRO-3, no FSDP)" in text
    words = " ".join(text.split())
    assert " targets a list of texts required " in words
    assert " rank a whole number 1 " in words
    assert "(at least 1)" in text
    assert "targets: [my_target]" in text
    assert "one of high, medium, low" in methods("selector/loss")


def test_filters() -> None:
    found = methods(needs="targets", stage="dpo", family="selector").values["methods"]
    told = {each["name"] for each in found} & BUILT_IN  # other tests may have registered methods of their own
    assert told == {"less", "icons", "cluster_less", "bm25", "dsir", "greats", "opus"}
    assert [each["name"] for each in methods(family="weighters").values["methods"]] == names("weighter")
    in_rl, in_sft = ({each["name"] for each in methods(stage=stage).values["methods"]} for stage in ("rl", "sft"))
    assert {"mopps", "sec", "random", "sorting"} <= in_rl
    assert not {"bm25", "loss", "odm", "focal"} & in_rl
    assert not {"mopps", "sec"} & in_sft
    free = methods(needs="nothing").values["methods"]
    assert {"all", "random"} <= {each["name"] for each in free}
    assert all(each["needs"] == "" for each in free)
    both = methods("selectors", needs="targets, gradients").values["methods"]
    assert both
    assert all(each["targets"] and "gradients" in each["needs"] and each["kind"] == "selector" for each in both)
    assert [each["name"] for each in methods(family="mixer", needs="domains").values["methods"]] == names("mixer")


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"needs": "targts"}, "--needs: 'targts' is not known; did you mean 'targets'?"),
        ({"stage": "sfft"}, "--stage: 'sfft' is not known; did you mean 'sft'?"),
        ({"family": "selektor"}, "--family: 'selektor' is not known; did you mean 'selector'?"),
        ({"family": "orderer", "needs": "gradients"}, "none is all of that"),
        ({"name": "loss", "family": "selector"}, "'loss' is no kind; beside --family, --stage and --needs only a kind"),
        ({"name": "selektor", "stage": "dpo"}, "'selektor' is no kind; did you mean 'selector'?"),
        ({"name": "mixers", "family": "selector"}, "'mixers' and --family selector are two kinds; give one"),
    ],
)
def test_filters_that_are_wrong(filters: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        methods(**filters)
