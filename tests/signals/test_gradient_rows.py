"""Sketches and products of single rows' gradients, against one row at a time."""

from __future__ import annotations

import numpy as np
import pytest

from dataflex.errors import ConfigError
from dataflex.signals.gradients import scorers as targets_module
from dataflex.signals.gradients.scorers import GradientScorers
from dataflex.signals.kinds import GradientScores, GradientSketches
from dataflex.signals.runner import SignalCache
from dataflex.signals.specs import GradientSpec
from dataflex.signals.store import ArrayStore
from tests.rounding import layers_apart
from tests.signals.test_gradient_signals import (
    direction,
    setting,  # noqa: F401  a fixture
    unit,
)
from tests.signals.tiny import again, products

ROWS = np.arange(7)
UNLABELLED = 4


@pytest.fixture
def asked(setting):  # noqa: F811
    """A service of its own, so that no answer is kept from another test."""
    service, gradients, state = setting
    fresh = again(service, seed=3)
    return fresh, gradients, state


def rows_of(gradients, state, spec):
    """Directions of the training rows in float64; NaN without labels."""
    rows = gradients["pool"].copy()
    if spec.precondition == "true_adam":
        rows = np.stack([direction(g, *state, "true_adam", spec.include_momentum) for g in rows])
    rows[UNLABELLED] = np.nan
    return rows


SPECS = [GradientSpec(precondition="none"), GradientSpec()]


@pytest.mark.parametrize("at_once", [None, 1, 3])
@pytest.mark.parametrize("spec", SPECS, ids=["plain", "adam"])
def test_products_within_a_batch(asked, spec, at_once, monkeypatch):
    service, gradients, state = asked
    if at_once is not None:
        monkeypatch.setattr(targets_module, "_HELD_NUMBERS", at_once * gradients["pool"].shape[1])
    order = np.array([5, 0, 4, 2, 2, 6])  # any order, a row twice
    scores, gram = products(service, order, **vars(spec), targets=("near", "far"))
    rows = rows_of(gradients, state, spec)[order]
    targets = np.stack([gradients[name].mean(axis=0) for name in ("near", "far")])
    wanted, wanted_gram = rows @ targets.T, rows @ rows.T
    np.testing.assert_allclose(scores, wanted, rtol=2e-4, atol=2e-5 * np.nanmax(np.abs(wanted)))
    np.testing.assert_allclose(gram, wanted_gram, rtol=2e-4, atol=2e-5 * np.nanmax(np.abs(wanted_gram)))


def test_sketches_have_length_one_and_keep_angles(asked):
    service, gradients, state = asked
    spec, dim = GradientSpec(), 4096
    ours = service(GradientSketches(**vars(spec), dim=dim), ROWS)
    theirs = service(GradientSketches(**vars(spec), dim=dim), np.arange(3), target="near")
    assert np.isnan(ours[UNLABELLED]).all()
    kept = np.delete(ROWS, UNLABELLED)
    np.testing.assert_allclose(np.linalg.norm(ours[kept], axis=1), 1.0, rtol=1e-5)
    rows = unit(rows_of(gradients, state, spec))[kept]
    near = unit(gradients["near"])
    for estimate, exact in ((ours[kept] @ theirs.T, rows @ near.T), (ours[kept] @ ours[kept].T, rows @ rows.T)):
        assert np.abs(estimate - exact).max() < 5 / np.sqrt(dim)


def test_target_rows_are_sketched_plain(asked):
    """A pool that is the target itself has the target's sketches where it is not preconditioned, and only there."""
    service, _, _ = asked
    twin = again(service, train=service.access.targets["near"])
    target = service(GradientSketches(dim=64), np.arange(3), target="near")
    plain = twin(GradientSketches(precondition="none", dim=64), np.arange(3))
    np.testing.assert_allclose(plain, target, atol=1e-6)
    assert np.abs(twin(GradientSketches(dim=64), np.arange(3)) - target).max() > 0.01


def test_the_projection_follows_the_seed_of_the_run(asked):
    service, _, _ = asked
    other = again(service, seed=4)
    first, second = (one(GradientSketches(dim=64), ROWS[:2]) for one in (service, other))
    assert np.abs(first - second).max() > 0.01


def test_an_odd_sketch_is_refused(asked):
    service, _, _ = asked
    with pytest.raises(ConfigError, match="sketch size 63"):
        service(GradientSketches(dim=63), ROWS)


def test_no_rows(asked):
    service, _, _ = asked
    none = ROWS[:0]
    scores, gram = products(service, none, targets=("near",))
    assert (scores.shape, gram.shape) == ((0, 1), (0, 0))
    assert service(GradientSketches(dim=8), none).shape == (0, 8)


def test_answers_are_kept_and_stored(asked, tmp_path, monkeypatch):
    service, _, _ = asked

    def ask(one):
        return [one(GradientSketches(dim=16), ROWS), *products(one, ROWS, targets=("near",))]

    def with_store():
        book = SignalCache(store=ArrayStore(tmp_path), model_identity=lambda: "model")
        return again(service, book)

    first = ask(service)
    stored = with_store()
    for one in (first, ask(stored)):
        for a, b in zip(one, first, strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(stored.cache.store.entries()) == 1, "products are of few rows, and are not stored"

    def no_pass(*_args, **_kwargs):
        raise AssertionError("a pass was run again")

    monkeypatch.setattr(GradientScorers, "sketches", no_pass)
    np.testing.assert_array_equal(ask(with_store())[0], first[0])
    monkeypatch.setattr(targets_module, "row_products", no_pass)
    for a, b in zip(ask(service), first, strict=True):
        np.testing.assert_array_equal(a, b)


def test_target_gradients_are_made_once_in_a_decision(asked, monkeypatch):
    service, _, _ = asked
    made = []
    original = targets_module.target_vectors
    monkeypatch.setattr(targets_module, "target_vectors", lambda *args, **how: made.append(1) or original(*args, **how))
    service.begin(1)
    one = service(GradientScores(targets=("near", "far")), ROWS[:3])
    two = service(GradientScores(targets=("near", "far")), ROWS[2:])
    assert len(made) == 1
    np.testing.assert_allclose(one[2], two[0], rtol=0, atol=2 * layers_apart(3, 24))  # cosines; a pass forward and back
    for spec, targets in (
        (GradientSpec(mean_of_cosines=False), ("near", "far")),
        (GradientSpec(last_blocks=1), ("near", "far")),
        (GradientSpec(), ("far", "near")),
    ):
        service(GradientScores(**vars(spec), targets=targets), ROWS[:2])
    assert len(made) == 4, "other gradients, or other targets"
    service.end()
    assert not service.access.for_decision
    service.begin(2)
    np.testing.assert_array_equal(service(GradientScores(targets=("near", "far")), ROWS[:3]), one)
    assert len(made) == 5
