"""LESS's scores, end to end on the engine: half of a pool shares the target's direction and is found."""

from __future__ import annotations

import pytest
import torch

from dataflex.signals.gradients.consumers import Dots, Norms, Sketch, TargetVectors
from dataflex.signals.gradients.precondition import PRESETS, moments_of, preconditioner
from dataflex.signals.gradients.scorers import TargetBuilder
from tests.signals.gradients.small import PAD, build, engine_of, lora

ROWS = 80


def sequences(kind: str, count: int, seed: int) -> torch.Tensor:
    """Two languages that share half of their tokens: one counts up, the other down."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 20, (count, 1), generator=generator)
    if kind == "target":
        return (start + 3 * torch.arange(10)) % 20 + 4
    return (start - 7 * torch.arange(10)) % 20 + 14


def batch_of(ids):
    return {"input_ids": ids, "attention_mask": ids.ne(PAD).long(), "labels": ids}


def train(model, steps, rate):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for step in range(steps):
        ids = torch.cat([sequences("target", 6, 100 + step), sequences("other", 6, 200 + step)])
        model(**batch_of(ids)).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


def warmed_up(name):
    """A model that has begun to learn both languages, with the optimizer of its last steps."""
    model = build("llama")
    optimizer = train(model, 20, 1e-2)
    if name == "lora":
        model = lora(model, drawn=False)
        optimizer = train(model, 16, 3e-3)
    return model, optimizer


def recovered(scores, planted):
    top = scores.argsort(descending=True, stable=True)[: int(planted.sum())]
    return float(planted[top].float().mean())


@pytest.mark.slow
def test_planted_pool_is_recovered():
    planted = torch.rand(ROWS, generator=torch.Generator().manual_seed(3)) < 0.5
    ids = torch.where(planted[:, None], sequences("target", ROWS, 1), sequences("other", ROWS, 2))
    for name in ("lora", "llama"):
        model, optimizer = warmed_up(name)
        engine = engine_of(model)
        builder = TargetBuilder(engine, ["target"])
        builder.add(batch_of(sequences("target", 24, 77)), torch.zeros(24, dtype=torch.int64))
        targets = builder.finish()
        moments = moments_of(optimizer, engine.parameters)
        for preset in ("none", "true_adam", "paper_repo"):
            direction = preconditioner(PRESETS[preset], moments)
            found = [
                engine.run(batch_of(part), [Dots(targets), Sketch(size=512)], precondition=direction)
                for part in ids.split(16)
            ]
            scores = torch.cat([one["dots"] for one in found])[:, 0]
            assert recovered(scores, planted) >= 0.95, (name, preset)
            rows = torch.cat([one["sketch"] / one["sketch.norms"][:, None] for one in found])
            assert recovered(rows @ Sketch(size=512).of(targets)[0], planted) >= 0.95, (name, preset, "sketched")


@pytest.mark.slow
def test_scores_do_not_depend_on_the_order_of_the_pool():
    model, optimizer = warmed_up("lora")
    engine = engine_of(model)
    targets = TargetVectors.zeros(1, engine.shapes, "cpu")
    for tensor in targets.tensors.values():
        tensor.normal_(generator=torch.Generator().manual_seed(0))
    direction = preconditioner(PRESETS["true_adam"], moments_of(optimizer, engine.parameters))
    ids = sequences("other", 12, 5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    straight = engine.run(batch_of(ids), [Dots(targets)], precondition=direction)["dots"]
    shuffled = engine.run(batch_of(ids[order]), [Dots(targets)], precondition=direction)["dots"]
    assert torch.allclose(shuffled, straight[order], rtol=1e-4, atol=1e-5)


def test_gradient_of_a_vanishes_before_the_first_step():
    """With B = 0, as peft starts, only B has gradients; the norm of A's part is exactly zero."""
    model = build("lora")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    only_a = {n: p for n, p in model.named_parameters() if "lora_A" in n}
    only_b = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    batch = batch_of(sequences("target", 3, 0))
    assert engine_of(model, parameters=only_a).run(batch, [Norms()])["norms"].eq(0).all()
    assert engine_of(model, parameters=only_b).run(batch, [Norms()])["norms"].gt(0).all()
