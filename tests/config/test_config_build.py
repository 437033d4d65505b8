"""From mappings to dataclasses: types, ranges, nesting, plugins, and back again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.config.build import parse_dynamic
from dataflex.config.mappings import as_mapping, as_yaml, collect, describe
from dataflex.config.schema import block_keys
from dataflex.errors import ComponentError, ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    depth: int = field(metadata={"minimum": 1})
    name: str = "x"


@dataclass(frozen=True, kw_only=True)
class Everything:
    count: int = field(default=1, metadata={"minimum": 0, "maximum": 9})
    size: float = field(default=1.0, metadata={"above": 0.0})
    on: bool = False
    text: str = "t"
    choice: Literal["left", "right"] = "left"
    picked: str = field(default="a", metadata={"choices": ("a", "b")})
    pair: tuple[float, float] = (0.0, 1.0)
    many: tuple[int, ...] = ()
    listed: list[float] = field(default_factory=list)
    named: dict[str, float] | None = None
    either: tuple[float, ...] | dict[str, float] | None = None
    free: float | Literal["auto"] = "auto"
    inner: Inner | None = None
    inners: tuple[Inner, ...] = ()


def build(mapping: Any) -> Everything | None:
    return collect(Everything, mapping, "x", [])


def problems_of(mapping: Any) -> list[str]:
    problems: list[str] = []
    assert collect(Everything, mapping, "x", problems, subject="test") is None
    return problems


def test_values_of_every_type() -> None:
    built = build(
        {
            "count": 9,
            "size": 3,
            "on": True,
            "text": "",
            "choice": "right",
            "picked": "b",
            "pair": [1, 2],
            "many": [1, 2, 3],
            "listed": [1],
            "named": {"a": 1},
            "either": {"a": 1, 2: 0.5},
            "free": 2,
            "inner": {"depth": 2},
            "inners": [{"depth": 1, "name": "y"}],
        }
    )
    assert built == Everything(
        count=9,
        size=3.0,
        on=True,
        text="",
        choice="right",
        picked="b",
        pair=(1.0, 2.0),
        many=(1, 2, 3),
        listed=[1.0],
        named={"a": 1.0},
        either={"a": 1.0, "2": 0.5},
        free=2.0,
        inner=Inner(depth=2),
        inners=(Inner(depth=1, name="y"),),
    )
    assert isinstance(built.size, float)
    assert build({"either": [1, 2]}) == Everything(either=(1.0, 2.0))


def test_null_means_default() -> None:
    assert build(dict.fromkeys(Everything.__dataclass_fields__)) == Everything()


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("count", 10, "x.count: must be at most 9, found 10"),
        ("count", -1, "x.count: must be at least 0, found -1"),
        ("count", 1.0, "x.count: expected a whole number, found 1.0"),
        ("count", False, "x.count: expected a whole number, found false"),
        ("count", [1], "x.count: expected a whole number, found [1]"),
        ("count", "1", "x.count: expected a whole number, found the text '1'; write it without quotes"),
        ("size", 0, "x.size: must be above 0, found 0"),
        ("size", True, "x.size: expected a number, found true"),
        ("size", "1e-3", "x.size: expected a number, found the text '1e-3'; write it without quotes"),
        ("size", math.nan, "x.size: expected a number, found .nan"),
        ("size", 10**400, "x.size: expected a number, found 1" + "0" * 56 + "..., which is too large"),
        ("on", "true", "x.on: expected true or false, found 'true'"),
        ("on", 0, "x.on: expected true or false, found 0"),
        ("text", 1.5, "x.text: expected text, found 1.5; write it in quotes"),
        ("text", ["a"], 'x.text: expected text, found ["a"]'),
        ("choice", "rihgt", "x.choice: 'rihgt' is not a choice; did you mean 'right'? (choices: left, right)"),
        ("choice", 3, "x.choice: 3 is not a choice (choices: left, right)"),
        ("picked", "c", "x.picked: 'c' is not a choice (choices: a, b)"),
        ("pair", [1], "x.pair: expected 2 values, found 1"),
        ("pair", [1, "b"], "x.pair[1]: expected a number, found 'b'"),
        ("many", [1, None], "x.many[1]: expected a whole number, found null"),
        ("many", 3, "x.many: expected a list of whole numbers, found 3"),
        ("listed", {"a": 1}, 'x.listed: expected a list of numbers, found {"a": 1}'),
        ("named", [1], "x.named: expected a mapping from names to numbers, found [1]"),
        ("named", {"a": "b"}, "x.named.a: expected a number, found 'b'"),
        ("either", 3, "x.either: expected a list of numbers or a mapping from names to numbers, found 3"),
        ("either", [1, math.nan], "x.either[1]: expected a number, found .nan"),
        ("free", "automatic", "x.free: expected a number or one of auto, found 'automatic'"),
        ("inner", {}, "x.inner.depth: missing; expected a whole number"),
        ("inner", {"depth": 0}, "x.inner.depth: must be at least 1, found 0"),
        ("inner", 3, "x.inner: expected a mapping of keys, found 3"),
        (
            "inners",
            [{"depth": 1}, {"depth": 1, "nam": "y"}],
            "x.inners[1].nam: unknown key; did you mean 'name'? (x.inners[1] accepts: depth, name)",
        ),
    ],
)
def test_refused_values(key: str, value: Any, line: str) -> None:
    assert problems_of({key: value}) == [line]


def test_problems_come_together_and_name_the_subject() -> None:
    lines = problems_of({"cuont": 1, "count": "x", "size": -1})
    assert lines[0].startswith("x.cuont: unknown key; did you mean 'count'? (test accepts: count, size, on")
    assert len(lines) == 3


@pytest.mark.parametrize("value", [None, 3, "text", [1]])
def test_not_a_mapping(value: Any) -> None:
    assert problems_of(value)[0].startswith("x: expected a mapping of keys, found")


def test_a_field_type_that_cannot_be_read_is_the_components_fault() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Odd:
        value: set[int] = field(default_factory=set)

    with pytest.raises(ComponentError, match=r"x\.value: fields of type"):
        collect(Odd, {"value": [1]}, "x", [])


def test_descriptions() -> None:
    assert describe(tuple[float, float]) == "a list of 2 numbers"
    assert describe(tuple[Inner, ...]) == "a list of mappings (depth, name)"
    assert describe(int | None) == "a whole number"


@given(
    warmup=st.integers(0, 10**6),
    interval=st.integers(1, 10**6),
    ratio=st.floats(1e-9, 1.0),
    focus_weight=st.floats(0, 1e9),
    caps=st.none() | st.floats(0.01, 1e6),
    seed=st.none() | st.integers(0, 2**32),
    unit=st.sampled_from(["sequences", "tokens"]),
)
def test_written_back_and_read_again(
    warmup: int, interval: int, ratio: float, focus_weight: float, caps: float | None, seed: int | None, unit: str
) -> None:
    from io import StringIO

    from omegaconf import OmegaConf

    block = {
        "mixer": {"name": "temperature", "tau": 3.3},
        "weighter": {"name": "column", "column": "w"},
        "warmup_steps": warmup,
        "interval_steps": interval,
        "max_epochs": caps,
        "seed": seed,
        "unit": unit,
    }
    if caps is None:
        block |= {"selector": {"name": "loss", "focus_weight": focus_weight}, "keep_ratio": ratio}
    dynamic = parse_dynamic(block, Path("."))
    again = OmegaConf.to_container(OmegaConf.load(StringIO(as_yaml({"dynamic": as_mapping(dynamic)}))))
    assert isinstance(again, dict)
    assert parse_dynamic(again["dynamic"], Path(".")) == dynamic


def test_yaml_of_nested_values_is_read_again() -> None:
    block = {
        "interval_steps": 7,
        "mixer": {
            "name": "staged",
            "stages": [{"start_step": 100 * i, "proportions": {"a": 0.25, "b": 1 + i}} for i in range(5)],
        },
    }
    dynamic = parse_dynamic(block, Path("."))
    import yaml

    assert parse_dynamic(yaml.safe_load(as_yaml({"dynamic": as_mapping(dynamic)}))["dynamic"], Path(".")) == dynamic


def test_what_the_methods_need_together() -> None:
    dynamic = parse_dynamic(
        {
            "interval_steps": 5,
            "keep_ratio": 0.5,
            "selector": {"name": "tacs", "targets": "t, u"},
            "mixer": "uniform",
            "weighter": {"name": "column", "column": "w"},
            "domain_column": "source",
        },
        Path("."),
    )
    assert dynamic.requires.signals == {"losses"}
    assert dynamic.requires.stages == ("pt", "sft")
    assert dynamic.requires.targets
    assert dynamic.requires.whole_parameters
    assert dynamic.requires.needs_interval
    assert dynamic.targets == ("t", "u")
    assert dynamic.columns == ("source", "w")
    assert [method.name for method in dynamic.methods] == ["tacs", "uniform", "column"]
    alone = parse_dynamic({"selector": "all"}, Path("."))
    assert not alone.requires.needs_interval
    assert not alone.requires.whole_parameters
    assert alone.columns == ()


PLUGIN = """
from __future__ import annotations

