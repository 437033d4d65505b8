"""LESS, GraNd and EL2N on given gradients: aggregation, checkpoints, ties, rows without labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.errors import ConfigError, DataError
from dataflex.select.scoring import Aggregate
from dataflex.selectors.influence import Less, lr_weighted
from dataflex.selectors.losses import El2n, GradNorm
from dataflex.signals.kinds import GradientScores
from dataflex.testing import FakeSignals, example_context


def pool_of(count):
    return np.arange(count, dtype=np.int64)


class GivenScores(FakeSignals):
    """Answers gradient questions with given scores by target."""

    def __init__(self, by_task):
        super().__init__(np.ones(len(by_task)), values={GradientScores: by_task})


def less(**params):
    return Less(Less.Params(**params))


def context(by_task, **options):
    by_task = np.asarray(by_task)
    targets = tuple(f"task{i}" for i in range(by_task.shape[1]))
    learning_rate = options.pop("learning_rate", 1.0)
    ctx = example_context({"all": len(by_task)}, signals=GivenScores(by_task), targets=targets, **options)
    object.__setattr__(ctx, "learning_rate", learning_rate)
    return ctx


def test_learning_rates_of_the_papers_checkpoints():
    rates = [1.6877e-05, 1.2859e-05, 7.7030e-06, 2.5616e-06]
    weights = lr_weighted([np.eye(4, dtype=np.float32)[i] for i in range(4)], rates)
    np.testing.assert_allclose(weights, [0.4219, 0.3215, 0.1926, 0.0640], atol=6e-5)
    assert lr_weighted([np.array([1.0]), np.array([3.0])], [0.0, 0.0]) == [2.0]


def test_aggregation_toy_of_the_sheet():
    """Means in the tasks (.5, .4) and (.2, .35): the largest are .5 and .35, the means .45 and .275."""
    by_task = [[0.5, 0.4], [0.2, 0.35]]
    np.testing.assert_allclose(less().select(pool_of(2), 2, context(by_task)).scores, [0.5, 0.35])
    mean = less(aggregate=Aggregate.of("mean")).select(pool_of(2), 2, context(by_task)).scores
    np.testing.assert_allclose(mean, [0.45, 0.275], rtol=1e-6)


def test_round_robin_toy_of_the_sheet():
    by_task = np.array([[0.9, 0.8, 0.1], [0.95, 0.2, 0.3]]).T
    assert less(aggregate=Aggregate.of("round_robin")).select(pool_of(3), 2, context(by_task)).rows.tolist() == [0, 2]
    assert less().select(pool_of(3), 2, context(by_task)).rows.tolist() == [0, 1]


@given(
    scores=st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=1, max_size=20),
    budget=st.integers(1, 20),
)
@settings(max_examples=50, deadline=None)
def test_the_best_rows_are_kept_and_ties_go_by_pool_order(scores, budget):
    budget = min(budget, len(scores))
    chosen = less().select(pool_of(len(scores)), budget, context(np.array(scores, dtype=float)))
    wanted = sorted(range(len(scores)), key=lambda i: (-max(scores[i]), i))[:budget]
    assert chosen.rows.tolist() == wanted


def test_scores_accumulate_over_intervals_and_survive_a_resume():
    first, second, third = (np.array([[a], [b]]) for a, b in ((1.0, 0.0), (0.0, 1.0), (0.0, 0.5)))
    method = less(checkpoints=2)
    method.select(pool_of(2), 1, context(first, learning_rate=3e-4))
    both = method.select(pool_of(2), 1, context(second, learning_rate=1e-4))
    np.testing.assert_allclose(both.scores, [0.75, 0.25])
    assert "over 2 intervals" in both.reason
    resumed = less(checkpoints=2)
    resumed.load_state_dict(method.state_dict())
    for selector in (method, resumed):
        last = selector.select(pool_of(2), 1, context(third, learning_rate=1e-4))
        np.testing.assert_allclose(last.scores, [0.0, 0.75])
    assert less().state_dict() == {}


def test_checkpoints_need_the_same_pool():
    method = less(checkpoints=2)
    method.select(pool_of(3), 1, context(np.ones((3, 1))))
    with pytest.raises(ConfigError, match="pool_fraction"):
        method.select(pool_of(2), 1, context(np.ones((3, 1))))


def test_rows_without_labels_are_never_kept_and_their_number_is_told():
    by_task = np.array([[0.1, 0.2], [np.nan, np.nan], [0.3, 0.1]])
    chosen = less().select(pool_of(3), 3, context(by_task))
    assert chosen.rows.tolist() == [2, 0]
    assert "1 rows have no supervised token" in chosen.reason
    with pytest.raises(DataError, match="all 2 rows"):
        less().select(pool_of(2), 1, context(np.full((2, 1), np.nan)))


def test_parameters_reach_the_gradient_engine():
    signals = GivenScores(np.ones((3, 1)))
    ctx = example_context({"all": 3}, signals=signals, targets=("goal",), seed=9)
    less(
        precondition="paper_repo",
        include_momentum=False,
        normalize=False,
        target_gradient="cosine_of_mean",
        sketch_size=64,
        parameters="lora_B",
        last_blocks=2,
        bf16=True,
    ).select(pool_of(3), 1, ctx)
    (call,) = signals.calls
    spec = call.asked
    assert (spec.precondition, spec.include_momentum, spec.normalize, spec.mean_of_cosines) == (
        "paper_repo",
        False,
        False,
        False,
    )
    assert (spec.sketch_size, spec.sketch_seed, spec.parameters, spec.last_blocks, spec.bf16) == (
        64,
        9,
        "lora_B",
        2,
        True,
    )
    assert call.options["targets"] == ("goal",)


@pytest.mark.parametrize(("cls", "losses"), [(GradNorm, [3.0, 1.0, 2.0, 3.0]), (El2n, [3.0, 1.0, 2.0, 3.0])])
def test_the_hardest_or_the_easiest_are_kept(cls, losses):
    def chosen(keep, values):
        signals = FakeSignals(values, gradients=np.array(values)[:, None])
        ctx = example_context({"all": len(values)}, signals=signals)
        return cls(cls.Params(keep=keep)).select(pool_of(len(values)), 2, ctx).rows.tolist()

    assert chosen("largest", losses) == [0, 3]
    assert chosen("smallest", losses) == [1, 2]
    assert chosen("largest", [np.nan, 1.0, np.nan, 2.0]) == [3, 1]
    with pytest.raises(DataError, match="all 2 rows have no supervised token"):
        chosen("largest", [np.nan, np.nan])
