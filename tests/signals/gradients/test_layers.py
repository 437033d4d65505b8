"""Single layers, layers without a formula, and models that cannot be taken apart."""

from __future__ import annotations

import logging

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.utils.checkpoint import checkpoint

from dataflex.errors import ConfigError, UnsupportedError
from dataflex.signals.gradients.consumers import Norms
from dataflex.signals.gradients.engine import GradientEngine
from dataflex.signals.gradients.factors import ghost_dots, ghost_norms
from dataflex.signals.gradients.layers import _KINDS, gradient_of, kind_of
from dataflex.signals.gradients.parameters import choose_parameters
from dataflex.testing import oracle_row_gradients
from tests.signals.gradients.small import Collect, build, differences, engine_of, layers_of

WIDTH = 6


class Toy(nn.Module):
    """Embeds ids, runs a body, and scores each row by a smooth function of everything."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.body = body
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, batch: dict) -> torch.Tensor:
        hidden = self.body(self.embed(batch["input_ids"]))
        return (self.head(hidden).tanh() * batch["weight"].unsqueeze(-1)).sum(dim=(1, 2))


def toy_batch(rows: int, tokens: int, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(0, 11, (rows, tokens), generator=generator),
        "weight": torch.rand(rows, tokens, generator=generator),
    }


def check(body: nn.Module, batch: dict, **options) -> tuple[GradientEngine, list[str]]:
    torch.manual_seed(1)
    for parameter in body.parameters():
        nn.init.normal_(parameter, mean=0.3, std=0.5)
    model = Toy(body).eval()
    engine = GradientEngine(model, loss=model, **options)
    collect = Collect(engine)
    engine.run(batch, [collect])
    expected = [
        oracle_row_gradients(model, batch, i, dict(model.named_parameters())) for i in range(len(batch["input_ids"]))
    ]
    return engine, differences(collect.rows, expected, 1e-5)


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(self.inner(x).tanh())


class Flattened(nn.Module):
    """Calls its layer with the positions of all samples in one dimension, as some routers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.inner(x.reshape(-1, WIDTH)).view(x.shape)


class Gate(nn.Module):
    """A layer with parameters of its own and no formula."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x * self.scale.sigmoid() + self.shift.square()


class Branching(Gate):
    """Looks at values to decide, which cannot be vectorized."""

    def forward(self, x):
        return super().forward(x) if float(x.detach().abs().sum()) >= 0 else x


class Behind(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return nn.functional.linear(x, self.inner.weight, self.inner.bias)


class HasParameterList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.ones(WIDTH)) for _ in range(2)])

    def forward(self, x):
        return x * self.parts[0] + self.parts[1]


class OddRMSNorm(nn.Module):
    """Called RMSNorm, but is something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.eps = 1e-6

    def forward(self, x):
        return x * self.weight / x.abs().mean(dim=-1, keepdim=True)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.inner(x)
        y += 1.0
        return torch.relu_(y)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.norm, self.reentrant = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), reentrant

    def forward(self, x):
        return checkpoint(lambda y: self.norm(self.inner(y).tanh()), x, use_reentrant=self.reentrant)


class Positions(nn.Module):
    """One set of positions for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Embedding(16, WIDTH)

    def forward(self, x):
        return x + self.inner(torch.arange(x.shape[1]).unsqueeze(0))


class MixesRows(Gate):
    """Centres over the batch."""

    def forward(self, x):
        return super().forward(x - x.mean(dim=0, keepdim=True))


class ZeroCentredRMSNorm(nn.RMSNorm):
    def forward(self, x):
        return nn.functional.rms_norm(x, (WIDTH,), None, self.eps) * (1 + self.weight)


BODIES = {
    "linear": (lambda: nn.Linear(WIDTH, WIDTH), "linear"),
    "no bias": (lambda: nn.Linear(WIDTH, WIDTH, bias=False), "linear"),
    "layer norm": (lambda: nn.LayerNorm(WIDTH), "layer norm"),
    "layer norm without bias": (lambda: nn.LayerNorm(WIDTH, bias=False), "layer norm"),
    "torch rms norm": (lambda: nn.RMSNorm(WIDTH), "rms norm"),
    "zero centred rms norm": (lambda: ZeroCentredRMSNorm(WIDTH, eps=1e-6), "rms norm"),
    "called twice": (lambda: Twice(nn.Linear(WIDTH, WIDTH)), "linear"),
    "gate called twice": (lambda: Twice(Gate()), "torch.func"),
    "flattened": (lambda: Flattened(), "linear"),
    "gate": (lambda: Gate(), "torch.func"),
    "branching": (lambda: Branching(), "torch.func"),
    "behind": (lambda: Behind(), "torch.func"),
    "parameter list": (lambda: HasParameterList(), "torch.func"),
    "odd rms norm": (lambda: OddRMSNorm(), "torch.func"),
    "in place": (lambda: InPlace(), "linear"),
    "checkpointed": (lambda: Checkpointed(False), "linear"),
    "positions": (lambda: Positions(), "embedding"),
    "attention": (lambda: SelfAttention(), "torch.func"),
}


class SelfAttention(nn.Module):
    """torch's own attention uses its output layer's weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("name", BODIES)
@settings(max_examples=5, deadline=None)
@given(rows=st.integers(1, 4), tokens=st.integers(1, 6), seed=st.integers(0, 1000))
def test_layer(name, rows, tokens, seed):
    make, kind = BODIES[name]
    engine, lines = check(make(), toy_batch(rows, tokens, seed))
    assert not lines, "\n".join(lines)
    assert kind in {how for parameter, how in layers_of(engine).items() if parameter.startswith("body")}


