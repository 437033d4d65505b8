"""Every hint of a message, when it is followed, is accepted: misspelt keys, misplaced keys, names of the wrong kind."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dataflex.commands.methods import requirements
from dataflex.config.build import parse_dynamic
from dataflex.config.load import load_mapping
from dataflex.config.mappings import key_of
from dataflex.config.schema import SignalsConfig, block_keys
from dataflex.config.split import split
from dataflex.errors import ConfigError
from dataflex.registry import KINDS, find, names

METHODS = [
    (kind, name) for kind in KINDS for name in names(kind) if find(kind, name).__module__.startswith("dataflex.")
]
SIGNALS = [field.name for field in fields(SignalsConfig)]
PLACE = re.compile(r"unknown key; it belongs under '[\w.]+': ([\w.\[\]]+(?: or '[\w.]+': [\w.\[\]]+)*)")


def keys_of(kind, name):
    return [key_of(field) for field in fields(find(kind, name).Params)]


def problems(block, read=parse_dynamic):
    try:
        read(block, Path())
    except ConfigError as error:
        return error.problems
    return []


def line(found, key):
    (told,) = [problem for problem in found if problem.startswith(f"{key}: unknown key")]
    return told


def unknown(found):
    return [problem for problem in found if "unknown key" in problem]


def put(block, path, value):
    """Set a dotted path below ``dynamic``, a method's bare name lifted to a mapping."""
    *above, last = path.removeprefix("dynamic.").split(".")
    for key in above:
        inner = block.get(key, {})
        block[key] = dict(inner) if isinstance(inner, dict) else {"name": inner}
        block = block[key]
    block[last] = value


@st.composite
def misspelt(draw, words):
    """A word with a letter left out, doubled, swapped with the next or replaced."""
    word = draw(st.sampled_from(words))
    at = draw(st.integers(0, len(word) - 1))
    how = draw(st.sampled_from(["out", "twice", "swap", "other"]))
    wrong = {
        "out": word[:at] + word[at + 1 :],
        "twice": word[:at] + word[at] + word[at:],
        "swap": word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :],
        "other": word[:at] + "x" + word[at + 1 :],
    }[how]
    return word, wrong


def suggestion(told):
    match = re.search(r"did you mean '([^']*)'\?", told)
    return None if match is None else match[1]


@pytest.mark.slow
@given(data=st.data(), method=st.sampled_from(METHODS))
@settings(max_examples=300, deadline=None)
def test_a_suggested_parameter_is_accepted(data, method):
    kind, name = method
    known = [*keys_of(kind, name), *(["targets"] if requirements(find(kind, name)).targets else [])]
    assume(known)
    word, wrong = data.draw(misspelt(known))
    assume(wrong and wrong not in known and "." not in wrong)
    told = line(problems({kind: {"name": name, wrong: 1}}), f"dynamic.{kind}.{wrong}")
    if len(word) > 3 and "belongs under" not in told:
        assert suggestion(told) is not None, told
    if suggestion(told) is not None:
        assert unknown(problems({kind: {"name": name, suggestion(told): 1}})) == []


@pytest.mark.slow
@given(word=misspelt(block_keys()), signal=misspelt(SIGNALS))
@settings(max_examples=100, deadline=None)
def test_a_suggested_key_of_the_block_is_accepted(word, signal):
    assume(word[1] not in block_keys() and signal[1] not in SIGNALS)
    told = line(problems({"selector": "loss", word[1]: 1}), f"dynamic.{word[1]}")
    assert "belongs under" in told or suggestion(told) in block_keys(), told
    told = line(problems({"selector": "loss", "signals": {signal[1]: 1}}), f"dynamic.signals.{signal[1]}")
    assert "belongs under" in told or suggestion(told) in SIGNALS, told


def test_the_nearest_key_is_suggested():
    (told,) = unknown(problems({"selector": {"name": "less", "target": "x"}, "interval_steps": 3}))
    assert "did you mean 'targets'? (less selector accepts: targets, every, warmup_steps, aggregate, rule, " in told
    # Whether there are targets depends on the parameters here.
    block = {"represent": "rds_plus", "aggregate": "round_robin", "rule": "top_k", "target": "x"}
    (told,) = unknown(problems({"selector": block, "interval_steps": 3}))
    assert "did you mean 'targets'?" in told
    told = problems({"selector": {"naem": "loss"}, "interval_steps": 3})[0]
    assert told.startswith("dynamic.selector.name: missing; name a selector (known: all, random")
    assert told.endswith("is it spelt 'naem'?")


