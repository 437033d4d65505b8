"""A pass leaves everything as it was, and training goes on bit for bit as if it had not been."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from dataflex.errors import UnsupportedError
from dataflex.signals.gradients.consumers import Dots, Norms, Sketch
from dataflex.signals.gradients.engine import GradientEngine
from dataflex.signals.gradients.precondition import PRESETS, moments_of, preconditioner
from dataflex.signals.gradients.scorers import TargetBuilder
from tests.signals.gradients.small import build, engine_of, layers_of, ragged
from tests.signals.gradients.test_layers import MixesRows, Toy, toy_batch


def snapshot(model):
    return {
        "values": {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "requires": {n: p.requires_grad for n, p in model.named_parameters()},
        "versions": {n: p._version for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for n, m in model.named_modules()
        },
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()),
        "grad mode": torch.is_grad_enabled(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def everything(model, optimizer, seed=0):
    """Run every consumer, a preconditioned pass, targets and a forward-mode pass."""
    engine, batch = engine_of(model), ragged([5, 9, 3], seed=seed)
    builder = TargetBuilder(engine, ["target"])
    builder.add(batch, torch.zeros(3, dtype=torch.int64))
    targets = builder.finish()
    direction = preconditioner(PRESETS["true_adam"], moments_of(optimizer, engine.parameters))
    found = engine.run(batch, [Dots(targets), Norms(), Sketch(size=64)], precondition=direction)
    try:
        engine.jvp(batch, targets.one(0))
    except UnsupportedError:
        assert "torch.func" in layers_of(engine).values(), "only experts have no forward derivative here"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "lora", "dora", "mixtral-grouped"])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_state_is_untouched(name, with_gradients):
    model = build(name)
    model.train()
    list(model.modules())[3].eval()  # modes differ between modules
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    if with_gradients:
        model(**ragged([4, 6])).loss.backward()
    before = snapshot(model)
    everything(model, optimizer)
    after = snapshot(model)
    for key in before:
        assert same(before[key], after[key]), key
    if not with_gradients:
        assert all(p.grad is None for p in model.parameters())


def test_state_is_untouched_when_a_pass_fails():
    model = Toy(MixesRows())
    model.train()
    engine = GradientEngine(model, loss=model)
    before = snapshot(model)
    with pytest.raises(UnsupportedError):
        engine.run(toy_batch(3, 4), [Norms()])
    after = snapshot(model)
    for key in before:
        assert same(before[key], after[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "lora", "dora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_goes_on_bit_for_bit(name, checkpointing):
    def train(observe):
        model = build(name)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for step in range(4):
            model.train()
            for half in range(2):  # two micro-batches; a pass between them meets gradients that are not zero
                loss = model(**ragged([5, 8], seed=10 * step + half)).loss
                loss.backward()
                losses.append(float(loss.detach()) + float(torch.rand(())))
                if observe:
                    everything(model, optimizer, seed=step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return losses, [p.detach().clone() for p in model.parameters()]

    plain, observed = train(False), train(True)
    assert plain[0] == observed[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], observed[1], strict=True))
    assert len(set(plain[0])) > 4


def test_one_holding_of_the_model_serves_many_runs():
    model = build("lora")
    model.train()
    released = []
    engine = engine_of(model, release=lambda: released.append(1))
    with engine.observing():
        assert not model.training
        a = engine.run(ragged([5, 9]), [Norms()])
        b = engine.run(ragged([5, 9]), [Norms()])
        assert not released
    assert released == [1]
    assert model.training
    assert torch.equal(a["norms"], b["norms"])
    engine.run(ragged([5, 9]), [Norms()])
    assert released == [1, 1]