from dataclasses import dataclass, field

from dataflex import Card, Params, Selection, Selector


class Every(Selector):
    name = "{name}"
    card = Card(summary="Keeps every nth row.", paper="baseline", cost="none")

    @dataclass(frozen=True, kw_only=True)
    class Params(Params):
        n: int = field(metadata={{"help": "which rows", "minimum": 2}})
        boost: float = field(default=1.0, metadata={{"help": "how much"}})

    def select(self, pool, budget, ctx):
        return Selection(rows=pool[:: self.params.n])
"""


def test_plugins_beside_the_configuration_come_first_then_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, work = tmp_path / "beside", tmp_path / "work"
    for folder, name in ((beside, "every_beside"), (work, "every_work")):
        folder.mkdir()
        (folder / f"{name}.py").write_text(PLUGIN.format(name=name))
    monkeypatch.chdir(work)
    for name, folder in (("every_beside", beside), ("every_work", work)):
        block = {"plugins": f"{name}.py", "selector": {"name": name, "n": 3}}
        dynamic = parse_dynamic(block, beside)
        assert dynamic.plugins == (str(folder / f"{name}.py"),)
        assert dynamic.selector is not None
        assert dynamic.selector.params.n == 3  # type: ignore[attr-defined]
    with pytest.raises(ConfigError) as caught:
        parse_dynamic({"plugins": ["every_work.py"], "selector": {"name": "every_work", "bost": 2, "n": 1}}, beside)
    assert caught.value.problems == [
        "dynamic.selector.bost: unknown key; did you mean 'boost'? "
        "(every_work selector accepts: every, warmup_steps, n, boost)",
        "dynamic.selector.n: must be at least 2, found 1",
    ]
    with pytest.raises(ConfigError, match=r"dynamic.selector.n: missing; expected a whole number \(which rows\)"):
        parse_dynamic({"plugins": ["every_work.py"], "selector": "every_work"}, beside)


def test_the_method_of_a_broken_plugin_is_not_called_unknown(tmp_path: Path) -> None:
    (tmp_path / "cardless.py").write_text("from dataflex import Mixer\nclass A(Mixer):\n    name = 'cardless'\n")
    for plugins, told in ((["cardless.py"], "'card' must be"), (["absent.py"], "no such file")):
        with pytest.raises(ConfigError) as caught:
            parse_dynamic({"plugins": plugins, "mixer": "cardless", "interval_steps": 0}, tmp_path)
        assert told in str(caught.value)
        assert "interval_steps" in str(caught.value)
        assert "unknown mixer" not in str(caught.value)
    with pytest.raises(ConfigError, match="unknown mixer 'cardless'"):
        parse_dynamic({"mixer": "cardless"}, tmp_path)


def test_broken_plugin_is_told_beside_other_problems(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(ConfigError) as caught:
        parse_dynamic({"plugins": ["broken.py"], "selector": "random", "interval_steps": 0}, tmp_path)
    assert any("broken.py cannot be imported: ModuleNotFoundError" in line for line in caught.value.problems)
    assert any(line.startswith("dynamic.interval_steps: must be at least 1") for line in caught.value.problems)


def test_keys_of_the_schema_do_not_leak_the_translations_own() -> None:
    assert "cycle_steps" not in block_keys()
    with pytest.raises(ConfigError, match=r"dynamic\.cycle_steps: unknown key"):
        parse_dynamic({"selector": "random", "cycle_steps": 3}, Path("."))
