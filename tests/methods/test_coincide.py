"""COINCIDE: transferability, density, quotas and the greedy rows of a cluster, against slow transcriptions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.config.build import method_block
from dataflex.errors import DataError
from dataflex.selectors.clusters import Coincide, cluster_quotas, density, gaussian_kernel, greedy_mmd, transferability
from dataflex.signals.kinds import Embedding
from dataflex.testing import FakeSignals, example_context


class GivenVectors(FakeSignals):
    """Answers embedding questions with given vectors; layer k adds k to each."""

    def __init__(self, vectors):
        given = np.asarray(vectors, dtype=np.float32)
        values = {Embedding: lambda signal, rows, _: given[rows] + max(signal.layer, 0)}
        super().__init__(np.ones(len(vectors)), values=values)


def choose(vectors, budget, seed=0, **params):
    signals = GivenVectors(vectors)
    ctx = example_context({"all": len(vectors)}, signals=signals, seed=seed, targets=())
    return Coincide(Coincide.Params(**params)).select(np.arange(len(vectors)), budget, ctx), signals


# ---------------------------------------------------------------- worked examples


def test_transferability_of_the_worked_example():
    centres = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    np.testing.assert_allclose(transferability(centres), [0.30, 0.70, 0.40])
    np.testing.assert_allclose(transferability(5.0 * centres), [0.30, 0.70, 0.40])


def test_near_duplicates_of_a_centre_do_not_count():
    centres = np.array([[1.0, 0.0], [0.95, math.sqrt(1 - 0.95**2)], [0.0, 1.0]])
    side = math.sqrt(1 - 0.95**2)
    np.testing.assert_allclose(transferability(centres), [0.0, side, side / 2])
    assert transferability(centres[:1]).tolist() == [0.0]
    assert transferability(centres[:2]).tolist() == [0.0, 0.0]


def test_density_of_the_worked_example():
    rows = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert density(rows) == pytest.approx(0.684654, abs=5e-7)
    assert density(rows[:1]) == 1.0


# ---------------------------------------------------------------- quotas


def shares(scores, temperature):
    """Softmax of scores / temperature."""
    raised = scores / temperature
    weights = np.exp(raised - raised.max())
    return weights / weights.sum()


def slow_quotas(scores, sizes, budget, temperature):
    """The walk as it is written: highest share first, then a softmax over the rest."""
    left = min(budget, sum(sizes))
    rest, taken, order = list(range(len(scores))), {}, []
    while rest:
        ratio = shares(np.array([scores[c] for c in rest]), temperature)
        best = int(np.argmax(ratio))
        cluster = rest.pop(best)
        count = min(round(left * ratio[best]), sizes[cluster], left)
        taken[cluster] = count
        order.append(cluster)
        left -= count
    for cluster in order:
        more = min(left, sizes[cluster] - taken[cluster])
        taken[cluster] += more
        left -= more
    return [(cluster, taken[cluster]) for cluster in order]


@given(
    clusters=st.lists(st.tuples(st.integers(-20, 20), st.integers(1, 9)), min_size=1, max_size=8),
    budget=st.integers(0, 60),
    temperature=st.sampled_from([0.02, 0.1, 1.0, 50.0]),
)
@settings(max_examples=150, deadline=None)
def test_quotas_follow_the_walk_and_add_up(clusters, budget, temperature):
    scores = [score / 20 for score, _ in clusters]
    sizes = [size for _, size in clusters]
    found = cluster_quotas(np.array(scores), np.array(sizes), budget, temperature)
    assert sum(count for _, count in found) == min(budget, sum(sizes))
    assert all(0 <= count <= sizes[cluster] for cluster, count in found)
    wanted = slow_quotas(scores, sizes, budget, temperature)
    # A half may be rounded to either side after one last bit of difference.
    assert [cluster for cluster, _ in found] == [cluster for cluster, _ in wanted]
    assert max(abs(a - b) for (_, a), (_, b) in zip(found, wanted, strict=True)) <= 1


def test_quotas_of_the_worked_shares():
    """(.0416, .6509, .3075) of 100: 65, then .8808 of 35 = 31, then the rest."""
    scores = np.array([0.3, 0.7, 0.4]) / np.array([0.5, 0.8, 0.5])
    assert cluster_quotas(scores, np.array([100, 100, 100]), 100, 0.1) == [(1, 65), (2, 31), (0, 4)]
    assert cluster_quotas(scores, np.array([100, 10, 100]), 100, 0.1) == [(1, 10), (2, 79), (0, 11)]
    assert cluster_quotas(scores, np.array([1, 10, 10]), 100, 0.1) == [(1, 10), (2, 10), (0, 1)]


# ---------------------------------------------------------------- rows of a cluster


def naive_mmd(rows, count, gamma):
    """Try every row at every step with the whole definition."""
    kernel = [
        [math.exp(-sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / (2 * gamma**2)) for y in rows] for x in rows
    ]
    n, chosen = len(rows), []
    everything = sum(map(sum, kernel)) / n**2
    for _ in range(min(count, n)):
        values = {}
        for candidate in range(n):
            if candidate not in chosen:
                s = [*chosen, candidate]
                among = sum(kernel[i][j] for i in s for j in s) / len(s) ** 2
                across = sum(kernel[i][j] for i in s for j in range(n)) / (len(s) * n)
                values[candidate] = everything + among - 2 * across
        chosen.append(min(values, key=lambda i: (values[i], i)))
    return chosen, values


@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
def test_the_fast_form_is_the_naive_one(gamma):
    for seed in range(4):
        rows = np.random.default_rng(seed).standard_normal((14, 3))
        for count in (1, 5, 14, 20):
            assert greedy_mmd(rows, count, gamma).tolist() == naive_mmd(rows.tolist(), count, gamma)[0]
    assert greedy_mmd(rows, 0).tolist() == []


def test_the_first_row_is_the_most_central_and_duplicates_wait():
    rows = np.array([[0.0], [0.0], [1.0], [2.0], [2.0]])
    chosen = greedy_mmd(rows, 3).tolist()
    assert chosen[0] == 2
    assert {rows[i, 0] for i in chosen} == {0.0, 1.0, 2.0}


def test_kernels_of_close_rows_keep_their_digits():
    rows = np.array([[1000.0, 0.0], [1000.0, 1e-3]], dtype=np.float64)
    np.testing.assert_allclose(1 - gaussian_kernel(rows, rows)[0, 1], 5e-7, rtol=1e-3)


# ---------------------------------------------------------------- the whole


def test_rows_come_cluster_by_cluster():
    """One row for each cluster: S / D = S, and the features are tanh, then length one."""
    vectors = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    chosen, _ = choose(vectors, 2, clusters=3)
    features = np.tanh(vectors)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(chosen.scores, transferability(features), rtol=1e-5)
    assert chosen.rows.tolist() == np.argsort(-chosen.scores, kind="stable")[:2].tolist()


def test_the_dense_cluster_gives_fewer_rows_than_the_sparse_one():
    draw = np.random.default_rng(0)
    dense = np.array([1.0, 0.2, 0.2]) + 0.01 * draw.standard_normal((40, 3))
    sparse = np.array([0.2, 0.2, 1.0]) + 0.25 * draw.standard_normal((40, 3))
    chosen, _ = choose(np.concatenate([dense, sparse]), 20, clusters=2, seed=1)
    assert len(chosen.rows) == 20
    assert (chosen.rows >= 40).sum() > (chosen.rows < 40).sum()


def test_layers_are_asked_for_one_by_one_and_weigh_the_same():
    vectors = np.random.default_rng(0).standard_normal((6, 3))
    _, signals = choose(vectors, 3, layers=(1, 3), encoder="small")
    asked = [(call.asked.layer, call.asked.pooling, call.asked.encoder) for call in signals.calls]
    assert asked == [(1, "mean", "small"), (3, "mean", "small")]
    method = Coincide(Coincide.Params(layers=(1, 3)))
    features = method._features(np.arange(6), example_context({"all": 6}, signals=signals))
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(features[:, :3], axis=1), math.sqrt(0.5), rtol=1e-5)


def test_one_cluster_for_66_rows():
    vectors = np.random.default_rng(0).standard_normal((133, 4))
    assert "of 3 clusters" in choose(vectors, 10)[0].reason
    assert "of 133 clusters" in choose(vectors, 10, clusters=1000)[0].reason


def test_equal_rows_and_rows_without_a_vector():
    chosen, _ = choose(np.ones((5, 2)), 3, clusters=2)
    assert len(set(chosen.rows.tolist())) == 3
    vectors = np.random.default_rng(0).standard_normal((6, 3))
    vectors[2] = np.nan
    chosen, _ = choose(vectors, 6, clusters=2)
    assert sorted(chosen.rows.tolist()) == [0, 1, 3, 4, 5]
    assert "1 rows have no embedding" in chosen.reason
    with pytest.raises(DataError, match="all 2 rows have no embedding"):
        choose(np.full((2, 2), np.nan), 1)


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ({"temperature": 0}, "temperature: must be above 0"),
        ({"layers": []}, "layers: name at least one layer"),
        ({"layers": [1, 1]}, "layers: names a layer twice"),
        ({"clusters": 0}, "clusters: must be at least 1"),
        ({"targets": ["a"]}, "takes no targets"),
    ],
)
def test_mistakes_are_told(block, problem):
    problems = []
    assert method_block("selector", {"name": "coincide", **block}, "dynamic.selector", problems) is None
    assert problem in problems[0]
