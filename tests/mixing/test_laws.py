"""The laws: their value, their fit, and the correlation that is told about them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

from dataflex.errors import DataError
from dataflex.mixers.online import fit_power_law
from dataflex.mixing.fit import (
    LAWS,
    _objective,
    fit_law,
    fit_losses,
    folds_of,
    huber,
    out_of_fold,
    predict,
    read_fit,
    spearman,
    warnings_of,
    write_fit,
)
from dataflex.mixing.runs import Table
from dataflex.mixing.swarm import SwarmSettings, sample_swarm


def slow_law(c, k, t, r):
    return c + k * math.exp(sum(t_j * r_j for t_j, r_j in zip(t, r, strict=True)))


def test_mixing_law_golden_value():
    assert slow_law(1, 2, (-1, 0.5), (0.3, 0.7)) == pytest.approx(3.102543, abs=1e-6)
    theta = np.array([math.log(1), math.log(2), -1, 0.5])
    assert predict(theta, np.array([[0.3, 0.7]]))[0] == pytest.approx(3.102543, abs=1e-6)


def test_huber_is_a_parabola_that_goes_on_straight():
    assert huber(np.array([0.0, 0.01, -0.02, 0.5, -0.5])).tolist() == pytest.approx(
        [0, 0.00005, 0.0002, 0.02 * (0.5 - 0.01), 0.02 * (0.5 - 0.01)]
    )


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_gradient_of_the_fit_is_that_of_its_value(seed):
    rng = np.random.default_rng(seed)
    design, losses = rng.dirichlet(np.ones(3), size=7), rng.uniform(0.5, 4, 7)
    theta = rng.normal(size=4)
    value, gradient = _objective(theta, design, losses)
    assert value == pytest.approx(huber(np.exp(theta[0]) + np.exp(design @ theta[1:]) - losses).mean() / 0.02**2)
    for place in range(4):
        step = np.zeros(4)
        step[place] = 1e-6
        slope = (_objective(theta + step, design, losses)[0] - _objective(theta - step, design, losses)[0]) / 2e-6
        assert gradient[place] == pytest.approx(slope, rel=1e-4, abs=1e-3)


def test_the_gradient_is_finite_where_exponents_explode():
    value, gradient = _objective(np.array([100.0, 500.0]), np.ones((2, 1)), np.ones(2))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("law", LAWS)
def test_a_law_without_noise_is_found(law):
    mixtures = sample_swarm(np.array([5.0, 3.0, 1.0, 1.0]), SwarmSettings(runs=20, seed=1))
    losses = np.array([slow_law(1.3, 1.0, (-1.0, 0.5, 0.2, 0.8), mixture) for mixture in mixtures])
    theta = fit_law(law, mixtures, losses, restarts=3)
    assert np.abs(predict(theta, mixtures) - losses).max() < 1e-6
    unseen = np.random.default_rng(0).dirichlet(np.ones(4), size=50)
    truth = np.array([slow_law(1.3, 1.0, (-1.0, 0.5, 0.2, 0.8), mixture) for mixture in unseen])
    assert np.abs(predict(theta, unseen) - truth).max() < 1e-4
    assert (theta[1] == 0) == (law == "log_linear")
    np.testing.assert_array_equal(theta, fit_law(law, mixtures, losses, restarts=3))


def test_outliers_pull_less_than_squares_would_let_them():
    mixtures = sample_swarm(np.array([5.0, 3.0, 2.0]), SwarmSettings(runs=30, seed=2))
    clean = np.array([slow_law(1.0, 1.0, (-1.0, 0.5, 0.3), mixture) for mixture in mixtures])
    broken = clean.copy()
    broken[4] += 2.0
    theta = fit_law("log_linear", mixtures, broken, restarts=3)
    assert np.abs(np.delete(predict(theta, mixtures) - clean, 4)).max() < 0.02


def test_losses_that_no_law_describes_are_told():
    mixtures = np.array([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]])
    with pytest.raises(DataError, match="could not be fitted"):
        fit_law("log_linear", mixtures, np.array([np.nan, 1.0, 2.0]), restarts=1)


@pytest.mark.parametrize("loss", [-5.0, 1e308])
def test_losses_that_no_law_reaches_are_told_at_once(loss):
    mixtures = Table(runs=("r0", "r1", "r2"), columns=("a", "b"), values=np.array([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]]))
    losses = Table(runs=mixtures.runs, columns=("held",), values=np.array([[1.0], [loss], [2.0]]))
    with pytest.raises(DataError, match=r"run r1: the held-out loss of held is .* of at least 0 and below 1e\+13"):
        fit_losses("log_linear", mixtures, losses, folds=3, provenance={})


@pytest.mark.parametrize(
    "fit",
    [
        lambda: fit_law("log_linear", np.array([[0.5, 0.5], [0.2, 0.8]]), np.array([1.0, 2.0]), restarts=1),
        lambda: fit_power_law(np.arange(1, 301) * 8.0, 1.0 + np.arange(1, 301) ** -0.5),
    ],
)
def test_laws_are_fitted_on_one_thread(fit, monkeypatch):
    """Waking others takes scipy twenty times as long as steps in a few dimensions."""

    def threads():
        return {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}

    seen, minimize = set(), scipy.optimize.minimize
    monkeypatch.setattr(scipy.optimize, "minimize", lambda *a, **k: seen.update(threads()) or minimize(*a, **k))
    with threadpool_limits(limits=2, user_api="blas"):
        before = threads()
        fit()
        assert threads() == before
    assert seen == {1}


# ---------------------------------------------------------------- quality


def test_spearman_by_hand():
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([10.0, 20, 40, 30])) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert spearman(np.array([1.0, 2, 3]), np.array([-1.0, -4, -9])) == pytest.approx(-1)
    assert math.isnan(spearman(np.array([1.0, 1, 1]), np.array([1.0, 2, 3])))
    ties = spearman(np.array([1.0, 1, 2]), np.array([1.0, 2, 3]))  # ranks 1.5 1.5 3 and 1 2 3
    assert ties == pytest.approx(1.5 / math.sqrt(1.5 * 2))


def test_folds_are_disjoint_and_leave_one_out_leaves_one():
    folds = folds_of(23, 5, 0)
    assert sorted(np.concatenate(folds).tolist()) == list(range(23))
    assert {len(fold) for fold in folds} == {4, 5}
    assert [len(fold) for fold in folds_of(4, 100, 0)] == [1, 1, 1, 1]


def test_a_run_is_never_predicted_by_a_fit_that_has_seen_it():
    losses = np.arange(7.0)

    def fit(_, seen):
        return lambda unseen: np.full(len(unseen), float(seen.sum()))

    mixtures = np.full((7, 2), 0.5)
    predicted = out_of_fold(fit, mixtures, losses, folds_of(7, 7, 0))
    assert predicted.tolist() == [21 - loss for loss in losses]


def tables(num_runs, noise=0.0, seed=0):
    mixtures = sample_swarm(np.array([5.0, 3.0, 2.0]), SwarmSettings(runs=num_runs, seed=seed))
    rng = np.random.default_rng(seed)
    slopes = {"a": (-1.0, 0.4, 0.1), "b": (0.3, -0.8, 0.2)}
    losses = np.array([[slow_law(1.2, 1, t, row) for t in slopes.values()] for row in mixtures])
    losses += noise * rng.standard_normal(losses.shape)
    runs = tuple(f"run-{i:04d}" for i in range(1, num_runs + 1))
    return (
        Table(runs=runs, columns=("web", "code", "math"), values=mixtures),
        Table(runs=runs, columns=tuple(slopes), values=losses),
    )


@pytest.mark.slow
def test_a_fit_tells_its_held_out_quality_and_reads_back(tmp_path, monkeypatch):
    monkeypatch.setattr("dataflex.mixing.fit.RESTARTS", 3)
    mixtures, losses = tables(14)
    fit = fit_losses("log_linear", mixtures, losses, folds=14, provenance={"command": "test"})
    assert {task: round(quality.spearman, 3) for task, quality in fit.quality.items()} == {"a": 1.0, "b": 1.0}
    assert all(quality.error < 1e-3 < quality.spread for quality in fit.quality.values())
    write_fit(tmp_path, fit)
    back = read_fit(tmp_path)
    np.testing.assert_array_equal(back.theta, fit.theta)
    assert (back.method, back.names, back.tasks, back.runs) == (fit.method, fit.names, fit.tasks, fit.runs)
    assert back.quality == fit.quality
    np.testing.assert_array_equal(back.predict(mixtures.values), fit.predict(mixtures.values))
    np.testing.assert_array_equal(back.predict(mixtures.values, ["b"])[:, 0], fit.predict(mixtures.values)[:, 1])


@pytest.mark.slow
def test_losses_of_pure_noise_are_not_said_to_be_predictable(monkeypatch):
    monkeypatch.setattr("dataflex.mixing.fit.RESTARTS", 3)
    mixtures, losses = tables(20)
    noise = np.random.default_rng(5).standard_normal(losses.values.shape) * 0.1 + 2
    fit = fit_losses(
        "log_linear", mixtures, Table(runs=losses.runs, columns=losses.columns, values=noise), folds=5, provenance={}
    )
    assert all(quality.spearman < 0.5 for quality in fit.quality.values())
    assert all(quality.error > 0.5 * quality.spread for quality in fit.quality.values())


def test_too_few_runs_are_refused_and_few_are_warned_about():
    mixtures, losses = tables(2)
    with pytest.raises(DataError, match=r"2 finished runs .* at least 3, and Olmix advises 3 \(domains \+ 1\) = 12"):
        fit_losses("log_linear", mixtures, losses, folds=10, provenance={})
    assert warnings_of("log_linear", 12, 3) == []
    (told,) = warnings_of("log_linear", 11, 3)
    assert "3 (domains + 1) = 12" in told
    assert len(warnings_of("lightgbm", 118, 3)) == 1
    assert warnings_of("lightgbm", 119, 3) == []


def test_a_damaged_fit_is_told(tmp_path):
    with pytest.raises(DataError, match=r"holds no fit\.json; run 'dataflex mix fit"):
        read_fit(tmp_path)
    (tmp_path / "fit.json").write_text('{"method": "log_linear"}')
    with pytest.raises(DataError, match="is damaged"):
        read_fit(tmp_path)
