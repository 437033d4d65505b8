"""What weighters do to noise, on data where it is known: a Markov chain, and rows of random tokens.

The model is a table of bigram logits, trained through the weighted loss itself.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dataflex.sequences import Sequences
from dataflex.train import loss
from dataflex.weighters.loss import LossWeighter, SelectiveLanguageModelling

VOCABULARY, WIDTH, ROWS = 24, 33, 600


def chain(rng, rows, tail):
    """Rows of a Markov chain in which two tokens follow each; with probability ``tail`` it is any."""
    table = np.full((VOCABULARY, VOCABULARY), tail / VOCABULARY)
    table[np.arange(VOCABULARY), np.random.default_rng(5).permutation(VOCABULARY)] += 0.6
    table[np.arange(VOCABULARY), np.random.default_rng(6).permutation(VOCABULARY)] += 0.3
    table /= table.sum(axis=1, keepdims=True)
    tokens = np.zeros((rows, WIDTH), dtype=np.int64)
    tokens[:, 0] = rng.integers(0, VOCABULARY, rows)
    steps = table.cumsum(axis=1)
    for t in range(1, WIDTH):
        draws = rng.random(rows)[:, None]
        tokens[:, t] = (draws > steps[tokens[:, t - 1]]).sum(axis=1).clip(max=VOCABULARY - 1)
    return torch.from_numpy(tokens)


def mixed(seed, share, tail):
    """A data set of which ``share`` of the rows are random tokens, shuffled; and which ones."""
    rng = np.random.default_rng(seed)
    noise = np.arange(ROWS) < round(share * ROWS)
    tokens = chain(rng, ROWS, tail)
    tokens[torch.from_numpy(noise)] = torch.from_numpy(rng.integers(0, VOCABULARY, (int(noise.sum()), WIDTH)))
    order = rng.permutation(ROWS)
    return tokens[torch.from_numpy(order)], noise[order]


def losses_of(table, tokens):
    return loss.token_losses(table[tokens], tokens)


def train(tokens, steps, seed, rate=0.5):
    table = torch.zeros(VOCABULARY, VOCABULARY, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=rate / 10)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = torch.from_numpy(rng.choice(len(tokens), 20, replace=False))
        found = losses_of(table, tokens[rows])
        optimizer.zero_grad()
        (found.loss_BT.sum() / found.mask_BT.sum()).backward()
        optimizer.step()
    return table.detach()


def batches(table, tokens, size):
    for rows in np.arange(len(tokens)).reshape(-1, size):
        found = losses_of(table, tokens[torch.from_numpy(rows)])
        sequences = Sequences(rows_B=rows)
        yield loss.batch_view(found, sequences, domains_B=np.zeros(size, dtype=np.int64), step=0, total_steps=1)


def relative_weights(strategy, seed):
    """Mean weight of the noise rows, in units of the mean weight, after training on the mixture."""
    tokens, noise = mixed(seed, 0.1, tail=0.1)
    table = train(tokens, 150, seed)
    weighter = LossWeighter(LossWeighter.Params(strategy=strategy, warmup_steps=0))
    weights = torch.cat([weighter.weigh(batch) for batch in batches(table, tokens, 10)]).numpy()
    return float(weights[noise].mean() / weights.mean())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_strategies_by_loss_and_rows_of_random_labels(seed):
    """A tenth of the rows is noise: quadratic lowers it, linupper and extremes raise it."""
    assert relative_weights("quadratic", seed) < 0.9
    assert relative_weights("linupper", seed) > 1.5
    assert relative_weights("extremes", seed) > 1.05
    assert relative_weights("softmax_loss", seed) > relative_weights("linupper", seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_slm_with_a_clean_reference_drops_noise(seed, share):
    """At least four fifths of the tokens left out are noise, when as many are left out as there is noise."""
    tokens, noise = mixed(seed, share, tail=0.001)
    reference = train(chain(np.random.default_rng(seed + 100), ROWS, 0.001), 600, seed)
    table = train(tokens, 60, seed)
    weighter = SelectiveLanguageModelling(SelectiveLanguageModelling.Params(reference="r", keep=1 - share))
    dropped = dropped_noise = 0
    for batch in batches(table, tokens, ROWS):
        beside = losses_of(reference, tokens[torch.from_numpy(batch.rows_B)]).loss_BT
        kept = weighter.weigh(dataclasses.replace(batch, reference_BT=beside)).bool()
        out = batch.mask_BT & ~kept
        dropped += int(out.sum())
        dropped_noise += int(out[torch.from_numpy(noise[batch.rows_B])].sum())
    assert dropped == round(share * ROWS * (WIDTH - 1))
    assert dropped_noise / dropped >= 0.8
