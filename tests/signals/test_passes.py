"""Backward passes are counted once each, by whichever output they come."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dataflex.signals.passes import PassCounter


class Model(torch.nn.Module):
    """Rows of 3 tokens in; with ``copied``, logits that its loss does not come by, as in mixed precision."""

    def __init__(self, copied):
        super().__init__()
        self.copied, self.weight = copied, torch.nn.Parameter(torch.ones(3))

    def forward(self, input_ids):
        logits = self.weight * input_ids
        return SimpleNamespace(logits=logits.clone() if self.copied else logits, loss=(logits**2).sum())


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("of", ["loss", "logits"])
def test_a_backward_pass_is_counted_once(copied, of):
    model = Model(copied)
    counter = PassCounter(model, lambda: "train", torch.device("cpu"))
    rows = torch.ones(2, 3)
    for passes in (1, 2):
        output = model(input_ids=rows)
        scalar = getattr(output, of).sum()
        for _ in range(passes):
            scalar.backward(retain_graph=True)
    with torch.no_grad():
        model(input_ids=rows)
    counter.close()
    assert counter._own == {"train/forward": 18, "train/backward": 18}
