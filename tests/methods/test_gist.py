"""GIST against the specification's numbers and a slow transcription in the space of the gradients."""

from __future__ import annotations

import numpy as np
import pytest

from dataflex.errors import DataError
from dataflex.selectors.gist import Gist, cosines, subspace
from dataflex.signals.kinds import GradientNorms
from dataflex.testing import FakeSignals, example_context


@pytest.mark.parametrize(
    ("targets", "components", "row", "inside", "whole"),
    [
        ([[3.0, 0, 0], [0, 2, 0]], 9, [1.0, 0, 5], 0.832050, 0.832050 / np.sqrt(26)),
        ([[3.0, 0, 0], [0, 2, 0]], 9, [1.0, 1, 0], 0.980581, 0.980581),
        ([[2.0, 1, 0], [1, 2, 0], [0, 1, 1]], 2, [1.0, -1, 2], 0.749635, 0.028692),
    ],
)
def test_scores_of_the_specification(targets, components, row, inside, whole):
    basis, means = subspace([np.array(targets)], components)
    assert basis.shape == (3, 2)
    np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-12)
    assert cosines(np.array([row]), basis, means).tolist() == [[pytest.approx(inside, abs=1e-6)]]
    assert cosines(np.array([row]), basis, means, full=True).tolist() == [[pytest.approx(whole, abs=1e-6)]]


def slow(rows, targets, components):
    """By the singular vectors of all target rows themselves."""
    _, singular, directions = np.linalg.svd(np.concatenate(targets))
    directions = [d for s, d in zip(singular, directions, strict=False) if s > 1e-6 * singular[0]][:components]
    scores = []
    for target in targets:
        mean = [float(direction @ target.mean(axis=0)) for direction in directions]
        for row in rows:
            inside = [float(direction @ row) for direction in directions]
            scores.append(np.dot(mean, inside) / np.linalg.norm(mean) / np.linalg.norm(inside))
    return np.reshape(scores, (len(targets), len(rows)))


@pytest.mark.parametrize("components", [2, 9])
def test_the_selector_against_a_slow_transcription(components):
    """Sketches of the stand-in are the gradients themselves, of length one."""
    rng = np.random.default_rng(0)
    rows, targets = rng.standard_normal((30, 6)), {"x": rng.standard_normal((3, 6)), "y": rng.standard_normal((4, 6))}
    rows[7] = np.nan

    def norms(_, places, target):
        return np.linalg.norm(targets[target][places], axis=1)

    signals = FakeSignals(np.ones(30), gradients=rows, target_rows=targets, values={GradientNorms: norms})
    ctx = example_context({"a": 30}, signals=signals, targets=("x", "y"))
    selector = Gist(Gist.Params(components=components, sketch_size=8))
    found = selector.select(np.arange(30), 5, ctx)
    known = np.delete(np.arange(30), 7)
    expected = slow(rows[known], list(targets.values()), components).max(axis=0)
    np.testing.assert_allclose(found.scores[known], expected, rtol=1e-4, atol=1e-5)
    assert np.isnan(found.scores[7])
    assert sorted(found.rows.tolist()) == sorted(known[np.argsort(-expected)[:5]].tolist())
    nothing = FakeSignals(np.ones(30), gradients=rows, target_rows={**targets, "y": np.zeros((2, 6))})
    with pytest.raises(DataError, match="target 'y' has 2 rows, none of which has a gradient"):
        selector.select(np.arange(30), 5, example_context({"a": 30}, signals=nothing, targets=("x", "y")))
