"""Held-out losses by token: one set, several, by domain, and over all of them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dataflex.errors import DataError

BASE = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "do_eval": True, "per_device_eval_batch_size": 2}
SELECTOR = {"selector": "all"}


def evaluations(outcome):
    history = json.loads((outcome.folder / "trainer_state.json").read_text())["log_history"]
    merged = {}
    for entry in history:
        merged.setdefault(entry["step"], {}).update({k: v for k, v in entry.items() if k.startswith("eval_")})
    return {step: metrics for step, metrics in merged.items() if metrics}


def test_the_loss_of_a_set_is_a_mean_over_its_tokens(run, tiny_model):
    ours = run("one", **BASE, eval_dataset="held", eval_on_start=True, dynamic=SELECTOR)
    stock = run("stock", **BASE, eval_dataset="held", eval_on_start=True)
    found, plain = evaluations(ours), evaluations(stock)
    assert list(found) == [0, 1, 2]
    for step, metrics in found.items():
        assert metrics["eval_loss"] == plain[step]["eval_loss"]
        assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_token_loss"]))
    assert exact(tiny_model, run, "held") == pytest.approx(found[0]["eval_token_loss"], rel=1e-5)
    assert found[0]["eval_token_loss"] != pytest.approx(found[0]["eval_loss"], rel=1e-6)  # ragged rows


def exact(model, run, name):
    """Add up token losses row by row with another program."""
    import torch
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer
    from transformers import AutoModelForCausalLM

    mapping = run.mapping("exact", dataset=name)
    model_args, data_args, training_args, _, _ = get_train_args(mapping)
    tokenizer = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tokenizer["tokenizer"], data_args)
    rows = get_dataset(template, model_args, data_args, training_args, "sft", **tokenizer)["train_dataset"]
    lm, total, tokens = AutoModelForCausalLM.from_pretrained(model).eval(), 0.0, 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            loss = lm(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
        count = int(labels[:, 1:].ne(-100).sum())
        total, tokens = total + float(loss) * count, tokens + count
    return total / tokens


def check_totals(metrics, names):
    losses = [metrics[f"eval_{name}_token_loss"] for name in names]
    assert metrics["eval_macro_loss"] == pytest.approx(np.mean(losses))
    assert min(losses) < metrics["eval_micro_loss"] < max(losses)
    assert metrics["eval_micro_perplexity"] == pytest.approx(math.exp(metrics["eval_micro_loss"]))
    assert metrics["eval_loss"] == metrics["eval_micro_loss"]


def test_several_sets_and_the_best_model_by_their_total(run):
    dynamic = {**SELECTOR, "eval_by_domain": True}
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}
    ours = run("two", **BASE, **best, eval_dataset="held,goal", dynamic=dynamic)
    for metrics in evaluations(ours).values():
        check_totals(metrics, ["held", "goal"])
    summary = json.loads((ours.folder / "all_results.json").read_text())
    assert {"eval_macro_loss", "eval_held_perplexity", "eval_goal_token_loss"} <= summary.keys()
    recorded = [event["metrics"] for event in ours.events if event["event"] == "evaluated"]
    assert any("eval_macro_perplexity" in metrics for metrics in recorded)


def test_a_split_by_data_set(run):
    ours = run(
        "split", **BASE, dataset="alpha,beta", val_size=0.3, dynamic={"mixer": "uniform", "eval_by_domain": True}
    )
    for metrics in evaluations(ours).values():
        check_totals(metrics, ["alpha", "beta"])


@pytest.mark.parametrize("held", [{"val_size": 0.3}, {"eval_dataset": "beta"}])
def test_a_column_that_names_domains(run, held):
    names = ["alpha0", "alpha1"] if "val_size" in held else ["beta0", "beta1"]
    dynamic = {"mixer": "uniform", "domain_column": "source", "eval_by_domain": True}
    ours = run("column", **BASE, **held, dataset="alpha", dynamic=dynamic)
    for metrics in evaluations(ours).values():
        check_totals(metrics, names)


def test_nothing_held_out_is_told(run):
    from dataflex.errors import ConfigError

    with pytest.raises(ConfigError, match=r"dynamic.eval_by_domain: no rows are held out"):
        run("none", max_steps=2, dynamic={**SELECTOR, "eval_by_domain": True})


def test_an_evaluation_without_a_batch_is_refused_before_training(run):
    """Stock, it has no loss: a run of stage pt fails over that when it is through."""
    few = {"dataloader_drop_last": True, "per_device_eval_batch_size": 8}
    with pytest.raises(DataError, match="nothing of 7 evaluation rows: 1 ranks x 8 sequences need 8"):
        run("few", **{**BASE, **few}, eval_dataset="held", dynamic=SELECTOR)
    assert not list((run.folder / "few").glob("*.safetensors"))
