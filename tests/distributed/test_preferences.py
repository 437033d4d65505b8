"""Margins of pairs on two ranks: those of one rank, with whole parameters and with partitioned ones."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dataflex.record.read import load_plan
from dataflex.score_table import read_scores
from tests.distributed.test_engines import TUNING, engine_settings, outcome
from tests.integration.conftest import Runner, base_settings

pytestmark = pytest.mark.gloo

RUNS = [("ddp", "full"), *((engine, tuning) for engine in ("zero3", "fsdp2") for tuning in TUNING)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model, data_dir, two_ranks):
    """Train 4 steps with decisions after the second and the third, and score from the checkpoint of the second."""
    folder = tmp_path_factory.mktemp("preferences")
    runner = Runner(base_settings(tiny_model, data_dir), folder)
    block = {"warmup_steps": 2, "interval_steps": 1, "selector": "margin"}
    common = {
        "dynamic": block,
        "stage": "dpo",
        "dataset": "pairs",
        "max_steps": 4,
        "adam_epsilon": 1e-3,
        "lora_dropout": 0.0,
    }
    configs = []
    for engine, tuning in RUNS:
        name = f"{engine}-{tuning}"
        settings = {**TUNING[tuning], **common, **engine_settings(engine, folder)}
        settings |= {"save_strategy": "steps", "save_steps": 2}
        mapping = runner.mapping(name, **settings)
        base = {key: value for key, value in mapping.items() if key != "dynamic"}
        command = ["score", str(folder / f"{name}-base.json"), "--method", "margin"]
        command += ["--out", str(folder / f"{name}.parquet")]
        command += [f"resume_from_checkpoint={folder / name / 'checkpoint-2'}"]
        for end, content in (("", mapping), ("-base", base), ("-score", {"command": command})):
            (folder / f"{name}{end}.json").write_text(json.dumps(content))
        configs += [folder / f"{name}.json", folder / f"{name}-score.json"]
    two_ranks(configs)
    for tuning in TUNING:
        runner(f"one-{tuning}", **{**TUNING[tuning], **common}, per_device_train_batch_size=4)
    return folder


@pytest.mark.parametrize(("engine", "tuning"), RUNS)
def test_every_engine_has_the_margins_of_one_rank(runs, engine, tuning):
    one, two = (outcome(runs, f"{name}-{tuning}") for name in ("one", engine))
    for index in (1, 2):
        expected, found = (load_plan(run.folder, index) for run in (one, two))
        scale = np.abs(expected.scores).max()
        assert scale > 1e-4
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-3, atol=1e-3 * scale)
        assert found.rows.tolist() == expected.rows.tolist()
    np.testing.assert_allclose(
        two.series(), one.series(), rtol=1e-4
    )  # the passes left model and reference as they were


@pytest.mark.parametrize(("engine", "tuning"), RUNS)
def test_scores_without_training_are_those_of_the_checkpoint_s_step(runs, engine, tuning):
    found = read_scores(runs / f"{engine}-{tuning}.parquet").columns["margin"]
    expected = load_plan(outcome(runs, f"{engine}-{tuning}").folder, 1).scores
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
