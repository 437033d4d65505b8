"""ICONS: votes by percentile, ties by mean percentile rank, tasks by name."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.config.build import method_block
from dataflex.errors import ComponentError, DataError
from dataflex.select.scoring import count_votes, percentile_ranks
from dataflex.selectors.influence import Icons
from dataflex.signals.kinds import GradientScores
from dataflex.testing import FakeSignals, example_context

GOLDEN = np.array([[0.9, 0.1, 0.2], [0.8, 0.7, 0.1], [0.1, 0.9, 0.8], [0.2, 0.2, 0.9], [0.3, 0.3, 0.3]])


class GivenScores(FakeSignals):
    """Answers gradient questions with given scores by target."""

    def __init__(self, by_task):
        super().__init__(np.ones(len(by_task)), values={GradientScores: by_task})


def icons(**params):
    return Icons(Icons.Params(**params))


def choose(by_task, budget, seed=0, **params):
    by_task = np.asarray(by_task, dtype=float)
    targets = tuple(f"task{i}" for i in range(by_task.shape[1]))
    signals = GivenScores(by_task)
    ctx = example_context({"all": len(by_task)}, signals=signals, targets=targets, seed=seed)
    return icons(**params).select(np.arange(len(by_task)), budget, ctx), signals


def test_votes_of_the_worked_example():
    """Thresholds (.5, .46, .5) at p = 40 give the votes (1, 2, 2, 1, 0); the largest influence picks another set."""
    np.testing.assert_allclose(np.percentile(GOLDEN, 60, axis=0), [0.5, 0.46, 0.5])
    assert count_votes(GOLDEN, 40.0).tolist() == [1, 2, 2, 1, 0]
    chosen, _ = choose(GOLDEN, 2, vote_percent=40.0)
    assert set(chosen.rows.tolist()) == {1, 2}
    assert GOLDEN.max(axis=1).tolist() == [0.9, 0.8, 0.9, 0.9, 0.3]
    assert set(np.argsort(-GOLDEN.max(axis=1), kind="stable")[:2].tolist()) != {1, 2}


def oracle(influence, vote_percent):
    """Votes and doubled mean ranks, one row and one task at a time."""
    rows = []
    for i, mine in enumerate(influence):
        votes, rank = 0, 0
        for t, value in enumerate(mine):
            column = sorted(row[t] for row in influence)
            place = (1 - vote_percent / 100) * (len(column) - 1)
            low = min(int(place), len(column) - 2) if len(column) > 1 else 0
            high = min(low + 1, len(column) - 1)
            threshold = column[low] + (place - low) * (column[high] - column[low])
            votes += value >= threshold - 1e-12
            rank += 2 * sum(other < value for other in column) + sum(other == value for other in column)
        rows.append((-votes, -rank, i))
    return rows


@given(
    influence=st.lists(st.tuples(*[st.integers(-3, 3)] * 3), min_size=1, max_size=15),
    budget=st.integers(1, 15),
    vote_percent=st.sampled_from([12.5, 25.0, 50.0, 100.0]),
)
@settings(max_examples=80, deadline=None)
def test_rows_are_those_of_most_votes_then_highest_ranks_then_first(influence, budget, vote_percent):
    chosen, _ = choose(influence, budget, vote_percent=vote_percent)
    wanted = sorted(oracle(influence, vote_percent))
    assert chosen.rows.tolist() == [i for _, _, i in wanted[:budget]]
    for votes, rank, i in wanted:
        assert chosen.scores[i] == pytest.approx(-votes - rank / (2 * len(influence) * 3))


def test_ranks_are_between_zero_and_one_and_equal_values_share_one():
    np.testing.assert_allclose(percentile_ranks(np.array([[5.0], [1.0], [5.0], [7.0]])), [0.5, 0.125, 0.5, 0.875])
    np.testing.assert_allclose(percentile_ranks(np.array([[1.0, 9.0], [2.0, 8.0]])), [0.5, 0.5])


def test_ties_of_votes_are_decided_by_ranks_not_by_order():
    by_task = [[0.8, 0.1], [0.9, 0.8], [0.1, 0.9], [0.2, 0.2]]
    chosen, _ = choose(by_task, 4, vote_percent=50.0)
    assert count_votes(np.array(by_task), 50.0).tolist() == [1, 2, 1, 0]
    assert chosen.rows.tolist() == [1, 2, 0, 3]  # ranks 3 + 1 and 1 + 4


def test_one_task_is_ranked_by_its_influence():
    chosen, _ = choose([[0.1], [0.4], [0.3], [0.2]], 3, vote_percent=25.0)
    assert chosen.rows.tolist() == [1, 2, 3]


def test_soft_votes_are_mean_ranks():
    chosen, _ = choose([[9.0, 1.0], [8.0, 8.0], [1.0, 9.0], [0.0, 0.0]], 4, votes="borda")
    np.testing.assert_allclose(chosen.scores, [(7 + 3) / 16, (5 + 5) / 16, (3 + 7) / 16, 1 / 8])
    assert chosen.rows.tolist() == [0, 1, 2, 3]


def test_tasks_are_asked_for_by_name_with_plain_gradients():
    _, signals = choose(GOLDEN, 2, seed=5, sketch_size=64)
    (call,) = signals.calls
    assert call.options["targets"] == ("task0", "task1", "task2")
    spec = call.asked
    assert (spec.precondition, spec.normalize, spec.mean_of_cosines) == ("none", True, True), "as published"
    _, signals = choose(GOLDEN, 2, target_gradient="cosine_of_mean")
    assert not signals.calls[0].asked.mean_of_cosines
    assert (spec.sketch_size, spec.sketch_seed) == (64, 5)


def test_rows_without_labels_neither_vote_nor_win():
    by_task = np.vstack([GOLDEN, [[np.nan] * 3]])
    chosen, _ = choose(by_task, 6, vote_percent=40.0)
    assert sorted(chosen.rows.tolist()) == [0, 1, 2, 3, 4]
    assert np.floor(chosen.scores[:5]).tolist() == [1, 2, 2, 1, 0]
    assert "1 rows have no supervised token" in chosen.reason
    with pytest.raises(DataError, match="all 2 rows"):
        choose(np.full((2, 2), np.nan), 1)


def test_equal_influences_are_taken_in_pool_order():
    chosen, _ = choose(np.ones((5, 2)), 3)
    assert chosen.rows.tolist() == [0, 1, 2]


def test_influences_of_other_rows_are_refused():
    short = {GradientScores: lambda signal, rows, _: np.ones((len(rows) - 1, len(signal.targets)))}
    with pytest.raises(ComponentError, match="icons: asked for the scores of 3 rows"):
        icons().select(np.arange(3), 1, example_context({"all": 3}, signals=FakeSignals(np.ones(3), values=short)))


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ({"vote_percent": 0}, "vote_percent: must be above 0"),
        ({"vote_percent": 101}, "vote_percent: must be at most 100"),
        ({"votes": "bordas"}, "did you mean 'borda'"),
        ({"vote_percnt": 5}, "did you mean 'vote_percent'"),
    ],
)
def test_mistakes_are_told(block, problem):
    problems = []
    assert method_block("selector", {"name": "icons", "targets": ["a"], **block}, "dynamic.selector", problems) is None
    assert problem in problems[0]
