"""Rows through Muon: its polynomial held at the momentum, against transcriptions and the optimizer itself."""

from __future__ import annotations

import copy

import pytest
import torch

from dataflex.errors import UnsupportedError
from dataflex.signals.gradients.consumers import Dots, TargetVectors
from dataflex.signals.gradients.factors import Factors, formed
from dataflex.signals.gradients.in_run import directions, scaled
from dataflex.signals.gradients.muon import Momentum
from dataflex.signals.gradients.precondition import PRESETS, Moments, moments_of, preconditioner
from tests.signals.gradients.small import Collect, build, engine_of, oracle, ragged
from tests.signals.gradients.test_in_run import prepared, step

MU = 0.95


def transcribed(M, g, *, momentum=True):
    """The update of a row's gradient in float64: every factor of the iteration is taken from M and applied to both."""
    M, g = M.double(), g.double()
    if len(M) > M.shape[1]:
        return transcribed(M.T, g.T, momentum=momentum).T
    length = M.norm() + 1e-7
    X, row = M / length, ((1 + MU) * g + MU**2 * M * momentum) / length
    for _ in range(5):
        A = X @ X.T
        B = -4.7750 * A + 2.0315 * A @ A
        X, row = 3.4445 * X + B @ X, 3.4445 * row + B @ row
    return 0.2 * max(M.shape) ** 0.5 * row


def test_golden_values():
    """Diagonal momentum: singular values (.6, .8) of M / |M| become f(s), and each row of g is scaled by f(s) / s."""
    M, g = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    values = []
    for s in (0.6, 0.8):
        x = s
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
        values.append(x / s)
    assert values == pytest.approx([1.204794, 1.399005], abs=1e-6)
    own = torch.tensor(values)[:, None] * g * 1.95 / 5 * 0.2 * 3**0.5
    state = Momentum(buffer=M)
    for turned in (False, True):
        buffer, gradient, wanted = (each.T if turned else each for each in (M, g, own))
        [found] = Momentum(buffer=buffer).directions([gradient.unsqueeze(0)], include_momentum=False)
        torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scaled(g[None], state)[0], own / 1.95 / (1 - MU), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5), (1, 6)])
def test_formula_in_float64(shape):
    draw = torch.Generator().manual_seed(sum(shape))
    M, left, right = (torch.randn(*size, generator=draw) for size in (shape, (2, 3, shape[0]), (2, 3, shape[1])))
    uses = [Factors(left=left, right=right)]
    gradients = torch.einsum("btm,btn->bmn", left, right)
    for momentum in (False, True):
        found = formed(Momentum(buffer=M).directions(uses, include_momentum=momentum), 0, shape[0]).view(2, *shape)
        for row in range(2):
            expected = transcribed(M, gradients[row], momentum=momentum)
            assert (found[row] - expected).norm() < 1e-3 * expected.norm()


def trained(model, steps=3):
    """LLaMA-Factory's own Muon after some steps."""
    from llamafactory.train.trainer_utils import _create_muon_optimizer
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir="unused", learning_rate=1e-2, weight_decay=0.0, adam_epsilon=1e-12)
    optimizer = _create_muon_optimizer(model, args)
    for number in range(steps):
        model(**ragged([5, 8], seed=number + 50)).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


def next_step(model, optimizer, gradients):
    """What one step of the optimizer moves the parameters by, for each unit of the learning rate."""
    other = copy.deepcopy(model)
    names = {name: p for name, p in other.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in names.items()}
    for name, parameter in names.items():
        parameter.grad = gradients[name].clone()
    own = trained(other, 0)
    own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    own.step()
    return {name: (before[name] - p.detach()) / 1e-2 for name, p in names.items()}


@pytest.mark.parametrize("name", ["lora", "llama"])
def test_directions_of_a_model(name):
    """Matrices by the transcription; embeddings, head and norms by the optimizer's own next step."""
    model = build(name).eval()
    optimizer = trained(model)
    engine, batch = engine_of(model), ragged([5, 9, 3])
    moments = moments_of(optimizer, engine.parameters)
    matrices = {key for key, kept in moments.items() if isinstance(kept, Momentum)}
    assert matrices == {
        key for key, p in engine.parameters.items() if p.dim() == 2 and "embed" not in key and "lm_head" not in key
    }
    collect = Collect(engine)
    engine.run(batch, [collect], precondition=preconditioner(PRESETS["true_adam"], moments))
    for row, gradients in enumerate(oracle(model, batch)):
        moved = next_step(model, optimizer, gradients)
        for key, gradient in gradients.items():
            found = collect.rows[key][row]
            if key in matrices:
                expected, close = transcribed(moments[key].buffer, gradient).flatten(), 1e-3
            else:
                expected, close = moved[key].flatten(), 1e-3
            assert (found - expected).norm() <= close * expected.norm(), key


