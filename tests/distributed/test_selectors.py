"""Two ranks choose the rows that one rank chooses: the selectors that are not covered elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.integration.conftest import Outcome, Runner, base_settings

pytestmark = pytest.mark.gloo


def blocks(model):
    goal = {"targets": ["goal"]}
    encoder = {"encoder": str(model)}
    return {
        "less": {"name": "less", **goal},
        "grad_norm": "grad_norm",
        "el2n": "el2n",
        "rds_plus": {"name": "rds_plus", **goal},
        "near": {"name": "near", **goal, **encoder},
        "tsds": {"name": "tsds", **goal, **encoder},
        "embed": {"name": "embed", **goal, **encoder},
        "bm25": {"name": "bm25", **goal},
        "dsir": {"name": "dsir", **goal},
        "ifd": {"name": "ifd", "fill": True},
        "rho_loss": {"name": "rho_loss", "reference": str(model)},
        "random_balanced": "random_balanced",
        "longest": "longest",
        "compose": {"represent": "rds_plus", "aggregate": "mean_then_max", "rule": "gumbel_top_k", **goal},
        "s2l": {"name": "s2l", "clusters": 3},
        "budget": {"name": "less", **goal},
        "infobatch": {"name": "infobatch", "delta": 1.0},
    }


COMMON = {
    "dataset": "alpha,beta,gamma",
    "max_steps": 4,
    "disable_shuffling": False,
    "learning_rate": 1e-4,
    "adam_epsilon": 1e-3,
}


OWN = {"infobatch": {"dataset": "beta", "max_steps": 8}}  # losses of most rows are known at its second decision


def block_of(name, selector):
    """The block; under a budget every row of the first plan is scored in its own step, on whichever rank."""
    own = {"signals": {"budget": 2.0}, "max_repeats": None} if name == "budget" else {}
    return {"selector": selector, "interval_steps": 4 if name in OWN else 2, **own}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, tiny_model, data_dir, two_ranks):
    folder = tmp_path_factory.mktemp("selectors")
    runner, selectors, configs = Runner(base_settings(tiny_model, data_dir), folder), blocks(tiny_model), []
    for name, selector in selectors.items():
        dynamic = block_of(name, selector)
        settings = {**COMMON, **OWN.get(name, {}), "ddp_find_unused_parameters": False, "dynamic": dynamic}
        settings["per_device_train_batch_size"] = 2
        configs.append(folder / f"two-{name}.json")
        configs[-1].write_text(json.dumps(runner.mapping(f"two-{name}", **settings)))
    two_ranks(configs)
    for name, selector in selectors.items():
        dynamic = block_of(name, selector)
        runner(f"one-{name}", **{**COMMON, **OWN.get(name, {})}, per_device_train_batch_size=4, dynamic=dynamic)
    return folder


def chosen(folder, job):
    errors = [path.read_text() for path in folder.glob(f"{job}.json.*error")]
    assert not errors, errors
    rows = []
    for event in Outcome(folder / job).events:
        if event["event"] == "planned":
            with np.load(folder / job / "dataflex" / event["plan"]) as arrays:
                rows.append(sorted(arrays["rows"].tolist()))
    assert len(rows) == 2
    return rows


@pytest.mark.parametrize("name", list(blocks("model")))
def test_the_same_rows_on_one_rank_and_two(outcomes, name):
    assert chosen(outcomes, f"two-{name}") == chosen(outcomes, f"one-{name}")


def test_rows_weigh_the_same_on_two_ranks(outcomes):
    one, two = (Outcome(outcomes / f"{ranks}-infobatch") for ranks in ("one", "two"))
    assert max(one.series("dataflex/weight_max")) > 1.0
    assert two.series("dataflex/weight_max") == pytest.approx(one.series("dataflex/weight_max"))
    assert two.series() == pytest.approx(one.series(), rel=1e-3)
