"""Parts of decisions within a budget: levels of observations, and target rows compared with the others."""

from __future__ import annotations

import dataclasses
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_info, threadpool_limits

from dataflex.plan.schedule import Interval
from dataflex.signals.kinds import GradientProducts
from dataflex.train import in_run, observations
from dataflex.train.in_run import InRun
from dataflex.train.observations import Newest, Observations, centred, levels


def numbered(steps, passes=(), goals=()):
    steps = np.array(steps)
    pilots, of_goals = np.zeros(len(steps), dtype=bool), np.zeros(len(steps), dtype=bool)
    pilots[list(passes)], of_goals[list(goals)] = True, True
    return levels(steps, pilots | of_goals, of_goals).tolist()


def test_neighbouring_steps_share_a_level_until_there_are_eight_rows():
    assert numbered([0] * 3 + [1] * 3 + [2] * 3 + [3] * 8 + [4] * 5 + [5] * 4) == [0] * 9 + [1] * 8 + [2] * 9
    assert numbered([0] * 3 + [1] * 3) == [0] * 6
    assert numbered([0] * 9 + [1] * 2) == [0] * 11, "too few at the end join what was before"
    assert numbered([7, 0, 0, 0, 0, 0, 0, 0, 0]) == [0] * 9, "in any order"


def test_pilots_have_a_level_of_their_own_and_rows_of_targets_join_them():
    served, passes = [0] * 8, [1] * 10
    assert numbered(served + passes, passes=range(8, 18)) == [0] * 8 + [1] * 10
    assert numbered(served + passes, passes=range(8, 16), goals=range(16, 18)) == [0] * 8 + [1] * 10
    assert numbered(served + passes, goals=range(8, 18)) == [0] * 18, "without pilots that of the steps before"
    assert numbered([*served, *passes, *[1] * 8], goals=range(8, 18)) == [0] * 18 + [1] * 8


def test_values_are_centred_within_groups():
    found = centred(np.array([[1.0], [3.0], [10.0]]), np.array([0, 0, 1]))
    assert found.ravel().tolist() == [-1, 1, 0]


def a_run(**attributes):
    run = object.__new__(InRun)
    vars(run).update(attributes)
    return run


def seen_of(rows, sketches, *, pilots=(), intervals=0, steps=0, scores=np.nan, values=0, unbiased=True):
    """Observations [n]: of rows that were served, but for those numbered ``pilots``."""
    count = len(rows)
    return Observations(
        rows=np.array(rows),
        intervals=np.zeros(count, int) + intervals,
        steps=np.zeros(count, int) + steps,
        sketches=sketches,
        values=np.ones((count, values)),
        scores=np.zeros((count, 1)) + scores,
        unbiased=np.zeros(count, bool) | unbiased,
        pilots=np.isin(np.arange(count), pilots),
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_a_target_row_is_compared_with_the_direction_of_the_others(normalize):
    """Three target rows of one target after 10 rows of the pool, whose direction is their mean, twice as long."""
    rng = np.random.default_rng(5)
    sketches = rng.normal(size=(3, 6))
    mean = 2.0 * sketches.mean(axis=0)
    kept = []
    run = a_run(
        spec=SimpleNamespace(normalize=normalize),
        budget=0.1,
        asked=(),
        space=SimpleNamespace(num_rows=10),
        aims=mean[None] / np.linalg.norm(mean),
        _firsts=np.array([10, 13]),
        _note=lambda rows, interval, steps, values, *, unbiased, scores: kept.append((rows, scores[:, 0])),
    )
    shares = np.array([2.0 / np.linalg.norm(mean) / 3])
    order = np.array([2, 0, 1])  # as ranks found them
    InRun._note_goals(
        run, [(10 + order, sketches[order])], Interval(index=1, kind="dynamic", start_step=10, stop_step=20), shares
    )
    others = [np.delete(sketches, own, axis=0).mean(axis=0) for own in range(3)]
    wanted = np.array([row @ mean / np.linalg.norm(mean) for row, mean in zip(sketches, others, strict=True)])
    ((rows, found),) = kept
    assert rows.tolist() == [10, 11, 12]
    np.testing.assert_allclose(found, wanted / (np.linalg.norm(sketches, axis=1) if normalize else 1.0), rtol=1e-9)


def test_served_rows_are_compared_with_the_newest_directions_and_pilots_keep_their_score():
    """Rows 3 and 8 were served, row 5 is a pilot."""
    run = a_run(spec=SimpleNamespace(normalize=False), products=False, aims=np.array([[0.0, 1.0]]))
    kept = np.array([[np.nan], [9.0], [np.nan]])
    run.seen = seen_of([3, 5, 8], np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), pilots=[1], scores=kept)
    run._score_served()
    assert run._of(run.seen).ravel().tolist() == [2, 9, 6]
    run.aims = np.array([[1.0, 0.0]])
    run._score_served()
    assert run._of(run.seen).ravel().tolist() == [1, 9, 5]
    assert np.isnan(kept).sum() == 2, "what a checkpoint shares with it is left alone"