def test_the_momentum_alone_is_the_optimizers_own_step(monkeypatch):
    """Where the next gradient is zero, G is mu^2 M: but for that length and bfloat16 nothing was held fixed."""
    model = build("llama")
    optimizer = trained(model)
    named = dict(model.named_parameters())
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)
    moved = next_step(model, optimizer, {key: torch.zeros_like(p) for key, p in named.items()})
    for key, kept in moments_of(optimizer, named).items():
        if isinstance(kept, Momentum):
            *_, found = kept.directions([torch.zeros(1, *named[key].shape)], include_momentum=True)
            assert (found[0] / MU**2 - moved[key]).norm() < 1e-3 * moved[key].norm(), key


def test_products_need_no_formed_gradients_and_moments_come_back_from_a_checkpoint(tmp_path):
    model = build("llama").eval()
    optimizer = trained(model)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = trained(model, 0)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    engine, batch = engine_of(model), ragged([3, 2, 4])
    draw = torch.Generator().manual_seed(0)
    targets = TargetVectors(tensors={k: torch.randn(2, *s, generator=draw) for k, s in engine.shapes.items()})
    found, collect = [], Collect(engine)
    for each in (optimizer, again):
        direction = preconditioner(PRESETS["adam_scale"], moments_of(each, engine.parameters))
        alone = [Dots(targets, normalize="none")]
        found.append(engine.run(batch, alone, precondition=direction)["dots"])
        engine.run(batch, [collect], precondition=direction)
    assert torch.equal(*found)
    expected = sum(collect.rows[key] @ targets.flat(key).T for key in targets.tensors)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_steps_compare_with_the_target_in_muons_scale():
    """<P q, g> is <q, P g>: the map is symmetric, so the target takes it on."""
    model = build("llama").eval()
    optimizer = trained(model)
    engine, capture = prepared(model)
    moments = moments_of(optimizer, engine.parameters)
    draw = torch.Generator().manual_seed(1)
    aims = TargetVectors(tensors={k: torch.randn(1, *s, generator=draw) for k, s in engine.shapes.items()})
    found = directions(aims, moments, capture.layers, rank=None, seed=7)
    capture.aim(found)
    batch = ragged([9, 4], seed=3)
    step(model, capture, batch)
    scores = capture.take().scores * found.lengths
    names = {name for unit in capture.layers for name in unit.parameters.values()}
    for row, gradients in enumerate(oracle(model, batch)):
        expected = 0.0
        for key in names:
            q, g, kept = aims.tensors[key][0], gradients[key], moments[key]
            if isinstance(kept, Momentum):
                g = transcribed(kept.buffer, g, momentum=False) / 1.95 / (1 - MU)
            else:
                q = scaled(q[None], kept)[0]
            expected += float((q.double() * g).sum())
        assert float(scores[row]) == pytest.approx(expected, rel=1e-3)


def test_before_the_first_step_and_where_no_gradient_has_been():
    gradient = torch.randn(2, 3, 4)
    fresh, unreached = Momentum(buffer=None), Momentum(buffer=torch.zeros(3, 4))
    assert fresh.directions([gradient], include_momentum=True)[0] is gradient
    assert scaled(gradient, fresh) is gradient
    assert unreached.directions([gradient], include_momentum=False)[0].abs().sum() == 0
    assert all(
        isinstance(kept, Moments) or kept.buffer is None
        for model in [build("llama")]
        for kept in moments_of(trained(model, 0), dict(model.named_parameters())).values()
    )


def test_what_is_refused():
    model = build("llama")
    optimizer, named = trained(model), dict(model.named_parameters())
    with pytest.raises(UnsupportedError, match=r"Muon.*DeepSpeed keeps no matrices"):
        moments_of(optimizer, named, "zero")
    with pytest.raises(UnsupportedError, match="another code's Adam"):
        preconditioner(PRESETS["paper_repo"], moments_of(optimizer, named))
    from dataflex.train.updates import base_of

    with pytest.raises(UnsupportedError, match="ledger: Muon"):
        base_of(optimizer)
