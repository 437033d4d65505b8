"""Two ranks of 2 rows weigh as one rank of 4: the micro-batch is that of all ranks. Also under ZeRO and FSDP2."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.test_engines import engine_settings
from tests.integration.conftest import Outcome, Runner, base_settings

pytestmark = pytest.mark.gloo

ANCHORED = {"targets": ["goal"], "refresh_steps": 2}


def blocks(model):
    reference = {"reference": str(model)}
    return {
        "loss": {"name": "loss", "warmup_steps": 0, "r": 0.5},
        "adapt": {"name": "adapt", **ANCHORED, "tau": 0.1, "rescale": "mean1"},
        "joint": {"name": "joint_update_aware", **ANCHORED},
        "slm": {"name": "slm", **reference, "keep": 0.4},
        "rho": {"name": "rho", **reference, "keep": 0.4},
        "dro": {"name": "group", "strategy": "group_dro", "eta": 0.5},
        "balanced": {"name": "group", "strategy": "class_balanced", "beta": 0.9},
        "entropy": {"name": "token", "function": "entropy"},
        "q_tuning": {"name": "q_tuning", "keep_tokens": 0.5},
        "clip": {"name": "token", "function": "clip_quantile", "quantile": 0.7, "normalizer": "weight_sum"},
        "product": [{"name": "slm", **reference, "keep": 0.6}, {"name": "adapt", **ANCHORED, "tau": 0.2}],
        "meta": {"name": "meta", "targets": ["goal"]},
        "meta-rows": {"name": "meta", "targets": ["goal"], "forward_mode": False},
        "presence": {"name": "presence", "group_rows": 3, "direct_share": 0.5},
    }


NAMES = "loss adapt joint slm rho dro balanced entropy q_tuning clip product meta meta-rows presence".split()
ENGINES = [
    ("zero2", "adapt"),
    ("zero3", "loss"),
    ("zero3", "adapt"),
    ("zero3", "slm"),
    ("zero3", "meta-rows"),
    ("zero3", "presence"),
    ("fsdp2", "meta-rows"),
    ("fsdp2", "presence"),
    ("fsdp2", "joint"),
    ("fsdp2", "entropy"),
    ("fsdp2", "rho"),
]
TOLERANCES = {"loss": 1e-4, "grad_norm": 1e-3, "dataflex/plain_loss": 1e-4, "dataflex/weight_ess": 1e-3}
COMMON = {
    "dataset": "alpha,beta",
    "disable_shuffling": False,
    "max_steps": 4,
    "gradient_accumulation_steps": 2,
    "adam_epsilon": 1e-3,  # the direction of a gradient that is rounding only would be rounding of full size
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, tiny_model, data_dir, two_ranks):
    folder = tmp_path_factory.mktemp("weighters")
    runner, weighters = Runner(base_settings(tiny_model, data_dir), folder), blocks(tiny_model)
    jobs = {f"ddp-{name}": (name, {"ddp_find_unused_parameters": False}) for name in NAMES}
    jobs |= {f"{engine}-{name}": (name, engine_settings(engine, folder)) for engine, name in ENGINES}
    configs = []
    for job, (name, engine) in jobs.items():
        settings = {**COMMON, **engine, "per_device_train_batch_size": 2, "dynamic": {"weighter": weighters[name]}}
        configs.append(folder / f"{job}.json")
        configs[-1].write_text(json.dumps(runner.mapping(job, **settings)))
    two_ranks(configs)
    for name in NAMES:
        runner(f"one-{name}", **COMMON, per_device_train_batch_size=4, dynamic={"weighter": weighters[name]})
    return folder


def series(folder: Path, job: str, key: str) -> list[float]:
    errors = [path.read_text() for path in folder.glob(f"{job}.json.*error")]
    assert not errors, errors
    found = Outcome(folder / job).series(key)
    assert len(found) == COMMON["max_steps"]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one(outcomes, name):
    for key, tolerance in TOLERANCES.items():
        one, two = series(outcomes, f"one-{name}", key), series(outcomes, f"ddp-{name}", key)
        np.testing.assert_allclose(two, one, rtol=tolerance, err_msg=key)


@pytest.mark.parametrize(("engine", "name"), ENGINES)
def test_partitioned_parameters_do_not_matter(outcomes, engine, name):
    one, two = series(outcomes, f"ddp-{name}", "loss"), series(outcomes, f"{engine}-{name}", "loss")
    np.testing.assert_allclose(two, one, rtol=1e-4)
