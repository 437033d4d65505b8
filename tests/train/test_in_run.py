"""Parts of decisions within a budget: levels of observations, and target rows compared with the others."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dataflex.train import in_run
from dataflex.train.in_run import InRun, Newest, Observations, centred, levels


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


def test_the_newest_of_each_row_is_kept_and_no_more_than_fit(monkeypatch):
    monkeypatch.setattr(in_run, "_KEPT_NUMBERS", 8)
    old = Newest(
        rows=np.array([3, 1, 3]), steps=np.array([0, 0, 1]), values=np.array([[0.0, 0], [1, 1], [2, 2]])
    ).and_()
    assert old.rows.tolist() == [1, 3]
    assert old.values[:, 0].tolist() == [1, 2]
    both = old.and_(Newest(rows=np.array([1, 7]), steps=np.array([2, 2]), values=np.array([[3.0, 3], [4, 4]])))
    assert (both.rows.tolist(), both.steps.tolist(), both.values[:, 0].tolist()) == ([3, 1, 7], [1, 2, 2], [2, 3, 4])
    more = Newest(rows=np.array([8, 9]), steps=np.array([3, 3]), values=np.array([[5.0, 5], [6, 6]]))
    assert both.and_(more).rows.tolist() == [1, 7, 8, 9]