class Features:
    """Ten features of each row, drawn."""

    def __init__(self, rows):
        self.dense = np.random.default_rng(3).normal(size=(rows, 10))

    def matrix(self, rows):
        return csr_matrix(self.dense[rows])

    def times(self, rows, weights):
        return self.dense[rows] @ weights


def judged(served_scores, *, pilots, seed=1):
    """A run that saw rows 0 to 299 in part: 75 served in each of two intervals, and ``pilots`` at each decision.

    Pilots' scores are linear in ten features of a row but for some noise; those of served rows are as given.
    """
    rng, features = np.random.default_rng(seed), Features(300)
    truth = features.dense @ rng.normal(size=10)
    rows = rng.permutation(300)[: 150 + 2 * pilots]
    run = a_run(
        spec=SimpleNamespace(normalize=False),
        space=SimpleNamespace(num_rows=300),
        targets=("t",),
        asked=(),
        scores=(),
        embeddings=(),
        budget=0.1,
        total_steps=100,
        products=False,
        aims=np.ones((1, 1)),
        forgetting=0.9,
        _features=features,
        _firsts=np.array([300, 301]),
        told={},
    )
    at = np.repeat([0, 1, 1, 2], [75, pilots, 75, pilots])
    passes = np.repeat([False, True, False, True], [75, pilots, 75, pilots])
    scores = np.where(passes, truth[rows], served_scores(truth, rng)[rows]) + 0.3 * rng.normal(size=len(rows))
    run.seen = seen_of(
        rows,
        np.zeros((len(rows), 1)),
        pilots=np.flatnonzero(passes),
        intervals=at,
        steps=10 * at,
        scores=scores[:, None],
    )
    return run, truth


def alike(truth, rng):
    return truth


def noise(truth, rng):
    return rng.normal(size=len(truth)) * truth.std()


@pytest.mark.parametrize(
    ("served", "pilots", "trusted"), [(alike, 12, True), (alike, 0, True), (noise, 40, True), (noise, 0, False)]
)
def test_predictions_are_trusted_where_they_foretell_rows_that_were_drawn(served, pilots, trusted):
    run = judged(served, pilots=pilots)[0]
    run._judge()
    assert (run.told["correlation"] > 0.3) == trusted
    assert (run.trust > 0.95) == trusted


@pytest.mark.parametrize("pilots", [0, 8, 16])
def test_where_nothing_can_be_foretold_trust_is_nearly_even(pilots):
    """Scores are noise, those of pilots too: correlations are as often above 0 as below, also of few rows."""
    found = []
    for seed in range(40):
        run = judged(noise, pilots=pilots, seed=seed)[0]
        noisy = np.random.default_rng(seed).normal(size=(len(run.seen.rows), 1))
        run.seen = dataclasses.replace(run.seen, scores=noisy)
        run._judge()
        found.append(run.told["correlation"])
    assert abs(np.mean(found)) < 4 * np.std(found) / len(found) ** 0.5
    assert 8 < np.sum(np.array(found) > 0) < 32


