"""RDS+, NEAR and TSDS on given vectors: rules, tasks, rows without a vector, draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.errors import DataError
from dataflex.select.choose import round_robin
from dataflex.select.rules import Rule
from dataflex.selectors.nearest import Near, RdsPlus, Tsds
from dataflex.signals.kinds import Embedding
from dataflex.testing import FakeSignals, example_context
from tests.methods.oracles import oracle_top_rows

TOY = np.array([[0.9, 0.8, 0.1], [0.95, 0.2, 0.3]])  # similarities of the sheet: two queries, three rows
EACH = pytest.mark.parametrize("method", [RdsPlus, Near, Tsds])


class GivenVectors(FakeSignals):
    """Answers embedding questions with given vectors."""

    def __init__(self, rows, targets):
        self.vectors = {None: np.array(rows, dtype=np.float32)}
        self.vectors |= {name: np.array(found, dtype=np.float32) for name, found in targets.items()}
        super().__init__(
            np.ones(len(rows)),
            targets={name: np.ones(len(found)) for name, found in targets.items()},
            values={Embedding: lambda _, rows, target: self.vectors[target][rows]},
        )


def pool_of(count):
    return np.arange(count, dtype=np.int64)


def context(rows, *targets, **options):
    named = {f"task{t}": found for t, found in enumerate(targets)}
    return example_context({"all": len(rows)}, signals=GivenVectors(rows, named), targets=tuple(named), **options)


def choose(method, rows, *targets, budget, seed=0, **params):
    ctx = context(rows, *targets, seed=seed)
    return method(method.Params(**params)).select(pool_of(len(rows)), budget, ctx)


# ---------------------------------------------------------------- RDS+


def test_rows_of_one_target_take_turns():
    chosen = choose(RdsPlus, np.eye(3), TOY, budget=2)
    assert chosen.rows.tolist() == [0, 2]
    np.testing.assert_allclose(chosen.scores, [0.95, 0.8, 0.3], rtol=1e-6)
    assert choose(RdsPlus, np.eye(3), TOY, budget=2, rule=Rule.of("top_k")).rows.tolist() == [0, 1]


def test_a_target_row_whose_row_is_taken_may_lose_its_turn():
    """Rows of similarity 5 to 1 to three targets; the second wants the first's row, the third has its own."""
    targets = np.array([[5.0, 4, 3, 2, 1], [5, 3, 4, 2, 1], [1, 2, 3, 4, 5]])
    assert choose(RdsPlus, np.eye(5), targets, budget=4).rows.tolist() == [0, 2, 4, 1]
    assert choose(RdsPlus, np.eye(5), targets, budget=4, taken="lose_turn").rows.tolist() == [0, 4, 1, 2]
    apart = [targets[:1], targets[1:2], targets[2:]]
    assert choose(RdsPlus, np.eye(5), *apart, budget=4).rows.tolist() == [0, 2, 4, 1]
    assert choose(RdsPlus, np.eye(5), *apart, budget=4, taken="lose_turn").rows.tolist() == [0, 4, 1, 2]
    for budget in range(6):
        shuffled = choose(RdsPlus, np.eye(5), targets, budget=budget, taken="lose_turn", shuffle=True).rows
        assert len(set(shuffled.tolist())) == budget


def test_several_targets_take_turns_by_their_best_rows():
    """By task the largest are (.9, .8, .1) and (.95, .2, .3); a third target row changes only the first task."""
    first = [TOY[0], [0.0, 0.0, 0.85]]
    chosen = choose(RdsPlus, np.eye(3), first, [TOY[1]], budget=3)
    assert chosen.rows.tolist() == [0, 2, 1]
    np.testing.assert_allclose(chosen.scores, [0.95, 0.8, 0.85], rtol=1e-6)
    assert choose(RdsPlus, np.eye(3), first, [TOY[1]], budget=2, rule=Rule.of("top_k")).rows.tolist() == [0, 2]


