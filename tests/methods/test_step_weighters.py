"""group, meta and presence against slow transcriptions and the specification's numbers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataflex.errors import CheckpointError
from dataflex.testing import FakeSignals, example_batch, example_context
from dataflex.weighters.influence import Meta, Presence, clipped_shares, group_weights, self_influence
from dataflex.weighters.rows import GroupWeighter, domain_weights

# ---------------------------------------------------------------- group


def group(**params):
    return GroupWeighter(GroupWeighter.Params(**params))


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=6), st.floats(0, 2), st.sampled_from([0.0, 0.9, 0.9999]))
def test_domain_weights_against_the_formulas(sizes, power, beta):
    for strategy, raw in (
        ("inverse_frequency", [n**-power for n in sizes]),
        ("class_balanced", [1.0 if beta == 0 else (1 - beta) / (1 - beta**n) for n in sizes]),
    ):
        mean = sum(n * w for n, w in zip(sizes, raw, strict=True)) / sum(sizes)
        got = domain_weights(np.array(sizes), strategy, power=power, beta=beta)
        np.testing.assert_allclose(got, [w / mean for w in raw], rtol=1e-6)


def test_weights_follow_the_domain_of_the_row():
    weighter = group()
    assert weighter.due(0)
    assert weighter.static_weights(np.array([0]), {}) is None
    weighter.prepare(example_context({"big": 30, "small": 10}), np.arange(2))
    assert not weighter.due(1)
    big, small = 40 / (2 * 30), 40 / (2 * 10)
    assert weighter.static_weights(np.array([0, 35, 29, 30]), {}).tolist() == pytest.approx([big, small, big, small])


def dro(eta=0.01, **params):
    weighter = group(strategy="group_dro", eta=eta, **params)
    weighter.prepare(example_context({"a": 4, "b": 16}), np.arange(2))
    return weighter


def in_domains(losses, domains, tokens=None):
    return dataclasses.replace(example_batch(losses, tokens), domains_B=np.array(domains))


def test_group_dro_is_that_of_the_specification():
    """With q = (.5, .5), L = (2, 1), step .01: q = (.5025, .4975), loss 1.5025."""
    weighter = dro()
    batch = in_domains([2.0, 1.0], [0, 1])
    weights = weighter.weigh(batch)
    assert np.exp(weighter.log_weights).tolist() == pytest.approx([0.5025, 0.4975], abs=1e-6)
    assert (weights * batch.loss_B).sum().item() == pytest.approx(1.5025, abs=1e-6)
    assert weighter.normalizer == "num_sequences"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_group_dro_goes_on_after_a_step_without_a_finite_loss(bad):
    """It is one without the domain; a loss scaler skips such steps."""
    broken, absent = dro(), dro()
    broken.weigh(in_domains([2.0, bad], [0, 1]))
    absent.weigh(in_domains([2.0], [0]))
    for weighter in (broken, absent):
        weighter.weigh(in_domains([2.0, 1.0], [0, 1]))
    assert np.isfinite(broken.log_weights).all()
    assert broken.log_weights.tolist() == absent.log_weights.tolist()


def test_group_dro_takes_token_means_and_leaves_absent_domains_out():
    weighter, q = dro(eta=0.5, adjustment=0.2), [0.5, 0.5]
    for losses, domains, tokens in (
        ([1.0, 4.0, 3.0], [0, 0, 1], [2, 6, 5]),
        ([2.0, 1.0], [0, 0], [3, 1]),
        ([0.5, 9.0], [1, 0], [4, 0]),
    ):
        batch = in_domains(losses, domains, tokens)
        sums, counts = [0.0, 0.0], [0, 0]
        for loss, domain, n in zip(losses, domains, tokens, strict=True):
            sums[domain] += n * (loss if n else 0.0)
            counts[domain] += n
        means = [a / b if b else 0.0 for a, b in zip(sums, counts, strict=True)]
        raised = [q[k] * math.exp(0.5 * (means[k] + 0.2 / math.sqrt([4, 16][k]))) for k in range(2)]
        q = [x / sum(raised) for x in raised]
        wanted = sum(q[k] * means[k] for k in range(2) if counts[k])
        got = (weighter.weigh(batch) * torch.where(batch.tokens_B > 0, batch.loss_B, 0.0)).sum().item()
        assert got == pytest.approx(wanted, rel=1e-5)
        assert np.exp(weighter.log_weights).tolist() == pytest.approx(q)


def test_group_dro_goes_on_from_its_state_but_not_with_other_domains():
    one = dro(eta=0.5)
    one.weigh(in_domains([2.0, 1.0], [0, 1]))
    other = group(strategy="group_dro", eta=0.5)
    other.load_state_dict(one.state_dict())
    other.prepare(example_context({"a": 4, "b": 16}), np.arange(2))
    assert other.log_weights.tolist() == one.log_weights.tolist()
    stranger = group(strategy="group_dro")
    stranger.load_state_dict(one.state_dict())
    with pytest.raises(CheckpointError, match="the saved weights are of a, b, but the data has b, a"):
        stranger.prepare(example_context({"b": 4, "a": 16}), np.arange(2))


# ---------------------------------------------------------------- meta


def test_products_are_clipped_and_shared_out():
    assert clipped_shares(np.array([3.0, -1.0, 1.0, np.nan])).tolist() == [0.75, 0.0, 0.25, 0.0]
    assert clipped_shares(np.array([-3.0, -1.0])).tolist() == [0.0, 0.0]


def with_micro_batches(losses, rows, count, tokens=None):
    batch = example_batch(losses, tokens)
    return dataclasses.replace(batch, rows_B=np.array(rows), num_micro_batches=count)


def test_meta_weighs_rows_by_their_step_along_the_target():
    """The step's loss is the mean over micro-batches of sum w l, which must be sum of shares x l over the step."""
    gradients = np.array([[1.0, 0], [0, 1], [-1, -1], [2, 2], [0, 0]])
    signals = FakeSignals([1.0] * 5, gradients=gradients, target_rows={"target": [[1.0, 0.5]]})
    weighter = Meta(Meta.Params())
    weighter.prepare(example_context({"only": 5}, signals=signals), np.array([4, 0, 3, 1, 2, 0]))
    products = {0: 1.0, 1: 0.5, 2: 0.0, 3: 3.0, 4: 0.0}
    total = sum(products[row] for row in (4, 0, 3, 1, 2, 0))
    batch = with_micro_batches([1.0, 1.0, 1.0], [4, 0, 3], 2)
    assert weighter.weigh(batch).tolist() == pytest.approx([2 * products[row] / total for row in (4, 0, 3)])
    copy = with_micro_batches([1.0, 1.0], [0, 99], 1, [4, 4])  # a row that only evens out a short step
    assert weighter.weigh(copy).tolist() == pytest.approx([products[0] / total, 0.0])
    unlabelled = with_micro_batches([1.0], [3], 1, [0])
    assert weighter.weigh(unlabelled).tolist() == [0.0]
    assert all(weighter.due(step) for step in range(5))


