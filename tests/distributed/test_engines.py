"""Passes are harmless and scores the same under DDP, ZeRO-1/2/3 and FSDP2, full and LoRA."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from dataflex.record.read import load_plan
from tests.integration.conftest import Outcome, Runner, base_settings

pytestmark = pytest.mark.gloo

ENGINES = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
TUNING = {
    "full": {"finetuning_type": "full"},
    "lora": {"finetuning_type": "lora", "lora_rank": 4, "lora_dropout": 0.2, "lora_target": "all"},
}
BUDGETED = [("zero2", "full"), ("zero3", "full"), ("fsdp2", "full"), ("zero3", "lora"), ("fsdp2", "lora")]
SHOWN = [("ddp", "full"), *BUDGETED]
WATCHERS = Path(__file__).with_name("watchers.py")
OWN_SIGNAL = Path(__file__).parents[2] / "examples" / "my_signal.py"


def engine_settings(engine: str, folder: Path) -> dict:
    if engine.startswith("zero"):
        config = {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
            "zero_optimization": {
                "stage": int(engine[-1]),
                "overlap_comm": False,
                # By default 2 GB each, which stay in the ranks' address space until no worker can be forked.
                "reduce_bucket_size": 1_000_000,
                "allgather_bucket_size": 1_000_000,
                "contiguous_gradients": True,
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
        }
        path = folder / f"{engine}.json"
        path.write_text(json.dumps(config))
        return {"deepspeed": str(path)}
    if engine == "fsdp2":
        wrap = {"fsdp_version": 2, "sync_module_states": False, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        return {"fsdp": "full_shard auto_wrap", "fsdp_config": wrap}
    return {"ddp_find_unused_parameters": False}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, tiny_model, data_dir, two_ranks):
    folder = tmp_path_factory.mktemp("engines")
    runner = Runner(base_settings(tiny_model, data_dir), folder)

    def mapping(name, selector, tuning, **settings):
        plugin = folder / name / "watchers.py"
        plugin.parent.mkdir()
        shutil.copy(WATCHERS, plugin)
        shutil.copy(OWN_SIGNAL, plugin.parent)
        named = {"watcher": {"targets": ["goal"]}, "shown": {"targets": ["goal", "held"]}}
        block = {
            "plugins": [str(plugin)],
            "interval_steps": 2,
            "selector": {"name": selector, **named.get(selector, {})},
        }
        # A large epsilon: Adam's direction of a gradient that is rounding only would be rounding of full size.
        common = {"max_steps": 5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
        common["adam_epsilon"] = 1e-3
        tuned = {**TUNING[tuning], "lora_dropout": 0.0} if selector == "shown" else TUNING[tuning]
        return {**common, **tuned, **settings, "dynamic": block}

    configs = []
    for engine in ENGINES:
        for tuning in TUNING:
            for selector in ("blind", "watcher", *(["shown"] if (engine, tuning) in SHOWN else [])):
                name = f"{engine}-{tuning}-{selector}"
                settings = mapping(name, selector, tuning, **engine_settings(engine, folder))
                path = folder / f"{name}.json"
                path.write_text(json.dumps(runner.mapping(name, **settings)))
                configs.append(path)

    def within_a_budget(tuning, **settings):
        block = {
            "interval_steps": 2,
            "selector": {"name": "less", "targets": ["goal"]},
            "signals": {"budget": 2.0},
            "max_repeats": None,
        }
        common = {"max_steps": 4, "adam_epsilon": 1e-3, "learning_rate": 1e-4, "per_device_train_batch_size": 2}
        return {**common, **TUNING[tuning], "lora_dropout": 0.0, **settings, "dynamic": block}

    for engine, tuning in BUDGETED:
        path = folder / f"{engine}-{tuning}-budget.json"
        settings = within_a_budget(tuning, **engine_settings(engine, folder))
        path.write_text(json.dumps(runner.mapping(path.stem, **settings)))
        configs.append(path)
    log = two_ranks(configs)
    (folder / "log.txt").write_text(log)
    for tuning in TUNING:
        for selector in ("watcher", "shown"):
            name = f"one-{tuning}-{selector}"
            runner(name, **mapping(name, selector, tuning, per_device_train_batch_size=2))
        runner(f"one-{tuning}-budget", **within_a_budget(tuning, per_device_train_batch_size=4))
    return folder


def outcome(folder, name):
    errors = [path.read_text() for path in folder.glob(f"{name}.json.*error")]
    assert not errors, errors
    return Outcome(folder / name)


@pytest.mark.parametrize("tuning", TUNING)
@pytest.mark.parametrize("engine", ENGINES)
def test_watching_changes_nothing(outcomes, engine, tuning):
    blind, watching = (outcome(outcomes, f"{engine}-{tuning}-{kind}") for kind in ("blind", "watcher"))
    assert len(blind.series()) == 5
    assert blind.series() == watching.series()
    assert blind.series("grad_norm") == watching.series("grad_norm")


@pytest.mark.parametrize("tuning", TUNING)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_same_scores(outcomes, engine, tuning):
    """Compared in the first interval, before different engines round their updates differently."""
    one = json.loads((outcomes / f"one-{tuning}-watcher" / "scores-0.json").read_text())
    outcome(outcomes, f"{engine}-{tuning}-watcher")
    two = json.loads((outcomes / f"{engine}-{tuning}-watcher" / "scores-0.json").read_text())
    assert one.pop("kinds") == ["whole"]
    assert two.pop("kinds") == [{"zero3": "ZeRO-3", "fsdp2": "DTensor"}.get(engine, "whole")], "not really partitioned"
    assert one.keys() == two.keys()
    for key in one:
        scale = np.abs(one[key]).max()
        np.testing.assert_allclose(two[key], one[key], rtol=1e-5, atol=1e-5 * scale, err_msg=key)


@pytest.mark.parametrize(("engine", "tuning"), SHOWN)
def test_every_engine_shows_the_same_of_rows_that_are_trained_on(outcomes, engine, tuning):
    """Up to step 3, of which the directions are those after step 1, in the scale of the engine's own moments."""
    for decision, steps in ((1, {0, 1}), (2, {0, 1, 2, 3})):
        one, two = (
            json.loads((outcome(outcomes, f"{name}-{tuning}-shown").folder / f"scores-{decision}.json").read_text())
            for name in ("one", engine)
        )
        assert one.keys() == two.keys() == {"losses", "norms", "scores", "embeddings"}
        for what, values in one.items():
            expected, found = np.array(values), np.array(two[what])
            seen = np.isfinite(expected[:, -1])
            assert set(expected[seen, -1]) == steps
            np.testing.assert_array_equal(found[:, -1], expected[:, -1])
            scale = np.abs(expected[seen, :-1]).max()
            np.testing.assert_allclose(
                found[seen, :-1], expected[seen, :-1], rtol=1e-4, atol=1e-4 * scale, err_msg=what
            )