PLACES = [
    *(("dynamic", key) for key in block_keys() if key not in KINDS),
    *(("dynamic.signals", key) for key in SIGNALS),
    *((f"dynamic.{kind}", key, name) for kind, name in METHODS for key in keys_of(kind, name)),
]


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(place))
def test_a_misplaced_key_is_told_where_it_belongs(place):
    """From every level of the block at which it does not stand, and from the top level; the place told is right."""
    parent, key, *method = place
    block = {"selector": "loss"}
    if method:
        block[parent.removeprefix("dynamic.")] = method[0]
    wrong_places = ["dynamic", "dynamic.signals", *(f"dynamic.{kind}" for kind in KINDS if kind in block)]
    for wrong in wrong_places:
        broken = {kind: value for kind, value in block.items()}
        at = f"{wrong}.{key}"
        put(broken, at, 1)
        found = [problem for problem in unknown(problems(broken)) if problem.startswith(f"{at}:")]
        if not found:
            assert wrong == parent or key in (*block_keys(), *SIGNALS, *accepted(block, wrong))
            continue
        match = PLACE.search(found[0])
        assert match is not None, found[0]
        told = [each.rpartition(" ")[2] for each in match[1].split(" or ")]
        assert f"{parent}.{key}" in told
        for path in told:
            mended = dict(block)
            put(mended, path, 1)
            assert unknown(problems(mended)) == [], path


def accepted(block, path):
    kind = path.removeprefix("dynamic.")
    return keys_of(kind, block[kind]) if kind in block else []


def test_keys_of_parts_of_factors_and_of_other_methods():
    compose = {"represent": "rds_plus", "aggregate": "round_robin", "rule": "knn_kde", "targets": ["t"], "sigma": 0.1}
    (told,) = unknown(problems({"selector": compose, "interval_steps": 3}))
    assert "it belongs under 'selector.rule': dynamic.selector.rule.sigma (" in told
    factors = ["column", {"name": "slm", "reference": "x"}]
    (told,) = unknown(problems({"weighter": factors, "reference": "x"}))
    assert "it belongs under 'weighter.of[1]': dynamic.weighter.of[1].reference (" in told
    (told,) = unknown(problems({"selector": {"name": "all", "focus": "high"}}))
    assert told.endswith("(all selector takes no parameters); it is a key of selector/loss, mixer/aioli")
    (told,) = unknown(problems({"selector": "all", "cutoff_len": 8}))
    assert "dynamic.cutoff_len: unknown key; it is LLaMA-Factory's: write it at the top level" in told
    (told,) = unknown(problems({"mixer": {"name": "staged", "stage": 1}}))
    assert "unknown key; did you mean 'stages'?; it is LLaMA-Factory's: write it at the top level (" in told


@pytest.mark.slow
def test_names_of_another_kind():
    for kind, name in METHODS:
        for other in KINDS:
            if name in names(other):
                continue
            (told,) = [problem for problem in problems({other: name}) if "unknown" in problem]
            right = re.search(r"it is a (\w+): write '(\w+): (\w+)'", told)
            assert right is not None
            assert right[1] == right[2]
            assert right[3] == name
            assert name in names(right[1])
            assert kind == right[1] or name in names(kind)


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        (
            {"interval_steps": 3, "dynamic": {"selector": "random"}},
            "interval_steps: unknown key; it belongs under 'dynamic'",
        ),
        ({"selector": "random"}, "selector: unknown key; it belongs under 'dynamic': dynamic.selector"),
        ({"selector": {"focus": "low"}, "dynamic": {"selector": "loss"}}, "selector: unknown key; it belongs under"),
        ({"focus": "low", "dynamic": {"selector": "loss"}}, "focus: unknown key; it belongs under 'selector'"),
        ({"pool_fraction": 0.5, "dynamic": {"selector": "loss"}}, "it belongs under 'signals': dynamic.signals.pool"),
        ({"dynamc": {"interval_steps": 3}}, "dynamc: unknown key; did you mean 'dynamic'?"),
        ({"dinamic": {"signals": {}}, "dynamic": {"selector": "all"}}, "dinamic: unknown key; did you mean 'dynamic'?"),
    ],
)
def test_keys_outside_the_block(mapping, expected):
    found = problems(mapping, split)
    assert any(expected in problem for problem in found), found


def test_keys_that_llama_factory_has_too_stay_where_they_are():
    mapping = {"seed": 3, "warmup_steps": 2, "temperature": 0.5, "train_type": "static", "freeze_gate": False}
    assert split({key: mapping[key] for key in ("seed", "warmup_steps", "temperature")}, Path()).dynamic is None
    with_block = {**mapping, "dynamic": {"selector": "loss", "interval_steps": 2}}
    for key in ("train_type", "freeze_gate"):
        del with_block[key]
    assert split(with_block, Path()).lf["temperature"] == 0.5
    assert split(mapping, Path()).dynamic is None


def test_an_override_goes_below_the_name_of_a_part(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("dynamic: {selector: {represent: rds_plus, aggregate: round_robin, rule: knn_kde, targets: [t]}}")
    mapping = load_mapping(config, ["dynamic.selector.rule.sigma=0.1", "dynamic.interval_steps=3"])
    assert mapping["dynamic"]["selector"]["rule"] == {"name": "knn_kde", "sigma": 0.1}
    assert problems(mapping["dynamic"]) == []
