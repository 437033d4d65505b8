"""Zeroth-order influence: exact on linear functions, known moments on a toy, close with many directions."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from dataflex.config.build import method_block
from dataflex.errors import DataError
from dataflex.rng import rademacher
from dataflex.select.scoring import Aggregate
from dataflex.selectors.influence import Zeroth, central_difference
from dataflex.signals.kinds import PerturbedLoss
from dataflex.testing import FakeSignals, example_context


def choose(gradients, target_rows, budget=2, *, index=0, seed=0, losses=None, **params):
    gradients = np.asarray(gradients, dtype=np.float64)
    signals = FakeSignals(
        np.ones(len(gradients)) if losses is None else losses, gradients=gradients, target_rows=target_rows
    )
    ctx = example_context({"all": len(gradients)}, signals=signals, targets=tuple(target_rows), seed=seed, index=index)
    params = {"epsilon": 0.125, **params}
    return Zeroth(Zeroth.Params(**params)).select(np.arange(len(gradients)), budget, ctx), signals


def test_the_difference_is_exact_on_linear_and_quadratic_functions():
    """f(p) = 3 p1 + 4 p2 along (1, -1) has the derivative -1; a quadratic's derivative at p is x.(A p + b)."""
    step, p = np.array([1.0, -1.0]), np.array([0.5, -2.0])

    def linear(x):
        return np.array([3.0 * x[0] + 4.0 * x[1]])

    def quadratic(x):
        return np.array([0.5 * (2.0 * x[0] ** 2 + 6.0 * x[0] * x[1] + 8.0 * x[1] ** 2) + x[0]])

    for epsilon in (2.0**-10, 0.25, 1.0):
        assert central_difference(linear(p + epsilon * step), linear(p - epsilon * step), epsilon).tolist() == [-1.0]
        wanted = step @ np.array([2.0 * p[0] + 3.0 * p[1] + 1.0, 3.0 * p[0] + 8.0 * p[1]])
        found = central_difference(quadratic(p + epsilon * step), quadratic(p - epsilon * step), epsilon)
        assert found.tolist() == [wanted]


def test_the_toys_products_have_mean_24_and_deviation_25():
    """a = (3, 4), b = (4, 3): along (1, 1) the product is 49, along (1, -1) it is -1."""
    products = []
    for index in range(400):
        chosen, _ = choose([[3.0, 4.0]], {"goal": [[4.0, 3.0]]}, index=index, directions=1, similarity="product")
        products.append(float(chosen.scores[0]))
    assert set(products) == {49.0, -1.0}
    assert abs(np.mean(products) - 24) < 3 * 25 / 20
    assert np.std(products) == pytest.approx(25, abs=0.5)


def test_one_pass_over_k_directions_is_their_mean():
    single = [
        choose([[3.0, 4.0]], {"goal": [[4.0, 3.0]]}, index=i, directions=1, similarity="product")[0].scores[0]
        for i in range(32)
    ]
    together, _ = choose([[3.0, 4.0]], {"goal": [[4.0, 3.0]]}, directions=32, similarity="product")
    assert together.scores[0] == pytest.approx(np.mean(single))


def test_cosines_come_close_and_ranks_are_right_with_many_directions():
    draw = np.random.default_rng(0)
    gradients, target = draw.standard_normal((12, 40)), draw.standard_normal((3, 40))
    gradients[4] = 3.0 * target.mean(axis=0) + 0.1 * draw.standard_normal(40)
    chosen, _ = choose(gradients, {"goal": target}, budget=1, directions=1024)
    mean = target.mean(axis=0)
    exact = gradients @ mean / np.linalg.norm(gradients, axis=1) / np.linalg.norm(mean)
    assert chosen.rows.tolist() == [4]
    assert np.abs(chosen.scores - exact).max() < 4 / np.sqrt(1024)


