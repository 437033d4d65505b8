"""What a resumed run may change: every key is listed once, and a refusal names what was written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from dataflex.config.load import merged
from dataflex.config.resuming import ON_RESUME
from dataflex.config.schema import DynamicConfig, SignalsConfig
from dataflex.config.split import split
from dataflex.plan.domains import Domains
from dataflex.plan.plan import BatchShape
from dataflex.train.checkpoint import Identity
from dataflex.train.row_space import RowSpace

LF = {"dataset": "web,code", "seed": 7, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
BLOCK = {
    "warmup_steps": 2,
    "interval_steps": 3,
    "selector": {"name": "loss", "focus": "medium"},
    "mixer": {"name": "static", "proportions": {"web": 3, "code": 1}},
    "weighter": ["column", {"name": "focal", "gamma": 2.0}],
    "keep_ratio": 0.5,
    "max_epochs": 4,
}


@pytest.fixture(autouse=True)
def any_combination(monkeypatch):
    """Let every key stand beside every other, so that one block serves all."""
    monkeypatch.setattr("dataflex.config.build.rule_problems", lambda *_: [])


def identity(*overrides, block=None, lf=None, sources=None, content="", world=1):
    """Return the identity of a run, built from its configuration as a run does."""
    mapping = merged({**LF, **(lf or {}), "dynamic": {**BLOCK, **(block or {})}}, overrides)
    return of(mapping, sources or {"web": 30, "code": 20}, content, world)


def of(mapping, sources, content="", world=1):
    parts = split(mapping, Path())
    rows = sum(sources.values())
    space = RowSpace(
        dataset=None,
        sources=sources,
        domains=Domains.from_sizes(list(sources), list(sources.values()), lengths=np.full(rows, 5)),
        supervised=np.full(rows, 5),
        fingerprint=f"{list(sources.items())}{content}",
    )
    micro, accumulation = (int(parts.lf.get(key) or 1) for key in list(LF)[2:])
    seed = parts.lf["seed"] if parts.dynamic.seed is None else parts.dynamic.seed
    shape = BatchShape(
        micro_batch_size=micro,
        accumulation=accumulation,
        world=world,
        rank=0,
        drop_last=bool(parts.lf.get("dataloader_drop_last")),
        shuffle=True,
    )
    return Identity(parts.dynamic, space, parts.lf, shape=shape, seed=seed)


def saved(one):
    return json.loads(json.dumps(one.described))


def test_every_key_of_the_block_says_what_a_change_does_on_resume():
    """Every key of the schema is in the table, those about which it says nothing as refused."""
    keys = [f"dynamic.{field.name}" for field in dataclasses.fields(DynamicConfig) if field.name != "signals"]
    keys += [f"dynamic.signals.{field.name}" for field in dataclasses.fields(SignalsConfig)]
    assert sorted(keys) == sorted(key for key in ON_RESUME if key.startswith("dynamic."))
    assert all(bool(change.note) == (change.kind == "told") for change in ON_RESUME.values())


def test_llamafactorys_keys_are_theirs():
    from llamafactory.hparams import DataArguments, FinetuningArguments, ModelArguments, TrainingArguments

    known = {
        field.name
        for cls in (DataArguments, FinetuningArguments, ModelArguments, TrainingArguments)
        for field in dataclasses.fields(cls)
    }
    assert {key for key in ON_RESUME if "." not in key} <= known


def test_the_pages_list_every_key():
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    text = page[page.index("### What may change on resume") : page.index("### A pool that changes on purpose")]
    parts = dict(zip(("refused", "told", "free", "rows", "batch"), text.split("\n- ")[1:], strict=True))
    ours = {key: change for key, change in ON_RESUME.items() if key not in ("dynamic.flat",)}
    for key, change in ours.items():
        named = change.flat if key in ("dynamic.cycle_steps",) else key.removeprefix("dynamic.")
        if key != "dynamic.total_steps" and not (key == "seed"):
            assert f"`{named}`" in parts[change.kind], key


REFUSED = [
    ("dynamic.exclude_seen=true", "dynamic.exclude_seen changed (false -> true)"),
    ("dynamic.signals.pool_fraction=0.5", "dynamic.signals.pool_fraction changed (1.0 -> 0.5)"),
    ("dynamic.signals.screen_fraction=0.5", "dynamic.signals.screen_fraction changed (1.0 -> 0.5)"),
    ("dynamic.signals.screen_by=pilot", "dynamic.signals.screen_by changed (embeddings -> pilot)"),
    ("disable_shuffling=true", "disable_shuffling changed (false -> true)"),
    ("dataloader_drop_last=true", "dataloader_drop_last changed (false -> true)"),
    ("dynamic.warmup_steps=4", "dynamic.warmup_steps changed (2 -> 4)"),
    ("dynamic.interval_steps=4", "dynamic.interval_steps changed (3 -> 4)"),
    ("dynamic.interval_steps=null", "dynamic.interval_steps changed (3 -> not given)"),
    ("dynamic.keep_ratio=0.25", "dynamic.keep_ratio changed (0.5 -> 0.25)"),
    ("dynamic.unit=tokens", "dynamic.unit changed (sequences -> tokens)"),
    ("dynamic.interleave=even", "dynamic.interleave changed (shuffled -> even)"),
    ("dynamic.initial_proportions=[1,1]", "dynamic.initial_proportions changed (not given -> [1.0, 1.0])"),
    ("dynamic.domain_column=topic", "dynamic.domain_column changed (not given -> topic)"),
    ("dynamic.freeze_gate=true", "dynamic.freeze_gate changed (false -> true)"),
    ("dynamic.seed=5", "dynamic.seed changed (not given -> 5)"),
    ("seed=8", "seed changed (7 -> 8)"),
    ("stage=pt", "stage changed (not given -> pt)"),
    ("dynamic.selector.focus=high", "dynamic.selector.focus changed (medium -> high)"),
    ("dynamic.selector=random", "dynamic.selector changed (loss -> random)"),
    ("dynamic.mixer.proportions.web=2", "dynamic.mixer.proportions.web changed (3.0 -> 2.0)"),
    ("dynamic.mixer=uniform", "dynamic.mixer changed (static -> uniform)"),
    ("dynamic.weighter=null", "dynamic.weighter changed (product -> not given)"),
    (
        "gradient_accumulation_steps=4",
        "gradient_accumulation_steps changed (2 -> 4): global batch changed (4 -> 8 sequences)",
    ),
    (
        "per_device_train_batch_size=4",
        "per_device_train_batch_size changed (2 -> 4): global batch changed (4 -> 8 sequences)",
    ),
]


@pytest.mark.parametrize(
    ("change", "line", "interval"),
    [(*each, interval) for each in REFUSED for interval in (3, None) if interval or "interval_steps" not in each[0]],
)
def test_one_change_is_refused_in_one_line(change, line, interval):
    before = saved(identity(block={"interval_steps": interval}))
    assert identity(change, block={"interval_steps": interval}).differences(before) == ([line], [])


def test_a_factor_of_a_product_is_named():
    weighter = ["column", {"name": "focal", "gamma": 3.0}]
    refused, _ = identity(block={"weighter": weighter}).differences(saved(identity()))
    assert refused == ["dynamic.weighter.of[1].gamma changed (2.0 -> 3.0)"]


@pytest.mark.parametrize(
    "change",
    [
        "dynamic.repeat=true",
        "dynamic.max_epochs=8",
        "dynamic.max_epochs=null",
        "dynamic.at_cap=stop",
        "dynamic.min_proportion=0.1",
        "dynamic.signals.max_age_steps=4",
    ],
)
def test_some_changes_are_told(change):
    refused, told = identity(change).differences(saved(identity()))
    assert refused == []
    assert len(told) == 1
    assert told[0].startswith(f"{change.partition('=')[0]} changed (")
    assert told[0].endswith("next decision on") or "next decision" in told[0]


@pytest.mark.parametrize(
    "change",
    [
        "dynamic.eval_by_domain=true",
        "dynamic.signals.store=answers",
        "dynamic.signals.store_gb=1",
        "dynamic.resume_plan=ignore",
        "dynamic.early_stopping_min_delta=0.1",
        "max_steps=99",
        "num_train_epochs=9",
        "learning_rate=0.1",
        "output_dir=elsewhere",
        "dynamic.max_epochs=4.0",
    ],
)
def test_some_changes_do_not_matter(change):
    assert identity(change).differences(saved(identity())) == ([], [])


ROWS = ["cutoff_len=32", "template=llama3", "max_samples=9", "packing=true", "val_size=0.1", "dynamic.leakage=drop"]


@pytest.mark.parametrize("change", ROWS)
def test_a_key_that_changes_the_rows_is_named_once(change):
    key, _, value = change.partition("=")
    before = saved(identity())
    refused, told = identity(change, sources={"web": 25, "code": 20}).differences(before)
    assert told == []
    (line,) = refused
    written = "warn" if key == "dynamic.leakage" else "not given"
    assert line == f"{key} changed ({written} -> {value}): row space changed (source 'web': 30 -> 25 rows)"
    refused, told = identity(change).differences(before)
    assert refused == []
    assert told == [f"{key} changed ({written} -> {value}): the rows are the same"]


def test_other_rows_without_another_key():
    before = saved(identity())
    what = "row space changed (same numbers of rows, other content or another tokenizer)"
    assert identity(content="x").differences(before) == ([what], [])
    refused, _ = identity("seed=8", block={"seed": 1}, content="x").differences(saved(identity(block={"seed": 1})))
    assert refused == [f"seed changed (7 -> 8): {what}"]
    refused, _ = identity("seed=8", content="x").differences(before)  # another seed holds out other rows
    assert refused == ["seed changed (7 -> 8)"]
    assert identity("seed=8", block={"seed": 1}).differences(saved(identity(block={"seed": 1}))) == ([], [])


@pytest.mark.parametrize("written", ["code,web", ["code", "web"], " code , web "])
def test_another_order_of_data_sets_is_told_as_such(written):
    now = identity(lf={"dataset": written}, sources={"code": 20, "web": 30})
    assert now.differences(saved(identity())) == (
        [
            "dataset changed (web, code -> code, web): row space changed (the data sets are in another order: "
            "web, code -> code, web)"
        ],
        [],
    )
    assert identity(lf={"dataset": ["web", "code"]}).differences(saved(identity())) == ([], [])


def test_ranks_and_micro_batches_may_change_as_long_as_the_batch_does_not():
    before = saved(identity())
    assert identity("gradient_accumulation_steps=1", world=2).differences(before) == ([], [])
    refused, _ = identity(world=2).differences(before)
    assert refused == ["ranks changed (1 -> 2): global batch changed (4 -> 8 sequences)"]
    odm = {"selector": None, "keep_ratio": None, "weighter": None, "mixer": {"name": "odm", "variant": "official"}}
    pure = identity(block=odm)
    if pure._pure:
        other = identity("gradient_accumulation_steps=1", "per_device_train_batch_size=4", block=odm)
        (line,) = other.differences(saved(pure))[0]
        assert "per_device_train_batch_size changed (2 -> 4)" in line


def test_ranks_and_micro_batches_may_not_change_the_rows_of_an_epoch():
    """Of 50 rows, micro-batches of 2 on one rank make 25, on two ranks 12 each, whose epochs have 48."""
    whole = {"selector": None, "mixer": None, "keep_ratio": None, "max_epochs": None, "interval_steps": None}
    lf = {"dataloader_drop_last": True}
    before = saved(identity(block=whole, lf=lf))
    refused, _ = identity("gradient_accumulation_steps=1", block=whole, lf=lf, world=2).differences(before)
    what = "the rows of an epoch changed (50 -> 48, by dataloader_drop_last)"
    assert refused == [f"gradient_accumulation_steps changed (2 -> 1); ranks changed (1 -> 2): {what}"]
    kept = identity("per_device_train_batch_size=1", "gradient_accumulation_steps=4", block=whole, lf=lf)
    assert kept.differences(before) == ([], [])
    for served in ({"block": whole}, {"lf": lf}):  # no row is dropped, or methods fill every step
        other = identity("gradient_accumulation_steps=1", world=2, **served)
        assert other.differences(saved(identity(**served))) == ([], [])


def test_flat_keys_are_named_as_they_were_written():
    flat = {
        **LF,
        "train_type": "dynamic_select",
        "component_name": "loss",
        "warmup_step": 2,
        "update_step": 3,
        "update_times": 2,
    }
    before = saved(of(flat, {"web": 30}))
    for key, value in (("warmup_step", 4), ("update_step", 5)):
        refused, _ = of({**flat, key: value}, {"web": 30}).differences(before)
        assert f"{key} changed ({flat[key]} -> {value})" in refused
    refused, _ = of({**flat, "component_name": "random"}, {"web": 30}).differences(before)
    assert refused == ["component_name changed (loss -> random)"]
