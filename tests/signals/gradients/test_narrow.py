"""Losses whose head sees labelled positions only: same values, same gradients, fewer logits."""

from __future__ import annotations

import pytest
import torch

from dataflex.signals.gradients.engine import GradientEngine, supervised_losses
from dataflex.signals.losses import row_losses
from dataflex.signals.model_parts import model_parts
from tests.signals.gradients.small import Collect, build, differences, gemma, lora, oracle, ragged


def small(name):
    torch.manual_seed(0)
    return (lora(gemma()) if name == "lora-gemma" else build(name)).eval()  # gemma caps its logits after the head


def positions_at_head(model, run):
    seen = []
    handle = model_parts(model).head.register_forward_hook(
        lambda _m, _i, output: seen.append(output.shape[:-1].numel())
    )
    try:
        run()
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["lora", "lora-gpt2", "lora-gemma", "dora"])
def test_same_losses_and_gradients_for_fewer_logits(name, side):
    model = small(name)
    batch = ragged([5, 9, 3, 7], side=side, unlabelled=(2,))
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = supervised_losses(model, parameters)
    assert torch.allclose(losses(batch), row_losses(model, batch), rtol=1e-6, equal_nan=True)
    assert losses(batch)[2].isnan()
    labelled = int(batch["labels"][:, 1:].ne(-100).sum())
    assert positions_at_head(model, lambda: losses(batch)) == [labelled]
    assert positions_at_head(model, lambda: row_losses(model, batch)) == [batch["labels"].numel()]
    engine = GradientEngine(model)
    collect = Collect(engine)
    engine.run(batch, [collect])
    lines = differences(collect.rows, oracle(model, batch), 1e-5, floor=1.0)
    assert not lines, "\n".join(lines)
    assert not model_parts(model).head._forward_pre_hooks


@pytest.mark.parametrize("name", ["llama", "llama-tied", "lora-saved"])
def test_a_head_that_is_differentiated_sees_every_position(name):
    model = small(name)
    batch = ragged([5, 9, 3])
    losses = supervised_losses(model, [p for p in model.parameters() if p.requires_grad])
    assert positions_at_head(model, lambda: losses(batch)) == [batch["labels"].numel()]
    engine = GradientEngine(model)
    collect = Collect(engine)
    engine.run(batch, [collect])
    lines = differences(collect.rows, oracle(model, batch), 1e-5, floor=1.0)
    assert not lines, "\n".join(lines)


def test_no_label_at_all():
    model = small("lora")
    batch = ragged([4, 3], unlabelled=(0, 1))
    assert supervised_losses(model, [])(batch).isnan().all()
    engine = GradientEngine(model)
    assert engine.run(batch, [Collect(engine)])["losses"].isnan().all()


def test_forward_mode():
    model = small("lora")
    batch = ragged([5, 9, 3])
    direction = {n: torch.ones(s) for n, s in GradientEngine(model).shapes.items()}
    plain = GradientEngine(model, loss=lambda one: row_losses(model, one)).jvp(batch, direction)
    assert torch.allclose(GradientEngine(model).jvp(batch, direction), plain, rtol=1e-4)
