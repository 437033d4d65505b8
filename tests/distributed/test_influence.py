"""Selectors by gradients, clusters, random steps and rewards keep the same rows on two ranks as on one."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.test_two_ranks import rows_of

pytestmark = pytest.mark.gloo

TARGETS = ["goal", "held"]
CASES = {
    "icons": {"name": "icons", "targets": TARGETS},
    "cluster_less": {"name": "cluster_less", "targets": TARGETS, "clusters": 6, "sketch_size": 64},
    "coincide": {"name": "coincide", "clusters": 4},
    "zeroth": {"name": "zeroth", "targets": TARGETS, "directions": 3},
    "nice": {"name": "nice", "targets": TARGETS, "samples": 4, "max_new_tokens": 6},
}
REWARD = """
import os
from pathlib import Path

def score(prompt, answer, reference):
    with open(Path(__file__).with_suffix(".log"), "a") as log:
        print(os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0"), file=log)
    return sum(map(ord, answer)) % 7
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_model, data_dir, two_ranks):
    """All cases on one and on two ranks, and who graded."""
    from tests.integration.conftest import Outcome, Runner, base_settings

    folder = tmp_path_factory.mktemp("influence")
    reward = folder / "reward.py"
    reward.write_text(textwrap.dedent(REWARD))
    runner = Runner({**base_settings(tiny_model, data_dir), "dataset": "alpha", "max_steps": 4}, folder)

    def settings(case, world):
        selector = {**CASES[case], **({"reward": f"{reward}:score"} if case == "nice" else {})}
        return {
            "dynamic": {"interval_steps": 2, "selector": selector},
            "gradient_accumulation_steps": 2 // world,
            "ddp_find_unused_parameters": False,
        }

    single = {case: runner(f"one-{case}", **settings(case, 1)) for case in CASES}
    configs = []
    for case in CASES:
        configs.append(folder / f"two-{case}.json")
        configs[-1].write_text(json.dumps(runner.mapping(f"two-{case}", **settings(case, 2))))
    two_ranks(configs)
    errors = [path.read_text() for path in folder.glob("*.error")]
    assert not errors, errors
    graded = reward.with_suffix(".log").read_text().splitlines()
    return single, {path.stem: Outcome(folder / path.stem) for path in map(Path, configs)}, graded


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_keep_the_same_rows(results, case):
    single, double, _ = results
    one, two = rows_of(single[case]), rows_of(double[f"two-{case}"])
    assert len(one) == 2
    assert all(len(rows) == 8 for rows in one)
    assert one == two
    np.testing.assert_allclose(double[f"two-{case}"].series(), single[case].series(), rtol=1e-5)


def test_one_rank_grades_for_all(results):
    *_, graded = results
    answers = 2 * 4 * (5 + 7)  # intervals, samples, prompts
    assert graded.count("1 0") == answers
    assert graded.count("2 0") == answers
    assert len(graded) == 2 * answers