@given(seed=st.integers(0, 1000), budget=st.integers(0, 40), num_targets=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_rds_plus_on_whole_matrices(seed, budget, num_targets):
    rng = np.random.default_rng(seed)
    rows = rng.integers(-3, 4, size=(30, 3))
    targets = [rng.integers(-3, 4, size=(rng.integers(1, 5), 3)) for _ in range(num_targets)]
    whole = [found @ rows.T.astype(float) for found in targets]
    by_task = np.stack([one.max(axis=0) for one in whole])
    wanted = round_robin(whole[0] if num_targets == 1 else by_task, budget)
    assert choose(RdsPlus, rows, *targets, budget=budget).rows.tolist() == wanted.tolist()
    best = by_task.max(axis=0).tolist()
    assert choose(RdsPlus, rows, *targets, budget=budget, rule=Rule.of("top_k")).rows.tolist() == oracle_top_rows(
        best, budget
    )


def test_shuffled_turns_follow_the_seed():
    rng = np.random.default_rng(0)
    rows, target = rng.normal(size=(50, 4)), rng.normal(size=(30, 4))
    by_seed = [choose(RdsPlus, rows, target, budget=10, shuffle=True, seed=seed).rows.tolist() for seed in (1, 1, 2)]
    assert by_seed[0] == by_seed[1] != by_seed[2]
    firsts = set((target @ rows.T).argmax(axis=1).tolist())
    assert by_seed[0][0] in firsts


def test_what_rds_plus_asks_for():
    ctx = context(np.eye(3), TOY)
    RdsPlus(RdsPlus.Params()).select(pool_of(3), 1, ctx)
    RdsPlus(RdsPlus.Params(layer=2, completion_only=True)).select(pool_of(3), 1, ctx)
    RdsPlus(RdsPlus.Params(encoder="folder")).select(pool_of(3), 1, ctx)
    default = Embedding(layer=-1, pooling="weighted_mean", completion_only=False, normalize=True)
    other = Embedding(layer=2, pooling="weighted_mean", completion_only=True, normalize=True)
    theirs = Embedding(encoder="folder")
    assert [(call.options["target"], call.asked) for call in ctx.signals.calls] == [
        ("task0", default),
        (None, default),
        ("task0", other),
        (None, other),
        ("task0", theirs),
        (None, theirs),
    ]
    with pytest.raises(ValueError, match="completion_only"):
        RdsPlus.Params(encoder="folder", completion_only=True)


# ---------------------------------------------------------------- NEAR


def test_near_walks_rank_by_rank_over_all_targets():
    """Both first neighbours are row 0; the second of the first query is row 1, of the second row 2."""
    assert choose(Near, np.eye(3), TOY, budget=2).rows.tolist() == [0, 1]
    assert choose(Near, np.eye(3), [TOY[0]], [TOY[1]], budget=3).rows.tolist() == [0, 1, 2]
    assert choose(Near, np.eye(3), [TOY[1]], [TOY[0]], budget=2).rows.tolist() == [0, 2]


def test_what_near_asks_for(tmp_path):
    def spec(**params):
        ctx = context(np.eye(3), TOY)
        Near(Near.Params(**params)).select(pool_of(3), 1, ctx)
        return {(call.asked.pooling, call.asked.encoder) for call in ctx.signals.calls}

    folder = str(tmp_path)
    assert spec() == {("mean", None)}
    assert spec(pooling="last", encoder=folder) == {("last", folder)}
    (tmp_path / "modules.json").write_text("[]")
    # The only pooling that the loader of sentence-transformers models accepts: its own is used.
    assert spec(encoder=folder) == {(Embedding().pooling, folder)}


# ---------------------------------------------------------------- TSDS


def line(distances):
    """A target row at 0, and pool rows at these distances from it; far ones so that a tenth of the pool is enough."""
    near = np.array(distances, dtype=float)
    rows = np.concatenate([near, 100.0 + np.arange(10 * len(near) - len(near))])[:, None]
    return rows, np.zeros((1, 1))


def test_check_a_of_the_sheet():
    rows, target = line([0, 1, 2, 3, 4, 5])
    p = choose(Tsds, rows, target, budget=3, sigma=0.0, c=5.0).scores
    np.testing.assert_allclose(p[:3], 1 / 3, rtol=1e-12)
    assert p[3:].max() == 0.0


def test_check_b_of_the_sheet():
    """Copies at distance 1 have density 2 each within any small radius."""
    rows, target = line([0, 1, 1, 2, 3, 4])
    p = choose(Tsds, rows, target, budget=3, sigma=0.5, c=2.0).scores
    np.testing.assert_allclose(p[:3], [0.5, 0.25, 0.25], rtol=1e-6)
    p = choose(Tsds, rows, target, budget=3, sigma=0.0, c=2.0).scores
    np.testing.assert_allclose(p[:3], 1 / 3, rtol=1e-12)


def test_the_budget_is_filled_up_with_the_nearest_rows():
    rows, target = line([0, 1, 2, 3, 4, 5])
    chosen = choose(Tsds, rows, target, budget=6, sigma=0.0)
    assert set(chosen.rows[:3].tolist()) == {0, 1, 2}
    assert chosen.rows[3:].tolist() == [3, 4, 5]
    assert "from 3 rows of probability above 0, and the 3 nearest of the others" in chosen.reason
    assert len(choose(Tsds, rows, target, budget=1000, sigma=0.0).rows) == 60


def test_draws_follow_the_probabilities():
    rows, target = line([0, 1, 1, 2, 3, 4])
    params = {"sigma": 0.5, "c": 2.0, "replacement": True}
    drawn = choose(Tsds, rows, target, budget=4000, **params).rows
    counts = np.bincount(drawn, minlength=60)
    assert counts[3:].sum() == 0
    np.testing.assert_allclose(counts[:3] / 4000, [0.5, 0.25, 0.25], atol=0.04)
    firsts = [choose(Tsds, rows, target, budget=1, seed=seed, sigma=0.5, c=2.0).rows[0] for seed in range(400)]
    np.testing.assert_allclose(np.bincount(firsts, minlength=3) / 400, [0.5, 0.25, 0.25], atol=0.1)


def test_neighbours_are_capped_at_a_tenth_of_the_pool():
    """With alpha 0 the walk never stops: of K neighbours the first K - 1 share the mass."""
    rows = np.arange(40.0)[:, None]
    for max_k, width in ((5000, 4), (3, 3)):
        p = choose(Tsds, rows, np.zeros((1, 1)), budget=1, sigma=0.0, alpha=0.0, max_k=max_k).scores
        assert np.count_nonzero(p) == width - 1
    p = choose(Tsds, rows[:5], np.zeros((1, 1)), budget=1, sigma=0.0, alpha=0.0).scores
    assert p.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


# ---------------------------------------------------------------- all three


@EACH
def test_rows_without_a_vector_are_never_kept_and_their_number_is_told(method):
    rows = np.eye(4)
    rows[1] = np.nan
    chosen = choose(method, rows, np.ones((2, 4)), budget=4)
    assert sorted(chosen.rows.tolist()) == [0, 2, 3]
    assert np.isnan(chosen.scores).tolist() == [False, True, False, False]
    assert chosen.reason.endswith("; 1 rows have no embedding")
    with pytest.raises(DataError, match="all 2 rows have no embedding"):
        choose(method, np.full((2, 4), np.nan), np.ones((2, 4)), budget=1)


@EACH
def test_target_rows_without_a_vector_are_passed_over(method):
    target = np.array([[np.nan, np.nan], [1.0, 0.0]])
    plain = choose(method, np.eye(2), target[1:], budget=2)
    chosen = choose(method, np.eye(2), target, budget=2)
    assert chosen.rows.tolist() == plain.rows.tolist()
    assert chosen.scores.tolist() == plain.scores.tolist()
    for empty, count in ((target[:1], "1 rows"), (target[:0], "0 rows")):
        with pytest.raises(DataError, match=f"target 'task1' has {count}, none of which"):
            choose(method, np.eye(2), target, empty, budget=1)


@EACH
def test_positions_are_those_of_the_pool(method):
    rows = np.random.default_rng(0).normal(size=(40, 3))
    ctx = context(rows, rows[:3])
    pool = np.arange(39, 9, -1, dtype=np.int64)
    chosen = method(method.Params()).select(pool, 5, ctx)
    assert set(chosen.rows.tolist()) <= set(pool.tolist())
    if method is not Tsds:
        nearest = (rows[:3] @ rows[pool].T).max(axis=0)
        np.testing.assert_allclose(chosen.scores, nearest, rtol=1e-5)
        assert chosen.rows[0] == pool[(rows[0] @ rows[pool].T).argmax()]
