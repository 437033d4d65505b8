"""Adam's direction: the sheet's numbers, a literal optimizer step, and moments found by identity."""

from __future__ import annotations

import copy
import sys
import types

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from dataflex.errors import ConfigError, UnsupportedError
from dataflex.signals.gradients.consumers import Segment
from dataflex.signals.gradients.precondition import (
    PRESETS,
    Moments,
    Precondition,
    adam_direction,
    moments_of,
    preconditioner,
)
from tests.signals.gradients.small import Collect, build, engine_of, flat, oracle, ragged


def one(m, v, g, **options):
    values = [torch.tensor([x], dtype=torch.float32) for x in (g, m, v)]
    return float(adam_direction(values[0].unsqueeze(0), values[1], values[2], Precondition(**options), step=10))


@pytest.mark.parametrize(
    ("m", "v", "g", "outside", "inside"),
    [
        (0.0, 0.0, 1e-3, 3.161278, 0.953463),
        (1e-7, 1e-13, 1e-6, 0.579891, 0.00190),
        (1e-3, 1e-6, 1e-2, 1.812386, 1.804213),
    ],
)
def test_golden_values(m, v, g, outside, inside):
    assert one(m, v, g, bias_correction=False) == pytest.approx(outside, rel=2e-6)
    assert one(m, v, g, bias_correction=False, eps_mode="inside") == pytest.approx(inside, rel=2e-4)


