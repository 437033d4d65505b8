"""Values, gradients and derivatives along a direction, whether log-probabilities are kept or worked out again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from dataflex.signals import losses as module

WORDS = 11


@pytest.fixture(params=["kept", "again"])
def kept(request, monkeypatch):
    if request.param == "again":
        monkeypatch.setattr(module, "_KEPT_ELEMENTS", 0)
    monkeypatch.setattr(module, "chunk_tokens", lambda vocabulary, device: 4)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_whole(share, dtype):
    generator = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn(17, WORDS, generator=generator)).to(dtype)
    targets = torch.randint(0, WORDS, (17,), generator=generator)
    targets[torch.rand(17, generator=generator) >= share] = -100
    weights = torch.rand(17, generator=generator)

    def loss_of(given):
        loss, entropy = module.token_cross_entropy(given, targets, entropy=True)
        assert not entropy.requires_grad
        return loss, entropy

    def stock_of(given):
        return F.cross_entropy(given.float(), targets, ignore_index=-100, reduction="none")

    leaf, stock = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, entropy = loss_of(leaf)
    wanted = stock_of(stock)
    assert torch.equal(loss, wanted)
    p = logits.float().softmax(dim=-1)
    assert torch.allclose(entropy, torch.where(targets.ne(-100), -(p * p.log()).sum(dim=-1), 0.0), atol=1e-5)
    ours = torch.autograd.grad((weights * loss).sum(), leaf)[0]
    theirs = torch.autograd.grad((weights * wanted).sum(), stock)[0]
    assert torch.equal(ours, theirs)

    direction = torch.randn(17, WORDS, generator=generator).to(dtype)
    with torch.no_grad(), forward_ad.dual_level():
        along = forward_ad.unpack_dual(loss_of(forward_ad.make_dual(logits, direction))[0]).tangent
    (slope,) = torch.autograd.grad(stock_of(stock).sum(), stock)
    assert torch.allclose(
        along, (slope.float() * direction.float()).sum(dim=-1), atol=1e-4 if dtype == torch.float32 else 5e-2
    )
