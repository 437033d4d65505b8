"""``exclude_seen`` and ``leakage`` through real training runs."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from dataflex.errors import ConfigError, DataError

SETTINGS = {"dataset": "alpha", "max_steps": 12, "save_strategy": "steps", "save_steps": 4}
BLOCK = {"warmup_steps": 2, "interval_steps": 3, "selector": "loss", "exclude_seen": True}


def plans(outcome):
    """Rows served in each interval, and the pool that was chosen from (all rows where none is stored)."""
    found = []
    for event in outcome.events:
        if event["event"] == "planned":
            with np.load(outcome.folder / "dataflex" / event["plan"]) as arrays:
                pool = arrays["pool"].tolist() if "pool" in arrays else list(range(40))
                found.append((arrays["rows"].tolist(), pool, event["reason"]))
    return found


def test_rows_come_again_only_when_too_few_are_left(run):
    """40 rows, 4 in warm-up and 6 in each interval: after 6 of them nothing is left, and all come back."""
    outcome = run("run", **{**SETTINGS, "max_steps": 26}, dynamic=BLOCK)
    intervals = plans(outcome)
    assert len(intervals) == 9
    seen: set[int] = set()
    for index, (rows, pool, reason) in enumerate(intervals):
        if index:
            assert ("every row is in the pool again" in reason) == (index == 7)
            if index == 7:
                assert seen == set(range(40))
                seen = set()
            assert pool == [row for row in range(40) if row not in seen]
            assert set(rows) <= set(pool)
        assert not seen & set(rows)
        assert len(set(rows)) == len(rows)
        seen |= set(rows)
    assert "0 rows are unseen and 6 are wanted" in intervals[7][2]


def test_a_rest_that_is_too_small_is_passed_over(run):
    """37 rows (``ones``), 16 in each interval: 5 are left after two, fewer than wanted."""
    block = {"interval_steps": 8, "selector": "random", "exclude_seen": True}
    outcome = run("run", max_steps=24, dynamic=block)
    reasons = [reason for _, _, reason in plans(outcome)]
    assert "5 rows are unseen and 16 are wanted" in reasons[2]
    assert "unseen" not in reasons[0] + reasons[1]


def test_shares_count_from_all_rows(run):
    """A pool of half the 40 rows; a quarter of that is kept: 5 new rows each time while 5 are left."""
    block = {"interval_steps": 2, "selector": "random", "exclude_seen": True, "keep_ratio": 0.25}
    outcome = run("run", **{**SETTINGS, "max_steps": 16}, dynamic={**block, "signals": {"pool_fraction": 0.5}})
    intervals = plans(outcome)
    seen: set[int] = set()
    for rows, pool, reason in intervals:
        assert "again" not in reason
        assert len(pool) == min(20, 40 - len(seen))
        assert len(set(rows)) == 4  # 2 steps x 2 rows, of the 5 that were kept
        assert not seen & set(rows)
        seen |= set(rows)
    assert len(seen) == 32


def test_a_resumed_run_has_seen_the_same(run):
    straight = run("straight", **SETTINGS, dynamic=BLOCK)
    for step in (4, 8):
        folder = run.folder / f"resumed{step}"
        shutil.copytree(straight.folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copytree(straight.folder / "dataflex", folder / "dataflex")
        again = run(folder.name, **SETTINGS, dynamic=BLOCK, resume_from_checkpoint=True)
        assert again.series() == straight.series()
        assert [rows for rows, _, _ in plans(again)] == [rows for rows, _, _ in plans(straight)]


def test_rows_served_too_often_are_told(run):
    """The same 4 rows fill 6 places in each interval: 3 times each after two of them."""
    block = {"interval_steps": 3, "selector": "longest", "keep_ratio": 0.1, "max_repeats": 2}
    outcome = run("run", **SETTINGS, dynamic=block)
    told = ["were served more than 2 times by now" in reason for _, _, reason in plans(outcome)]
    assert told == [False, True, True, True]


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({"mixer": "uniform", "exclude_seen": True}, "exclude_seen: has no effect without a selector"),
        ({"mixer": "uniform", "max_repeats": 2}, "max_repeats: has no effect without a selector"),
        ({"selector": "all", "max_repeats": 2}, "max_repeats: has no effect with the all selector"),
        ({"selector": "random", "max_repeats": 0}, "max_repeats: must be at least 1"),
        ({"selector": "all", "exclude_seen": True}, "has no effect with the all selector"),
        ({"selector": "random", "mixer": "uniform", "keep_ratio": 0.5, "exclude_seen": True}, "not work with a mixer"),
        (
            {
                "interval_steps": 2,
                "selector": {"name": "less", "targets": ["goal"], "checkpoints": 2},
                "exclude_seen": True,
            },
            "set checkpoints to 1",
        ),
        ({"selector": "random", "leakage": "drop"}, "leakage: 'drop' has no effect without targets"),
        ({"selector": "random", "leakage": "dropp"}, "dynamic.leakage"),
    ],
)
def test_what_would_have_no_effect_is_refused(run, block, told):
    with pytest.raises(ConfigError, match=told):
        run("run", dataset="alpha,beta", max_steps=2, dynamic=block)


@pytest.fixture
def leaky(run, data_dir, tmp_path):
    """A run whose target ``goal`` has its rows 1 and 3 in the training set too, one of them twice."""
    data = tmp_path / "leaky"
    shutil.copytree(data_dir, data)
    goal = [json.loads(line) for line in (data / "goal.jsonl").read_text().splitlines()]
    rows = (data / "alpha.jsonl").read_text().splitlines()
    alike = {**goal[1], "source": "elsewhere"}  # the same text
    rows[5:5] = [json.dumps(goal[3]), json.dumps(alike)]
    rows.append(json.dumps(alike))
    (data / "alpha.jsonl").write_text("".join(row + "\n" for row in rows))
    selector = {"name": "rds_plus", "targets": ["goal"]}

    def start(name, **block):
        settings = {**SETTINGS, "dataset_dir": str(data), "max_steps": 3, "dataset": "alpha,beta"}
        return run(name, **settings, dynamic={"interval_steps": 3, "selector": selector, **block})

    return start


def test_leaks_are_told_and_recorded(leaky):
    import logging

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dataflex").addHandler(handler)
    try:
        outcome = leaky("warned")
    finally:
        logging.getLogger("dataflex").removeHandler(handler)
    assert any("target 'goal': 2 of its 5 rows also lie in the training pool (row 3" in line for line in lines)
    space = outcome.events[0]["row_space"]
    assert space["leaks"]["goal"] == {
        "target_rows": 2,
        "of": 5,
        "training_rows": 3,
        "examples": [
            {"target_row": 3, "training_row": 5},
            {"target_row": 1, "training_row": 6},
            {"target_row": 1, "training_row": 42},
        ],
    }
    assert space["sources"] == {"alpha": 43, "beta": 21}
    assert set(plans(outcome)[0][0]) & {5, 6, 42}  # nearest to the target: themselves


def test_leaks_may_end_the_run_or_leave_the_pool(leaky):
    with pytest.raises(DataError, match=r"dynamic\.leakage: target 'goal': 2 of its 5 rows"):
        leaky("refused", leakage="error")
    outcome = leaky("dropped", leakage="drop")
    space = outcome.events[0]["row_space"]
    assert space["sources"] == {"alpha": 40, "beta": 21}
    assert space["domains"] == {"alpha": 40, "beta": 21}
    assert space["leaks"]["goal"]["training_rows"] == 3
