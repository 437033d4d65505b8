"""Online mixers in real runs: gates of a mixture of experts, a bandit that is resumed, held-out losses."""

from __future__ import annotations

import json

import numpy as np
import pytest

TWO = {"dataset": "alpha,beta", "max_steps": 6}


def shares(outcome):
    return [
        event["proportions"] for event in outcome.events if event["event"] == "planned" and event.get("proportions")
    ]


def test_gate_loads_are_those_of_the_routers(tiny_moe):
    import torch
    from transformers import MixtralForCausalLM

    from dataflex.signals.logits import GateReader

    model = MixtralForCausalLM.from_pretrained(tiny_moe).eval()
    ids = torch.tensor([[5, 6, 7, 8, 3, 3], [9, 10, 11, 12, 13, 14]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    gates = GateReader(model)
    loads = gates({"input_ids": ids, "attention_mask": mask, "labels": ids})
    assert loads.shape == (2, 2, 4) == (2, *gates.shape)
    assert loads.sum(dim=2).tolist() == [[8.0, 8.0], [12.0, 12.0]]  # two experts a token, padding left out
    for row in range(2):
        length = int(mask[row].sum())
        alone = model(ids[row : row + 1, :length], output_router_logits=True).router_logits
        for layer, logits in enumerate(alone):
            counts = torch.bincount(logits.softmax(-1).topk(2).indices.flatten(), minlength=4)
            assert loads[row, layer].tolist() == counts.tolist()


def test_dynamic_moe_runs_and_refuses_other_models(run, tiny_moe):
    from dataflex.errors import UnsupportedError

    mixer = {"name": "dynamic_moe", "targets": ["goal", "held", "ones"]}
    three = {**TWO, "dataset": "alpha,beta,gamma"}
    dynamic = {"mixer": mixer, "interval_steps": 2, "freeze_gate": True}
    ours = run("moe", **three, model_name_or_path=str(tiny_moe), dynamic=dynamic)
    found = shares(ours)
    assert len(found) == 3
    assert len({round(share, 6) for share in found[0].values()}) == 3  # no two domains are routed alike
    with pytest.raises(UnsupportedError, match="no mixture-of-experts model"):
        run("dense", **three, dynamic={"mixer": mixer, "interval_steps": 2})


def test_the_balance_loss_of_a_mixture_of_experts_stays(run, tiny_moe):
    settings = {**TWO, "dataset": "ones", "model_name_or_path": str(tiny_moe), "moe_aux_loss_coef": 0.5}
    stock = run("stock", **settings)
    ours = run("ours", **settings, dynamic={"weighter": {"name": "column"}})
    assert np.allclose(stock.series(), ours.series(), rtol=1e-5)
    assert stock.series()[0] > run("without", **{**settings, "moe_aux_loss_coef": None}).series()[0] + 0.1


def test_the_balance_loss_is_no_part_of_what_a_token_costs(run, tiny_moe):
    evaluation = {"eval_dataset": "held", "do_eval": True, "eval_strategy": "steps", "eval_on_start": True}
    settings = {**TWO, "max_steps": 1, "eval_steps": 1, "model_name_or_path": str(tiny_moe), **evaluation}

    def first(name, coefficient):
        outcome = run(name, **settings, moe_aux_loss_coef=coefficient, dynamic={"selector": "all"})
        history = json.loads((outcome.folder / "trainer_state.json").read_text())["log_history"]
        return next(entry for entry in history if "eval_loss" in entry)

    balanced, plain = first("balanced", 0.5), first("plain", None)
    assert balanced["eval_loss"] > plain["eval_loss"] + 0.1  # as stock
    assert balanced["eval_token_loss"] == pytest.approx(plain["eval_token_loss"], rel=1e-6)


@pytest.mark.parametrize("variant", ["full_information", "paper", "official"])
def test_odm_is_resumed_exactly(run, variant):
    dynamic = {"mixer": {"name": "odm", "variant": variant}, "interval_steps": 1, "warmup_steps": 1}
    settings = {**TWO, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
    whole = run("whole", **settings, dynamic=dynamic)
    part = run("part", **{**settings, "max_steps": 3}, lr_scheduler_type="constant", dynamic=dynamic)
    rest = run(
        "rest",
        **settings,
        lr_scheduler_type="linear",
        resume_from_checkpoint=str(whole.folder / "checkpoint-3"),
        dynamic=dynamic,
    )
    assert shares(whole)[-1] == shares(rest)[-1]
    assert whole.series()[-3:] == rest.series()[-3:]
    assert shares(whole)[0] == shares(part)[0]
    assert shares(whole)[-1] != shares(whole)[0]
    for name, value in whole.weights().items():
        assert np.array_equal(value, rest.weights()[name]), name


def test_sheared_reads_held_out_losses(run):
    mixer = {"name": "sheared", "targets": ["goal", "held"], "target_losses": [0.0, 9.0], "initial": "uniform"}
    ours = run("sheared", **TWO, dynamic={"mixer": mixer, "interval_steps": 3})
    assert [share["alpha"] > 0.99 for share in shares(ours)] == [True, True]  # nine nats further from its target