def test_scores_are_cosines_of_the_vectors_of_derivatives():
    """A transcription: all directions are stored, which the method does not."""
    draw = np.random.default_rng(1)
    gradients = draw.integers(-4, 5, (5, 6)).astype(float)
    targets = {"a": draw.integers(-4, 5, (2, 6)).astype(float), "b": draw.integers(-4, 5, (4, 6)).astype(float)}
    signs = np.stack([rademacher(7, "fake", direction, 6) for direction in range(32, 48)])
    own = gradients @ signs.T
    by_task = []
    for rows in targets.values():
        aim = (rows @ signs.T).mean(axis=0)
        by_task.append(own @ aim / np.linalg.norm(own, axis=1) / np.linalg.norm(aim))
    for aggregate, wanted in (("max", np.max(by_task, axis=0)), ("mean", np.mean(by_task, axis=0))):
        chosen, _ = choose(gradients, targets, 5, index=2, seed=7, directions=16, aggregate=Aggregate.of(aggregate))
        np.testing.assert_allclose(chosen.scores, wanted, atol=1e-6)
        assert chosen.rows.tolist() == np.argsort(-chosen.scores, kind="stable").tolist()


def test_training_and_target_rows_meet_the_same_directions_and_intervals_new_ones():
    _, signals = choose(np.ones((3, 2)), {"a": np.ones((2, 2)), "b": np.ones((1, 2))}, index=3, directions=2)
    asked = {}
    for call in signals.calls:
        asked.setdefault(call.options["target"], []).append((call.options["direction"], call.options["epsilon"]))
    assert set(asked) == {None, "a", "b"}
    assert all(found == [(6, 0.125), (6, -0.125), (7, 0.125), (7, -0.125)] for found in asked.values())


def test_signs_are_even_and_a_function_of_the_counter_alone():
    signs = rademacher(1, "layer.weight", 4, 100_001)
    assert signs.dtype == np.float32
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.02
    assert (signs[:77] == rademacher(1, "layer.weight", 4, 77)).all()
    for other in (
        rademacher(2, "layer.weight", 4, 1000),
        rademacher(1, "layer.bias", 4, 1000),
        rademacher(1, "layer.weight", 5, 1000),
    ):
        assert abs((other * signs[:1000]).mean()) < 0.15
    assert len(rademacher(1, "x", 0, 0)) == 0


def test_the_warning_is_honest_and_told_once(caplog):
    signals = FakeSignals(np.ones(3))
    ctx = example_context({"all": 3}, signals=signals)
    method = Zeroth(Zeroth.Params(directions=16))
    with caplog.at_level(logging.WARNING, logger="dataflex.selectors.influence"):
        reasons = [method.select(np.arange(3), 1, ctx).reason for _ in range(2)]
    assert [record.getMessage() for record in caplog.records] == [
        "zeroth is experimental: with 16 directions its cosines have a standard error of about 0.25, for 32 forward "
        "passes over the pool; less gives them exactly for one forward and one backward pass"
    ]
    assert all("16 directions, standard error about 0.25" in reason for reason in reasons)
    assert "Experimental" in Zeroth.card.summary
    assert Zeroth(Zeroth.Params()).requires().passes.over_pool(1)[0] == 2 * Zeroth.Params().directions
    assert Zeroth(Zeroth.Params()).requires().whole_parameters


def test_rows_and_targets_without_a_loss():
    chosen, _ = choose(np.ones((3, 2)), {"a": np.ones((2, 2))}, 3, losses=[1.0, np.nan, np.inf], directions=4)
    assert chosen.rows.tolist() == [0]
    assert "2 rows have no finite loss" in chosen.reason

    values = {PerturbedLoss: lambda _, rows, target: np.full(len(rows), 1.0 if target is None else np.nan)}
    ctx = example_context({"all": 3}, signals=FakeSignals(np.ones(3), values=values), targets=("a",))
    with pytest.raises(DataError, match="target 'a' has 3 rows, none"):
        Zeroth(Zeroth.Params(directions=4)).select(np.arange(3), 1, ctx)
    with pytest.raises(DataError, match="all 2 rows have no finite loss"):
        choose(np.ones((2, 2)), {"a": np.ones((2, 2))}, losses=[np.nan, np.nan], directions=4)


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ({"directions": 0}, "directions: must be at least 1"),
        ({"epsilon": 0}, "epsilon: must be above 0"),
        ({"direction": 3}, "did you mean 'directions'"),
    ],
)
def test_mistakes_are_told(block, problem):
    problems = []
    assert method_block("selector", {"name": "zeroth", "targets": ["a"], **block}, "dynamic.selector", problems) is None
    assert problem in problems[0]
