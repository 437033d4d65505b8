"""Sketches, pairs and products of single rows' gradients, against one row at a time."""

from __future__ import annotations

import numpy as np
import pytest

from dataflex.errors import ConfigError
from dataflex.signals.answers import AnswerBook
from dataflex.signals.gradient_signals import GradientSource
from dataflex.signals.gradients import rows as rows_module
from dataflex.signals.handle import Corpus
from dataflex.signals.service import SignalService
from dataflex.signals.specs import GradientSpec
from dataflex.signals.store import ArrayStore
from tests.rounding import layers_apart
from tests.signals.gradients.small import flat, oracle
from tests.signals.test_gradient_signals import (
    Rows,
    collate,
    direction,
    setting,  # noqa: F401  a fixture
    unit,
)

ROWS = np.arange(7)
UNLABELLED = 4


@pytest.fixture
def asked(setting):  # noqa: F811
    """A service of its own, so that no answer is kept from another test."""
    service, gradients, state = setting
    fresh = SignalService(handle=service.handle, train=service.train, targets=service.targets, seed=3)
    return fresh, gradients, state


def rows_of(gradients, state, spec):
    """Directions of the training rows in float64; NaN without labels."""
    rows = gradients["pool"].copy()
    if spec.precondition == "true_adam":
        rows = np.stack([direction(g, *state, "true_adam", spec.include_momentum) for g in rows])
    rows[UNLABELLED] = np.nan
    return rows


SPECS = [GradientSpec(precondition="none"), GradientSpec(), GradientSpec(include_momentum=False)]


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [None, 1, 3])
@pytest.mark.parametrize("spec", SPECS, ids=["plain", "adam", "no momentum"])
def test_pairs_are_cosines_of_single_rows(asked, spec, at_once, monkeypatch):
    service, gradients, state = asked
    if at_once is not None:
        monkeypatch.setattr(rows_module, "_HELD_NUMBERS", at_once * gradients["pool"].shape[1])
    found = service.pair_scores(ROWS, spec, target="near")
    wanted = unit(rows_of(gradients, state, spec)) @ unit(gradients["near"]).T
    assert found.shape == (7, 3)
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5 * np.nanmax(np.abs(wanted)))


def test_pairs_average_to_the_mean_of_cosines(asked):
    service, _, _ = asked
    pairs = service.pair_scores(ROWS, GradientSpec(), target="far")
    scores = service.gradient_scores(ROWS, GradientSpec(), targets=("far",))[:, 0]
    np.testing.assert_allclose(pairs.mean(axis=1), scores, rtol=1e-4, atol=1e-6)


def test_pairs_without_normalizing_are_inner_products(asked):
    service, gradients, _ = asked
    found = service.pair_scores(ROWS[:3], GradientSpec(precondition="none", normalize=False), target="near")
    np.testing.assert_allclose(found, gradients["pool"][:3] @ gradients["near"].T, rtol=1e-4, atol=1e-5)


def test_pairs_leave_out_target_rows_without_labels(asked):
    service, _, _ = asked
    target = Rows([6, 8, 5], seed=2, unlabelled=(1,))
    service.targets = {"near": Corpus(dataset=target, lengths=target.lengths)}
    found = service.pair_scores(ROWS[:2], GradientSpec(), target="near")
    assert np.isnan(found[:, 1]).all()
    assert np.isfinite(found[:, [0, 2]]).all()


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [None, 1, 3])
@pytest.mark.parametrize("spec", SPECS[:2], ids=["plain", "adam"])
def test_products_within_a_batch(asked, spec, at_once, monkeypatch):
    service, gradients, state = asked
    if at_once is not None:
        monkeypatch.setattr(rows_module, "_HELD_NUMBERS", at_once * gradients["pool"].shape[1])
    order = np.array([5, 0, 4, 2, 2, 6])  # any order, a row twice
    scores, gram = service.gradient_products(order, spec, targets=("near", "far"))
    rows = rows_of(gradients, state, spec)[order]
    targets = np.stack([gradients[name].mean(axis=0) for name in ("near", "far")])
    wanted, wanted_gram = rows @ targets.T, rows @ rows.T
    np.testing.assert_allclose(scores, wanted, rtol=2e-4, atol=2e-5 * np.nanmax(np.abs(wanted)))
    np.testing.assert_allclose(gram, wanted_gram, rtol=2e-4, atol=2e-5 * np.nanmax(np.abs(wanted_gram)))


