"""The draws of a swarm: on the simplex, within caps, rounded, distinct, and the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.errors import ConfigError
from dataflex.mixing.swarm import SwarmSettings, dirichlet, prior_of, sample_swarm, settings_of

SIZES = np.array([60.0, 25.0, 10.0, 4.0, 1.0])

sizes_K = st.lists(st.floats(1.0, 30.0), min_size=2, max_size=8).map(np.array)


@settings(max_examples=40, deadline=None)
@given(sizes=sizes_K, style=st.sampled_from(["olmix", "regmix"]), seed=st.integers(0, 2**31))
def test_mixtures_keep_to_every_promise(sizes, style, seed):
    asked = settings_of(style, 6, seed, min_weight=1e-3, step=1e-3)
    mixtures = sample_swarm(sizes, asked)
    assert mixtures.shape == (6, len(sizes))
    assert np.abs(mixtures.sum(axis=1) - 1).max() < 1e-12
    assert mixtures.min() >= 0
    natural = sizes / sizes.sum()
    if style == "regmix":
        assert (mixtures <= np.minimum(15 * natural, 1)).all()
    distances = np.abs(mixtures[:, None] - mixtures[None]).sum(axis=2)
    assert distances[~np.eye(6, dtype=bool)].min() > asked.distance
    positive = mixtures[mixtures > 0]
    assert positive.min() > 1e-3 * 0.9  # renormalized once more after rounding
    np.testing.assert_array_equal(mixtures, sample_swarm(sizes, asked))


def test_shares_are_multiples_of_the_step_up_to_the_last_renormalization():
    mixtures = sample_swarm(SIZES, SwarmSettings(runs=50, step=0.05, min_weight=0.01))
    for mixture in mixtures:
        # Rounded shares m_i / 20 over their sum S / 20 are m_i / S with whole numbers m_i and S near 20.
        assert any(np.abs(mixture * total - np.round(mixture * total)).max() < 1e-9 for total in range(17, 24))


def test_another_seed_gives_other_mixtures_and_more_runs_begin_with_the_same():
    few = sample_swarm(SIZES, SwarmSettings(runs=10, seed=3))
    np.testing.assert_array_equal(few, sample_swarm(SIZES, SwarmSettings(runs=40, seed=3))[:10])
    assert not np.array_equal(few, sample_swarm(SIZES, SwarmSettings(runs=10, seed=4)))


def test_mixtures_lie_around_the_prior():
    """The mean of a Dirichlet variable is its prior, whatever its strength."""
    natural = SIZES / SIZES.sum()
    plain = {"runs": 4000, "step": 0.0, "min_weight": 0.0, "least_strength": 1.0, "distance": 0.0}  # nothing left out
    mixtures = sample_swarm(SIZES, SwarmSettings(**plain))
    error = mixtures.std(axis=0) / np.sqrt(4000)
    assert (np.abs(mixtures.mean(axis=0) - natural) < 5 * error).all()
    tempered = prior_of(SIZES, 0.5)
    np.testing.assert_allclose(tempered, np.sqrt(SIZES) / np.sqrt(SIZES).sum(), atol=1e-15)
    drawn = sample_swarm(SIZES, SwarmSettings(**plain, prior_power=0.5))
    assert (np.abs(drawn.mean(axis=0) - tempered) < 5 * drawn.std(axis=0) / np.sqrt(4000)).all()


def test_strength_sets_the_spread():
    narrow = sample_swarm(SIZES, SwarmSettings(runs=500, least_strength=100.0, most_strength=100.0))
    wide = sample_swarm(SIZES, SwarmSettings(runs=500, least_strength=1.0, most_strength=1.0))
    natural = SIZES / SIZES.sum()
    # Var = m (1 - m) / (strength + 1)
    np.testing.assert_allclose(narrow.var(axis=0)[:3], (natural * (1 - natural) / 101)[:3], rtol=0.3)
    np.testing.assert_allclose(wide.var(axis=0)[:3], (natural * (1 - natural) / 2)[:3], rtol=0.3)


def test_dirichlet_has_the_moments_of_a_dirichlet_and_survives_tiny_concentrations():
    alpha = np.array([0.5, 1.0, 2.5])
    drawn = dirichlet(np.random.default_rng(0), np.broadcast_to(alpha, (40_000, 3)))
    mean, total = alpha / alpha.sum(), alpha.sum()
    np.testing.assert_allclose(drawn.mean(axis=0), mean, atol=0.006)
    np.testing.assert_allclose(drawn.var(axis=0), mean * (1 - mean) / (total + 1), rtol=0.05)
    tiny = dirichlet(np.random.default_rng(0), np.full((1000, 4), 1e-6))
    assert np.isfinite(tiny).all()
    np.testing.assert_allclose(tiny.sum(axis=1), 1.0)
    assert dirichlet(np.random.default_rng(0), np.array([[0.0, 1.0, 1.0]]))[0, 0] == 0.0


def test_a_domain_of_size_zero_is_never_drawn():
    mixtures = sample_swarm(np.array([3.0, 0.0, 1.0]), settings_of("regmix", 20, 0))
    assert (mixtures[:, 1] == 0).all()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_ratio": 0.9}, "--max-ratio: a cap of 0.9 times the natural share cannot be met"),
        ({"runs": 10**9}, "--runs: must be from 1 to 100,000, found 1,000,000,000"),
        ({"runs": 0}, "--runs: must be from 1 to 100,000, found 0"),
        ({"min_weight": 1.0}, "--min-weight: must be at least 0 and below 1"),
        ({"step": 0.7}, "--round: must be from 0"),
        ({"least_strength": 0.0}, "--strengths: must be 0 < least <= most, found 0 and 5"),
        ({"strengths": 0}, "--strengths: their number must be from 1 to 100,000"),
        ({"prior_power": -1.0}, "--prior-power: must be at least 0"),
    ],
)
def test_settings_that_cannot_work(changes, told):
    with pytest.raises(ConfigError) as caught:
        SwarmSettings(**{"runs": 4, **changes})
    assert told in str(caught.value)


@pytest.mark.slow
def test_too_few_distinct_mixtures_are_told():
    with pytest.raises(ConfigError, match=r"only [0-9]+ of 500 distinct mixtures were found"):
        sample_swarm(np.array([1.0, 1.0]), SwarmSettings(runs=500, step=0.1))
    with pytest.raises(ConfigError, match="only 0 of 3"):  # only the natural mix itself keeps to the caps
        sample_swarm(np.array([1.0, 1.0]), SwarmSettings(runs=3, max_ratio=1.0))


@pytest.mark.parametrize("sizes", [[1.0], [1.0, 0.0], [1.0, float("nan")], [1.0, -1.0]])
def test_sizes_must_be_sizes(sizes):
    with pytest.raises(ConfigError, match="--natural: sizes must be finite"):
        sample_swarm(np.array(sizes), SwarmSettings(runs=1))