@pytest.mark.parametrize(("engine", "tuning"), BUDGETED)
def test_every_engine_chooses_the_same_rows_within_a_budget(outcomes, engine, tuning):
    """Rows of the first interval were scored in their own step, on whichever rank, of sharded parameters."""
    plans, correlations = [], []
    for name in (f"one-{tuning}-budget", f"{engine}-{tuning}-budget"):
        run = outcome(outcomes, name)
        told = next(event["reason"] for event in run.events if event["event"] == "planned" and event["interval"] == 1)
        assert "8 of 37 rows by influence on goal" in told
        # Of what sketches and targets say of rows.
        correlations.append(float(re.search(r"correlation (-?[\d.e-]+)", told)[1]))
        plans.append([sorted(load_plan(run.folder, index).rows.tolist()) for index in (0, 1)])
    assert plans[0] == plans[1]
    assert correlations[0] == pytest.approx(correlations[1], abs=0.05)


def test_a_resumed_run_has_its_optimizers_moments_under_fsdp2(tmp_path, tiny_model, data_dir, two_ranks):
    runner = Runner(base_settings(tiny_model, data_dir), tmp_path)
    block = {"selector": "random", "interval_steps": 2}
    common = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **engine_settings("fsdp2", tmp_path)}
    for name, more in {
        "straight": {},
        "resumed": {"resume_from_checkpoint": str(tmp_path / "straight" / "checkpoint-2")},
    }.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(runner.mapping(name, **common, **more, dynamic=block)))
        two_ranks([path])
    straight, resumed = outcome(tmp_path, "straight"), outcome(tmp_path, "resumed")
    assert len(straight.series()) == 4
    assert resumed.series() == straight.series()
    assert resumed.series("grad_norm") == straight.series("grad_norm")
