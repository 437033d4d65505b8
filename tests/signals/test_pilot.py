"""Screening by a pilot: what is exact in it, and that it finds rows whose scores follow their tokens."""

from __future__ import annotations

import numpy as np
import pytest

from dataflex.errors import DataError
from dataflex.testing import global_random_state_untouched
from dataflex.train.screening import fitted, gcv_error, piloted, token_counts

NUM = 600


class Tokens:
    """Rows of tokens whose score is planted: the share of one group of tokens in the completion, and noise."""

    def __init__(self, num=NUM, noise=0.02, unscored=()):
        rng = np.random.default_rng(0)
        share = rng.random(num)
        self.completions = [
            np.where(rng.random(40) < p, rng.integers(0, 20, 40), rng.integers(20, 200, 40)) for p in share
        ]
        self.prompts = [rng.integers(0, 5000, 15) for _ in range(num)]
        self.scores = np.stack([share, 1 - share], axis=1) * [1.0, 0.1] + noise * rng.standard_normal((num, 2))
        self.scores[list(unscored)] = np.nan
        self.asked = []

    def tokens(self, rows, *, target=None, part="all"):
        return [(self.prompts if part == "prompt" else self.completions)[row] for row in rows]

    def __call__(self, signal, rows):
        self.asked.append(rows)
        return self.scores[rows, : len(signal.targets)].astype(np.float32)


def test_the_best_rows_survive():
    signals = Tokens()
    rows = np.arange(NUM)
    with global_random_state_untouched():
        kept = piloted(rows, 180, signals, ("a", "b"), seed=0, interval=0)
    assert len(kept) == 180
    assert (np.diff(kept) > 0).all()
    assert [len(asked) for asked in signals.asked] == [32], "a twentieth, at least 32, is scored exactly"
    best = np.argsort(-signals.scores.max(axis=1))[:60]
    assert len(np.intersect1d(best, kept)) >= 54
    by_chance = np.random.default_rng(0).permutation(NUM)[:180]
    assert len(np.intersect1d(best, by_chance)) < 30


def test_another_interval_draws_another_pilot_and_the_same_one_the_same():
    signals = Tokens()
    for interval in (0, 1, 0):
        piloted(np.arange(NUM), 60, signals, ("a",), seed=0, interval=interval)
    first, second, again = signals.asked
    assert first.tolist() == again.tolist()
    assert first.tolist() != second.tolist()


def test_rows_of_a_pool_keep_their_names():
    signals = Tokens()
    rows = np.arange(0, NUM, 3)
    kept = piloted(rows, 50, signals, ("a",), seed=0, interval=0)
    assert set(kept.tolist()) <= set(rows.tolist())


def test_rows_without_a_score_go_last():
    unscored = tuple(range(0, NUM, 2))
    signals = Tokens(unscored=unscored)
    kept = piloted(np.arange(NUM), 180, signals, ("a",), seed=0, interval=0)
    pilot = set(signals.asked[0].tolist()) & set(unscored)
    assert pilot
    assert not pilot & set(kept.tolist())
    with pytest.raises(DataError, match="screen_by"):
        piloted(np.arange(NUM), 180, Tokens(unscored=range(NUM)), ("a",), seed=0, interval=0)


def test_small_pools():
    signals = Tokens()
    assert piloted(np.array([7]), 5, signals, ("a",), seed=0, interval=0).tolist() == [7]
    kept = piloted(np.arange(20), 4, signals, ("a",), seed=0, interval=0)
    assert kept.tolist() == np.sort(np.argsort(-signals.scores[:20, 0])[:4]).tolist(), "the pilot is the pool: exact"


def test_ridge_equals_its_normal_equations():
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((40, 100)), rng.standard_normal(100)
    y = x @ w + 0.5 * rng.standard_normal(40) + 3.0
    weights, offset = fitted(x, y)
    centred, wanted = x - x.mean(axis=0), y - y.mean()
    errors = {}
    for strength in np.logspace(-4, 3, 29):
        direct = np.linalg.solve(centred.T @ centred + strength * np.eye(100), centred.T @ wanted)
        hat = np.full((40, 40), 1 / 40)  # the intercept's part
        hat += centred @ np.linalg.solve(centred.T @ centred + strength * np.eye(100), centred.T)
        errors[strength] = np.sum((y - hat @ y) ** 2) / np.trace(np.eye(40) - hat) ** 2, direct
    best = min(errors.values(), key=lambda pair: pair[0])[1]
    np.testing.assert_allclose(weights, best, rtol=1e-6, atol=1e-9)
    assert offset == pytest.approx(y.mean() - x.mean(axis=0) @ best)


def test_the_intercept_counts_as_fitted():
    x = np.array([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]])
    y = np.array([1.0, 0, 2, -1])
    centred, wanted = x - x.mean(axis=0), y - y.mean()
    squares, basis = np.linalg.eigh(centred @ centred.T)
    found = [gcv_error(squares.clip(0.0), basis.T @ wanted, strength) for strength in (0.05, 0.5, 5.0)]
    np.testing.assert_allclose(found, [3.453391, 4.181818, 7.418695], rtol=1e-6)


def test_values_that_no_feature_explains_are_not_fitted_through():
    sizes = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        weights, _ = fitted(rng.standard_normal((60, 200)), rng.standard_normal(60))
        sizes.append(np.linalg.norm(weights))
    assert np.median(sizes) < 0.3, "weights of a fit through every point have length 0.63"
    assert fitted(np.ones((1, 3)), np.array([2.5]))[1] == 2.5


def test_counts_tell_prompt_from_completion():
    signals = Tokens()
    found = token_counts(signals, np.arange(3))
    assert found.shape == (3, 2 * 4096 + 2)
    np.testing.assert_allclose(np.linalg.norm(found[:, :4096], axis=1), 1.0)
    np.testing.assert_allclose(np.linalg.norm(found[:, 4096:8192], axis=1), 1.0)
    for row in range(3):
        assert set(np.flatnonzero(found[row, :4096])) == set(np.unique(signals.prompts[row] % 4096))
        assert found[row, 8193] == pytest.approx(np.log1p(40) / 10)
