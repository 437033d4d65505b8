"""k-means: blobs are found, seeds repeat, no label is empty, and every row alone where there are enough clusters."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.errors import ConfigError
from dataflex.select.cluster import kmeans, members, spherical_kmeans
from dataflex.testing import global_random_state_untouched

both = pytest.mark.parametrize("cluster", [kmeans, spherical_kmeans])


def rng(seed=0):
    return np.random.default_rng(seed)


def blobs(seed=0, count=30):
    """Three groups around the axes, in mixed order."""
    draw = rng(seed)
    of = draw.permutation(np.repeat(np.arange(3), count))
    return np.eye(3)[of] + 0.05 * draw.standard_normal((3 * count, 3)), of


@both
def test_groups_are_found(cluster):
    rows, of = blobs()
    best = min((cluster(rows, 3, rng(seed)) for seed in range(5)), key=lambda found: spread(rows, *found))
    pairs = set(zip(best[0].tolist(), of.tolist(), strict=True))
    assert len(pairs) == 3


def spread(rows, labels, centres):
    return float(np.square(rows - centres[labels]).sum())


def test_euclidean_centres_are_means():
    rows, _ = blobs(1)
    labels, centres = kmeans(rows, 3, rng(2))
    for label, centre in enumerate(centres):
        np.testing.assert_allclose(centre, rows[labels == label].mean(axis=0), atol=1e-6)
    distances = np.linalg.norm(rows[:, None] - centres, axis=2)
    assert (distances.argmin(axis=1) == labels).all()


def test_spherical_centres_are_directions_of_means_of_unit_rows():
    rows, _ = blobs(1)
    rows = rows * rng(3).uniform(0.1, 10.0, size=(len(rows), 1))
    labels, centres = spherical_kmeans(rows, 3, rng(2))
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for label, centre in enumerate(centres):
        mean = units[labels == label].mean(axis=0)
        np.testing.assert_allclose(centre, mean / np.linalg.norm(mean), rtol=1e-4)
    assert ((units @ centres.T).argmax(axis=1) == labels).all()


@both
@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=25),
    k=st.integers(1, 30),
    seed=st.integers(0, 3),
)
def test_labels_are_dense_and_seeds_repeat(cluster, rows, k, seed):
    rows = np.array(rows, dtype=np.float64)
    with global_random_state_untouched():
        labels, centres = cluster(rows, k, rng(seed))
    assert labels.dtype == np.int64
    assert len(centres) <= min(k, len(rows))
    assert np.unique(labels).tolist() == list(range(len(centres)))
    assert np.isfinite(centres).all()
    again = cluster(rows, k, rng(seed))
    assert (again[0] == labels).all()
    assert (again[1] == centres).all()
    groups = members(labels)
    assert len(groups) == len(centres)
    assert all((labels[group] == label).all() for label, group in enumerate(groups))
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(rows)))


@both
def test_with_enough_clusters_every_row_is_its_own(cluster):
    labels, centres = cluster(np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]), 7, rng())
    assert labels.tolist() == [0, 1, 2]
    assert len(centres) == 3


def test_a_lost_cluster_is_started_again():
    """Two of three first centres are equal: the second of them loses its rows and moves to the farthest one."""
    rows = np.array([[1.0, 0.0]] * 8 + [[0.0, 1.0], [-1.0, 0.0]])
    for seed in range(10):
        _, centres = spherical_kmeans(rows, 3, rng(seed))
        assert len(centres) == 3


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match=r"dataflex-llm\[cluster\]"):
        kmeans(np.eye(3), 2, rng())
