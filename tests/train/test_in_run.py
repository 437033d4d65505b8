"""Parts of decisions within a budget: levels of observations, and target rows compared with the others."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dataflex.train.in_run import InRun, Observations, centred, levels


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
        _kept=lambda seen: np.ones(len(seen.rows)),
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


def test_what_a_row_keeps_of_the_length_of_its_first_gradient():
    """Row 0 falls to a third of its length where others fall to two thirds: half; row 1 grows: at most 1."""
    run = SimpleNamespace(_first=np.full((4, 2), np.nan), _lengths=np.zeros((0, 2)))

    def seen(rows, interval, lengths, unbiased):
        none = np.zeros(len(rows), bool)
        return Observations(
            rows=np.array(rows), intervals=np.full(len(rows), interval), steps=np.full(len(rows), interval),
            sketches=np.array(lengths, np.float32)[:, None] * [[0.6, 0.8]], values=np.zeros((len(rows), 0)),
            unbiased=np.array(unbiased), pilots=none,
        )  # fmt: skip

    first = seen([0, 1, 2], 0, [3.0, 3.0, 3.0], [True, True, True])
    later = seen([0, 1, 3, 3], 1, [1.0, 4.0, 2.0, 2.0], [False, False, True, True])
    for new in (first, later):
        InRun._note_lengths(run, new)
    np.testing.assert_allclose(InRun._kept(run, first), 1.0)
    np.testing.assert_allclose(InRun._kept(run, later), [0.5, 1.0, 1.0, 1.0], rtol=1e-6)
    chosen = seen([2], 2, [1.0], [False])  # none was drawn in this interval
    InRun._note_lengths(run, chosen)
    np.testing.assert_allclose(InRun._kept(run, chosen), [0.5], rtol=1e-6)
    together = SimpleNamespace(_first=np.full((4, 2), np.nan), _lengths=np.zeros((0, 2)))
    for start in range(3):  # the same sums to the bit, whenever steps are gathered
        InRun._note_lengths(together, first.where([start]))
    for start in range(4):
        InRun._note_lengths(together, later.where([start]))
    InRun._note_lengths(together, chosen)
    assert np.array_equal(run._lengths, together._lengths)
    assert np.array_equal(run._first, together._first, equal_nan=True)