@pytest.mark.parametrize(
    ("by_interval", "count"),
    [((40, 40, 40, 40), 120), ((40, 40, 8, 8, 8), 64), ((40, 8, 8, 8), 64), ((0, 0, 0, 7), 0), ((0, 0, 0, 8), 8)],
)
def test_the_newest_rows_that_were_drawn_are_judged_each_by_others(monkeypatch, by_interval, count):
    """Those of three intervals, and of as many more as 64 rows take; fewer than 8 say nothing."""
    run = judged(alike, pilots=0)[0]
    at, asked = np.repeat(np.arange(len(by_interval)), by_interval), []
    run.seen = seen_of(range(len(at)), np.zeros((len(at), 1)), intervals=at, steps=at, scores=at[:, None] * 1.0)
    monkeypatch.setattr(
        InRun, "_scores", lambda self, seen, rows: asked.append((seen.rows, rows)) or np.ones((len(rows), 1))
    )
    run._judge()
    held_out = [np.setdiff1d(rows, others) for others, rows in asked]
    assert np.array_equal(np.sort(np.concatenate([[], *held_out])), np.arange(len(at))[len(at) - count :])


def test_served_rows_count_less_beside_pilots(monkeypatch):
    """What 150 served rows show is noise here, and 80 pilots know better."""
    run, truth = judged(noise, pilots=40)

    def found(seen):
        return np.corrcoef(run._scores(seen, np.arange(300))[:, 0], truth)[0, 1]

    served, both = found(run.seen.where(~run.seen.pilots)), found(run.seen)
    monkeypatch.setattr(in_run, "_SERVED", 1.0)
    assert abs(served) < 0.5
    assert found(run.seen) < both
    assert both > 0.8


def test_a_regression_is_fitted_to_a_bounded_number_of_rows_and_every_row_has_its_residuals(monkeypatch):
    run, truth = judged(alike, pilots=40)
    whole, fits = run._scores(run.seen, np.arange(300))[:, 0], []
    fitted = in_run.fitted
    monkeypatch.setattr(in_run, "fitted", lambda x, *rest, **more: fits.append(x.shape[0]) or fitted(x, *rest, **more))
    monkeypatch.setattr(observations, "_FITTED_ROWS", 60)
    some = run._scores(run.seen, np.arange(300))[:, 0]
    assert fits == [120], "60 pilots and 60 served rows"
    assert np.corrcoef(some, truth)[0, 1] > 0.97 * np.corrcoef(whole, truth)[0, 1] > 0.9
    left = observations.fitted_to(run.seen.pilots)
    unfitted = np.setdiff1d(np.arange(len(run.seen.rows)), left)
    known = run.seen.rows[unfitted]
    monkeypatch.setattr(
        in_run, "row_effects", lambda rows, residuals, *rest: effects.append(residuals) or np.zeros((301, 1))
    )
    effects = []
    linear = run._scores(run.seen, np.arange(300))[:, 0]
    assert len(effects[0]) == len(run.seen.rows)
    assert np.abs(some[known] - linear[known]).min() > 0, "rows that the fit left out have an effect of their own"


def test_the_newest_pilots_and_served_rows_evenly_are_fitted_to(monkeypatch):
    monkeypatch.setattr(observations, "_FITTED_ROWS", 3)
    pilots = np.isin(np.arange(12), [1, 4, 5, 9])
    assert observations.fitted_to(pilots).tolist() == [0, 4, 5, 6, 9, 11]
    monkeypatch.setattr(observations, "_FITTED_ROWS", 8)
    assert observations.fitted_to(pilots).tolist() == list(range(12))