def test_direction_collapses_with_eps_inside():
    g, v, m = torch.tensor([[1e-7, 1e-8]]), torch.tensor([1e-14, 1e-16]), torch.zeros(2)

    def unit(**options):
        direction = adam_direction(g, m, v, Precondition(bias_correction=False, **options), step=10)[0]
        return (direction / direction.norm()).tolist()

    assert unit() == pytest.approx([0.876, 0.482], abs=1e-3)
    assert unit(eps_mode="inside") == pytest.approx([0.9950, 0.0995], abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    step=st.integers(0, 500),
    seed=st.integers(0, 2**16),
    betas=st.tuples(st.floats(0.0, 0.99), st.floats(0.5, 0.9999)),
    inside=st.booleans(),
    correct=st.booleans(),
    momentum=st.booleans(),
)
def test_formula_in_float64(step, seed, betas, inside, correct, momentum):
    generator = torch.Generator().manual_seed(seed)
    g, m = torch.randn(3, 7, generator=generator) * 1e-3, torch.randn(7, generator=generator) * 1e-3
    v = torch.rand(7, generator=generator) * 1e-6
    mode = "inside" if inside else "outside"
    spec = Precondition(eps_mode=mode, bias_correction=correct, include_momentum=momentum)
    found = adam_direction(g, m, v, spec, step=step, betas=betas, eps=1e-8)
    first = betas[0] * m.double() * momentum + (1 - betas[0]) * g.double()
    second = betas[1] * v.double() + (1 - betas[1]) * g.double() ** 2
    if correct:
        first, second = first / (1 - betas[0] ** (step + 1)), second / (1 - betas[1] ** (step + 1))
    expected = first / ((second + 1e-8).sqrt() if inside else second.sqrt() + 1e-8)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def trained(model, make, steps=3):
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    model.train()
    for step in range(steps):
        batch = ragged([5, 8], seed=step + 50)
        model(**{k: v for k, v in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("name", ["lora", "llama-tied"])
def test_true_adam_is_the_optimizers_own_next_step(name, steps):
    model = build(name)
    rate = 1e-2
    optimizer = trained(
        model, lambda p: torch.optim.AdamW(p, lr=rate, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0), steps
    )
    engine, batch = engine_of(model), ragged([5, 9, 3])
    collect = Collect(engine)
    moments = moments_of(optimizer, engine.parameters)
    engine.run(batch, [collect], precondition=preconditioner(PRESETS["true_adam"], moments))
    for row, gradients in enumerate(oracle(model, batch)):
        other = copy.deepcopy(model)
        names = {n: p for n, p in other.named_parameters() if p.requires_grad}
        before = {n: p.detach().clone() for n, p in names.items()}
        for n, parameter in names.items():
            parameter.grad = gradients[n].clone()
        own = torch.optim.AdamW(list(names.values()), lr=rate, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0)
        own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        own.step()
        for n, parameter in names.items():
            moved = (before[n] - parameter.detach()).flatten() / rate
            assert (collect.rows[n][row] - moved).norm() <= 2e-4 * moved.norm(), n


def test_moments_are_found_by_identity_whatever_the_groups():
    model = build("llama")
    named = dict(model.named_parameters())
    decay = [p for n, p in named.items() if "norm" not in n]
    rest = [p for n, p in named.items() if "norm" in n]
    optimizer = trained(
        model,
        lambda _: torch.optim.AdamW(
            [{"params": rest, "weight_decay": 0.0, "eps": 1e-5}, {"params": decay[::-1]}], lr=1e-3
        ),
    )
    wrapper = types.SimpleNamespace(optimizer=types.SimpleNamespace(optimizer=optimizer))
    moments = moments_of(wrapper, named)
    assert list(moments) == list(named)
    for name, parameter in named.items():
        assert torch.equal(moments[name].first, optimizer.state[parameter]["exp_avg"])
        assert torch.equal(moments[name].second, optimizer.state[parameter]["exp_avg_sq"])
        assert moments[name].step == 3
        assert moments[name].eps == (1e-5 if "norm" in name else 1e-8)


def test_presets():
    paper = PRESETS["paper_repo"]
    assert (paper.betas, paper.eps, paper.eps_mode, paper.bias_correction) == ((0.9, 0.999), 1e-8, "inside", False)
    state = Moments(first=torch.full((1,), 1e-3), second=torch.full((1,), 1e-6), step=7, betas=(0.5, 0.5), eps=1.0)
    direction = preconditioner(paper, {"w": state})
    assert float(direction((Segment("w", 0, 1),), torch.full((1, 1), 1e-2))) == pytest.approx(1.804213, rel=1e-5)
    signs = preconditioner(PRESETS["sign"])
    assert signs((Segment("w", 0, 3),), torch.tensor([[0.5, -2.0, 0.0]])).tolist() == [[1.0, -1.0, 0.0]]
    assert preconditioner(PRESETS["none"]) is None
    assert Precondition.preset("true_adam") == Precondition(kind="adam")
    with pytest.raises(ConfigError, match="did you mean 'true_adam'"):
        Precondition.preset("true-adam")


def test_without_momentum_a_vanishing_gradient_has_no_direction():
    m, v = torch.ones(4), torch.ones(4)
    assert adam_direction(torch.zeros(1, 4), m, v, Precondition(include_momentum=False), step=3).abs().sum() == 0
    assert adam_direction(torch.zeros(1, 4), m, v, Precondition(), step=3).abs().sum() > 0


class Adafactor(torch.optim.Adam):
    pass


class GaLoreAdamW(torch.optim.AdamW):
    pass


class Lion(torch.optim.SGD):
    pass


class Muon(torch.optim.SGD):
    pass


class Odd(torch.optim.Adam):
    """Keeps something else than its name promises."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2), "step": 1}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: Adafactor(p), "Adafactor.*row and column means"),
        (lambda p: GaLoreAdamW(p), "GaLoreAdamW.*projected gradient"),
        (lambda p: Lion(p, lr=0.1), "Lion.*no second moment"),
        (lambda p: Muon(p, lr=0.1), "Muon.*orthogonalizes"),
        (lambda p: torch.optim.SGD(p, lr=0.1), "SGD.*no betas"),
        (lambda p: torch.optim.Adamax(p), "Adamax.*running maximum"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad"),
        (lambda p: Odd(p), r"Odd.*shape \[2\] for"),
    ],
)
def test_optimizers_without_elementwise_moments_are_refused(make, reason):
    layer = nn.Linear(3, 2)
    optimizer = make(list(layer.parameters()))
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(UnsupportedError, match=reason):
        moments_of(optimizer, dict(layer.named_parameters()))


def test_transformers_adafactor_is_refused():
    from transformers.optimization import Adafactor as Real

    layer = nn.Linear(3, 2)
    with pytest.raises(UnsupportedError, match="Adafactor cannot precondition"):
        moments_of(Real(list(layer.parameters()), lr=1e-3, relative_step=False), dict(layer.named_parameters()))


def test_a_parameter_that_the_optimizer_does_not_train():
    layer = nn.Linear(3, 2)
    with pytest.raises(UnsupportedError, match="does not train bias"):
        moments_of(torch.optim.AdamW([layer.weight]), dict(layer.named_parameters()))


def test_before_the_first_step_the_direction_is_the_sign():
    layer = nn.Linear(3, 2)
    moments = moments_of(torch.optim.AdamW(layer.parameters()), dict(layer.named_parameters()))
    direction = preconditioner(PRESETS["true_adam"], moments)
    assert direction((Segment("weight", 0, 2),), torch.tensor([[0.3, -0.7]])).tolist() == [
        pytest.approx([1.0, -1.0], abs=1e-5)
    ]


def eight_bit(first, second):
    """State as bitsandbytes keeps it, in blocks of 256."""

    def quantize(values):
        blocks = values.view(-1, 256)
        absmax = blocks.abs().amax(dim=1)
        return ((blocks / absmax[:, None]) * 127 + 128).round().to(torch.uint8).view(values.shape), absmax

    one, two = quantize(first), quantize(second)
    return {"state1": one[0], "absmax1": one[1], "qmap1": torch.linspace(-1, 1, 256),
            "state2": two[0], "absmax2": two[1], "qmap2": torch.linspace(-1, 1, 256), "step": 5}  # fmt: skip


def test_eight_bit_moments(monkeypatch):
    layer = nn.Linear(256, 4, bias=False)
    optimizer = torch.optim.Adam(layer.parameters())
    first, second = torch.randn(4, 256), torch.rand(4, 256)
    optimizer.state[layer.weight] = eight_bit(first, second)
    with pytest.raises(UnsupportedError, match="8-bit moments cannot be dequantized here"):
        moments_of(optimizer, dict(layer.named_parameters()))

    def dequantize_blockwise(values, absmax, code, blocksize):
        assert blocksize == 256
        return ((values.float().view(-1, blocksize) - 128) / 127 * absmax[:, None]).view(values.shape)

    functional = types.ModuleType("bitsandbytes.functional")
    functional.dequantize_blockwise = dequantize_blockwise
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functional)
    moments = moments_of(optimizer, dict(layer.named_parameters()))["weight"]
    assert (moments.first - first).abs().max() < 0.02 * first.abs().max()
    assert (moments.second - second).abs().max() < 0.02 * second.abs().max()
    assert moments.step == 5


def test_sign_gradients_of_a_model():
    model = build("lora")
    engine, batch = engine_of(model), ragged([5, 9])
    found = engine.run(batch, [Collect(engine)], precondition=preconditioner(PRESETS["sign"]))["collect"]
    rows = flat(oracle(model, batch))
    clear = rows.abs() > 1e-6 * rows.abs().max()
    assert torch.equal(found[clear], rows[clear].sign())