def test_two_dimensional_inputs():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.inner(x.mean(dim=1)).unsqueeze(1)

    _, lines = check(Pooled(), toy_batch(3, 4))
    assert not lines, "\n".join(lines)


def test_padding_row_of_an_embedding_has_no_gradient():
    model = build("llama")
    engine = engine_of(model)
    batch = {"input_ids": torch.tensor([[5, 3, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    batch["labels"] = batch["input_ids"]  # token 3 is the padding token, here amid the text
    collect = Collect(engine)
    engine.run(batch, [collect])
    rows = collect.rows["model.embed_tokens.weight"].view(37, 16)
    assert rows[3].abs().sum() == 0
    assert rows[5].abs().sum() > 0


def test_fallback_is_said_once_with_its_reason(caplog):
    with caplog.at_level(logging.INFO, logger="dataflex"):
        engine, _ = check(Gate(), toy_batch(2, 3))
        model = engine.model
        engine.run(toy_batch(2, 3), [Collect(engine)])
    said = [record.getMessage() for record in caplog.records if "torch.func" in record.getMessage()]
    assert len(said) == 1
    assert "body.scale" in said[0]
    assert "no formula" in said[0]
    assert isinstance(model, Toy)


def test_a_module_that_mixes_samples_is_found_out():
    with pytest.raises(UnsupportedError) as error:
        check(nn.Sequential(MixesRows(), MixesRows()), toy_batch(3, 4))
    for name in ("body.0.scale", "body.0.shift", "body.1.scale", "body.1.shift"):
        assert name in str(error.value)
    assert "mixes samples" in str(error.value)


def test_reentrant_checkpointing_that_stays_on_in_eval_mode_is_refused():
    with pytest.raises(UnsupportedError, match="reentrant activation checkpointing"):
        check(Checkpointed(True), toy_batch(3, 4))


def test_embedding_that_couples_rows_is_not_taken_for_a_plain_one():
    class Renormed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Embedding(11, WIDTH, scale_grad_by_freq=True)

        def forward(self, x):
            return x + self.inner(torch.ones(x.shape[:2], dtype=torch.long))

    engine, _ = check(Renormed(), toy_batch(2, 3))
    assert layers_of(engine)["body.inner.weight"] == "torch.func"


def test_a_kind_of_ones_own():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x):
            return x * self.weight

    @gradient_of("scale", matches=lambda module: type(module) is Scale, parameters=("weight",))
    def _scale(module, kept, grad, wanted):
        return {"weight": (grad * kept[0]).sum(dim=1)}

    try:
        engine, lines = check(Scale(), toy_batch(3, 4))
        assert not lines, "\n".join(lines)
        assert layers_of(engine)["body.weight"] == "scale"
    finally:
        _KINDS.pop()


def test_choosing_parameters():
    model = build("llama")
    assert all(name.startswith("model.layers.1.") for name in choose_parameters(model, last_blocks=1))
    assert choose_parameters(model, last_blocks=99).keys() == choose_parameters(model, pattern=r"layers\.").keys()
    with pytest.raises(ConfigError, match="no trainable parameter is left"):
        choose_parameters(model, pattern="nothing-like-this")
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameters"):
        choose_parameters(model)


def test_the_graph_below_the_lowest_layer_is_not_run_backwards():
    """Gradients of the last block must not cost a backward pass through the first."""
    model = build("llama")
    visited = []
    hook = model.model.layers[0].mlp.down_proj.register_full_backward_hook(lambda *_: visited.append(1))
    engine = engine_of(model, parameters=choose_parameters(model, pattern="lm_head"))
    batch = {"input_ids": torch.arange(4, 10).view(1, 6)}
    engine.run({**batch, "labels": batch["input_ids"]}, [Norms()])
    assert not visited
    whole = engine_of(model)
    whole.run({**batch, "labels": batch["input_ids"]}, [Norms()])
    assert visited
    hook.remove()


def golden(layer, kept, grad, name):
    return kind_of(layer).sample(layer, (torch.tensor(kept),), torch.tensor(grad), frozenset({name}))[name]


@pytest.mark.parametrize(("padding", "product"), [(None, 0.9), (0, 0.6)])
def test_golden_lookup_table(padding, product):
    use = golden(
        nn.Embedding(3, 2, padding_idx=padding), [[2, 0, 2]], [[[0.1, 0.2], [0.3, -0.1], [0.5, 0.4]]], "weight"
    )
    V = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]]])
    assert float(ghost_dots([use], V)) == pytest.approx(product, abs=1e-6)
    if padding is None:
        assert float(ghost_norms([use])) == pytest.approx(0.82, abs=1e-6)


def test_golden_norm_and_bias():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, g = [[[3.0, 4.0], [1.0, -1.0]]], [[[0.2, 0.1], [-0.3, 0.4]]]
    scale = golden(LlamaRMSNorm(2, eps=1e-6), x, g, "weight")
    torch.testing.assert_close(scale, torch.tensor([[-0.130294, -0.286863]]), rtol=0, atol=1e-6)
    assert float(scale @ torch.tensor([1.0, 2.0])) == pytest.approx(-0.704020, abs=1e-6)
    bias = golden(nn.Linear(2, 2), x, g, "bias")
    assert float(bias @ torch.tensor([0.5, -1.0])) == pytest.approx(-0.55, abs=1e-6)
