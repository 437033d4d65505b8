"""Neutral components give LLaMA-Factory's own run, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

SCORING = {"selector": {"name": "loss"}, "interval_steps": 3}


def same(one, other):
    for key in ("loss", "grad_norm", "learning_rate", "epoch"):
        assert one.series(key) == other.series(key), key
    first, second = one.weights(), other.weights()
    assert first.keys() == second.keys()
    for name in first:
        assert np.array_equal(first[name], second[name]), name


def test_a_plain_yaml_is_stock(run):
    """Without a dynamic block our command is LLaMA-Factory's own code path."""
    from llamafactory.train.tuner import run_exp

    run_exp(run.mapping("direct", disable_shuffling=False))
    ours = run("ours", disable_shuffling=False)
    same(type(ours)(run.folder / "direct"), ours)
    assert not (ours.folder / "dataflex").exists()


@pytest.mark.parametrize("accumulation", [1, 3, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_all_in_file_order_is_stock(run, accumulation, dropout):
    """37 ragged rows: the last micro-batch and the last step of each epoch are short; LoRA brings dropout."""
    settings = {
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 2.0,
        "finetuning_type": "lora",
        "lora_rank": 4,
        "lora_dropout": dropout,
    }
    stock = run("stock", **settings)
    ours = run("ours", **settings, dynamic={"selector": "all"})
    same(stock, ours)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("normalizer", ["weight_sum", "num_tokens"])
def test_unit_weights_are_stock(run, accumulation, normalizer):
    settings = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 2.0}
    stock = run("stock", **settings)
    ours = run("ours", **settings, dynamic={"weighter": {"name": "column", "normalizer": normalizer}})
    same(stock, ours)
    assert {entry["dataflex/weight_ess"] for entry in ours.log} == {1.0}


@pytest.mark.parametrize(
    "tuning",
    [
        {"finetuning_type": "lora", "lora_rank": 4, "lora_dropout": 0.2},
        {"finetuning_type": "full", "neftune_noise_alpha": 5.0},
        {"finetuning_type": "full", "bf16": True, "use_cpu": True},
    ],
)
def test_scoring_changes_nothing(run, tmp_path, tuning):
    """A selector that scores every interval and then keeps the same plan equals the run without it."""
    plugin = tmp_path / "watcher.py"
    plugin.write_text(
        """
import numpy as np
from dataflex import Card, Requires, Selection, Selector
from dataflex.signals.kinds import EL2N, AdaptedLoss, Embedding, GradientNorms, GradientScores, TokenLoss


class Watcher(Selector):
    name = "watcher"
    card = Card(summary="Scores everything, then serves rows in file order.", paper="test", cost="1F")

    def requires(self):
        return Requires(signals=frozenset({"losses"}), targets=True, needs_interval=True)

    def select(self, pool, budget, ctx):
        np.random.rand()
        scores = ctx.signals(TokenLoss(), pool)
        ctx.signals(GradientScores(targets=("goal",)), pool)
        ctx.signals(GradientNorms(precondition="none"), pool)
        ctx.signals(Embedding(), pool)
        ctx.signals(EL2N(), pool)
        ctx.signals(AdaptedLoss(towards="goal", depth_steps=2, learning_rate=0.01, rank=1, alpha=4.0), pool)
        return Selection(rows=pool[:budget], scores=scores)


class Blind(Watcher):
    name = "blind"

    def requires(self):
        return Requires(needs_interval=True)

    def select(self, pool, budget, ctx):
        return Selection(rows=pool[:budget])
"""
    )
    settings = {**tuning, "gradient_accumulation_steps": 2, "max_steps": 9}
    blocks = {"interval_steps": 3, "plugins": [str(plugin)]}
    blind = run("blind", **settings, dynamic={**blocks, "selector": "blind"})
    watching = run("watching", **settings, dynamic={**blocks, "selector": {"name": "watcher", "targets": ["goal"]}})
    same(blind, watching)


def test_stock_evaluation_under_a_weighter(run):
    """Weights act on training losses only: evaluation sees the stock loss."""
    settings = {"eval_dataset": "held", "do_eval": True, "eval_strategy": "steps", "eval_steps": 3, "max_steps": 6}
    stock = run("stock", **settings)
    ours = run("ours", **settings, dynamic={"weighter": {"name": "column"}})
    from json import loads

    def evaluations(outcome):
        history = loads((outcome.folder / "trainer_state.json").read_text())["log_history"]
        return [entry["eval_loss"] for entry in history if "eval_loss" in entry]

    assert len(evaluations(stock)) >= 2
    assert evaluations(stock) == evaluations(ours)
