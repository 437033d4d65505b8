"""Cluster-LESS: LESS itself with a cluster for each row, and the mean direction of representatives otherwise."""

from __future__ import annotations

import numpy as np
import pytest

from dataflex.config.build import method_block
from dataflex.errors import DataError
from dataflex.select.scoring import Aggregate
from dataflex.selectors.influence import ClusterLess, Less, cluster_means, representatives
from dataflex.signals.kinds import Embedding
from dataflex.testing import FakeSignals, example_context


class Given(FakeSignals):
    """Given vectors to cluster, and given gradients."""

    def __init__(self, vectors, gradients, target_gradients):
        self.vectors = np.asarray(vectors, dtype=np.float32)
        super().__init__(
            np.ones(len(vectors)),
            gradients=gradients,
            target_rows={name: [gradient] for name, gradient in target_gradients.items()},
            values={Embedding: self.vectors},
        )


def setting(count=60, width=5, seed=0):
    draw = np.random.default_rng(seed)
    gradients = draw.standard_normal((count, width))
    vectors = draw.standard_normal((count, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Given(vectors, gradients, {"a": draw.standard_normal(width), "b": draw.standard_normal(width)})


def choose(signals, budget, *, targets=("a", "b"), seed=0, method=ClusterLess, **params):
    count = len(np.arange(signals.num_rows()))
    ctx = example_context({"all": count}, signals=signals, targets=targets, seed=seed)
    return method(method.Params(**params)).select(np.arange(count), budget, ctx)


@pytest.mark.parametrize("aggregate", ["max", "mean"])
def test_with_a_cluster_for_each_row_it_is_less(aggregate):
    signals = setting()
    for budget in (1, 7, 60):
        ours = choose(signals, budget, clusters=60, aggregate=aggregate)
        theirs = choose(signals, budget, method=Less, aggregate=Aggregate.of(aggregate))
        assert ours.rows.tolist() == theirs.rows.tolist()
        assert ours.scores.tolist() == theirs.scores.tolist()


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("renormalize", [True, False])
def test_a_clusters_score_is_the_cosine_of_the_mean_of_its_unit_directions(renormalize):
    draw = np.random.default_rng(1)
    directions = unit(draw.standard_normal((9, 6)))
    targets = unit(draw.standard_normal((2, 6)))
    of = np.array([0, 0, 0, 1, 1, 3, 4, 4, 4])
    found = cluster_means(directions @ targets.T, of, 5, directions if renormalize else None)
    for cluster in range(5):
        mine = directions[of == cluster]
        if not len(mine):
            assert np.isnan(found[cluster]).all()
            continue
        mean = mine.mean(axis=0)
        wanted = (unit(mean) if renormalize else mean) @ targets.T
        np.testing.assert_allclose(found[cluster], wanted, rtol=1e-5)


def test_directions_that_cancel_out_give_no_score_out_of_range():
    directions = np.array([[1.0, 0.0], [-1.0, 0.0]])
    found = cluster_means(directions @ np.array([[0.6], [0.8]]), np.array([0, 0]), 1, directions)
    assert np.abs(found).max() <= 1.0


def test_the_whole_on_given_clusters():
    """Three tight clusters; the fake's sketches are exact, so scores can be followed by hand."""
    draw = np.random.default_rng(3)
    of = np.repeat(np.arange(3), 8)
    vectors = unit(np.eye(3)[of] + 0.02 * draw.standard_normal((24, 3)))
    gradients = unit(draw.standard_normal((24, 4)))
    signals = Given(vectors, gradients, {"a": np.array([1.0, 2.0, 0.0, 0.0]), "b": np.array([0.0, 0.0, -1.0, 1.0])})
    chosen = choose(signals, 12, clusters=3, representatives=8, sketch_size=4)
    targets = unit(np.array([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, -1.0, 1.0]]))
    by_cluster = np.array([(unit(gradients[of == c].mean(axis=0)) @ targets.T).max() for c in range(3)])
    np.testing.assert_allclose(chosen.scores, by_cluster[of], rtol=1e-4)
    best = np.argsort(-by_cluster)
    assert set(chosen.rows[:8].tolist()) == set(np.flatnonzero(of == best[0]).tolist())
    cut = np.flatnonzero(of == best[1])
    near = np.linalg.norm(vectors[cut] - vectors[cut].mean(axis=0), axis=1)
    assert chosen.rows[8:].tolist() == cut[np.argsort(near)][:4].tolist()


def test_gradients_are_asked_for_representatives_only():
    signals = setting(count=200)
    choose(signals, 10, representatives=2)  # 4 clusters of about 50
    asked = [call for call in signals.calls if call.signal == "gradients"]
    assert len(asked) == 2
    assert all(len(call.rows) <= 8 for call in asked)
    assert asked[1].options["dim"] == 4096
    (embedded,) = [call for call in signals.calls if call.signal == "embeddings"]
    spec = embedded.asked
    assert (spec.pooling, spec.completion_only, spec.normalize) == ("mean", True, True)
    signals.calls.clear()
    choose(signals, 10, representatives=2, renormalize=False)
    assert [call.signal for call in signals.calls].count("gradients") == 1


@pytest.mark.parametrize("pick", ["mixed", "nearest", "farthest", "random"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 20])
def test_representatives_are_distinct_members(pick, count):
    distances = np.random.default_rng(0).permutation(12).astype(float)
    for seed in range(5):
        found = representatives(distances, count, pick, np.random.default_rng(seed))
        assert len(set(found.tolist())) == len(found) == min(count, 12)
    order = np.argsort(distances)
    if count < 12 and pick == "nearest":
        assert found.tolist() == order[:count].tolist()
    if count < 12 and pick == "farthest":
        assert found.tolist() == order[::-1][:count].tolist()
    if count in (2, 3) and pick == "mixed":
        assert found[:2].tolist() == [order[0], order[-1]]


def test_rows_without_labels_or_gradients():
    signals = setting(count=12)
    signals.vectors[3] = np.nan
    gradients = signals._gradients
    gradients[5] = np.nan
    chosen = choose(signals, 12, clusters=12)
    assert sorted(chosen.rows.tolist()) == [0, 1, 2, 4, 6, 7, 8, 9, 10, 11]
    assert np.isnan(chosen.scores[[3, 5]]).all()
    assert "2 rows have no score" in chosen.reason
    gradients[:] = np.nan
    with pytest.raises(DataError, match="all 12 rows have no score"):
        choose(signals, 2, clusters=11)
    signals.vectors[:] = np.nan
    with pytest.raises(DataError, match="labels all masked"):
        choose(signals, 2)


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ({"sketch_size": 3}, "sketch_size: must be even"),
        ({"pick": "nearst"}, "did you mean 'nearest'"),
        ({"representatives": 0}, "representatives: must be at least 1"),
    ],
)
def test_mistakes_are_told(block, problem):
    problems = []
    block = {"name": "cluster_less", "targets": ["a"], **block}
    assert method_block("selector", block, "dynamic.selector", problems) is None
    assert problem in problems[0]
