"""DoReMi's proxy on two ranks: what one rank finds, under DDP, ZeRO-3 and FSDP2, with and without the cache."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dataflex.plan.proportions import read_proportions
from dataflex.record.read import read_events
from tests.distributed.test_engines import engine_settings
from tests.integration.conftest import Runner, base_settings

pytestmark = pytest.mark.gloo

CASES = {
    "ddp": ("ddp", {}),
    "ddp-paper": ("ddp", {"variant": "paper"}),
    "ddp-live": ("ddp", {"reference_cache": False}),
    "proxy-zero3": ("zero3", {}),
    "proxy-zero3-live": ("zero3", {"reference_cache": False}),
    "proxy-fsdp2": ("fsdp2", {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, data_dir, two_ranks):
    """Every case on two ranks, and those of ``ddp`` on one rank with the same global batch."""
    folder = tmp_path_factory.mktemp("doremi")
    run = Runner(base_settings(tiny_model, data_dir), folder)
    reference = run("reference", dataset="alpha,beta", max_steps=8, learning_rate=5e-3, dynamic={"mixer": "size"})

    def settings(params, **changes):
        mixer = {"name": "doremi", "reference": str(reference.folder), "eta": 5.0, **params}
        common = {"dataset": "alpha,beta,gamma", "max_steps": 5, "gradient_accumulation_steps": 2}
        # A large epsilon: Adam's direction of a gradient that is rounding only would be rounding of full size.
        return {**common, "adam_epsilon": 1e-3, **changes, "dynamic": {"mixer": mixer}}

    configs = []
    for case, (engine, params) in CASES.items():
        mapping = settings(params, per_device_train_batch_size=1, **engine_settings(engine, folder))
        configs.append(folder / f"{case}.json")
        configs[-1].write_text(json.dumps(run.mapping(case, **mapping)))
    two_ranks(configs)
    for case, (engine, params) in CASES.items():
        if engine == "ddp":
            run(f"one-{case}", **settings(params, per_device_train_batch_size=2))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_find_what_one_finds(folder, case):
    errors = [path.read_text() for path in folder.glob(f"{case}.json.*error")]
    assert not errors, errors
    one = f"one-{case}" if CASES[case][0] == "ddp" else "one-ddp-live" if case.endswith("live") else "one-ddp"
    ours, theirs = (read_proportions(folder / name / "dataflex" / "doremi.json") for name in (case, one))
    assert ours.details["steps"] == theirs.details["steps"] == 5
    assert max(abs(share - 1 / 3) for share in ours.proportions) > 1e-3
    np.testing.assert_allclose(ours.proportions, theirs.proportions, atol=1e-5)
    for name in ours.names:
        weights = [found.details["trajectory"]["weights"][name] for found in (ours, theirs)]
        np.testing.assert_allclose(*weights, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith("live")])
def test_two_ranks_store_what_one_stores(folder, case):
    def stored(name):
        (path,) = (folder / name / "dataflex" / "reference").glob("reference-losses-*/array.npy")
        return np.load(path)

    one = "one-ddp-paper" if case == "ddp-paper" else "one-ddp"
    assert np.array_equal(stored(case), stored(one), equal_nan=True)
    assert read_events(folder / case)[-1]["event"] == "finished"
