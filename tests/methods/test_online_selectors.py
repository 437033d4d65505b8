"""GREATS, OPUS and UDS on given products and logits, and the candidates that every step is given."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dataflex.errors import CheckpointError, ConfigError, DataError
from dataflex.plan.planner import Candidates
from dataflex.plan.schedule import Interval, Schedule
from dataflex.selectors.candidates import Greats, Opus, Uds, mean_distances, pick, scaled_strength
from dataflex.signals.kinds import LogitFeatures
from dataflex.testing import FakeSignals, example_context

SCORES = np.array([3.0, 2.9, 1.0])
GRAM = np.array([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 1.0]])


def pool_of(count):
    return np.arange(count, dtype=np.int64)


def ctx_of(gradients, targets, *, learning_rate=1.0, **options):
    """A context whose targets are single gradients, or rows of them."""
    gradients = np.asarray(gradients, dtype=float)
    signals = FakeSignals(
        np.ones(len(gradients)),
        gradients=gradients,
        target_rows={name: np.atleast_2d(np.asarray(rows, dtype=float)) for name, rows in targets.items()},
    )
    return example_context(
        {"all": len(gradients)}, signals=signals, targets=tuple(targets), learning_rate=learning_rate, **options
    )


def greats(**params):
    return Greats(Greats.Params(**params))


def opus(**params):
    return Opus(Opus.Params(**params))


# ---------------------------------------------------------------- greedy


def test_worked_example_of_the_published_rule():
    """At a rate of 0.01 the interaction is inert; at 1 it passes the twin over."""
    assert pick(SCORES, GRAM, 2, 0.01).tolist() == [0, 1]
    assert pick(SCORES, GRAM, 2, 1.0).tolist() == [0, 2]
    assert pick(SCORES, GRAM, 3, 1.0).tolist() == [0, 2, 1]


def test_the_scaled_rule_does_not_depend_on_the_rate_or_the_scale():
    """c = 2.3 / (2 x 3): 2.9 - 4 c = 1.367 still beats 1, and no longer at twice the strength."""
    assert scaled_strength(SCORES, GRAM, 2, 1.0) == pytest.approx(2.3 / 6)
    for scale in (1e-6, 1.0, 1e6):
        gradients = scale * GRAM
        for strength, wanted in ((1.0, [0, 1]), (2.0, [0, 2])):
            c = scaled_strength(SCORES, gradients, 2, strength)
            assert pick(SCORES, gradients, 2, c).tolist() == wanted
    assert scaled_strength(SCORES, np.zeros((3, 3)), 2, 1.0) == 0.0


def test_worked_example_with_gradients():
    """g = (1, 0), (1, 0), (0, 1) towards (1, .9) at rate 1: (1, 1, .9), pick 0, then (., 0, .9), pick 2."""
    ctx = ctx_of([[1, 0], [1, 0], [0, 1]], {"target": [1, 0.9]})
    chosen = greats(interaction="learning_rate").select(pool_of(3), 2, ctx)
    np.testing.assert_allclose(chosen.scores, [1.0, 1.0, 0.9], rtol=1e-6)
    assert chosen.rows.tolist() == [0, 2]
    small = ctx_of([[1, 0], [1, 0], [0, 1]], {"target": [1, 0.9]}, learning_rate=1e-5)
    assert greats(interaction="learning_rate").select(pool_of(3), 2, small).rows.tolist() == [0, 1]
    assert greats().select(pool_of(3), 2, small).rows.tolist() == [0, 2]  # c = .967 / 2: 1 - .483 < .9
    assert greats(strength=0.0).select(pool_of(3), 2, ctx).rows.tolist() == [0, 1]


def slow_greats(gradients, aim, budget, rate):
    """The published sentences: value of each row, minus rate^2 times its product with every row picked so far."""
    picked = []
    for _ in range(budget):
        best = None
        for i, g in enumerate(gradients):
            if i in picked:
                continue
            value = rate * sum(a * b for a, b in zip(g, aim, strict=True))
            value -= sum(rate**2 * sum(a * b for a, b in zip(g, gradients[p], strict=True)) for p in picked)
            if best is None or value > best[0] + 1e-9:
                best = (value, i)
        picked.append(best[1])
    return picked


@given(
    gradients=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=9),
    budget=st.integers(1, 9),
    rate=st.sampled_from([0.5, 1.0, 0.125]),
)
@settings(max_examples=80, deadline=None)
def test_rows_are_those_of_the_published_greedy_rule(gradients, budget, rate):
    ctx = ctx_of(gradients, {"target": [2, 1, -1]}, learning_rate=rate)
    budget = min(budget, len(gradients))
    chosen = greats(interaction="learning_rate").select(pool_of(len(gradients)), budget, ctx)
    assert chosen.rows.tolist() == slow_greats(gradients, [2, 1, -1], budget, rate)


def test_targets_count_alike():
    ctx = ctx_of([[1, 0], [0, 1]], {"one": [1, 0], "two": [[0, 4], [0, 2]]})
    np.testing.assert_allclose(greats().select(pool_of(2), 1, ctx).scores, [0.5, 1.5], rtol=1e-6)


def test_rows_of_a_target_are_drawn_anew_in_every_decision():
    rows = np.arange(40.0)[:, None] + np.zeros((40, 2))
    drawn = []
    for index in range(6):
        ctx = ctx_of(np.eye(2), {"long": rows, "short": [[1, 1], [2, 2]]}, index=index)
        greats(target_rows=3).select(pool_of(2), 1, ctx)
        (call,) = ctx.signals.calls
        asked = call.options["target_rows"]
        assert set(asked) == {"long"}, "a target of fewer rows is taken whole"
        assert len(set(asked["long"].tolist())) == 3
        drawn.append(tuple(asked["long"].tolist()))
    assert len(set(drawn)) == 6
    ctx = ctx_of(np.eye(2), {"long": rows})
    greats(target_rows=None).select(pool_of(2), 1, ctx)
    assert ctx.signals.calls[0].options["target_rows"] == {}


def test_gradients_are_asked_for_as_said():
    ctx = ctx_of(np.eye(2), {"target": [1, 1]})
    greats().select(pool_of(2), 1, ctx)
    opus().select(pool_of(2), 1, ctx)
    greats(precondition="true_adam").select(pool_of(2), 1, ctx)
    specs = [call.asked for call in ctx.signals.calls]
    assert [spec.precondition for spec in specs] == ["none", "adam_scale", "true_adam"]
    assert not any(spec.include_momentum or spec.normalize for spec in specs)


@pytest.mark.parametrize("method", [greats, opus])
def test_rows_without_a_gradient_are_never_picked(method):
    gradients = np.eye(4)
    gradients[2] = np.nan
    ctx = ctx_of(gradients, {"target": [1, 1, 9, 1]})
    chosen = method().select(pool_of(4), 4, ctx)
    assert sorted(chosen.rows.tolist()) == [0, 1, 3]
    assert np.isnan(chosen.scores[2])
    assert "1 rows have no supervised token" in chosen.reason
    with pytest.raises(DataError, match="all 2 rows have no supervised token"):
        method().select(pool_of(2), 1, ctx_of(np.full((2, 2), np.nan), {"target": [1, 1]}))


# ---------------------------------------------------------------- drawn


@pytest.mark.slow
def test_draws_follow_the_boltzmann_weights_of_what_is_left():
    """Every ordered pair as often as softmax(s / T), then softmax of what is left without the first."""
    temperature, strength, trials = 1.5, 0.5, 20_000
    counts = np.zeros((3, 3))
    rng = np.random.default_rng(0)
    for _ in range(trials):
        first, second = pick(SCORES, GRAM, 2, strength, (temperature, rng.random(2)))
        counts[first, second] += 1
    raised = np.exp(SCORES / temperature)
    for first in range(3):
        left = np.exp((SCORES - strength * GRAM[first]) / temperature)
        left[first] = 0.0
        wanted = raised[first] / raised.sum() * left / left.sum()
        np.testing.assert_allclose(counts[first] / trials, wanted, atol=0.012)


def test_a_cold_draw_is_greedy():
    for seed in range(5):
        uniforms = np.random.default_rng(seed).random(3)
        assert pick(SCORES, GRAM, 3, 1.0, (1e-6, uniforms)).tolist() == pick(SCORES, GRAM, 3, 1.0).tolist()


def frequency_of_first(method, learning_rate, trials=400):
    gradients = [[1.0, 0, 0], [0, 0, 0], [0, 0, 1e-3]]
    first = 0
    for seed in range(trials):
        ctx = ctx_of(gradients, {"target": [1, 1, 1]}, learning_rate=learning_rate, seed=seed)
        first += int(method.select(pool_of(3), 1, ctx).rows[0] == 0)
    return first / trials


@pytest.mark.slow
def test_the_temperature_counts_in_deviations_unless_as_published():
    """With lr 1e-5 the published temperature of 1.5 draws uniformly; in deviations it does not depend on lr."""
    published = frequency_of_first(opus(standardize=False), 1e-5)
    assert published == pytest.approx(1 / 3, abs=0.08)
    values = np.array([1.0, 0.0, 1e-3])
    raised = np.exp(values / values.std() / 1.5)
    for rate in (1e-5, 1.0):
        assert frequency_of_first(opus(), rate) == pytest.approx(raised[0] / raised.sum(), abs=0.08)
    whole = np.exp(values / 1.5)
    assert frequency_of_first(opus(standardize=False), 1.0) == pytest.approx(whole[0] / whole.sum(), abs=0.08)


def test_a_rate_of_zero_and_equal_scores_draw_uniformly():
    equal = ctx_of(np.ones((4, 2)), {"target": [1, 1]})
    assert len(set(opus().select(pool_of(4), 4, equal).rows.tolist())) == 4
    assert frequency_of_first(opus(standardize=False), 0.0) == pytest.approx(1 / 3, abs=0.08)


# ---------------------------------------------------------------- uds


class GivenLogits(FakeSignals):
    """Answers questions about logits with given norms and sketches."""

    def __init__(self, norms, sketches):
        super().__init__(np.ones(len(norms)), values={LogitFeatures: np.column_stack([norms, sketches])})


def uds(**params):
    return Uds(Uds.Params(**params))


def test_distance_to_the_queue_worked_example():
    """(0, 0) and (3, 4) from a queue of (0, 0) and (6, 8): (0 + 10) / 2 and (5 + 5) / 2."""
    queue = np.array([[0.0, 0.0], [6.0, 8.0]])
    np.testing.assert_allclose(mean_distances(np.array([[0.0, 0.0], [3.0, 4.0]]), queue), [5.0, 5.0])
    assert mean_distances(np.ones((2, 2)), np.zeros((0, 2))).tolist() == [0.0, 0.0]


@given(
    steps=st.lists(st.permutations(range(8)).map(lambda order: sorted(order[:5])), min_size=1, max_size=6),
    budget=st.integers(0, 5),
    queue_size=st.integers(1, 6),
)
@settings(max_examples=60, deadline=None)
def test_rows_are_those_of_the_published_score(steps, budget, queue_size):
    rng = np.random.default_rng(7)
    norms, sketches = rng.integers(10, 14, 8).astype(float), rng.integers(-3, 4, (8, 4)).astype(float)
    method, queue = uds(alpha=0.5, queue_size=queue_size), []
    for index, candidates in enumerate(steps):
        ctx = example_context({"all": 8}, signals=GivenLogits(norms, sketches), index=index)
        chosen = method.select(np.array(candidates), budget, ctx)
        values = []
        for i in candidates:
            away = [math.dist(sketches[i], other) for other in queue]
            values.append(norms[i] + (0.5 * sum(away) / len(away) if away else 0.0))
        np.testing.assert_allclose(chosen.scores, values, rtol=1e-6)
        kept = chosen.rows.tolist()
        assert len(kept) == budget
        outside = [v for i, v in zip(candidates, values, strict=True) if i not in kept]
        inside = [v for i, v in zip(candidates, values, strict=True) if i in kept]
        if inside and outside:
            assert min(inside) >= max(outside) - 1e-6
        queue = (queue + [sketches[i] for i in kept])[-queue_size:]
        np.testing.assert_array_equal(
            method.state_dict().get("queue", np.zeros((0, 4))), np.array(queue).reshape(-1, 4)
        )


def test_the_queue_is_state_and_decides():
    norms, sketches = [5.0, 5.0, 4.999], [[0, 0], [0, 0], [9, 9]]

    def ctx():
        return example_context({"all": 3}, signals=GivenLogits(norms, sketches))

    first = uds()
    assert first.select(pool_of(3), 1, ctx()).rows.tolist() == [0]
    again = uds()
    again.load_state_dict(first.state_dict())
    assert again.select(pool_of(3), 1, ctx()).rows.tolist() == [2]  # 4.999 + 0.0025 x 12.7
    assert uds(alpha=0.0).select(pool_of(3), 1, ctx()).rows.tolist() == [0]
    with pytest.raises(CheckpointError, match="keeps queue, but was given rows"):
        uds().load_state_dict({"rows": 1})


def test_what_is_asked_and_told():
    signals = GivenLogits([1.0, np.nan, 3.0], np.ones((3, 2)))
    ctx = example_context({"all": 3}, lengths=[4, 9, 12], signals=signals, seed=5)
    chosen = uds(tokens="all", per_length=True, sketch_rows=2, sketch_columns=6).select(pool_of(3), 3, ctx)
    assert chosen.rows.tolist() == [2, 0]
    assert np.isnan(chosen.scores[1])
    (spec,) = (call.asked for call in signals.calls)
    assert (spec.tokens, spec.per_length, spec.rows, spec.columns, spec.seed) == ("all", True, 2, 6, 5)
    assert "8 tokens on average against 8" in chosen.reason
    assert "1 rows have no supervised token" in chosen.reason
    with pytest.raises(DataError, match="uds: all 2 rows"):
        uds().select(pool_of(2), 1, example_context({"all": 2}, signals=GivenLogits([np.nan] * 2, np.ones((2, 2)))))


# ---------------------------------------------------------------- candidates


def intervals(schedule):
    return [interval for interval in schedule.intervals() if interval.kind == "dynamic"]


@given(
    num=st.integers(8, 60),
    batches=st.integers(2, 4),
    batch=st.integers(1, 2),
    interval=st.integers(1, 2),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_every_row_is_a_candidate_once_before_any_twice(num, batches, batch, interval, seed):
    assume(batches * batch * interval <= num)
    usable = np.flatnonzero(np.arange(2 * num) % 2 == 1)
    schedule = Schedule(warmup_steps=3, interval_steps=interval, total_steps=40)
    source = Candidates(usable, batches=batches, global_batch=batch, schedule=schedule, seed=seed)
    size, seen, taken = batches * batch, [], 0
    for one in intervals(schedule):
        pool = source.pool(one)
        assert pool.dtype == np.int64
        assert (np.diff(pool) > 0).all()
        assert set(pool.tolist()) <= set(usable.tolist())
        begin, taken = taken, taken + one.steps * size
        whole = begin // num == (taken - 1) // num
        assert len(pool) == one.steps * size if whole else one.steps * batch <= len(pool) <= one.steps * size
        if begin % num == 0:
            seen = []
        if whole:
            assert not set(seen) & set(pool.tolist())
            seen += pool.tolist()
        else:
            early = set(usable.tolist()) - set(seen)
            assert early <= set(pool.tolist()), "the epoch ends with what was left of it"
            seen = None
            break
    if seen is not None and taken % num == 0:
        assert len(seen) in (0, num)


def test_candidates_follow_from_seed_and_step_alone():
    schedule = Schedule(interval_steps=1, total_steps=60)

    def source(seed):
        return Candidates(pool_of(20), batches=2, global_batch=3, schedule=schedule, seed=seed)

    straight, late = source(1), source(1)
    wanted = [straight.pool(one).tolist() for one in intervals(schedule)]
    assert late.pool(intervals(schedule)[37]).tolist() == wanted[37]
    assert late.pool(Interval(index=9, kind="dynamic", start_step=9, stop_step=10)).tolist() == wanted[9]
    assert source(2).pool(intervals(schedule)[0]).tolist() != wanted[0]
    assert wanted[0] != wanted[10], "another epoch, another order"


def test_too_few_rows_are_refused():
    schedule = Schedule(interval_steps=2, total_steps=10)
    with pytest.raises(ConfigError, match=r"candidate_batches: 3 x 2 steps x 4 rows are 24 candidates.*only 23 rows"):
        Candidates(pool_of(23), batches=3, global_batch=4, schedule=schedule, seed=0)
    with pytest.raises(DataError, match="no candidate"):
        Candidates(pool_of(0), batches=2, global_batch=4, schedule=schedule, seed=0)
