"""What 'plan' refuses and notes of an orderer: columns, files of scores, selectors, paces, cadences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.commands.plan import plan
from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.files import file_records
from dataflex.config.rates import Rate
from dataflex.config.split import resolve
from dataflex.errors import ConfigError
from dataflex.score_table import ScoreTable, write_scores
from tests.config.conftest import add_column

Config = Callable[..., dict[str, Any]]

RANDOM = {"selector": "random", "interval_steps": 5}
LOSS = {"selector": "loss", "interval_steps": 5}
BY_LENGTH = {"name": "sorting", "by": "length"}
BY_COLUMN = {"name": "sorting", "by": {"name": "column", "column": "level"}}


def problems(mapping: dict[str, Any], project: Path) -> list[str]:
    try:
        resolve(mapping, project)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    "block",
    [
        {"orderer": {"name": "sorting", "by": "length"}},
        {"orderer": "shuffle"},
        {"orderer": {"name": "saw", "by": "loss"}, "interval_steps": 5, "warmup_steps": 2},
        {"orderer": {"name": "saw", "by": "loss", "every": 5}},
        {"orderer": {"name": "pacing", "by": "length", "full_at": 70}},
        {"orderer": {"name": "stair", "by": "random"}, "mixer": "uniform"},
        {"orderer": {"name": "pacing", "by": "length"}, "mixer": "uniform", "interval_steps": 5},
        {"orderer": {"name": "segment", "by": "selector"}, **LOSS},
        {"orderer": {"name": "segment", "by": "length", "every": 1}, **LOSS},
        {"orderer": {"name": "zigzag", "by": "length"}, **LOSS, "mixer": "uniform", "keep_ratio": 0.9},
        {"orderer": {"name": "zigzag", "by": "selector"}, "selector": {"represent": "embed", "targets": ["t"]}, **LOSS}
        | {"selector": {"represent": "rds_plus", "targets": ["t"]}},
    ],
)
def test_what_can_be_ordered(block: Any, config: Config, project: Path) -> None:
    assert problems(config(dynamic=block), project) == []


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({"orderer": "sorting"}, "dynamic.orderer.by: missing"),
        ({"orderer": {"by": "length"}}, "dynamic.orderer.name: missing; name an orderer (known: sorting, "),
        ({"orderer": {"name": "saw", "by": "loss"}}, "dynamic.interval_steps: missing; the saw orderer decides"),
        ({"orderer": {"name": "saw", "by": "selector"}}, "dynamic.orderer: saw goes by a selector's scores, and no"),
        (
            {"orderer": {"name": "saw", "by": "selector"}, "selector": "all"},
            "dynamic.orderer: saw goes by a selector's scores, and no selector chooses rows",
        ),
        (
            {"orderer": {"name": "saw", "by": "selector"}, **RANDOM},
            "dynamic.orderer: saw goes by the selector's scores, and the random selector gives none",
        ),
        (
            {"orderer": {"name": "saw", "by": "selector"}, **RANDOM}
            | {"selector": {"represent": "embed", "rule": "k_center"}},
            "the compose selector gives none",
        ),
        (
            {"orderer": {"name": "saw", "by": "length"}, "selector": "random", "interval_steps": 1},
            "dynamic.orderer: has no effect where the random selector chooses the rows of one step",
        ),
        (
            {
                "orderer": "shuffle",
                "selector": {"name": "greats", "targets": ["t"]},
                "interval_steps": 1,
                "candidate_batches": 2,
            },
            "dynamic.orderer: has no effect where the greats selector chooses the rows of one step",
        ),
        (
            {"orderer": {"name": "pacing", "by": "length"}, **RANDOM},
            "dynamic.orderer: pacing says which rows are available, and so does the random selector",
        ),
        (
            {"orderer": {"name": "pacing", "by": "length"}, "mixer": "uniform"},
            "dynamic.interval_steps: missing; beside a mixer, pacing makes more rows available at each decision",
        ),
        (
            {"orderer": {"name": "pacing", "by": "length", "full_at": 999}},
            "dynamic.orderer.full_at: all rows are available at step 999, and the run has 225 steps",
        ),
        (
            {"orderer": {"name": "saw", "by": "loss"}, **LOSS, "signals": {"budget": 0.5}},
            "dynamic.signals.budget: the saw orderer makes a pass that no budget pays for",
        ),
        (
            {"orderer": {"name": "sorting", "by": {"name": "scores", "file": "none.parquet", "column": "c"}}},
            "dynamic.orderer: none.parquet: no such file; scores are written by 'dataflex score'",
        ),
        ({"orderer": BY_COLUMN}, "dynamic.orderer: the data set 'a' has no column 'level'"),
    ],
)
def test_what_makes_no_sense_is_refused(block: Any, told: str, config: Config, project: Path) -> None:
    found = problems(config(dynamic=block), project)
    assert any(told in line for line in found), found


def test_flat_keys_have_no_orderer(config: Config, project: Path) -> None:
    flat = {"train_type": "dynamic_select", "component_name": "loss", "update_step": 5, "update_times": 2}
    found = problems(config(**flat, dynamic={"orderer": "shuffle"}), project)
    assert found


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "null"), ("hard", "'hard'"), (float("nan"), ".nan"), (True, "true")]
)
def test_a_value_that_cannot_be_ordered_by_is_named_with_row_and_file(
    value: Any, shown: str, config: Config, project: Path
) -> None:
    add_column(project, "level", value)
    file = project / "data" / "a.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for number, row in enumerate(lines):
        row["level"] = 1.5 if value is None or number < 7 else row["level"]
    lines[7]["level"] = value
    file.write_text("".join(json.dumps(row) + "\n" for row in lines))
    block = {"orderer": BY_COLUMN}
    found = problems(config(dynamic=block, dataset="a"), project)
    if value in (None,) or value != value:
        more = "" if value is None else " (and 92 more rows)"
        told = f"data set 'a', line 8 of data/a.jsonl, has level = {shown}{more}; a column to order by must hold finite"
        assert [line for line in found if line.startswith(f"dynamic.orderer: {told}")], found
        assert problems(config(dynamic=block, dataset="a", max_samples=7), project) == []
    else:
        assert found  # two types in one column, or a value of the wrong one
    whole = problems(config(dynamic=block, dataset="b"), project)
    assert any("item 1 of data/b.json, has level = " in line for line in whole), whole


def test_other_methods_columns_are_looked_at_too(config: Config, project: Path) -> None:
    add_column(project, "sample_weight", -1)
    found = problems(config(dynamic={"weighter": "column"}, dataset="a"), project)
    assert found == [
        "dynamic.weighter: data set 'a', line 1 of data/a.jsonl, has sample_weight = -1 (and 99 more rows); weights "
        "must be finite numbers, 0 or more"
    ]


def scores(project: Path, names: tuple[str, ...] = ("a", "b"), values: float = 1.0) -> Path:
    files = {name: next(iter((project / "data").glob(f"{name}.json*"))) for name in names}
    counts = {"a": 100, "b": 50}
    num = sum(counts[name] for name in names)
    sources = [
        {"name": name, "rows_read": counts[name], "entry": {}, "files": [vars(r) for r in file_records(files[name])]}
        for name in names
    ]
    table = ScoreTable(
        datasets=names,
        dataset_of=np.repeat(np.arange(len(names)), [counts[name] for name in names]),
        domains=names,
        domain_of=np.repeat(np.arange(len(names)), [counts[name] for name in names]),
        position=np.zeros(num, dtype=np.int64),
        tokens=np.full(num, 3),
        supervised_tokens=np.full(num, 2),
        columns={"loss": np.full(num, values)},
        provenance={"methods": [{"name": "loss"}], "config": {}, "data": {"sources": sources, "fingerprint": "f"}},
    )
    write_scores(project / "scores.parquet", table)
    return project / "scores.parquet"


def by_scores(column: str = "loss") -> dict[str, Any]:
    return {"orderer": {"name": "sorting", "by": {"name": "scores", "file": "scores.parquet", "column": column}}}


def test_scores_of_these_files_are_taken(config: Config, project: Path) -> None:
    scores(project)
    assert problems(config(dynamic=by_scores()), project) == []
    found = problems(config(dynamic=by_scores("los")), project)
    assert found == ["dynamic.orderer: scores in scores.parquet: no column 'los'; did you mean 'loss'? (columns: loss)"]


def test_scores_of_other_data_are_refused(config: Config, project: Path) -> None:
    scores(project)
    found = problems(config(dynamic=by_scores(), dataset="a"), project)
    assert found == ["dynamic.orderer: scores in scores.parquet: they are of the rows of a, b, and a is trained on"]
    with (project / "data" / "a.jsonl").open("a") as file:
        file.write(json.dumps({"instruction": "new", "input": "", "output": "row"}) + "\n")
    found = problems(config(dynamic=by_scores()), project)
    assert found == [
        "dynamic.orderer: scores in scores.parquet: data/a.jsonl of 'a' is another file than was scored; score it again"
    ]
    scores(project, values=float("nan"))
    found = problems(config(dynamic=by_scores()), project)
    assert found == ["dynamic.orderer: scores in scores.parquet: no row has a finite number in column 'loss'"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dynamic": {"average_weights": {"last_steps": 1}}}, "last_steps: must be at least 2, found 1"),
        ({"dynamic": {"average_weights": {}}}, "dynamic.average_weights.last_steps: missing"),
        (
            {"dynamic": {"average_weights": {"last_steps": 5, "every": 5}}},
            "dynamic.average_weights.every: only the last",
        ),
        ({"max_steps": 20}, "dynamic.average_weights.last_steps: the run has 20 steps, fewer than the 30 asked for"),
        ({"fsdp": "full_shard"}, "dynamic.average_weights: needs whole parameters, and fsdp partitions them"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "DeepSpeed ZeRO-3 partitions them"),
        ({"stage": "rm"}, "dynamic.average_weights: a reward model's head is saved apart"),
    ],
)
def test_weights_that_cannot_be_averaged(changes: Any, told: str, config: Config, project: Path) -> None:
    block = {"average_weights": {"last_steps": 30, "every": 5}}
    assert problems(config(dynamic=block), project) == []  # without any method
    found = problems(config(**{"dynamic": block, **changes}), project)
    assert any(told in line for line in found), found


def test_plan_says_the_order_and_its_cost(config: Config, project: Path) -> None:
    def lines(**dynamic: Any) -> str:
        (project / "c.json").write_text(json.dumps(config(max_steps=60, dynamic=dynamic)))
        return plan(project / "c.json")

    by_loss = {"orderer": {"name": "saw", "by": "loss"}, "interval_steps": 20}
    text = lines(**by_loss)
    assert "saw of loss, smallest first; within the epochs of all rows" in text
    assert "at most 450 F (3 intervals x 150 rows x 1 F" in text
    assert "within an interval's selection" in lines(**by_loss, selector="random")
    assert "at most 120 F (3 intervals x 40 rows" in lines(**by_loss, selector="random")
    assert "within each domain, epoch by epoch" in lines(**by_loss, mixer="uniform")
    text = lines(**by_loss, mixer="uniform", selector="random", keep_ratio=0.9, repeat=True)
    assert "within each domain of an interval's selection" in text


def test_an_interval_that_changes_nothing_is_noted(config: Config, project: Path) -> None:
    def noted(**dynamic: Any) -> bool:
        found = resolve(config(dynamic=dynamic), project).notes
        return any("no effect with methods that decide once for all" in note for note in found)

    assert noted(orderer={"name": "sorting", "by": "length"}, interval_steps=5)
    assert noted(orderer={"name": "sorting", "by": "length", "every": 5})
    assert not noted(orderer={"name": "sorting", "by": "loss"}, interval_steps=5)
    assert not noted(orderer={"name": "pacing", "by": "length"}, mixer="uniform", interval_steps=5)


@pytest.mark.parametrize(
    ("falls", "floor", "begin", "late", "share"),
    [
        ("cosine", 0.0, 0.0, 0.25, 0.025043),
        ("cosine", 0.1, 0.0, 0.25, 0.065910),
        ("cosine", 1 / 3, 0.0, 0.25, 0.137465),
        ("1-sqrt", 0.0, 0.8, 0.2, 0.077471),
        ("1-sqrt", 1 / 3, 0.8, 0.2, 0.122282),
        (None, 0.0, 0.0, 0.25, 0.25),
    ],
)
def test_shares_of_the_rate_are_the_golden_ones(
    falls: str | None, floor: float, begin: float, late: float, share: float
) -> None:
    assert Rate(falls=falls, floor=floor, begin=begin).late_share(late) == pytest.approx(share, abs=1e-6)


@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")
@pytest.mark.parametrize(
    ("schedule", "given", "sets"),
    [
        ("linear", {}, "a"),
        ("cosine", {}, "a"),
        ("cosine_with_min_lr", {"min_lr_rate": 0.2}, "a"),
        ("constant", {}, "a"),
        ("warmup_stable_decay", {}, "a"),
        ("warmup_stable_decay", {"num_decay_steps": 300, "decay_type": "1-sqrt", "min_lr_ratio": 0.1}, "a"),
        ("warmup_stable_decay", {"num_decay_steps": 240, "num_stable_steps": 960, "decay_type": "linear"}, "a"),
        ("warmup_stable_decay", {"num_decay_steps": 120}, None),
    ],
)
def test_shares_of_the_rate_are_those_of_the_schedule(schedule: str, given: dict[str, Any], sets: str | None) -> None:
    """LLaMA-Factory's (it fills in lengths that are left out), or without data sets the Trainer's own."""
    import torch
    from llamafactory.train.trainer_utils import create_custom_scheduler
    from transformers import TrainingArguments, get_scheduler

    arguments = TrainingArguments(max_steps=1200, lr_scheduler_type=schedule, lr_scheduler_kwargs=dict(given))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if sets is not None:
        create_custom_scheduler(arguments, 1200, optimizer)
    kwargs = {"num_warmup_steps": 0, "num_training_steps": 1200}
    made = get_scheduler(schedule, optimizer, **kwargs, scheduler_specific_kwargs=arguments.lr_scheduler_kwargs)
    rates = []
    for _ in range(1200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    keys = {"max_steps": 1200, "lr_scheduler_type": schedule, "lr_scheduler_kwargs": given, "dataset": sets}
    found = Rate.of(LlamaFactoryArgs.read({key: value for key, value in keys.items() if value is not None}))
    assert found.late_share() == pytest.approx(sum(rates[900:]) / sum(rates), abs=2e-3)


def test_an_order_under_a_rate_that_falls_to_nothing_is_noted(config: Config, project: Path) -> None:
    def noted(orderer: Any = BY_LENGTH, **keys: Any) -> str:
        found = resolve(config(dynamic={"orderer": orderer, "average_weights": {"last_steps": 4}}, **keys), project)
        return "\n".join(note for note in found.notes if note.startswith("lr_scheduler_type"))

    assert "the last quarter of the steps has 6.3% of the learning rate" in noted(lr_scheduler_type="linear")
    assert "has 2.5%" in noted(lr_scheduler_type="cosine")
    least = {"lr_scheduler_type": "cosine_with_min_lr", "learning_rate": 3e-3}
    late = {"num_stable_steps": 80, "num_decay_steps": 20}
    assert noted(**least, lr_scheduler_kwargs={"min_lr_rate": 0.1})
    assert not noted(**least, lr_scheduler_kwargs={"min_lr_rate": 0.33})
    assert not noted(**least, lr_scheduler_kwargs={"min_lr": 1e-3})
    assert not noted(lr_scheduler_type="constant")
    assert "has 4.1%" in noted(lr_scheduler_type="warmup_stable_decay")  # two thirds of the steps fall
    assert not noted(lr_scheduler_type="warmup_stable_decay", max_steps=100, lr_scheduler_kwargs=late)
    assert not noted("shuffle", lr_scheduler_type="cosine")
