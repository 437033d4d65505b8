"""IFD, RHO-LOSS and S2L on given losses: golden values, rules, state, rows that have none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.errors import ConfigError, DataError
from dataflex.selectors.clusters import S2l, filled
from dataflex.selectors.losses import Ifd, RhoLoss, common_ending, ifd_ratios
from dataflex.signals.kinds import ResponseLoss, TokenLoss
from dataflex.testing import FakeSignals, example_context
from tests.methods.oracles import oracle_top_rows


def pool_of(count):
    return np.arange(count, dtype=np.int64)


# ---------------------------------------------------------------- IFD


class GivenAnswers(FakeSignals):
    """Answer losses under the prompt and alone, and the number of answer tokens."""

    def __init__(self, given, alone, lengths=None):
        losses = {True: np.asarray(given), False: np.asarray(alone)}
        super().__init__(given, values={ResponseLoss: lambda signal, rows, _: losses[signal.conditioned][rows]})
        self.lengths = [5] * len(alone) if lengths is None else lengths

    def tokens(self, rows, *, target=None, part="all"):
        super().tokens(rows, target=target, part=part)
        return [np.zeros(self.lengths[row], dtype=np.int64) for row in rows]


def by_ifd(given, alone, budget, lengths=None, **params):
    ctx = example_context({"all": len(given)}, signals=GivenAnswers(given, alone, lengths), targets=())
    return Ifd(Ifd.Params(**params)).select(pool_of(len(given)), budget, ctx)


def test_the_sheets_toy_of_ifd():
    assert ifd_ratios([1.0], [2.0], "loss")[0] == 0.5
    assert (
        ifd_ratios([1.0], [2.0], "perplexity")[0]
        == pytest.approx(math.exp(-1), rel=1e-12)
        == pytest.approx(0.3679, abs=5e-5)
    )


def test_the_two_ratios_rank_differently():
    """Losses 1/2 and 3/4.5: by loss .5 < .667, by perplexity e^-1 > e^-1.5."""
    given, alone = [1.0, 3.0], [2.0, 4.5]
    assert by_ifd(given, alone, 1, ratio="loss").rows.tolist() == [1]
    assert by_ifd(given, alone, 1, ratio="perplexity").rows.tolist() == [0]


@given(
    losses=st.lists(st.tuples(st.floats(0.01, 9), st.floats(0.01, 9)), min_size=1, max_size=20),
    budget=st.integers(1, 25),
    ratio=st.sampled_from(["loss", "perplexity"]),
)
@settings(max_examples=80, deadline=None)
def test_the_highest_below_the_threshold_are_kept(losses, budget, ratio):
    given, alone = (np.array(column, dtype=np.float32).tolist() for column in zip(*losses, strict=True))
    want = [g / a if ratio == "loss" else math.exp(g - a) for g, a in zip(given, alone, strict=True)]
    below = [value if value < 1.0 else math.nan for value in want]
    if all(map(math.isnan, below)):
        with pytest.raises(DataError, match=r"none of \d+ rows has a ratio below 1 \(the lowest is"):
            by_ifd(given, alone, budget, ratio=ratio)
    else:
        chosen = by_ifd(given, alone, budget, ratio=ratio)
        np.testing.assert_allclose(chosen.scores, want, rtol=1e-9)
        assert chosen.rows.tolist() == oracle_top_rows(below, budget)
    filled_up = by_ifd(given, alone, budget, ratio=ratio, fill=True).rows.tolist()
    kept = oracle_top_rows(below, budget)
    assert filled_up[: len(kept)] == kept
    assert len(filled_up) == min(budget, len(given))
    rest = [want[row] for row in filled_up[len(kept) :]]
    assert rest == sorted(rest)


def test_short_answers_and_those_without_losses_are_dropped():
    given, alone = [1.0, 1.0, math.nan, 1.0, 1.0], [2.0, 3.0, 2.0, 0.0, math.inf]
    chosen = by_ifd(given, alone, 5, lengths=[4, 5, 5, 5, 5], min_answer_tokens=5)
    assert chosen.rows.tolist() == [1]
    assert np.isnan(chosen.scores[[0, 2, 3, 4]]).all()
    assert "4 rows have no ratio" in chosen.reason
    with pytest.raises(DataError, match="all 5 rows have no ratio"):
        by_ifd(given, alone, 5, min_answer_tokens=6)


def test_what_all_prompts_end_with():
    prompts = [np.array(prompt) for prompt in ([1, 2, 7, 8, 9], [3, 7, 8, 9], [5, 4, 7, 8, 9], [])]
    assert common_ending(prompts) == 3
    assert common_ending(prompts, 2) == 2
    assert common_ending(prompts[:1]) == common_ending([prompts[0]] * 3) == common_ending([]) == 0
    assert common_ending([np.array([8, 9]), np.array([1, 8, 9])]) == 2
    assert common_ending([np.array([1]), np.array([2])]) == 0


class MarkedPrompts(GivenAnswers):
    """Prompts that differ but for their last three tokens."""

    def tokens(self, rows, *, target=None, part="all"):
        if part != "prompt":
            return super().tokens(rows, target=target, part=part)
        return [np.array([row, row + 1, 101, 102, 103]) for row in rows]


@pytest.mark.parametrize(
    ("params", "prefix"),
    [
        ({}, 3),
        ({"prefix_tokens": 0}, 0),
        ({"prefix_tokens": 1}, 1),
        ({"ratio": "perplexity"}, 0),
        ({"scorer": "folder"}, 0),
        ({"scorer": "folder", "prefix_tokens": 2}, 2),
    ],
)
def test_answers_alone_keep_the_marker_as_published(params, prefix):
    ctx = example_context({"all": 3}, signals=MarkedPrompts([0.5] * 3, [1.0] * 3), targets=())
    chosen = Ifd(Ifd.Params(**params)).select(pool_of(3), 1, ctx)
    asked = {call.options["prefix_tokens"] for call in ctx.signals.calls if "prefix_tokens" in call.options}
    assert asked == {prefix}
    assert ("keep the last" in chosen.reason) == (prefix > 0)


def test_what_ifd_asks_for():
    ctx = example_context({"all": 3}, signals=GivenAnswers([1.0] * 3, [2.0] * 3), targets=())
    Ifd(Ifd.Params(scorer="folder", prefix_tokens=4)).select(pool_of(3), 1, ctx)
    asked = [call.options for call in ctx.signals.calls if call.signal == "losses"]
    expected = {"model": "folder", "prefix_tokens": 4, "target": None}
    assert asked == [{"conditioned": True, **expected}, {"conditioned": False, **expected}]


# ---------------------------------------------------------------- RHO-LOSS


def of_models(losses, models):
    """Token losses of the model in training, and of others by folder."""
    return lambda signal, rows, target: np.asarray(losses if signal.model is None else models[signal.model])[rows]


def rho(losses, reference, num_rows=None):
    signals = FakeSignals(losses, values={TokenLoss: of_models(losses, {"folder": reference})})
    return example_context({"all": num_rows or len(losses)}, signals=signals, targets=())


def test_the_sheets_toys_of_rho_loss():
    selector = RhoLoss(RhoLoss.Params(reference="folder"))
    chosen = selector.select(pool_of(3), 3, rho([2.0, 3.0, 1.0], [0.5, 2.9, 0.2]))
    np.testing.assert_allclose(chosen.scores, [1.5, 0.1, 0.8], atol=1e-6)
    assert chosen.rows.tolist() == [0, 2, 1]
    selector = RhoLoss(RhoLoss.Params(reference="folder"))
    ctx = rho([2.0, 1.0, 1.4, 0.2], [1.0, 0.8, 0.5, 0.5])
    chosen = selector.select(pool_of(4), 2, ctx)
    np.testing.assert_allclose(chosen.scores, [1.0, 0.2, 0.9, -0.3], atol=1e-6)
    assert chosen.rows.tolist() == [0, 2]


def test_irreducible_losses_are_asked_for_once_and_go_through_a_checkpoint():
    ctx = rho([2.0, 1.0, 1.4, 0.2, np.nan], [1.0, 0.8, 0.5, 0.5, np.nan])

    def asked():
        return [call.rows.tolist() for call in ctx.signals.calls if call.options["model"] == "folder"]

    selector = RhoLoss(RhoLoss.Params(reference="folder"))
    selector.select(np.array([3, 0]), 1, ctx)
    selector.select(np.array([0, 1, 4, 3]), 1, ctx)
    resumed = RhoLoss(RhoLoss.Params(reference="folder"))
    resumed.load_state_dict(selector.state_dict())
    chosen = resumed.select(pool_of(5), 2, ctx)
    assert asked() == [[0, 3], [1, 4], [2]]  # a row without a loss is not asked about again either
    assert chosen.rows.tolist() == [0, 2]
    assert "1 rows have no finite loss" in chosen.reason


def test_rho_without_losses_and_with_equal_ones():
    with pytest.raises(DataError, match="all 2 rows have no finite loss"):
        RhoLoss(RhoLoss.Params(reference="folder")).select(pool_of(2), 1, rho([np.nan, 1.0], [1.0, np.nan]))
    chosen = RhoLoss(RhoLoss.Params(reference="folder")).select(pool_of(4), 2, rho([1.0] * 4, [1.0] * 4))
    assert chosen.rows.tolist() == [0, 1]


# ---------------------------------------------------------------- S2L


def s2l(trajectories, sizes, budget, seed=0, **params):
    """Decide from the checkpoints of proxies p0, p1, ..."""
    trajectories = np.asarray(trajectories, dtype=float)
    models = {f"p{t}": trajectories[:, t] for t in range(trajectories.shape[1])}
    signals = FakeSignals(np.ones(len(trajectories)), values={TokenLoss: of_models(None, models)})
    ctx = example_context(sizes, signals=signals, seed=seed, targets=())
    return S2l(S2l.Params(proxies=tuple(models), **params)).select(pool_of(len(trajectories)), budget, ctx)


@pytest.mark.slow
def test_domains_and_clusters_share_by_water_filling():
    """Domains of 2, 10 and 50 rows and a budget of 30: 2, 10 and 18 (the sheet); inside, equal shares by cluster."""
    rng = np.random.default_rng(0)
    levels = [5.0] * 2 + [5.0] * 10 + [1.0] * 40 + [9.0] * 7 + [4.0] * 3
    trajectories = np.stack([np.array(levels) + 0.01 * rng.random(62) for _ in range(3)], axis=1)
    chosen = s2l(trajectories, {"a": 2, "b": 10, "c": 50}, 30, clusters=3)
    assert len(chosen.rows) == 30
    domains = np.searchsorted([2, 12, 62], chosen.rows, side="right")
    assert np.bincount(domains).tolist() == [2, 10, 18]
    level = np.array(levels)[chosen.rows[domains == 2]]
    assert [int((level == one).sum()) for one in (4.0, 9.0, 1.0)] == [3, 7, 8]
    assert len(set(chosen.rows.tolist())) == 30


def test_tiny_clusters_come_last():
    levels = np.array([1.0] * 6 + [50.0] * 2)
    for seed in range(5):
        chosen = s2l(levels[:, None], {"all": 8}, 4, seed=seed, clusters=2)
        assert (chosen.rows < 6).all()
    assert len(s2l(levels[:, None], {"all": 8}, 7, clusters=2).rows) == 7
    assert sorted(s2l(levels[:, None], {"all": 8}, 8, clusters=2).rows.tolist()) == list(range(8))


def test_more_clusters_than_rows_and_equal_rows():
    assert len(s2l(np.arange(5.0)[:, None], {"all": 5}, 3, clusters=100).rows) == 3
    assert len(s2l(np.ones((9, 2)), {"all": 9}, 4, clusters=3).rows) == 4


def test_rows_of_a_cluster_are_drawn_at_random():
    drawn = [tuple(sorted(s2l(np.ones((9, 2)), {"all": 9}, 3, seed=seed, clusters=2).rows)) for seed in range(12)]
    assert drawn[0] == tuple(sorted(s2l(np.ones((9, 2)), {"all": 9}, 3, seed=0, clusters=2).rows))
    assert len(set(drawn)) > 3


def test_gaps_in_trajectories():
    nan = math.nan
    got = filled(np.array([[nan, 1, nan, 2], [nan, nan, nan, nan], [3, nan, nan, nan]]))
    np.testing.assert_array_equal(got, [[1, 1, 1, 2], [nan, nan, nan, nan], [3, 3, 3, 3]])


def test_the_model_under_training_makes_the_trajectories():
    params = S2l.Params(clusters=2, min_points=2)

    def at(step, losses):
        return example_context({"all": 8}, signals=FakeSignals(losses), index=step, targets=())

    first, second = np.ones(8), np.array([1.0] * 4 + [0.1] * 4)
    selector = S2l(params)
    assert "without clusters" in selector.select(pool_of(8), 4, at(0, first)).reason
    resumed = S2l(params)
    resumed.load_state_dict(selector.state_dict())
    chosen, again = (one.select(pool_of(8), 4, at(1, second)) for one in (selector, resumed))
    assert chosen.rows.tolist() == again.rows.tolist()
    assert int((chosen.rows < 4).sum()) == 2
    assert "from 2 clusters of 2 losses" in chosen.reason
    part = selector.select(np.array([0, 5]), 2, at(2, second))
    assert sorted(part.rows.tolist()) == [0, 5]
    assert selector.state_dict()["points"].shape == (8, 3)


@pytest.mark.slow
def test_long_runs_keep_a_trajectory_of_bounded_length():
    selector = S2l(S2l.Params(clusters=1))
    for step in range(70):
        ctx = example_context({"all": 4}, signals=FakeSignals(np.full(4, float(step))), index=step, targets=())
        selector.select(pool_of(4), 1, ctx)
    points = selector.state_dict()["points"][0].tolist()
    assert len(points) <= 64
    assert points[-1] == 69.0
    assert points == sorted(points)


def test_a_missing_library_is_told(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match=r"pip install 'dataflex-llm\[cluster\]'"):
        s2l(np.random.default_rng(0).random((9, 2)), {"all": 9}, 3, clusters=2)
