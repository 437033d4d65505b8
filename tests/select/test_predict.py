"""Predictions of scores against golden values, brute force, and a pool with a planted rule."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.stats import norm

from dataflex.select import predict
from dataflex.select.predict import PAIRS, TOKENS, Centred, TokenFeatures, fitted, rank_correlation, row_effects

X = csr_matrix(np.array([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]]))
Y = np.array([1.0, 0.0, 2.0, -1.0])[:, None]
HALF = np.array([0.5])


def one_interval(n):
    return np.zeros(n, dtype=np.int64)


def test_golden_ridge():
    """One intercept, alpha .5: by hand."""
    fit = fitted(X, one_interval(4), Y, np.ones(4), strengths=HALF)
    np.testing.assert_allclose(fit.weights[:, 0], [1.151515, 0.484848, -0.545455], atol=1e-6)
    assert float(np.array([1, 0, 1]) @ fit.weights[:, 0] + fit.offset[0]) == pytest.approx(0.424242, abs=1e-6)
    weighted = fitted(X, one_interval(4), Y, np.array([1, 1, 0.5, 0.5]), strengths=HALF)
    np.testing.assert_allclose(weighted.weights[:, 0], [0.964912, 0.298246, -0.473684], atol=1e-6)
    assert weighted.level == pytest.approx(0.5)


def test_golden_levels_are_taken_out_of_features_and_values():
    """Slope 1, where centring the values alone would give .9375."""
    x = np.array([0.0, 1, 0, 1, 1, 1])[:, None]
    intervals = np.array([0, 0, 1, 1, 1, 1])
    fit = fitted(csr_matrix(x), intervals, x - 0.5 * intervals[:, None], np.ones(6), strengths=np.array([1e-9]))
    assert float(fit.weights[0, 0]) == pytest.approx(1.0, abs=1e-8)


def test_a_golden_draw_of_the_posterior(monkeypatch):
    """Perturbed values and prior (1.266667, .333333, -.4), with s2 set to 1."""
    monkeypatch.setattr(predict, "_noise", lambda *_: np.ones(1))
    noise = np.array([0.1, -0.2, 0.0, 0.3])[:, None], np.array([0.2, 0.0, -0.1])[:, None] * np.sqrt(0.5)
    fit = fitted(X, one_interval(4), Y, np.ones(4), strengths=HALF, perturbed=noise)
    np.testing.assert_allclose(fit.weights[:, 0], [1.266667, 0.333333, -0.4], atol=1e-6)


def drawn(num_rows, seed=0):
    rng = np.random.default_rng(seed)
    tokens = [rng.zipf(1.5, size=rng.integers(3, 60)) % 5000 for _ in range(num_rows)]
    domains = rng.integers(0, 3, num_rows)
    prompts, responses = [row[: len(row) // 3] for row in tokens], [row[len(row) // 3 :] for row in tokens]

    def read(rows):
        return [prompts[i] for i in rows], [responses[i] for i in rows]

    return prompts, responses, domains, TokenFeatures.of(num_rows, read, domains, 3)


def test_features_are_hashed_counts_of_length_one(monkeypatch):
    monkeypatch.setattr(predict, "_CHUNK_ROWS", 7)
    prompts, responses, domains, features = drawn(20)
    rows = np.array([3, 0, 19, 3])
    found = np.asarray(features.matrix(rows).todense())
    for i, row in enumerate(rows):
        pairs = [(a * 1_000_003 + b) % PAIRS for a, b in zip(responses[row], responses[row][1:], strict=False)]
        blocks = [(prompts[row] % TOKENS, TOKENS), (responses[row] % TOKENS, TOKENS), (np.array(pairs, int), PAIRS)]
        wanted = []
        for ids, size in blocks:
            counts = np.log1p(np.bincount(ids, minlength=size))
            wanted.append(counts / max(np.linalg.norm(counts), 1e-30))
        lengths = [np.log1p(len(prompts[row])) / 10, np.log1p(len(responses[row])) / 10]
        wanted += [lengths, 0.5 * (np.arange(3) == domains[row])]
        np.testing.assert_allclose(found[i], np.concatenate(wanted), atol=1e-12)
    weights = np.random.default_rng(0).normal(size=(features.width, 2))
    np.testing.assert_allclose(features.times(rows, weights), found @ weights, atol=1e-12)


def test_conjugate_gradients_are_the_dual_solution(monkeypatch):
    _, _, _, features = drawn(80)
    matrix, rng = features.matrix(np.arange(80)), np.random.default_rng(1)
    data = Centred.of(matrix, rng.integers(0, 3, 80), rng.uniform(0.2, 1, 80))
    wanted = data.centred(rng.normal(size=(80, 2)))
    strengths = np.array([0.3, 2.0])
    dual = predict._solved(data, wanted, strengths)
    monkeypatch.setattr(predict, "_DUAL_ROWS", 10)
    np.testing.assert_allclose(predict._solved(data, wanted, strengths), dual, atol=1e-6)


def test_a_rule_is_found_and_nothing_where_there_is_none():
    _, _, _, features = drawn(900)
    rng = np.random.default_rng(2)
    known, new = np.arange(300), np.arange(300, 900)
    rule = features.times(np.arange(900), rng.normal(size=(features.width, 1)))
    noisy = rule + 0.5 * rule.std() * rng.normal(size=rule.shape)
    for values, low, high in ((noisy, 0.5, 1.0), (rng.permutation(noisy), -0.2, 0.2)):
        fit = fitted(features.matrix(known), one_interval(300), values[known], np.ones(300))
        predicted = features.times(new, fit.weights) + fit.offset
        correlation, _ = rank_correlation(predicted[:, 0], values[new, 0])
        assert low < correlation < high
    assert fit.strengths > 1, "labels without a rule shrink the weights"


def test_draws_spread_as_the_posterior_says():
    _, _, _, features = drawn(60)
    matrix, rng = features.matrix(np.arange(60)), np.random.default_rng(3)
    values, strengths = rng.normal(size=(60, 1)), np.array([0.7])
    mean = fitted(matrix, one_interval(60), values, np.ones(60), strengths=strengths)
    at = features.matrix(np.array([5, 40]))
    draws = []
    for _ in range(400):
        noise = rng.normal(size=(60, 1)), rng.normal(size=(features.width, 1))
        fit = fitted(matrix, one_interval(60), values, np.ones(60), strengths=strengths, perturbed=noise)
        draws.append(at @ (fit.weights - mean.weights))
    dense = np.asarray(matrix.todense())
    dense = dense - dense.mean(axis=0)
    point = np.asarray(at.todense())
    gram = dense @ dense.T
    inner = point @ dense.T
    variance = (mean.noise / strengths) * (
        np.sum(point**2, axis=1) - np.einsum("in,nm,im->i", inner, np.linalg.inv(gram + strengths * np.eye(60)), inner)
    )
    np.testing.assert_allclose(np.std(draws, axis=0)[:, 0], np.sqrt(variance), rtol=0.15)


def test_golden_row_effect():
    """Residuals .2 (age 0) and .4 (age 1, forgetting .5), shrinkage 2: .114286."""
    found = row_effects(np.array([1, 1]), np.array([[0.2], [0.4]]), np.array([1.0, 0.5]), 3)
    np.testing.assert_allclose(found[:, 0], [0, 0.114286, 0], atol=1e-6)


def test_how_likely_a_rank_correlation_is_above_chance():
    """Of 28 pairs Fisher's z has a standard deviation of 1/5; independent values are above 0.9 in a tenth of draws."""
    rng = np.random.default_rng(4)
    x = rng.permutation(28).astype(float)
    y = np.argsort(np.argsort(x + 20 * rng.normal(size=28))).astype(float)
    found, above = rank_correlation(x, y)
    assert above == pytest.approx(norm.cdf(np.arctanh(found) * 5))
    assert rank_correlation(x[:3], x[:3])[1] == 0.5
    assert rank_correlation(x, x) == (pytest.approx(1.0), pytest.approx(1.0))
    assert rank_correlation(x, -x) == (pytest.approx(-1.0), pytest.approx(0.0))
    chance = [rank_correlation(rng.normal(size=40), rng.normal(size=40))[1] for _ in range(2000)]
    assert np.mean(np.array(chance) > 0.9) == pytest.approx(0.1, abs=0.03)