def test_sketches_have_length_one_and_keep_angles(asked):
    service, gradients, state = asked
    spec, dim = GradientSpec(), 4096
    ours = service.gradient_sketches(ROWS, spec, dim=dim)
    theirs = service.gradient_sketches(np.arange(3), spec, dim=dim, target="near")
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
    twin = SignalService(handle=service.handle, train=service.targets["near"], targets=service.targets, seed=3)
    target = service.gradient_sketches(np.arange(3), GradientSpec(), dim=64, target="near")
    plain = twin.gradient_sketches(np.arange(3), GradientSpec(precondition="none"), dim=64)
    np.testing.assert_allclose(plain, target, atol=1e-6)
    assert np.abs(twin.gradient_sketches(np.arange(3), GradientSpec(), dim=64) - target).max() > 0.01


def test_the_projection_follows_the_seed_of_the_run(asked):
    service, _, _ = asked
    other = SignalService(handle=service.handle, train=service.train, targets=service.targets, seed=4)
    first, second = (one.gradient_sketches(ROWS[:2], GradientSpec(), dim=64) for one in (service, other))
    assert np.abs(first - second).max() > 0.01


def test_sketched_pairs(asked):
    service, _, _ = asked
    sketched = service.pair_scores(ROWS, GradientSpec(sketch_size=4096), target="near")
    exact = service.pair_scores(ROWS, GradientSpec(), target="near")
    assert np.nanmax(np.abs(sketched - exact)) < 5 / np.sqrt(4096)
    assert np.nanmax(np.abs(sketched - exact)) > 0
    with pytest.raises(ConfigError, match="normalize"):
        service.pair_scores(ROWS, GradientSpec(sketch_size=4096, normalize=False), target="near")


def test_an_odd_sketch_is_refused(asked):
    service, _, _ = asked
    with pytest.raises(ConfigError, match="sketch size 63"):
        service.gradient_sketches(ROWS, GradientSpec(), dim=63)


def test_no_rows(asked):
    service, _, _ = asked
    none = ROWS[:0]
    scores, gram = service.gradient_products(none, GradientSpec(), targets=("near",))
    assert (scores.shape, gram.shape) == ((0, 1), (0, 0))
    assert service.pair_scores(none, GradientSpec(), target="near").shape == (0, 3)
    assert service.gradient_sketches(none, GradientSpec(), dim=8).shape == (0, 8)


@pytest.mark.slow
def test_answers_are_kept_and_stored(asked, tmp_path):
    service, _, _ = asked

    def ask(one):
        return [
            one.gradient_sketches(ROWS, GradientSpec(), dim=16),
            one.pair_scores(ROWS, GradientSpec(), target="near"),
            *one.gradient_products(ROWS, GradientSpec(), targets=("near",)),
        ]

    def with_store():
        book = AnswerBook(store=ArrayStore(tmp_path), model_identity=lambda: "model")
        return SignalService(handle=service.handle, train=service.train, targets=service.targets, seed=3, book=book)

    first = ask(service)
    stored = with_store()
    for one in (first, ask(stored)):
        for a, b in zip(one, first, strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(stored.book.store.entries()) == 3

    def no_pass(*_args, **_kwargs):
        raise AssertionError("a pass was run again")

    again = with_store()
    for one in (service, again):
        one._sweep = no_pass
        for a, b in zip(ask(one), first, strict=True):
            np.testing.assert_array_equal(a, b)


def test_pairs_equal_single_rows_by_autograd(asked):
    """The oracle of this file is itself a gradient of one row: check one pair by hand."""
    service, _, _ = asked
    model = service.handle.model
    one, other = (
        flat(oracle(model, collate([corpus.dataset.rows[0]])))[0] for corpus in (service.train, service.targets["near"])
    )
    found = service.pair_scores(ROWS[:1], GradientSpec(precondition="none"), target="near")[0, 0]
    assert found == pytest.approx(float(one @ other / one.norm() / other.norm()), rel=1e-4)


@pytest.mark.slow
def test_target_gradients_are_made_once_in_a_decision(asked, monkeypatch):
    service, _, _ = asked
    made = []
    original = GradientSource._target_vectors
    monkeypatch.setattr(GradientSource, "_target_vectors", lambda *args: made.append(1) or original(*args))
    service.begin(1)
    one = service.gradient_scores(ROWS[:3], GradientSpec(), targets=("near", "far"))
    two = service.gradient_scores(ROWS[2:], GradientSpec(), targets=("near", "far"))
    assert len(made) == 1
    np.testing.assert_allclose(one[2], two[0], rtol=0, atol=2 * layers_apart(3, 24))  # cosines; a pass forward and back
    for spec, targets in (
        (GradientSpec(mean_of_cosines=False), ("near", "far")),
        (GradientSpec(last_blocks=1), ("near", "far")),
        (GradientSpec(), ("far", "near")),
    ):
        service.gradient_scores(ROWS[:2], spec, targets=targets)
    assert len(made) == 4, "other gradients, or other targets"
    service.end()
    assert not service.target_gradients
    service.begin(2)
    np.testing.assert_array_equal(service.gradient_scores(ROWS[:3], GradientSpec(), targets=("near", "far")), one)
    assert len(made) == 5
