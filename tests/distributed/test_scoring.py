"""Scores and losses of a model that ZeRO-3 or FSDP2 partitions are those of one that is whole on one rank."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dataflex.score_table import read_scores
from tests.distributed.test_engines import engine_settings
from tests.offline.conftest import Scoring, rows_of

pytestmark = pytest.mark.gloo

ENGINES = ["zero3", "fsdp2"]
METHODS = ["--method", "loss,less,grad_norm", "--targets", "goal"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_model, two_ranks):
    """Train 2 steps on two ranks with a checkpoint, then score from there, and evaluate."""
    scoring = Scoring(tmp_path_factory.mktemp("partitioned"), tiny_model)
    folder = scoring.folder
    scoring.write("pool", rows_of(21))
    scoring.write("goal", rows_of(5, seed=6))
    common = {"dataset": "pool", "finetuning_type": "lora", "lora_rank": 4, "learning_rate": 1e-2}
    common["dataset_dir"] = str(scoring.data)

    def file(name, **content):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(content))
        return path

    def commands(name, engine, checkpoint):
        """Return a run of 2 steps, and what is asked of its checkpoint."""
        settings = {**scoring.base, **common, **engine}
        steps = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "dynamic": {"selector": "all"}}
        run = {**settings, **steps, "output_dir": str(folder / f"run-{name}"), "overwrite_output_dir": True}
        score = file(f"{name}-base", **settings, output_dir=str(folder / "never"))
        asked = [f"resume_from_checkpoint={checkpoint}"]
        moments = ["less.precondition=true_adam", "--out", str(folder / f"{name}.parquet")]
        evaluate = ["eval", str(score), "--data", "goal", "--out", str(folder / f"eval-{name}.json")]
        curvature = ["less.precondition=ekfac", "less.ekfac_rows=12", "--out", str(folder / f"ekfac-{name}.parquet")]
        return run, [
            ["score", str(score), *asked, *METHODS, *moments],
            ["score", str(score), *asked, "--method", "less", "--targets", "goal", *curvature],
            evaluate,
        ]

    made = []
    for engine in ENGINES:
        (folder / engine).mkdir()
        run, asked = commands(engine, engine_settings(engine, folder), folder / f"run-{engine}" / "checkpoint-2")
        made.append(file(f"{engine}-run", **{**run, "per_device_train_batch_size": 1}))
        made += [file(f"{engine}-{number}", command=command) for number, command in enumerate(asked)]
    (folder / "log.txt").write_text(two_ranks(made))
    run, asked = commands("one", {}, folder / "run-one" / "checkpoint-2")
    assert scoring.run("train", str(file("one-run", **{**run, "per_device_train_batch_size": 2}))) == 0
    for command in asked:
        assert scoring.run(*command) == 0
    errors = [path.read_text() for path in folder.glob("*.error")]
    assert not errors, errors
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_scores_are_those_of_one_rank(scored, engine):
    one, two = (read_scores(scored / f"{name}.parquet") for name in ("one", engine))
    assert list(one.columns) == list(two.columns)
    for name in ("loss", "less", "grad_norm"):
        scale = np.abs(one.columns[name]).max()
        np.testing.assert_allclose(two.columns[name], one.columns[name], rtol=1e-4, atol=1e-4 * scale, err_msg=name)


@pytest.mark.parametrize("engine", ENGINES)
def test_influence_by_curvature_is_that_of_one_rank(scored, engine):
    one, two = (read_scores(scored / f"ekfac-{name}.parquet") for name in ("one", engine))
    scale = np.abs(one.columns["less"]).max()
    np.testing.assert_allclose(two.columns["less"], one.columns["less"], rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_evaluation_is_that_of_one_rank(scored, engine):
    one, two = (json.loads((scored / f"eval-{name}.json").read_text()) for name in ("one", engine))
    assert two["data"]["micro"]["loss"] == pytest.approx(one["data"]["micro"]["loss"], rel=1e-5)
