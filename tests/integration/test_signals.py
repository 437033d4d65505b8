"""How passes are made in a run: on a part of the pool, given again, taken up after a kill."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from dataflex.record.read import load_plan

SETTINGS = {"dataset": "alpha,beta", "max_steps": 8, "save_strategy": "steps", "save_steps": 1}
BLOCK = {"interval_steps": 2, "selector": "loss"}


def planned(outcome):
    return [event for event in outcome.events if event["event"] == "planned"]


def test_a_part_of_the_pool(run):
    outcome = run("out", **SETTINGS, dynamic={**BLOCK, "signals": {"pool_fraction": 0.5}})
    pools = []
    for event in planned(outcome):
        stored = load_plan(outcome.folder, event["interval"])
        assert len(stored.pool) == len(stored.scores) == round(61 / 2)
        assert np.isin(stored.rows, stored.pool).all()
        pools.append(stored.pool.tolist())
    assert len({tuple(pool) for pool in pools}) == len(pools)


@pytest.mark.parametrize("step", [1, 3, 5, 6])
def test_answers_given_again_survive_a_resume(run, step):
    """With max_age_steps 4, intervals 0, 2 and 4 share the scores of step 0; interval 6 makes new ones."""
    block = {**BLOCK, "signals": {"max_age_steps": 4}}
    straight = run("straight", **SETTINGS, dynamic=block)
    scores = [load_plan(straight.folder, event["interval"]).scores for event in planned(straight)]
    assert np.array_equal(scores[0], scores[1])
    assert np.array_equal(scores[0], scores[2])
    assert not np.array_equal(scores[0], scores[3])
    folder = run.folder / "resumed"
    shutil.copytree(straight.folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    shutil.copytree(straight.folder / "dataflex", folder / "dataflex")
    resumed = run("resumed", **SETTINGS, dynamic=block, resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert resumed.series() == straight.series()


def test_a_store_changes_nothing_and_holds_the_passes(run, tmp_path):
    plain = run("plain", **SETTINGS, dynamic=BLOCK)
    store = tmp_path / "store"
    stored = run("stored", **SETTINGS, dynamic={**BLOCK, "signals": {"store": str(store)}})
    assert stored.series() == plain.series()
    from dataflex.signals.store import ArrayStore

    assert len(ArrayStore(store).entries()) == 4
    again = run("again", **SETTINGS, dynamic={**BLOCK, "signals": {"store": str(store)}})
    assert again.series() == plain.series()
    assert len(ArrayStore(store).entries()) == 4


@pytest.mark.parametrize("how", ["embeddings", "pilot"])
def test_screening_leaves_the_rows_nearest_to_the_targets(run, how):
    """The target holds copies of pool rows: those are nearest, survive the screen, and are chosen by LESS."""
    import json
    from pathlib import Path

    data = Path(run.base["dataset_dir"])
    rows = (data / "alpha.jsonl").read_text().splitlines()
    folder = run.folder / "own"
    folder.mkdir()
    copied = [3, 17, 30]
    (folder / "pool.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "aim.jsonl").write_text("\n".join(rows[i] for i in copied) + "\n")
    info = {name: {"file_name": f"{name}.jsonl"} for name in ("pool", "aim")}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    settings = {"dataset_dir": str(folder), "dataset": "pool", "max_steps": 4, "finetuning_type": "lora"}
    block = {"interval_steps": 2, "selector": {"name": "less", "targets": ["aim"]}}
    outcome = run("out", **settings, dynamic={**block, "signals": {"screen_fraction": 0.5, "screen_by": how}})
    for event in planned(outcome):
        stored = load_plan(outcome.folder, event["interval"])
        assert len(stored.pool) == 20
        assert set(stored.rows.tolist()) <= set(stored.pool.tolist())
        assert len(set(copied) & set(stored.pool.tolist())) >= 2


def test_a_pilot_needs_gradients_and_something_to_screen(run):
    from dataflex.errors import ConfigError

    with pytest.raises(ConfigError, match=r"screen_by: has no effect without screen_fraction"):
        run("out", **SETTINGS, dynamic={**BLOCK, "signals": {"screen_by": "pilot"}})
    less = {"name": "less", "targets": ["beta"]}
    block = {"interval_steps": 2, "selector": less, "signals": {"screen_by": "pilot", "screen_fraction": 0.5}}
    with pytest.raises(ConfigError, match=r"screen_by: a pilot looks at gradients"):
        run("out", **{**SETTINGS, "stage": "dpo"}, dynamic=block)


def test_screening_needs_targets(run):
    from dataflex.errors import ConfigError

    with pytest.raises(ConfigError, match=r"screen_fraction.*has none"):
        run("out", **SETTINGS, dynamic={**BLOCK, "signals": {"screen_fraction": 0.5}})
