"""The one weighted loss against loops in float64, and the identity at unit weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.errors import ComponentError
from dataflex.sequences import Sequences
from dataflex.train.feedback import RowWeights, WeightStats
from dataflex.train.loss import (
    balance_loss,
    batch_view,
    document_sequences,
    micro_batch_scale,
    sample_means,
    token_losses,
    weighted_loss,
)


def batch(seed, rows=3, width=6, vocabulary=7, empty=()):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, width, vocabulary, generator=generator, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows, width), generator=generator)
    for row in range(rows):
        prompt = int(torch.randint(1, width - 1, (1,), generator=generator))
        labels[row, :prompt] = -100
    for row in empty:
        labels[row] = -100
    return logits, labels


def items(labels):
    return labels[:, 1:].ne(-100).sum()


def stock(logits, labels, num_items):
    targets = F.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets, reduction="sum") / num_items


def oracle(batches, weights, normalizer, num_items):
    """Sum over micro-batches, sequences and tokens, in float64 with an explicit denominator."""
    total = 0.0
    for (logits, labels), w in zip(batches, weights, strict=True):
        log_probs = F.log_softmax(logits.double(), dim=-1)
        means = []
        for i in range(len(labels)):
            losses = [
                -log_probs[i, t, int(labels[i, t + 1])]
                for t in range(labels.shape[1] - 1)
                if int(labels[i, t + 1]) != -100
            ]
            means.append(sum(losses) / len(losses) if losses else 0.0)
            if normalizer in {"num_tokens", "weight_sum"}:
                total = total + float(w[i]) * sum(losses)
        if normalizer == "num_sequences":
            total = total + sum(float(w[i]) * means[i] for i in range(len(labels))) / len(batches)
    if normalizer == "num_sequences":
        return total
    if normalizer == "num_tokens":
        return total / float(num_items)
    pairs = zip(batches, weights, strict=True)
    z = sum(float(w[i]) * int(items(labels[i : i + 1])) for (_, labels), w in pairs for i in range(len(w)))
    return total / z


@given(seed=st.integers(0, 5000), empty=st.booleans())
@settings(max_examples=40, deadline=None)
def test_unit_weights_give_the_stock_loss_and_gradient_to_the_bit(seed, empty):
    logits, labels = batch(seed, empty=(1,) if empty else ())
    num_items = items(labels) + 5
    expected = stock(logits, labels, num_items)
    (wanted,) = torch.autograd.grad(expected, logits)
    for normalizer, scale in (("num_tokens", None), ("weight_sum", torch.ones((), dtype=torch.float64))):
        losses = token_losses(logits, labels)
        got = weighted_loss(
            losses,
            torch.ones(len(labels), 1),
            sequences=Sequences(rows_B=np.arange(len(labels))),
            normalizer=normalizer,
            num_items=num_items,
            num_micro_batches=2,
            step_scale=scale,
            replicas=1,
        )
        assert torch.equal(got, expected)
        (gradient,) = torch.autograd.grad(got, logits)
        assert torch.equal(gradient, wanted)


@given(seed=st.integers(0, 5000), normalizer=st.sampled_from(["num_tokens", "weight_sum", "num_sequences"]))
@settings(max_examples=40, deadline=None)
def test_weighted_losses_of_a_step_against_loops(seed, normalizer):
    batches = [batch(seed + i, rows=2 + i % 2) for i in range(3)]
    rng = np.random.default_rng(seed)
    weights = [torch.from_numpy(rng.uniform(0.0, 2.0, len(labels)).astype(np.float32)) for _, labels in batches]
    num_items = sum(items(labels) for _, labels in batches)
    pairs = zip(batches, weights, strict=True)
    z = sum((w.double() * labels[:, 1:].ne(-100).sum(dim=1)).sum() for (_, labels), w in pairs)
    total = 0.0
    for (logits, labels), w in zip(batches, weights, strict=True):
        total = total + weighted_loss(
            token_losses(logits, labels),
            w[:, None],
            sequences=Sequences(rows_B=np.arange(len(labels))),
            normalizer=normalizer,
            num_items=num_items,
            num_micro_batches=len(batches),
            step_scale=num_items / z if normalizer == "weight_sum" else None,
            replicas=1,
        )
    wanted = oracle(batches, weights, normalizer, num_items).item()
    assert total.item() == pytest.approx(wanted, rel=2e-5)


def token_mean(losses, w):
    """The loss of a single micro-batch under ``token`` with weights [B] that nothing is known of beforehand."""
    sequences = Sequences(rows_B=np.arange(len(w)))
    return weighted_loss(
        losses,
        w[:, None],
        sequences=sequences,
        normalizer="weight_sum",
        num_items=losses.mask_BT.sum(),
        num_micro_batches=1,
        step_scale=micro_batch_scale(losses, w[:, None], sequences),
        replicas=1,
    )


def test_token_normalizer_without_known_weights_is_a_mean_inside_the_micro_batch():
    logits, labels = batch(4)
    w = torch.tensor([0.5, 2.0, 0.0])
    losses = token_losses(logits, labels)
    got = token_mean(losses, w)
    expected = (w[:, None] * losses.loss_BT).sum() / (w * losses.mask_BT.sum(1)).sum()
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)


def test_one_hot_weights_leave_one_row_in_the_gradient():
    logits, labels = batch(9)
    w = torch.tensor([0.0, 1.0, 0.0])
    loss = token_mean(token_losses(logits, labels), w)
    (gradient,) = torch.autograd.grad(loss, logits)
    alone = logits[1:2].detach().requires_grad_()
    (wanted,) = torch.autograd.grad(stock(alone, labels[1:2], items(labels[1:2])), alone)
    torch.testing.assert_close(gradient[1:2], wanted, rtol=1e-5, atol=1e-7)
    assert gradient[0].abs().sum() == 0
    assert gradient[2].abs().sum() == 0


def test_rows_without_labels_have_zero_loss():
    logits, labels = batch(2, empty=(0,))
    losses = token_losses(logits, labels)
    means, tokens = sample_means(losses.loss_BT, losses.mask_BT, Sequences(rows_B=np.arange(3)))
    assert means[0] == 0
    assert tokens[0] == 0
    seen = batch_view(
        losses, Sequences(rows_B=np.array([5, 6, 7])), domains_B=np.zeros(3, dtype=np.int64), step=3, total_steps=9
    )
    assert seen.loss_M.tolist() == means.tolist()
    assert (seen.local, seen.step, seen.total_steps) == (slice(0, 3), 3, 9)
    assert not seen.loss_BT.requires_grad


def add(stats, weights):
    stats.add(torch.tensor(weights)[:, None], torch.tensor(weights))


def test_weight_statistics_and_their_checks():
    stats = WeightStats("mine")
    add(stats, [1.0, 1.0])
    add(stats, [3.0, 0.0])
    read = stats.read()
    assert read == {
        "weight_ess": pytest.approx(25 / 11 / 4),
        "weight_p05": pytest.approx(0.15),
        "weight_p50": 1.0,
        "weight_p95": pytest.approx(2.7),
        "weight_max": 3.0,
    }
    assert stats.read() == {}
    for bad in ([-1.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0]):
        with pytest.raises(ComponentError, match="'mine' returned negative or non-finite"):
            add(stats, bad)
        stats = WeightStats("mine")


def test_many_micro_batches_between_two_logs_are_all_counted():
    stats = WeightStats("mine")
    for i in range(200):
        add(stats, [float(i)])
    assert stats.read()["weight_p50"] == pytest.approx(99.5)


def test_mean_weight_of_each_row():
    table = RowWeights()
    rng = np.random.default_rng(0)
    wanted = {}
    for _ in range(150):
        rows = rng.integers(0, 40, 5)
        w = rng.uniform(0, 2, 5).astype(np.float32)
        for row, weight in zip(rows.tolist(), w.tolist(), strict=True):
            wanted.setdefault(row, []).append(weight)
        table.add(rows, torch.from_numpy(w))
    other = RowWeights()
    other.load_state_dict(table.state_dict())
    ordered = sorted(wanted, key=lambda row: -np.mean(wanted[row]))
    for one in (table, other):
        most, least = one.extremes(3)
        assert [item["row"] for item in most] == ordered[:3]
        assert [item["row"] for item in least] == ordered[:-4:-1]
        assert most[0]["weight"] == pytest.approx(np.mean(wanted[ordered[0]]))
        assert most[0]["times"] == len(wanted[ordered[0]])
    few = RowWeights()
    few.add(np.array([7]), torch.tensor([2.0]))
    assert [len(part) for part in few.extremes(5)] == [1, 1]
    assert RowWeights().extremes(5) == ([], [])


def test_packed_documents_are_the_sequences():
    logits, labels = batch(3, rows=2, width=8)
    labels[0] = torch.tensor([-100, 1, 2, -100, 3, 4, -100, -100])
    labels[1] = torch.tensor([-100, -100, 5, 6, -100, -100, -100, 1])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, -1, -1], [0, 0, 0, 0, 1, 1, 2, 2]])
    losses = token_losses(logits, labels)
    sequences = document_sequences(documents, losses.mask_BT, np.array([40, 41]))
    assert sequences.rows_B.tolist() == [40, 40, 41, 41]  # document 1 of the second row has no label
    means, tokens = sample_means(losses.loss_BT, losses.mask_BT, sequences)
    log_probs = F.log_softmax(logits, dim=-1)

    def mean(row, places):
        return sum(-log_probs[row, t - 1, labels[row, t]] for t in places) / len(places)

    expected = torch.stack([mean(0, (1, 2)), mean(0, (4, 5)), mean(1, (2, 3)), mean(1, (7,))])
    torch.testing.assert_close(means, expected)
    assert tokens.tolist() == [2, 2, 2, 1]
    weights = torch.tensor([[1.0], [0.0], [2.0], [0.5]])
    options = {"num_items": 7, "num_micro_batches": 1, "step_scale": None, "replicas": 1, "sequences": sequences}
    by_sequence = weighted_loss(losses, weights, normalizer="num_sequences", **options)
    torch.testing.assert_close(by_sequence, (weights[:, 0] * expected).sum())
    by_token = weighted_loss(losses, weights, normalizer="num_tokens", **options)
    torch.testing.assert_close(by_token, (weights[:, 0] * expected * tokens).sum() / 7)


def test_the_balance_loss_is_that_of_the_language_part():
    from types import SimpleNamespace

    from transformers import LlavaConfig, MixtralConfig

    config = MixtralConfig(router_aux_loss_coef=0.25)
    outputs = SimpleNamespace(aux_loss=torch.tensor(2.0))
    assert balance_loss(outputs, config) == 0.5
    assert balance_loss(outputs, LlavaConfig(text_config=config)) == 0.5
    assert balance_loss(SimpleNamespace(aux_loss=None), config) is None
    assert balance_loss(SimpleNamespace(), config) is None
