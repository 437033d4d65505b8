"""Forward-mode derivatives equal the dot product with the direction."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dataflex.errors import UnsupportedError
from dataflex.signals.gradients.consumers import Dots
from dataflex.signals.gradients.engine import GradientEngine
from tests.signals.gradients.small import build, engine_of, ragged
from tests.signals.gradients.test_consumers import vectors
from tests.signals.gradients.test_layers import Toy, toy_batch


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "qwen2", "lora", "dora"])
def test_equals_the_dot_product(name):
    model = build(name)
    engine, batch = engine_of(model), ragged([5, 9, 3], unlabelled=(2,))
    targets = vectors(engine, 1)
    expected = engine.run(batch, [Dots(targets, normalize="none")])
    found = engine.jvp(batch, targets.one(0))
    scale = expected["dots.norms"][:2] * targets.norms()
    assert ((found[:2] - expected["dots"][:2, 0]).abs() <= 2e-5 * scale).all()
    assert found[2].isnan()
    assert all(p.grad is None for p in model.parameters())


def test_a_part_of_the_direction():
    model = build("llama")
    engine, batch = engine_of(model), ragged([5, 9])
    whole = vectors(engine, 1)
    part = {name: tensor for name, tensor in whole.one(0).items() if "mlp" in name}
    only = vectors(engine, 1)
    for name, tensor in only.tensors.items():
        if "mlp" not in name:
            tensor.zero_()
    expected = engine.run(batch, [Dots(only, normalize="none")])["dots"][:, 0]
    assert torch.allclose(engine.jvp(batch, part), expected, rtol=1e-4, atol=1e-5)


class NoForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Backwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return NoForward.apply(self.inner(x))


def test_a_model_without_forward_derivatives_is_refused():
    model = Toy(Backwards())
    engine = GradientEngine(model, loss=model)
    direction = {name: torch.ones(shape) for name, shape in engine.shapes.items()}
    with pytest.raises(UnsupportedError, match="jvp: this model cannot be differentiated forwards"):
        engine.jvp(toy_batch(2, 3), direction)
    before = dict(model.named_parameters())
    assert all(isinstance(p, nn.Parameter) for p in before.values())
