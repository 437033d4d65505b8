"""A step's gradient split by domain, against batches of the domain's rows alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dataflex.signals.gradients import shares as module
from dataflex.signals.gradients.consumers import Norms, TargetVectors
from dataflex.signals.gradients.engine import GradientEngine
from dataflex.signals.gradients.factors import Factors
from dataflex.signals.gradients.in_run import capturable
from dataflex.signals.gradients.layers import kind_of
from dataflex.signals.gradients.parameters import Unit
from dataflex.signals.gradients.shares import StepShares
from dataflex.train.loss import token_losses
from tests.signals.gradients.small import build, ragged

DOMAINS = ([0, 2, 0, 1], [1, 1, 2, 2])
BATCHES = [ragged([9, 4, 6, 2], seed=3), ragged([5, 7, 3, 3], seed=4)]


def losses_of(model, batch):
    logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}, use_cache=False).logits
    return token_losses(logits, batch["labels"])


def split(model, vectors=None):
    """Train two micro-batches and return the shares, the captured names, and the products with vectors."""
    engine = GradientEngine(model)
    layers, left_out = capturable(model, engine.units, whole=True)
    names = [name for name in engine.shapes if name in {n for unit in layers for n in unit.parameters.values()}]
    assert set(names) | set(left_out) == set(engine.shapes)
    shares = TargetVectors.zeros(3, {name: engine.shapes[name] for name in names}, "cpu")
    if vectors is None:
        vectors = TargetVectors.zeros(1, engine.shapes, "cpu")
    hooks, products = StepShares(layers, shares), []
    for domains, batch in zip(DOMAINS, BATCHES, strict=True):
        hooks.begin(tuple(batch["input_ids"].shape), torch.tensor(domains), vectors)
        (losses_of(model, batch).loss_BT.sum() / 31 * 64).backward()
        products.append(hooks.take())
    hooks.end()
    return shares, names, products


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "qwen2", "mixtral", "lora", "dora"])
def test_shares_add_up_to_the_gradient(name, monkeypatch):
    monkeypatch.setattr(module, "_FORMED", 500)  # a few rows, or one, at a time
    model = build(name).eval()
    shares, names, _ = split(model)
    own = dict(model.named_parameters())
    spared = {"gpt2": ["transformer.wpe.weight"]}.get(name, [])  # positions are the same for all rows
    for key in set(names) - set(spared):
        torch.testing.assert_close(shares.tensors[key].sum(dim=0), own[key].grad, rtol=1e-4, atol=1e-4)
    assert not any(shares.tensors[key].any() for key in spared)
    assert sum(bool(shares.tensors[key].any()) for key in names) > len(names) // 2


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("name", ["llama-tied", "lora"])
def test_a_share_is_the_gradient_of_the_domains_rows(name, reentrant):
    model = build(name)
    for each in model.modules():
        if isinstance(each, nn.Dropout):
            each.p = 0.0
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    own = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    draw = torch.Generator().manual_seed(1)
    vectors = TargetVectors(tensors={key: torch.randn(2, *p.shape, generator=draw) for key, p in own.items()})
    shares, names, products = split(model, vectors)
    assert set(names) == set(own)
    sums = torch.zeros(3, 2, dtype=torch.float64)
    for domains, found in zip(DOMAINS, products, strict=True):
        sums.index_add_(0, torch.tensor(domains), found)
    for domain in range(3):
        loss = torch.zeros(())
        for domains, batch in zip(DOMAINS, BATCHES, strict=True):
            mine = torch.tensor(domains).eq(domain)
            loss = loss + losses_of(model, batch).loss_BT[mine].sum() / 31 * 64
        model.zero_grad()
        loss.backward()
        product = torch.zeros(2, dtype=torch.float64)
        for key, parameter in own.items():
            torch.testing.assert_close(shares.tensors[key][domain], parameter.grad, rtol=1e-4, atol=1e-4)
            product += vectors.flat(key).double() @ parameter.grad.double().flatten()
        torch.testing.assert_close(sums[domain], product, rtol=1e-5, atol=1e-4)


def test_golden_tied_embeddings():
    """One matrix at both ends: .3 from the embedding and -.4 from the head; squares .15, .2 and together .33."""
    table, head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
    head.weight = table.weight
    layers = [
        Unit(name=name, module=each, kind=kind_of(each), parameters={"weight": "w"})
        for name, each in (("table", table), ("head", head))
    ]
    shares = TargetVectors.zeros(1, {"w": table.weight.shape}, "cpu")
    vectors = TargetVectors(tensors={"w": torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]]])})
    ids, h = torch.tensor([[1, 2]]), torch.tensor([[[1.0, 2.0], [0.0, 1.0]]])
    g_table, g_head = torch.tensor([[[0.1, 0.3], [0.2, -0.1]]]), torch.tensor([[[0.1, -0.3, 0.2], [0.0, 0.5, -0.5]]])
    hooks = StepShares(layers, shares)
    found = []
    for uses in ((0,), (1,), (0, 1)):
        hooks.begin((1, 2), torch.tensor([0]), vectors)
        shares.tensors["w"].zero_()
        for use in uses:
            if use:
                head(h.requires_grad_()).backward(g_head)
            else:
                table(ids).backward(g_table)
        found += [float(hooks.take()), float(shares.tensors["w"].square().sum())]
    assert found == pytest.approx([0.3, 0.15, -0.4, 0.2, -0.1, 0.33], abs=1e-6)
    norms = Norms()
    norms.begin(torch.ones(1, dtype=torch.bool))
    norms.add_factors(
        "w", [Factors(left=ids, right=g_table), Factors(left=g_head, right=h.detach())], torch.Size([3, 2])
    )
    assert float(norms.finish()[""]) ** 2 == pytest.approx(0.33, abs=1e-6), "not the .35 of both apart"
