"""Two ranks leave the table of chosen rows that one leaves, weights of both included; resumed, with the same bytes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from dataflex.record.chosen import CHOSEN, chosen_table
from tests.integration.conftest import Runner, base_settings

pytestmark = pytest.mark.gloo

RUN = {
    "dataset": "alpha,beta",
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 3,
    "dynamic": {
        "warmup_steps": 2,
        "interval_steps": 2,
        "selector": {"name": "longest"},
        "weighter": {"name": "loss", "warmup_steps": 0, "r": 0.5},
    },
}


def test_two_ranks_tell_what_one_does(tmp_path, tiny_model, data_dir, two_ranks):
    runner = Runner(base_settings(tiny_model, data_dir), tmp_path)
    ranks = {"per_device_train_batch_size": 2, "ddp_find_unused_parameters": False}

    def two(name, **changes):
        config = tmp_path / f"{name}.json"
        config.write_text(json.dumps(runner.mapping("two", **RUN, **ranks, **changes)))
        printed = two_ranks([config])
        assert not list(tmp_path.glob(f"{name}.json.*error")), printed

    two("begun")
    written = (tmp_path / "two" / "dataflex" / CHOSEN).read_bytes()
    found = chosen_table(tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoint-6")
    two("resumed", resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-3"))
    assert (tmp_path / "two" / "dataflex" / CHOSEN).read_bytes() == written

    runner("one", **RUN, per_device_train_batch_size=4)
    wanted = chosen_table(tmp_path / "one")
    assert found.drop_columns(["weight"]).equals(wanted.drop_columns(["weight"]))
    assert found.column("line").to_pylist() == [*range(1, 41), *range(1, 22)]
    weights = [table.column("weight").to_numpy() for table in (found, wanted)]
    np.testing.assert_allclose(*weights, rtol=1e-4)
    served = found.column("times_served").to_numpy()
    assert (np.isfinite(weights[0]) == (served > 0)).all()
    assert found.column("times_weighed").fill_null(0).to_pylist() == served.tolist()