def test_documents_of_a_packed_row_share_its_weight():
    signals = FakeSignals([1.0] * 2, gradients=[[1.0], [3.0]], target_rows={"target": [[1.0]]})
    weighter = Meta(Meta.Params())
    weighter.prepare(example_context({"only": 2}, signals=signals), np.array([0, 1]))
    batch = with_micro_batches([1.0, 1.0, 1.0], [0, 1, 1], 1)
    batch = dataclasses.replace(batch, sequence_BT=torch.zeros(2, 4, dtype=torch.int64))
    assert weighter.weigh(batch).tolist() == pytest.approx([0.25, 0.375, 0.375])


# ---------------------------------------------------------------- presence


def test_weights_of_the_specification():
    """With s = (1, 2, 3)."""
    np.testing.assert_allclose(group_weights(np.array([1.0, 2, 3]), 1.0), [0.062556, 0.212896, 0.724548], atol=1e-6)
    np.testing.assert_allclose(group_weights(np.array([1.0, 2, 3]), -1.0), [0.724548, 0.212896, 0.062556], atol=1e-6)
    np.testing.assert_allclose(
        group_weights(np.array([1e-9, 2e-9, 3e-9]), 1.0), [0.062556, 0.212896, 0.724548], atol=1e-6
    )
    assert group_weights(np.array([2.0, 2.0]), 1.0).tolist() == [0.5, 0.5]
    assert group_weights(np.array([2.0, np.nan]), 1.0).tolist() == [1.0, 0.0]


@given(st.integers(0, 1000))
def test_self_influence_is_the_norm_of_the_groups_gradient(seed):
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(7, 4))
    gradients[2] = np.nan
    groups = np.array([0, 0, 0, 1, 1, 1, 2])
    got = self_influence(gradients @ gradients.T, groups)
    for g in range(3):
        members = [row for row in gradients[groups == g] if not np.isnan(row).any()]
        mean = sum(members) / len(members)
        assert got[g] == pytest.approx(mean @ mean)
    assert np.isnan(self_influence(np.full((1, 1), np.nan), np.array([0]))).all()


def test_presence_weighs_groups_of_rows_and_turns_round():
    gradients = np.array([[1.0], [1.0], [2.0], [2.0], [3.0], [3.0]])
    signals = FakeSignals([1.0] * 6, gradients=np.sqrt(gradients))
    weighter = Presence(Presence.Params(group_rows=2, direct_share=0.3))
    weighter.prepare(example_context({"only": 6}, signals=signals, targets=()), np.arange(6))
    assert [weighter.tau_at(step, 10) for step in range(4)] == [1.0, 1.0, 1.0, -1.0]
    shares = np.repeat([0.062556, 0.212896, 0.724548], 2) / 2
    batch = with_micro_batches([1.0] * 3, [0, 3, 4], 2)
    np.testing.assert_allclose(weighter.weigh(batch), 2 * shares[[0, 3, 4]], atol=1e-6)
    # Rows without supervised tokens are no part of their group: what is left carries the group's whole share.
    unlabelled = FakeSignals(
        [1.0] * 6, gradients=np.sqrt(np.where(np.arange(6) == 1, np.nan, gradients[:, 0]))[:, None]
    )
    other = Presence(Presence.Params(group_rows=2, direct_share=0.3))
    other.prepare(example_context({"only": 6}, signals=unlabelled, targets=()), np.arange(6))
    every = with_micro_batches([1.0] * 6, range(6), 1, [4, 0, 4, 4, 4, 4])
    np.testing.assert_allclose(other.weigh(every), [2 * shares[0], 0.0, *shares[2:]], atol=1e-6)
    late = example_context({"only": 6}, signals=signals, targets=(), start_step=90, total_sequences=400)
    weighter.prepare(late, np.arange(6))
    np.testing.assert_allclose(weighter.weigh(batch), 2 * shares[::-1][[0, 3, 4]], atol=1e-6)