def interval(index, stop=50):
    return Interval(index=index, kind="dynamic", start_step=20, stop_step=stop)


def test_pilots_count_less_from_decision_to_decision():
    """10 and 10 pilots in intervals 1 and 2."""
    run = judged(alike, pilots=10)[0]
    assert run._pilots_count(interval(2)).sum() == pytest.approx(10 + 0.9 * 10)
    assert run._pilots_count(interval(3)).sum() == pytest.approx(0.9 * 10 + 0.81 * 10)
    assert judged(alike, pilots=0)[0]._pilots_count(interval(3)).sum() == 0


@pytest.mark.parametrize(
    ("pilots", "index", "asked", "enough"),
    [
        (8, 3, (), True),
        (7, 3, (), False),
        (8, 44, (), True),  # 0.9 ** 43 is above 0.01, from which on predictions take a row
        (8, 45, (), False),  # those of interval 1 are too old
        (8, 3, ("loss",), False),
    ],
)
def test_steps_are_not_listened_to_where_predictions_have_pilots(pilots, index, asked, enough):
    """8 and 8 pilots in intervals 1 and 2."""
    run = judged(alike, pilots=pilots)[0]
    run.asked = asked
    assert run._knows_enough(interval(index)) == enough


def test_the_steps_of_the_last_interval_are_not_listened_to_unless_methods_ask():
    run = judged(alike, pilots=10)[0]
    assert [run._last(interval(2, stop)) for stop in (99, 100)] == [False, True]
    run.asked = ("loss",)
    assert not run._last(interval(2, 100))


@pytest.mark.parametrize(("pilots", "left", "share"), [(0, 319, 1.0), (0, 320, 0.5), (9, 12, 1.0), (9, 13, 0.5)])
def test_half_is_for_pilots_where_that_makes_them_enough(pilots, left, share):
    """A pilot costs 2 x 5 tokens; 9 and 9 of them count 15.39 at decision 3, and 0.61 more are 16."""
    run = judged(alike, pilots=pilots)[0]
    run.space.lengths = np.array([4.0, 6.0])
    assert run._for_targets(interval(3), left, 2.0) == pytest.approx(left * share)
    run.budget = None
    assert run._for_targets(interval(3), left, 2.0) == left


def test_products_of_rows_are_those_of_their_predicted_gradients():
    """Rows 0 and 1 have gradients alike, 2 goes the other way, 3 has no supervised token; two targets, one value."""
    rng = np.random.default_rng(7)
    base, aims = rng.normal(size=300), np.linalg.qr(rng.normal(size=(300, 2)))[0].T
    sketches = np.stack([base, base + 0.1 * rng.normal(size=300), -base, rng.normal(size=300)])
    run = a_run(
        spec=SimpleNamespace(normalize=False),
        space=SimpleNamespace(num_rows=4),
        products=True,
        seed=3,
        targets=("a", "b"),
        asked=("norm",),
        aims=aims,
    )
    run.seen = seen_of(range(4), sketches, values=1, scores=np.full((4, 2), np.nan))
    run._score_served()
    run._predicted = run._of(run.seen)
    assert run._predicted.shape == (4, 2 + 1 + in_run._GRAM)
    run._predicted[3] = np.nan
    signal = GradientProducts(targets=("b", "a"), precondition="none")
    scores, gram = signal.split(run.answer(signal, np.arange(4)))
    np.testing.assert_allclose(scores[:3], (sketches @ aims.T)[:3, ::-1], rtol=1e-5)
    exact, size = sketches[:3] @ sketches[:3].T, base @ base
    assert np.abs(gram[:3, :3] - exact).max() < 5 * size / in_run._GRAM**0.5
    assert np.array_equal(np.sign(gram[:3, :3]), np.sign(exact))
    np.testing.assert_array_equal(gram[:3, :3], gram[:3, :3].T)
    assert np.isnan(gram[3]).all()
    assert np.isnan(gram[:, 3]).all()
    run.products = False
    run._predicted = run._predicted[:, :3]
    assert run.answer(signal, np.arange(4)) is None, "the model is asked"


