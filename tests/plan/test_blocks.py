"""Block counts by residual carry: the sheet's numbers, the slow loop, bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.plan import mixture
from dataflex.plan.mixture import block_counts, block_labels, evenly

from .slow_mixture import slow_block


def test_counts_of_the_sheet():
    counts, residuals = block_counts(np.array([0.6, 0.3, 0.1]), 16, np.zeros(3), 4)
    assert counts.tolist() == [[9, 5, 2], [10, 5, 1], [10, 4, 2], [9, 5, 2]]
    assert residuals[0].tolist() == [0.0, 0.0, 0.0]
    assert residuals[1] == pytest.approx([0.6, -0.2, -0.4])


def test_blocks_of_one_are_smooth():
    # T26, the order of Megatron-Core's blended data set.
    labels, _ = block_labels(np.array([0.5, 0.25, 0.25]), 1, np.zeros(3), 0, 0, 0, 8)
    assert labels.tolist() == [0, 1, 2, 0, 0, 1, 2, 0]


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
def test_both_loops_agree_bit_for_bit(proportions, block, num, data):
    # Residuals beyond what the loop itself leaves behind, so that blocks are over- and undersubscribed.
    size = int((proportions > 0).sum())
    shares = proportions[proportions > 0] * block
    raw = np.array(data.draw(st.lists(st.integers(-30, 30), min_size=size, max_size=size))) / 8
    residual = raw - raw.sum() / size
    flat, rests = mixture._carry_scalar(shares.tolist(), residual.tolist(), block, num)
    counts, residuals = mixture._carry_vector(shares, residual, block, num)
    assert counts.ravel().tolist() == flat
    assert residuals.ravel().tolist() == rests
    assert (counts >= 0).all()
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
    args = np.array([0.5, 0.5]), 64, np.zeros(2)
    whole, rests = block_labels(*args, 3, 2, 0, 6)
    part, _ = block_labels(args[0], 64, rests[4], 3, 2, 4, 2)
    assert part.tolist() == whole[4 * 64 :].tolist()
    assert whole[:64].tolist() != whole[64:128].tolist()
    assert block_labels(*args, 4, 2, 0, 1)[0].tolist() != whole[:64].tolist()
    assert block_labels(*args, 3, 1, 0, 1)[0].tolist() != whole[:64].tolist()


def test_even_order_is_that_of_error_diffusion():
    """T26."""
    assert evenly(np.array([4, 2, 2])).tolist() == [0, 1, 2, 0, 0, 1, 2, 0]
    assert evenly(np.array([7, 2, 1])).tolist() == [0, 1, 0, 2, 0, 0, 1, 0, 0, 0]


@given(counts=st.lists(st.integers(0, 12), min_size=1, max_size=6))
@settings(max_examples=80, deadline=None)
def test_even_order_keeps_counts(counts):
    labels = evenly(np.array(counts))
    assert np.bincount(labels, minlength=len(counts)).tolist() == counts
