"""Block counts by residual carry: the sheet's numbers, the slow loop, bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.plan.domains import Domains
from dataflex.plan.mixture import MixtureSampler, block_counts, evenly

from .slow_mixture import slow_block


def labels(proportions, block, seed, count, earlier=0):
    """The domains of sequences after ``earlier`` segments of one block."""
    domains = Domains.from_sizes([f"d{k}" for k in range(len(proportions))], [999] * len(proportions))
    sampler = MixtureSampler(domains, seed, block)
    for n in range(earlier):
        sampler.append(proportions, n * block, 0)
        sampler.draw(block)
    sampler.append(proportions, earlier * block, 0)
    return domains.domain_of[sampler.draw(count)].tolist()


def test_counts_of_the_sheet():
    counts, residuals = block_counts(np.array([0.6, 0.3, 0.1]), 16, np.zeros(3), 4)
    assert counts.tolist() == [[9, 5, 2], [10, 5, 1], [10, 4, 2], [9, 5, 2]]
    assert residuals[0].tolist() == [0.0, 0.0, 0.0]
    assert residuals[1] == pytest.approx([0.6, -0.2, -0.4])


def test_blocks_of_one_are_smooth():
    # The order of Megatron-Core's blended data set.
    assert labels([0.5, 0.25, 0.25], 1, 0, 8) == [0, 1, 2, 0, 0, 1, 2, 0]


@st.composite
def mixtures(draw, most=6):
    weights = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 50, 1000]), min_size=1, max_size=most).filter(any))
    return np.array(weights) / sum(weights)


@given(mixtures(), st.integers(1, 40), st.integers(0, 12))
def test_counts_equal_the_slow_loop(proportions, block, num):
    counts, residuals = block_counts(proportions, block, np.zeros(proportions.size), num)
    residual = [0.0] * proportions.size
    for b in range(num):
        expected, residual = slow_block(proportions.tolist(), block, residual)
        assert counts[b].tolist() == expected
        assert residuals[b + 1].tolist() == residual


@given(mixtures(), st.integers(1, 40), st.integers(0, 12), st.data())
def test_over_and_undersubscribed_blocks(proportions, block, num, data):
    # Residuals beyond what the loop itself leaves behind.
    active = proportions > 0
    raw = np.array(data.draw(st.lists(st.integers(-30, 30), min_size=len(active), max_size=len(active)))) / 8
    residual = np.where(active, raw - raw[active].sum() / active.sum(), 0.0)
    counts, residuals = block_counts(proportions, block, residual, num)
    left = residual.tolist()
    for b in range(num):
        expected, left = slow_block(proportions.tolist(), block, left)
        assert counts[b].tolist() == expected
        assert residuals[b + 1].tolist() == left
    assert (counts.sum(axis=1) == block).all()


@pytest.mark.parametrize("num_domains", [2, 3, 5, 16, 17, 60])
def test_cumulative_counts_stay_within_1_2_of_the_share(num_domains):
    generator = np.random.default_rng(num_domains)
    for _ in range(70):
        proportions = generator.dirichlet(np.full(num_domains, generator.choice([0.1, 1.0, 10.0])))
        block = int(generator.choice([1, 2, 7, 16, 64, 256]))
        counts, residuals = block_counts(proportions, block, np.zeros(num_domains), 60)
        assert (counts >= 0).all()
        assert (counts.sum(axis=1) == block).all()
        exact = proportions * block * np.arange(1, 61)[:, None]
        assert np.abs(np.cumsum(counts, axis=0) - exact).max() < 1.2
        assert np.abs(residuals.sum(axis=1)).max() < 1e-9


def test_a_small_domain_is_not_starved():
    # A share of a fiftieth of a sequence per block comes once in fifty blocks.
    proportions = np.array([0.99875, 0.00125])
    counts, _ = block_counts(proportions, 16, np.zeros(2), 500)
    assert counts[:, 1].sum() == 10


def test_a_domain_of_no_share_never_comes():
    for num_domains in (4, 40):
        proportions = np.zeros(num_domains)
        proportions[1::3] = 1 / proportions[1::3].size
        counts, _ = block_counts(proportions, 7, np.zeros(num_domains), 50)
        assert counts[:, proportions == 0].sum() == 0


def test_order_depends_on_seed_segment_and_block_alone():
    whole = labels([0.5, 0.5], 64, 3, 128)
    assert whole[:64] != whole[64:]
    assert labels([0.5, 0.5], 64, 4, 64) != whole[:64]
    assert labels([0.5, 0.5], 64, 3, 64, earlier=1) not in (whole[:64], whole[64:])
    assert labels([0.5, 0.5], 64, 3, 64) == whole[:64]


def test_even_order_is_that_of_error_diffusion():
    assert evenly(np.array([4, 2, 2])).tolist() == [0, 1, 2, 0, 0, 1, 2, 0]
    assert evenly(np.array([7, 2, 1])).tolist() == [0, 1, 0, 2, 0, 0, 1, 0, 0, 0]


@given(counts=st.lists(st.integers(0, 12), min_size=1, max_size=6))
@settings(max_examples=80, deadline=None)
def test_even_order_keeps_counts(counts):
    labels = evenly(np.array(counts))
    assert np.bincount(labels, minlength=len(counts)).tolist() == counts