def test_the_newest_of_each_row_is_kept_and_no_more_than_fit(monkeypatch):
    monkeypatch.setattr(observations, "_KEPT_NUMBERS", 8)
    old = Newest(
        rows=np.array([3, 1, 3]), steps=np.array([0, 0, 1]), values=np.array([[0.0, 0], [1, 1], [2, 2]])
    ).and_()
    assert old.rows.tolist() == [1, 3]
    assert old.values[:, 0].tolist() == [1, 2]
    both = old.and_(Newest(rows=np.array([1, 7]), steps=np.array([2, 2]), values=np.array([[3.0, 3], [4, 4]])))
    assert (both.rows.tolist(), both.steps.tolist(), both.values[:, 0].tolist()) == ([3, 1, 7], [1, 2, 2], [2, 3, 4])
    more = Newest(rows=np.array([8, 9]), steps=np.array([3, 3]), values=np.array([[5.0, 5], [6, 6]]))
    assert both.and_(more).rows.tolist() == [1, 7, 8, 9]


def shown_by(steps, *, sketches, monkeypatch, held=6):
    """A run that has seen 4 rows in each of ``steps``, with the numbers of their steps as all that was seen."""
    monkeypatch.setattr(in_run, "HELD_ROWS", held)
    run = a_run(targets=("t",) if sketches else (), budget=0.1, asked=(), _newest={}, _interval=0, seen=None)
    vars(run).update(_pending=[], _sketched=deque(), _num_pending=0, _num_sketched=0, explored=np.array([5]))
    most = 0
    for step in range(steps):
        rows = 4 * step + np.arange(4)
        seen = {"losses": torch.full((4, 1), float(step)), "": torch.full((4, 3), float(step))}
        run._hold(step, rows, seen)
        on_device = sum(len(each[1]) for each in run._sketched), run._num_pending
        most = max(most, *on_device)
    return run, most


@pytest.mark.parametrize("sketches", [True, False])
def test_the_device_holds_what_the_newest_rows_showed(monkeypatch, sketches):
    """Of sketches no more are used; of losses all are."""
    run, most = shown_by(5, sketches=sketches, monkeypatch=monkeypatch)
    assert most <= 6
    run.gather()
    assert run._newest["losses"].rows.tolist() == list(range(20))
    assert run.seen.rows.tolist() == (list(range(16, 20)) if sketches else list(range(20)))
    assert run.seen.unbiased.tolist() == [row == 5 for row in run.seen.rows]
    assert not run._pending
    assert not run._sketched
    run.gather()
    assert run._newest["losses"].steps.tolist() == [step for step in range(5) for _ in range(4)]


def test_steps_that_a_loss_scale_undid_are_left_out(monkeypatch):
    run, _ = shown_by(2, sketches=True, monkeypatch=monkeypatch, held=99)
    run._sketched[0][2][""][2, 1] = torch.inf
    run._pending[1][2]["losses"][3] = torch.nan
    run.gather()
    assert run._newest["losses"].rows.tolist() == [4, 5, 6]
    assert run.seen.rows.tolist() == [4, 5, 6, 7]


def test_decisions_use_one_thread_of_numpy(monkeypatch):
    """More spin while matrices of a few hundred rows are decomposed, and sums would depend on their number."""

    def threads():
        return {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}

    seen = []
    monkeypatch.setattr(InRun, "gather", lambda self: seen.append(threads()))
    with threadpool_limits(limits=2, user_api="blas"):
        before = threads()
        with pytest.raises(AttributeError):  # nothing but what is asked first
            InRun.decide(object.__new__(InRun), None, 8)
        assert threads() == before
    assert seen == [{1}]
