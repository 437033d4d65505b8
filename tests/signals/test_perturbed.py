"""Perturbed losses of the service: the derivative is the gradient's, and the model is as it was, bit for bit."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from dataflex.errors import ConfigError, UnsupportedError
from dataflex.rng import rademacher
from dataflex.selectors.influence import central_difference
from dataflex.signals.kinds import PerturbedLoss
from dataflex.signals.losses import row_losses
from dataflex.signals.model_access import Corpus
from dataflex.signals.moved import moved
from tests.signals.tiny import asking, assert_same, collate, llama, lora, make_rows, snapshot


def service(model, rows, autocast=contextlib.nullcontext):
    def corpus(name):
        return Corpus(dataset=rows, lengths=rows.lengths, identity=name)

    return asking(model, corpus("pool"), {"goal": corpus("goal")}, autocast=autocast, token_budget=24)


def bits(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("make", [llama, lora])
def test_the_difference_is_the_gradients_product_with_the_direction(make):
    model, rows = make(), make_rows(9)
    signals = service(model, rows)
    ids = np.array([5, 0, 3, 6, 8])
    before = snapshot(model)
    above, below = (
        signals(PerturbedLoss(seed=4, direction=2, epsilon=step), ids, target="goal") for step in (2e-4, -2e-4)
    )
    assert_same(before, snapshot(model))
    found = central_difference(above, below, 2e-4)
    model.eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for place, row in enumerate(ids.tolist()):
        loss = row_losses(model, collate(rows.__getitems__([row])))[0]
        if not torch.isfinite(loss):
            assert np.isnan(found[place])
            continue
        gradients = torch.autograd.grad(loss, list(trained.values()))
        wanted = sum(
            float(gradient.flatten().double() @ torch.from_numpy(rademacher(4, name, 2, gradient.numel())).double())
            for name, gradient in zip(trained, gradients, strict=True)
        )
        assert found[place] == pytest.approx(wanted, rel=5e-3, abs=5e-3)


def test_parameters_come_back_bit_for_bit_even_after_an_error():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e-30  # lost if it were added to and taken from
        model.lm_head.weight[0, 1] = 1e8
        model.lm_head.weight[0, 2] = -0.0
    before = bits(model)
    parameters = dict(model.named_parameters())

    def fails():
        with moved(parameters, seed=0, direction=0, epsilon=1e-3):
            assert any(not torch.equal(p, before[name]) for name, p in parameters.items())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    for name, parameter in parameters.items():
        assert torch.equal(parameter.view(torch.int32), before[name].view(torch.int32)), name


def test_only_named_parameters_move_by_epsilon_along_the_signs():
    model = llama()
    before = bits(model)
    chosen = {name: p for name, p in model.named_parameters() if "layers.1" in name}
    with moved(chosen, seed=3, direction=1, epsilon=-0.25):
        for name, parameter in model.named_parameters():
            step = rademacher(3, name, 1, parameter.numel()).reshape(parameter.shape) * np.float32(-0.25)
            wanted = before[name] + torch.from_numpy(step) if name in chosen else before[name]
            assert torch.equal(parameter, wanted)
    rows = make_rows(4)
    same = service(model, rows)(PerturbedLoss(seed=3, direction=1, epsilon=0.1, parameters="layers.1"), np.arange(4))
    other = service(model, rows)(PerturbedLoss(seed=3, direction=1, epsilon=0.1), np.arange(4))
    assert not np.array_equal(same, other)


def test_the_trainers_autocast_is_left_out():
    model, rows = llama(), make_rows(5)
    half = service(model, rows, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = half(PerturbedLoss(seed=0, direction=0, epsilon=1e-3), np.arange(5))
    whole = service(model, rows)(PerturbedLoss(seed=0, direction=0, epsilon=1e-3), np.arange(5))
    assert np.array_equal(found, whole)


def test_low_precision_is_refused_where_it_moves_and_warned_of_where_it_does_not(caplog):
    rows = make_rows(3)
    with pytest.raises(UnsupportedError, match=r"float32 parameters, but .* is torch.bfloat16"):
        service(llama().to(torch.bfloat16), rows)(PerturbedLoss(seed=0, direction=0, epsilon=1e-3), np.arange(3))
    frozen = lora()
    for parameter in frozen.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    signals = service(frozen, rows)
    for direction in range(2):
        signals(PerturbedLoss(seed=0, direction=direction, epsilon=1e-3), np.arange(3))
    assert [record.message for record in caplog.records if "drown in its rounding" in record.message] == [
        "perturbed losses: the model computes in torch.bfloat16; small differences drown in its rounding"
    ]


def test_a_pattern_without_parameters_is_told():
    with pytest.raises(ConfigError, match="no trainable parameter is left"):
        service(llama(), make_rows(2))(PerturbedLoss(seed=0, direction=0, epsilon=1, parameters="xyz"), np.arange(2))
