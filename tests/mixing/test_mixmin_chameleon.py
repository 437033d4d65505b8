"""MixMin and Chameleon: golden values, oracles, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dataflex.errors import DataError
from dataflex.mixing.models import (
    centred_kernel,
    check_matrix,
    leverage,
    leverage_weights,
    objective,
    read_embeddings,
    read_matrix,
    solve,
    split_rows,
    write_embeddings,
    write_matrix,
)

TWO = np.log(np.array([[0.5, 0.1], [0.1, 0.5]]))  # texts x domains: p1 = (.5, .1), p2 = (.1, .5)
ONES = np.ones(2)


def slow_objective(weights, loglik, lengths):
    total = 0.0
    for row, length in zip(loglik, lengths, strict=True):
        total += math.log(sum(w * math.exp(value) for w, value in zip(weights, row, strict=True))) / length
    return -total / len(loglik)


def test_mixmin_golden_values():
    assert objective(np.array([0.5, 0.5]), TWO, ONES)[0] == pytest.approx(1.203973, abs=1e-6)
    assert objective(np.array([1.0, 0.0]), TWO, ONES)[0] == pytest.approx(1.497866, abs=1e-6)
    found = solve(TWO, ONES)
    assert found.proportions == pytest.approx([0.5, 0.5], abs=1e-12)
    assert found.value == pytest.approx(1.203973, abs=1e-6)


def test_mixmin_finds_the_minimum_of_a_grid():
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, 6, 40).astype(float)
    loglik = -lengths[:, None] * rng.uniform(1.0, 3.0, (40, 2)) - np.array([0.3, 0.0])
    found = solve(loglik, lengths, most_steps=5000, tolerance=1e-9)
    grid = np.linspace(0, 1, 2001)
    values = [slow_objective((x, 1 - x), loglik, lengths) for x in grid]
    assert found.proportions[0] == pytest.approx(grid[int(np.argmin(values))], abs=1e-3)
    assert found.value <= min(values) + 1e-8
    assert found.gap <= 1e-9


def test_mixmin_gradient_and_gap():
    rng = np.random.default_rng(2)
    loglik, lengths = -rng.uniform(1, 40, (9, 3)), rng.integers(1, 8, 9).astype(float)
    w = np.array([0.2, 0.5, 0.3])
    value, gradient = objective(w, loglik, lengths)
    assert value == pytest.approx(slow_objective(w, loglik, lengths), rel=1e-12)
    for k in range(3):
        step = np.eye(3)[k] * 1e-7
        slope = (objective(w + step, loglik, lengths)[0] - objective(w - step, loglik, lengths)[0]) / 2e-7
        assert gradient[k] == pytest.approx(slope, rel=1e-5)
    best = solve(loglik, lengths, most_steps=20_000, tolerance=1e-10)
    early = solve(loglik, lengths, most_steps=5)
    assert early.steps == 5
    assert early.value - best.value <= early.gap + 1e-12


def test_mixmin_stands_long_texts_whose_likelihoods_underflow():
    loglik = np.array([[-5000.0, -5010.0], [-4000.0, -3990.0]])
    found = solve(loglik, np.full(2, 1000.0))
    assert np.isfinite(found.value)
    assert found.proportions.sum() == pytest.approx(1)


def test_mixmin_split_is_disjoint_and_of_the_size_asked_for():
    fitted, tested = split_rows(50, 0.2, seed=3)
    assert (len(fitted), len(tested)) == (40, 10)
    assert sorted([*fitted, *tested]) == list(range(50))
    assert not np.array_equal(split_rows(50, 0.2, seed=4)[1], tested)


@pytest.mark.parametrize(
    ("loglik", "lengths", "told"),
    [
        (np.zeros((3, 1)), np.ones(3), "expected \\[texts, domains >= 2\\]"),
        (np.zeros((3, 2)), np.ones(2), "lengths: expected one per text \\(3\\)"),
        (np.array([[0.0, np.nan]]), np.ones(1), "1 are not finite, the first of text 0, domain 1"),
        (np.zeros((2, 2)), np.array([1.0, 0.0]), "length in tokens above 0"),
    ],
)
def test_mixmin_refuses_what_are_no_likelihoods(loglik, lengths, told):
    with pytest.raises(DataError, match=told):
        check_matrix(loglik, lengths)


# ---------------------------------------------------------------- chameleon


def test_chameleon_golden_values():
    kernel = np.diag([1.0, 3.0])
    raw = [1 / (1 + 20), 3 / (3 + 20)]
    assert raw == pytest.approx([0.047619, 0.130435], abs=1e-6)
    scores = leverage(kernel)
    assert scores == pytest.approx([0.267442, 0.732558], abs=1e-6)
    assert leverage_weights(scores, "pretraining", ("a", "b")) == pytest.approx([0.616522, 0.383478], abs=1e-6)
    assert leverage_weights(scores, "finetuning", ("a", "b")) == pytest.approx([0.089026, 0.910974], abs=1e-6)


def test_chameleon_scores_are_the_ridge_formula_written_out():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(4, 6)) * 5
    centred = means - means.mean(axis=0)
    kernel = np.array([[float(a @ b) for b in centred] for a in centred])
    np.testing.assert_allclose(centred_kernel(means), kernel, atol=1e-12)
    hat = kernel @ np.linalg.inv(kernel + 10 * 4 * np.eye(4))
    np.testing.assert_allclose(leverage(kernel), np.diag(hat) / np.trace(hat), atol=1e-12)
    np.testing.assert_allclose(centred_kernel(means + 100.0), kernel, atol=1e-9)  # centring takes what all share


def test_chameleon_weighs_the_odd_one_up_for_finetuning_and_down_for_pretraining():
    means = np.array([[1.0, 0.0, 0.2], [0.9, 0.1, 0.0], [1.1, -0.1, 0.1], [0.0, 9.0, 0.0]])
    scores, names = leverage(centred_kernel(means)), tuple("abcd")
    assert scores.argmax() == 3
    assert leverage_weights(scores, "finetuning", names).argmax() == 3
    assert leverage_weights(scores, "pretraining", names).argmin() == 3
    for purpose in ("pretraining", "finetuning"):
        assert leverage_weights(scores, purpose, names).sum() == pytest.approx(1)


def test_chameleon_refuses_domains_that_nothing_tells_apart():
    with pytest.raises(DataError, match="all alike"):
        leverage(centred_kernel(np.ones((3, 4))))
    means = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])  # the third is the mean of all
    scores = leverage(centred_kernel(means))
    with pytest.raises(DataError, match="domain noise is the mean of all domains"):
        leverage_weights(scores, "pretraining", ("a", "b", "noise"))
    assert np.isfinite(leverage_weights(scores, "finetuning", ("a", "b", "noise"))).all()
    with pytest.raises(DataError, match="finite and square"):
        leverage(np.array([[np.nan, 0.0], [0.0, 1.0]]))


# ---------------------------------------------------------------- files


def test_matrices_read_back(tmp_path):
    write_matrix(tmp_path / "m.npz", ("web", "code"), TWO, ONES)
    names, loglik, lengths = read_matrix(tmp_path / "m.npz")
    assert names == ("web", "code")
    np.testing.assert_array_equal(loglik, TWO)
    np.testing.assert_array_equal(lengths, ONES)
    (tmp_path / "m.csv").write_text("web,length,code\n-1.5,3,-2\n-0.5,2,-4\n")
    names, loglik, lengths = read_matrix(tmp_path / "m.csv")
    assert (names, loglik.tolist(), lengths.tolist()) == (("web", "code"), [[-1.5, -2.0], [-0.5, -4.0]], [3.0, 2.0])


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("m.csv", "web,code\n1,2\n", "lacks a column 'length'"),
        ("m.csv", "web,code,length\n1,x,2\n", "cannot be read as a table of numbers"),
        ("m.csv", "web,web,length\n-1,-1,2\n", "names a domain twice"),
        ("m.npz", "no archive", "cannot be read"),
        ("m.txt", "", "must end in .npz or .csv"),
    ],
)
def test_bad_matrices_are_told(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=told):
        read_matrix(tmp_path / name)


def test_embeddings_read_back_and_samples_are_averaged(tmp_path):
    write_embeddings(tmp_path / "e.npz", ("file", "b"), np.array([[1.0, 2.0], [3.0, 4.0]]))
    names, means = read_embeddings(tmp_path / "e.npz")
    assert (names, means.tolist()) == (("file", "b"), [[1.0, 2.0], [3.0, 4.0]])
    np.savez(tmp_path / "s.npz", a=np.array([[0.0, 2.0], [2.0, 4.0]]), b=np.array([[1.0, 1.0]]))
    assert read_embeddings(tmp_path / "s.npz")[1].tolist() == [[1.0, 3.0], [1.0, 1.0]]
    np.savez(tmp_path / "w.npz", a=np.zeros(2), b=np.zeros(3))
    with pytest.raises(DataError, match="one width"):
        read_embeddings(tmp_path / "w.npz")
    np.savez(tmp_path / "n.npz", a=np.array([np.nan, 1.0]), b=np.zeros(2))
    with pytest.raises(DataError, match="a holds numbers that are not finite"):
        read_embeddings(tmp_path / "n.npz")
