"""One run whose pool and settings change at every resume: rows, record, prefix."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pytest

BASE = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 4, "overwrite_cache": True}
CHANGES = [
    {"dataset": "alpha,beta", "dynamic": {"mixer": "uniform"}},
    {
        "dataset": "alpha,beta,gamma",
        "dynamic": {"mixer": {"name": "static", "proportions": [2, 1, 1]}},
    },  # and more rows
    {"dataset": "alpha,gamma", "dynamic": {"selector": "all"}, "gradient_accumulation_steps": 2},
    {
        "dataset": "gamma,beta,alpha",
        "dynamic": {"mixer": {"name": "static", "proportions": [0, 1, 1]}, "max_epochs": 9},
    },
    {"dataset": "beta,alpha", "dynamic": {"selector": {"name": "loss"}, "interval_steps": 2}},
]


def lines_of(folder, name):
    return (folder / f"{name}.jsonl").read_text().splitlines()


def test_a_run_goes_on_over_five_pools(run, data_dir, tmp_path):
    from dataflex.errors import CheckpointError
    from dataflex.record.read import load_plan

    data = tmp_path / "data"
    shutil.copytree(data_dir, data)
    served, before = [], []
    for number, change in enumerate(CHANGES):
        if number == 1:  # rows dropped at the beginning, others appended
            rows = [*lines_of(data, "alpha")[3:], *lines_of(data, "held")]
            (data / "alpha.jsonl").write_text("\n".join(rows) + "\n")
        settings = {**BASE, **change, "dataset_dir": str(data), "max_steps": 4 * number + 4}
        settings["dynamic"] = {**change["dynamic"], "on_change": "extend"}
        if number == 1:
            strict = {**settings, "dynamic": {**change["dynamic"], "on_change": "strict"}}
            with pytest.raises(CheckpointError, match=r"'dynamic\.on_change: extend'"):
                run("live", **strict)
            with pytest.raises(CheckpointError, match="none of 61 again"):
                run("live", **settings, template="llama3")
        outcome = run("live", **settings)
        names = change["dataset"].split(",")
        pool = [(name, line) for name in names for line in lines_of(data, name)]
        planned = [event for event in outcome.events if event["event"] == "planned"]
        new = [event for event in planned if event["start_step"] >= 4 * number]
        rows = np.concatenate([load_plan(outcome.folder, event["interval"]).rows for event in new])
        served += [pool[row] for row in rows[rows >= 0]]
        assert outcome.series()[: len(before)] == before
        before = outcome.series()
        assert len(before) == 4 * number + 4
        if number == 3:
            copies = Counter(line for name in {*names, "held"} for line in lines_of(data_dir, name))
            assert max(count / copies[line] for line, count in Counter(line for _, line in served).items()) <= 1
    resumed = [event for event in outcome.events if event["event"] == "resumed"]
    assert [event["step"] for event in resumed] == [4, 8, 12, 16]
    assert [event["rows"]["new"] for event in resumed] == [7 + 3, 0, 21, 0]
    assert [event["rows"]["gone"] for event in resumed] == [3, 21, 0, 3]
    assert resumed[0]["changes"][0].startswith("dynamic.mixer changed (uniform -> static)")
    told = [event["interval"] for event in outcome.events if event["event"] == "planned"]
    assert told == sorted(set(told))
    assert json.loads((outcome.folder / "trainer_state.json").read_text())["global_step"] == 20
