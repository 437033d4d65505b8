"""Parts of decisions within a budget: levels of observations, and target rows compared with the others."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

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


def test_less_is_chosen_while_the_targets_losses_do_not_fall():
    """Pool of 10 rows, 8 target rows; a row is compared with the time when it was looked at last, whenever that was."""
    run = SimpleNamespace(space=SimpleNamespace(num_rows=10), told={}, share=1.0, _target_losses=np.full(8, np.nan))
    looks = [  # rows, their losses, the share afterwards
        (range(10, 16), [3.0] * 6, 1.0),  # nothing to compare with
        (range(14, 18), [9.0] * 4, 1.0),  # two rows are too few
        (range(10, 14), [2.9, 3.2, 3.0, 3.0], 0.5),
        (range(14, 18), [9.0] * 4, 0.25),  # no change is no gain
        (range(10, 18), [2.8] * 8, 0.5),
        (range(10, 18), [2.7] * 8, 1.0),
        (range(10, 18), [2.6] * 8, 1.0),
    ]
    for rows, losses, share in looks:
        InRun._compare(run, [(np.array(rows)[::-1], np.array(losses)[::-1])])
        assert run.share == share
    assert run.told["target change"] == pytest.approx(-0.1)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_target_row_is_compared_with_the_direction_of_the_others(normalize):
    """Three target rows of one target after 10 rows of the pool, whose direction is their mean, twice as long."""
    rng = np.random.default_rng(5)
    sketches = rng.normal(size=(4, 6))
    mean = 2.0 * sketches[1:].mean(axis=0)
    run = SimpleNamespace(
        spec=SimpleNamespace(normalize=normalize),
        products=False,
        space=SimpleNamespace(num_rows=10),
        aims=mean[None] / np.linalg.norm(mean),
        _firsts=np.array([10, 13]),
        _own=np.array([2.0 / np.linalg.norm(mean) / 3]),
        _aimed_at=1,
    )
    same = {"steps": np.zeros(4, int), "unbiased": np.zeros(4, bool), "pilots": np.ones(4, bool)}
    seen = Observations(
        rows=np.array([4, 10, 11, 12]), intervals=np.full(4, 1), sketches=sketches, values=np.zeros((4, 0)), **same
    )
    found = InRun._of(run, seen)[:, 0]
    wanted = [sketches[0] @ mean / np.linalg.norm(mean)]
    for own in (1, 2, 3):
        others = np.delete(sketches[1:], own - 1, axis=0).mean(axis=0)
        wanted.append(sketches[own] @ others / np.linalg.norm(others))
    lengths = np.linalg.norm(sketches, axis=1) if normalize else 1.0
    np.testing.assert_allclose(found, np.array(wanted) / lengths, rtol=1e-9)


def test_products_of_rows_are_those_of_their_predicted_gradients():
    """Rows 0 and 1 have gradients alike, 2 goes the other way, 3 has no supervised token; two targets, one value."""
    rng = np.random.default_rng(7)
    base, aims = rng.normal(size=300), np.linalg.qr(rng.normal(size=(300, 2)))[0].T
    sketches = np.stack([base, base + 0.1 * rng.normal(size=300), -base, rng.normal(size=300)])
    run = SimpleNamespace(
        spec=SimpleNamespace(normalize=False),
        space=SimpleNamespace(num_rows=4),
        products=True,
        seed=3,
        targets=("a", "b"),
        asked=("norm",),
        aims=aims,
        _firsts=np.array([4, 5, 6]),
        _own=np.zeros(2),
        _aimed_at=0,
    )
    seen = Observations(
        rows=np.arange(4),
        intervals=np.zeros(4, int),
        steps=np.zeros(4, int),
        sketches=sketches,
        values=np.ones((4, 1)),
        unbiased=np.ones(4, bool),
        pilots=np.zeros(4, bool),
    )
    run._predicted = InRun._of(run, seen)
    assert run._predicted.shape == (4, 2 + 1 + in_run._GRAM)
    run._predicted[3] = np.nan
    signal = GradientProducts(targets=("b", "a"), precondition="none")
    scores, gram = signal.split(InRun.answer(run, signal, np.arange(4)))
    np.testing.assert_allclose(scores[:3], (sketches @ aims.T)[:3, ::-1], rtol=1e-5)
    exact, size = sketches[:3] @ sketches[:3].T, base @ base
    assert np.abs(gram[:3, :3] - exact).max() < 5 * size / in_run._GRAM**0.5
    assert np.array_equal(np.sign(gram[:3, :3]), np.sign(exact))
    np.testing.assert_array_equal(gram[:3, :3], gram[:3, :3].T)
    assert np.isnan(gram[3]).all()
    assert np.isnan(gram[:, 3]).all()
    run.products = False
    run._predicted = run._predicted[:, :3]
    assert InRun.answer(run, signal, np.arange(4)) is None, "the model is asked"


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
