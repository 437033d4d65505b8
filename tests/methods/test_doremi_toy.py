"""DoReMi on a toy: a domain that can be learned gains weight over noise and over what is known at once.

The model is a table of next-token logits by domain and word; the loss, the statistics and the mixers are those
of training. Without a reference (Group DRO on losses) noise wins, which is why a missing reference is refused.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dataflex.mixers.loss_weights import DoReMi, GroupDro
from dataflex.plan.domains import Domains
from dataflex.testing import example_context
from dataflex.train import loader
from dataflex.train.loss import Reweighter, token_losses

NAMES = ("noise", "constant", "chain")
WORDS = 8
ROWS, LENGTH, STEPS = 160, 16, 150


def sequences(rng):
    """Rows of uniform noise, of one word again and again, and of a chain that mostly takes one way [3 ROWS, LENGTH]."""
    noise = rng.integers(0, WORDS, size=(ROWS, LENGTH))
    constant = np.zeros((ROWS, LENGTH), dtype=np.int64)
    chain = np.zeros((ROWS, LENGTH), dtype=np.int64)
    chain[:, 0] = rng.integers(0, WORDS, size=ROWS)
    for t in range(1, LENGTH):
        follows = (3 * chain[:, t - 1] + 1) % WORDS
        chain[:, t] = np.where(rng.random(ROWS) < 0.9, follows, rng.integers(0, WORDS, size=ROWS))
    return torch.from_numpy(np.concatenate([noise, constant, chain]))


class References:
    """Losses of a table of logits."""

    def __init__(self, table):
        self.table = table

    def of(self, batch, rows, mask_BT, joined=None):
        with torch.no_grad():
            return token_losses(self.table[batch["input_ids"]], batch["labels"]).loss_BT


def train(data, mixer, reference=None, *, steps, rate, seed):
    """Train a table of logits; batches hold 4 rows of every domain."""
    rng = np.random.default_rng(seed)
    table = torch.zeros(3 * WORDS, WORDS, requires_grad=True)
    domains = Domains.from_sizes(NAMES, (ROWS,) * 3)
    reweighter = Reweighter(None, mixer, columns={}, domains=domains, over_ranks=True, world=1, reference=reference)
    if mixer is not None:
        mixer.mix(example_context(dict.fromkeys(NAMES, ROWS)))
    for step in range(steps):
        rows = np.concatenate([ROWS * k + rng.choice(ROWS, size=4, replace=False) for k in range(3)])
        tokens = data[torch.from_numpy(rows)]
        context = tokens + WORDS * torch.arange(3).repeat_interleave(4)[:, None]
        batch = {"input_ids": context, "labels": tokens, loader.ROWS: rows}
        items = torch.tensor(len(rows) * (LENGTH - 1))
        reweighter.begin_step([batch], items, torch.device("cpu"), index=step, total=steps)
        loss = reweighter.loss(batch, table[context])
        (gradient,) = torch.autograd.grad(loss, table)
        if mixer is not None:
            reweighter.end_step(np.full(3, 1 / 3), learning_rate=rate)
        with torch.no_grad():
            table -= rate * gradient
    return table.detach()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("variant", ["repo", "paper"])
def test_what_can_be_learned_gains_over_noise(variant, seed):
    data = sequences(np.random.default_rng(seed))
    reference = References(train(data, None, steps=600, rate=20.0, seed=seed + 10))
    mixer = DoReMi(DoReMi.Params(reference="table", variant=variant, eta=0.1))
    train(data, mixer, reference, steps=STEPS, rate=2.0, seed=seed)
    found = dict(zip(NAMES, mixer.mean_alpha.tolist(), strict=True))
    assert found["chain"] > 1 / 3, found
    assert found["noise"] < 1 / 3, found

    blind = GroupDro(GroupDro.Params(eta=0.1))
    train(data, blind, steps=STEPS * 4, rate=2.0, seed=seed)
    weights = dict(zip(NAMES, blind.alpha.tolist(), strict=True))
    assert weights["noise"] > weights["chain"], weights
