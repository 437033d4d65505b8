"""Every weighter through the real path: tuning, packing, checkpointing, bf16, ways of cutting up a step, resume."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.integration.test_identity import same

ANCHORED = {"targets": ["goal"]}


@pytest.fixture
def blocks(tiny_model):
    """Weighter blocks by name; the reference model is the tiny model itself, before training."""
    reference = {"reference": str(tiny_model)}
    return {
        "loss": {"name": "loss", "warmup_steps": 0},
        "adapt": {"name": "adapt", **ANCHORED, "tau": 0.1, "refresh_steps": 2},
        "adapt-words": {"name": "adapt", **ANCHORED, "similarity": "bm25", "rescale": "mean1"},
        "joint": {"name": "joint_update_aware", **ANCHORED, "refresh_steps": 3},
        "slm": {"name": "slm", **reference, "keep": 0.5},
        "slm-live": {"name": "slm", **reference, "keep": 0.5, "reference_cache": False},
        "rho": {"name": "rho", **reference, "keep": 0.5},
        "group": {"name": "group"},
        "balanced": {"name": "group", "strategy": "class_balanced", "beta": 0.99},
        "dro": {"name": "group", "strategy": "group_dro", "eta": 0.5},
        "focal": {"name": "focal"},
        "token": {"name": "token"},
        "entropy": {"name": "token", "function": "entropy"},
        "clip": {"name": "token", "function": "clip_quantile", "quantile": 0.8, "normalizer": "weight_sum"},
        "excess": {"name": "token", "function": "excess", **reference},
        "product": [{"name": "slm", **reference, "warmup_steps": 1}, {"name": "adapt", **ANCHORED}],
        "meta": {"name": "meta", **ANCHORED},
        "presence": {"name": "presence", "group_rows": 2, "direct_share": 0.5},
    }


NAMES = (
    "loss adapt adapt-words joint slm slm-live rho group balanced dro focal token entropy clip excess product meta "
    "presence"
).split()
SETTINGS = {"dataset": "alpha,beta", "max_steps": 5, "per_device_train_batch_size": 4, "disable_shuffling": False}


@pytest.mark.parametrize("name", NAMES)
def test_it_changes_the_run_and_a_resumed_run_goes_on_the_same(run, blocks, name):
    """LoRA with dropout, gradient checkpointing and accumulation; checkpoints between refreshes."""
    settings = {
        **SETTINGS,
        "finetuning_type": "lora",
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "disable_gradient_checkpointing": False,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "dynamic": {"weighter": blocks[name]},
    }
    plain = run("plain", **{**settings, "dynamic": {"selector": "all"}})
    whole = run("whole", **settings)
    assert np.isfinite(whole.series()).all()
    assert whole.series() != plain.series()
    for entry in whole.log:
        assert 0.0 < entry["dataflex/weight_ess"] <= 1.0
        assert entry["dataflex/weight_p05"] <= entry["dataflex/weight_p50"] <= entry["dataflex/weight_p95"]
    # Before the first update the model is the same, and so is the plain loss.
    assert whole.log[0]["dataflex/plain_loss"] == pytest.approx(plain.log[0]["loss"], rel=1e-4)
    weights, losses, ess = whole.weights(), whole.series(), whole.series("dataflex/weight_ess")
    resumed = run("whole", **settings, resume_from_checkpoint=str(whole.folder / "checkpoint-3"))
    assert len(resumed.events) > 0
    assert resumed.series() == losses
    assert resumed.series("dataflex/weight_ess") == ess
    for key, value in resumed.weights().items():
        assert np.array_equal(value, weights[key]), key


@pytest.mark.parametrize("name", ["adapt", "adapt-words", "slm", "slm-live", "dro", "focal", "meta", "presence"])
def test_the_warmup_is_plain_training(run, blocks, name):
    """Two steps to the bit, with nothing weighed or asked; from the third on weights act."""
    plain = run("plain", **SETTINGS, dynamic={"selector": "all"})
    outcome = run("out", **SETTINGS, dynamic={"weighter": {**blocks[name], "warmup_steps": 2}})
    for key in ("loss", "grad_norm"):
        assert outcome.series(key)[:2] == plain.series(key)[:2]
    assert outcome.series()[2:] != plain.series()[2:]
    assert ["dataflex/weight_ess" in entry for entry in outcome.log[:3]] == [False, False, True]


@pytest.mark.parametrize("name", ["loss", "adapt", "slm", "joint", "clip", "meta"])
@pytest.mark.parametrize("packing", [{"packing": True}, {"neat_packing": True}])
def test_packed_documents(run, blocks, name, packing):
    settings = {**SETTINGS, "cutoff_len": 40, "max_steps": 3, "dynamic": {"weighter": blocks[name]}}
    outcome = run("out", **settings, **packing)
    assert np.isfinite(outcome.series()).all()
    assert 0.0 < outcome.log[0]["dataflex/weight_ess"] < 1.0


@pytest.mark.parametrize("name", ["loss", "adapt", "joint", "slm", "entropy", "meta", "presence"])
def test_bf16(run, blocks, name):
    outcome = run("out", **SETTINGS, bf16=True, use_cpu=True, dynamic={"weighter": blocks[name]})
    assert np.isfinite(outcome.series()).all()


@pytest.mark.parametrize("name", ["adapt", "adapt-words", "group", "balanced", "focal", "token", "meta", "presence"])
def test_accumulation_does_not_matter_where_the_method_says_so(run, blocks, name):
    """Weights that do not depend on the micro-batch: one of 8 rows equals four of 2."""
    block = {**blocks[name], **({"rescale": "none"} if name == "adapt-words" else {})}
    settings = {**SETTINGS, "dynamic": {"weighter": block}}
    one = run("one", **{**settings, "per_device_train_batch_size": 8})
    four = run("four", **{**settings, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})
    np.testing.assert_allclose(one.series(), four.series(), rtol=2e-4)
    np.testing.assert_allclose(one.series("grad_norm"), four.series("grad_norm"), rtol=2e-3)


def test_forward_mode_gives_the_products_of_gradients(run, blocks):
    forward = run("forward", **SETTINGS, dynamic={"weighter": blocks["meta"]})
    exact = run("exact", **SETTINGS, dynamic={"weighter": {**blocks["meta"], "forward_mode": False}})
    np.testing.assert_allclose(forward.series(), exact.series(), rtol=1e-4)
    assert forward.series("dataflex/weight_ess") == pytest.approx(exact.series("dataflex/weight_ess"), rel=1e-3)


def test_all_tokens_kept_is_the_plain_loss(run, blocks):
    """All tokens are kept: k = 100 %."""
    plain = run("plain", **SETTINGS, dynamic={"selector": "all"})
    kept = run("kept", **SETTINGS, dynamic={"weighter": {**blocks["slm"], "keep": 1.0}})
    same(plain, kept)


def test_a_cached_reference_gives_the_run_of_a_live_one(run, blocks):
    stored = run("stored", **SETTINGS, dynamic={"weighter": blocks["slm"]})
    live = run("live", **SETTINGS, dynamic={"weighter": blocks["slm-live"]})
    np.testing.assert_allclose(stored.series(), live.series(), rtol=2e-2)  # kept in fp16


def test_the_record_holds_the_rows_that_weigh_most_and_least(run, blocks):
    from dataflex.record.read import read_weights
    from dataflex.record.report import report

    outcome = run("out", **{**SETTINGS, "max_steps": 10}, dynamic={"weighter": blocks["loss"]})
    weighed = read_weights(outcome.folder)
    assert weighed["rows"] == 40
    assert weighed["step"] == 10
    assert len(weighed["most"]) == len(weighed["least"]) == 10
    assert weighed["most"][0]["weight"] > 1.0 > weighed["least"][0]["weight"]
    assert weighed["most"][0]["domain"] in {"alpha", "beta"}
    assert len(weighed["most"][0]["text"]) > 10
    text = report([outcome.folder])
    assert "Rows that weighed most and least, of 40" in text
    assert "weights.png" in text


@pytest.mark.parametrize("key", ["use_dft_loss", "use_eaft_loss", "use_asft_loss"])
def test_losses_of_llamafactory_stay_usable_without_a_weighter_only(run, capsys, key):
    from dataflex.cli import main

    extra = {"ref_model": run.base["model_name_or_path"]} if key == "use_asft_loss" else {}
    ours = run("ours", **{**SETTINGS, "max_steps": 2}, **{key: True}, **extra, dynamic={"selector": "all"})
    assert np.isfinite(ours.series()).all()
    for block, kind in (({"weighter": "focal"}, "weighter"), ({"interval_steps": 2, "mixer": "odm"}, "mixer")):
        mapping = {**run.mapping("refused", **SETTINGS, **{key: True}, **extra), "dynamic": block}
        file = run.folder / "refused.json"
        file.write_text(json.dumps(mapping))
        assert main(["plan", str(file)]) == 2
        told = capsys.readouterr()
        name = block[kind]
        assert f"{key}: it computes a loss of its own, and so does the {name} {kind}" in told.out + told.err
