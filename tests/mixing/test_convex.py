"""The convex proposal: the golden values, the conditions of optimality, and a general solver as oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize as scipy_minimize

from dataflex.errors import ConfigError
from dataflex.mixing.fit import Fit
from dataflex.mixing.propose import caps_of_epochs, check_caps, kl_projection, linear_minimum, minimize, propose

HALF = np.array([0.5, 0.5])
TWO_DOMAINS = np.array([[-2.0, 0.0]])


def test_golden_values_of_a_single_task():
    assert minimize(TWO_DOMAINS, HALF, kl=0.5).proportions[0] == pytest.approx(0.720474, abs=1e-6)
    capped = minimize(TWO_DOMAINS, HALF, kl=0.0, caps_K=np.array([0.3, 1.0])).proportions
    assert capped == pytest.approx([0.3, 0.7], abs=1e-9)
    assert minimize(TWO_DOMAINS, HALF, kl=1e6).proportions == pytest.approx(HALF, abs=1e-6)
    assert minimize(TWO_DOMAINS, HALF, kl=0.0).proportions.tolist() == [1.0, 0.0]


def problem(seed, num_domains, num_tasks):
    rng = np.random.default_rng(seed)
    natural = rng.dirichlet(np.ones(num_domains))
    return rng.normal(size=(num_tasks, num_domains)), natural, np.minimum(1.0, rng.uniform(1.1, 6.0) * natural)


def gradient(slopes, natural, kl, p):
    losses = np.exp(slopes @ p)
    return losses @ slopes / len(slopes) + (kl * (np.log(p / natural) + 1) if kl else 0.0)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_domains=st.integers(2, 20),
    num_tasks=st.integers(1, 6),
    kl=st.sampled_from([0.0, 0.01, 0.05, 0.5, 5.0]),
)
def test_the_conditions_of_karush_kuhn_and_tucker_hold(seed, num_domains, num_tasks, kl):
    slopes, natural, caps = problem(seed, num_domains, num_tasks)
    found = minimize(slopes, natural, kl=kl, caps_K=caps)
    p = found.proportions
    assert p.sum() == pytest.approx(1, abs=1e-9)
    assert (p >= 0).all()
    assert (p <= caps).all()
    g = gradient(slopes, natural, kl, np.maximum(p, 1e-300))
    free = (p > 1e-6) & (p < caps - 1e-6)
    at_cap, at_zero = p >= caps - 1e-9, p <= 1e-9
    # One multiplier: free domains share a slope, those at their cap are not above it, those at 0 not below.
    if free.any():
        multiplier = g[free].mean()
        assert np.abs(g[free] - multiplier).max() < 1e-4
        assert (g[at_cap] <= multiplier + 1e-4).all()
        assert (g[at_zero] >= multiplier - 1e-4).all()
    assert found.gap < 1e-6


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kl", [0.0, 0.05, 0.5])
def test_a_general_solver_finds_nothing_better(seed, kl):
    slopes, natural, caps = problem(seed, 6, 4)

    def value(p):
        divergence = float(np.sum(p * np.log(np.maximum(p, 1e-300) / natural)))
        return float(np.exp(slopes @ p).mean()) + kl * divergence

    found = minimize(slopes, natural, kl=kl, caps_K=caps)
    assert found.value == pytest.approx(value(found.proportions), abs=1e-12)
    other = scipy_minimize(
        value,
        natural,
        method="SLSQP",
        bounds=[(1e-12, cap) for cap in caps],
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
        options={"ftol": 1e-13, "maxiter": 500},
    )
    assert other.success
    assert found.value <= other.fun + 1e-8
    np.testing.assert_allclose(found.proportions, other.x, atol=2e-4)


def test_a_domain_that_is_not_there_naturally_stays_out():
    found = minimize(np.array([[0.0, -9.0, 0.5]]), np.array([0.7, 0.0, 0.3]), kl=0.05)
    assert found.proportions[1] == 0
    assert found.proportions[0] > 0.7


def test_caps_that_leave_one_mixture_give_it():
    found = minimize(TWO_DOMAINS, HALF, kl=0.05, caps_K=np.array([0.25, 0.75]))
    assert found.proportions == pytest.approx([0.25, 0.75], abs=1e-12)


def test_many_domains_are_quick_and_exact():
    slopes, natural, caps = problem(0, 300, 20)
    found = minimize(slopes, natural, kl=0.05, caps_K=caps)
    assert found.gap < 1e-6
    assert found.steps < 600


# ---------------------------------------------------------------- the simplex


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), num=st.integers(2, 9))
def test_the_projection_scales_what_is_free_and_caps_the_rest(seed, num):
    rng = np.random.default_rng(seed)
    q = rng.dirichlet(np.ones(num)) * rng.uniform(0.1, 10)
    caps = np.minimum(rng.dirichlet(np.ones(num)) * rng.uniform(1.0, 4.0), 1.0)
    if caps.sum() < 1:
        caps = caps / caps.sum()
    p = kl_projection(q, caps)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert (p <= caps + 1e-12).all()
    free = p < caps - 1e-9
    if free.any():
        scale = (p / q)[free]
        assert np.ptp(scale) < 1e-9 * scale.max()
        assert (p[~free] / q[~free] <= scale.max() + 1e-9).all()


def test_the_linear_minimum_fills_the_cheapest():
    assert linear_minimum(np.array([3.0, 1.0, 2.0]), np.array([1.0, 0.25, 0.5])).tolist() == [0.25, 0.25, 0.5]


def test_caps_that_cannot_be_met_are_told():
    caps = caps_of_epochs(np.array([100.0, 20.0]), budget=1000, max_epochs=4)
    assert caps.tolist() == [0.4, 0.08]
    with pytest.raises(ConfigError, match=r"caps: cannot be met: .* sum to 0.48, less than 1 \(web 0.4, code 0.08\)"):
        check_caps(caps, ("web", "code"))
    assert caps_of_epochs(np.array([1000.0, 20.0]), budget=1000, max_epochs=4).tolist() == [1.0, 0.08]


# ---------------------------------------------------------------- proposals from a fit


def fit_of(slopes, names=("web", "code"), tasks=None):
    theta = np.concatenate([np.zeros((len(slopes), 2)), np.asarray(slopes, dtype=float)], axis=1)
    tasks = tasks or tuple(f"task{i}" for i in range(len(slopes)))
    return Fit(method="log_linear", names=names, tasks=tasks, theta=theta)


def test_a_proposal_is_the_minimum_for_the_tasks_that_were_named():
    fit = fit_of([[-2.0, 0.0], [0.0, -2.0]], tasks=("a", "b"))
    shares, details = propose(fit, np.array([1.0, 1.0]), kl=0.5, tasks=["a"])
    assert shares[0] == pytest.approx(0.720474, abs=1e-6)
    assert details["predicted"]["a"] == pytest.approx(1 + np.exp(-2 * 0.720474), abs=1e-5)
    assert details["predicted_natural"]["a"] == pytest.approx(1 + np.exp(-1), abs=1e-12)
    both, _ = propose(fit, np.array([1.0, 1.0]), kl=0.5)
    assert both == pytest.approx([0.5, 0.5], abs=1e-9)


def test_the_offset_of_a_mixing_law_counts_as_a_scale_of_its_task():
    theta = np.array([[0.0, np.log(3.0), -2.0, 0.0], [0.0, 0.0, 0.0, -2.0]])
    fit = Fit(method="mixing_law", names=("web", "code"), tasks=("a", "b"), theta=theta)
    shares, _ = propose(fit, np.array([1.0, 1.0]), kl=0.2)
    grid = np.linspace(0.001, 0.999, 99_801)
    values = (3 * np.exp(-2 * grid) + np.exp(-2 * (1 - grid))) / 2
    values += 0.2 * (grid * np.log(2 * grid) + (1 - grid) * np.log(2 * (1 - grid)))
    assert shares[0] == pytest.approx(grid[values.argmin()], abs=2e-5)


def test_bad_requests_are_told():
    fit = fit_of([[-2.0, 0.0]])
    with pytest.raises(ConfigError, match=r"--tasks: tsk0: was not fitted; did you mean 'task0'\?"):
        propose(fit, np.array([1.0, 1.0]), tasks=["tsk0"])
    with pytest.raises(ConfigError, match="--kl: must be a number of at least 0"):
        propose(fit, np.array([1.0, 1.0]), kl=-1)
    with pytest.raises(ConfigError, match="caps: cannot be met"):
        propose(fit, np.array([1.0, 1.0]), caps_K=np.array([0.3, 0.3]))
    with pytest.raises(ConfigError, match="caps: cannot be met"):  # the second domain is not there
        propose(fit, np.array([1.0, 0.0]), caps_K=np.array([0.3, 1.0]))
