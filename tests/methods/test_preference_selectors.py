"""Selectors of pairs: against formulas written out for one pair, the specification's values, and planted noise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dataflex.config.build import parse_dynamic
from dataflex.errors import ConfigError, DataError
from dataflex.registry import find
from dataflex.selectors.preferences import fused, implicit_margins, in_first_half, probabilities, upper_bound
from dataflex.signals.kinds import PreferenceLogps
from dataflex.testing import FakeSignals, example_context

SIX = {"rel": 0, "abs": 5e-7}  # the specification has six digits


def selector(name, **params):
    cls = find("selector", name)
    return cls(cls.Params(**params))


def answers(sums, tokens):
    """Values of a model for pairs, from sums and tokens of (chosen, rejected)."""
    return np.stack([np.asarray(sums, dtype=np.float32), np.asarray(tokens, dtype=np.float32)], axis=2)


def signals(policy, reference, tokens):
    given = {"policy": answers(policy, tokens), "reference": answers(reference, tokens)}
    return FakeSignals(np.ones(len(policy)), values={PreferenceLogps: lambda signal, rows, _: given[signal.of][rows]})


def test_the_margins_of_the_specification():
    policy, reference = answers([[-20, -30]], [[10, 20]]), answers([[-22, -27]], [[10, 20]])
    assert implicit_margins(policy, reference, 0.1) == pytest.approx([0.5])
    assert -math.log(1 / (1 + math.exp(-0.5))) == pytest.approx(0.474077, **SIX)
    assert implicit_margins(policy, reference, normalize=True) == pytest.approx([0.35])


@pytest.mark.parametrize(
    ("external", "implicit", "first", "second", "expected"),
    [
        (1.0, 2.5, 0.5, 0.75, 0.75),
        (-1.5, 3.5, 0.083333, 0.916667, 0.5),
        (5.0, 0.0, 1.0, 0.333333, 1.0),
        (-3.0, 3.0, 0.0, 0.833333, 0.0),
        (-9.0, 9.0, 0.0, 1.0, 0.5),  # 0/0: neither is believed
    ],
)
def test_the_fusion_of_the_specification(external, implicit, first, second, expected):
    p, q = probabilities([external], -2.0, 4.0), probabilities([implicit], -2.0, 4.0)
    assert [*p, *q] == pytest.approx([first, second], **SIX)
    assert fused(p, q) == pytest.approx([expected], **SIX)


def slow_upper_bound(margins):
    """Go down from the largest margin while few rows are larger than the next one."""
    bound, rows = max(margins), math.ceil(len(margins) / 20)
    for margin in sorted(margins, reverse=True):
        larger = sum(other > margin for other in margins)
        if not larger < min(rows, max(30, max(margins) - margin)):
            break
        bound = margin
    return bound


@pytest.mark.parametrize(("count", "scale"), [(1, 1.0), (7, 3.0), (200, 2.0), (1500, 1.0), (1500, 80.0)])
def test_the_upper_bound_is_where_the_tail_begins(count, scale):
    margins = np.round(scale * np.random.default_rng(count).standard_normal(count), 1)
    assert upper_bound(margins) == slow_upper_bound(margins.tolist())


def planted(seed=0, rows=400, flipped=0.2):
    """Pairs whose true margin is positive, a share of them the wrong way round, seen by a model and a reward model."""
    random = np.random.default_rng(seed)
    wrong = random.random(rows) < flipped
    true = random.gamma(4.0, 1.0, rows) * np.where(wrong, -1.0, 1.0)
    tokens = random.integers(5, 40, (rows, 2))
    reference = -2.0 * tokens
    policy = reference.astype(float)
    policy[:, 0] += true + random.normal(0.0, 1.5, rows)
    reward = true / 2.0 + random.normal(0.0, 1.0, rows)
    return wrong, signals(policy, reference, tokens), reward


def share_flipped(selection, wrong):
    return wrong[selection.rows].mean()


def test_flipped_pairs_are_told_apart():
    wrong, given, reward = planted()
    pool = np.arange(len(wrong), dtype=np.int64)
    ctx = example_context({"all": len(wrong)}, signals=given, columns={"reward": reward})
    kept = {
        "high": selector("margin").select(pool, 80, ctx),
        "external": selector("margin", source="external", column="reward").select(pool, 80, ctx),
        "bees": selector("bees", column="reward").select(pool, 80, ctx),
    }
    for name, selection in kept.items():
        assert share_flipped(selection, wrong) == 0.0, name
    low = selector("margin", keep="low").select(pool, int(wrong.sum()) // 2, ctx)
    assert share_flipped(low, wrong) > 0.95
    # What one source gets wrong, both together do not: among as many rows as are right, fewer flipped ones.
    right = int((~wrong).sum())
    alone = selector("margin", source="external", column="reward").select(pool, right, ctx)
    assert share_flipped(selector("bees", column="reward").select(pool, right, ctx), wrong) < share_flipped(
        alone, wrong
    )


def test_flipped_pairs_are_hard_for_models_that_were_not_trained_on_them():
    """A model is sure of the pairs that it was trained on; of the others it sees the true margins with noise."""
    wrong, _, _ = planted()
    pool, random = np.arange(len(wrong)), np.random.default_rng(5)
    tokens, reference = np.full((len(wrong), 2), 20), np.full((len(wrong), 2), -40.0)
    given, first = {"reference": reference}, in_first_half(pool, 0)
    for name in ("a", "c", "d", "b", "e", "f"):
        margins = random.normal(np.where(wrong, -2.0, 2.0), 3.0)
        given[name] = reference + np.outer(np.where(first == (name in "acd"), 9.0, margins), [1.0, 0.0])
    asked = FakeSignals(
        np.ones(len(wrong)), values={PreferenceLogps: lambda signal, rows, _: answers(given[signal.of], tokens)[rows]}
    )
    ctx = example_context({"all": len(wrong)}, signals=asked)
    one = selector("selective_dpo", first=("a",), second=("b",)).select(pool, len(pool), ctx)
    three = selector("selective_dpo", first=("a", "c", "d"), second=("b", "e", "f")).select(pool, len(pool), ctx)
    assert share_flipped(three, wrong) < share_flipped(one, wrong) < 0.5 * wrong.mean()
    assert three.ordered


def test_a_band_keeps_margins_inside_nearest_to_its_middle_first():
    margins = np.array([-3.0, -0.9, 0.2, 0.0, 0.7, 1.1, np.nan])
    ctx = example_context({"all": 7}, columns={"m": margins})
    chosen = selector("margin", source="external", column="m", keep="band")
    assert chosen.select(np.arange(7), 9, ctx).rows.tolist() == [3, 2, 4, 1]
    assert chosen.select(np.arange(7), 2, ctx).rows.tolist() == [3, 2]


def test_two_columns_are_taken_apart_and_lengths_are_told():
    ctx = example_context({"all": 3}, columns={"w": np.array([1, 5, 3]), "l": np.array([0.5, 1.0, 4.0])})
    rewards = selector("margin", source="external", column="w", minus_column="l").select(np.arange(3), 2, ctx)
    assert rewards.rows.tolist() == [1, 0]
    assert rewards.scores.tolist() == [0.5, 4.0, -1.0]
    given = signals([[-1, -9], [-5, -5], [-9, -1]], [[-5, -5]] * 3, [[8, 2], [4, 4], [2, 8]])
    told = selector("margin").select(np.arange(3), 1, example_context({"all": 3}, signals=given)).reason
    assert "8 tokens chosen and 2 rejected on average, correlation with their difference 1.00" in told


def test_a_policy_that_is_its_reference_still_is_refused():
    given = signals([[-1, -2]] * 4, [[-1, -2]] * 4, [[3, 3]] * 4)
    ctx = example_context({"all": 4}, signals=given, columns={"m": np.ones(4)})
    for one in (selector("margin"), selector("bees", column="m")):
        with pytest.raises(DataError, match=r"every margin is 0.*warmup_steps"):
            one.select(np.arange(4), 2, ctx)


def test_answers_that_are_equal_where_they_are_cut_are_told():
    asked = signals([[-4.0, -4.0], [-6.0, -6.0]], [[-5.0, -5.0], [-5.0, -5.0]], [[2, 2], [2, 2]])
    with pytest.raises(DataError, match=r"every margin is 0: the answers of each pair are equal within 'cutoff_len'"):
        selector("margin").select(np.arange(2), 1, example_context({"all": 2}, signals=asked))


def test_outliers_are_left_out_and_sums_add():
    reward = np.array([0.0, 1.0, 2.0, 3.0, 50.0])
    given = signals([[m, 0.0] for m in (1.0, 2.0, 9.0, 4.0, 3.0)], [[0.0, 0.0]] * 5, [[3, 3]] * 5)
    ctx = example_context({"all": 5}, signals=given, columns={"r": reward})
    added = selector("bees", column="r", fuse="add", outliers=0.2).select(np.arange(5), 5, ctx)
    assert added.rows.tolist() == [3, 1]
    assert np.isnan(added.scores[[0, 2, 4]]).all()
    assert added.scores[[3, 1]].tolist() == [7.0, 3.0]
    with pytest.raises(DataError, match="units of their own"):
        selector("bees", column="r", lower=60.0).select(np.arange(5), 5, ctx)


def test_the_order_of_the_specification():
    losses = np.array([0.62, 0.41, 0.55, 0.70])
    ctx = example_context({"all": 4}, columns={"a": losses - 0.1, "b": losses + 0.1})
    chosen = selector("selective_dpo", columns=("a", "b")).select(np.arange(4), 4, ctx)
    assert chosen.rows.tolist() == [1, 2]
    assert chosen.ordered
    assert chosen.scores == pytest.approx(losses)


def test_each_model_scores_the_half_that_it_was_not_trained_on():
    """Losses written out, pair by pair; models of one half are averaged, and a run on a half has that half alone."""
    pool = np.arange(3, 43, dtype=np.int64)
    random = np.random.default_rng(2)
    names = ("a", "b", "c", "reference")
    sums = {name: random.normal(-20.0, 3.0, (43, 2)) for name in names}
    asked = {name: [] for name in names}

    def given(signal, rows, _):
        asked[signal.of] += rows.tolist()
        return answers(sums[signal.of][rows], np.full((len(rows), 2), 7))

    ctx = example_context(
        {"all": 43}, signals=FakeSignals(np.ones(43), values={PreferenceLogps: given}), total_sequences=43
    )
    halves = {}
    for half in ("first", "second"):
        run = selector("selective_dpo", half=half).select(pool, 40, ctx)
        halves[half] = run.rows.tolist()
        assert not run.ordered
    assert sorted(halves["first"] + halves["second"]) == pool.tolist()
    assert min(map(len, halves.values())) > 10
    chosen = selector("selective_dpo", first=("a", "b"), second=("c",), beta=0.2).select(pool, 40, ctx)

    def loss(model, row):
        (w, v), (rw, rv) = sums[model].astype(np.float32)[row], sums["reference"].astype(np.float32)[row]
        return math.log(1 + math.exp(-0.2 * ((float(w) - float(rw)) - (float(v) - float(rv)))))

    expected = [
        loss("c", row) if row in halves["first"] else (loss("a", row) + loss("b", row)) / 2 for row in pool.tolist()
    ]
    assert chosen.scores == pytest.approx(expected, rel=1e-6)
    assert chosen.rows.tolist() == pool[np.argsort(expected)][:20].tolist()
    assert sorted(asked["a"]) == sorted(asked["b"]) == sorted(halves["second"])
    assert sorted(asked["c"]) == sorted(halves["first"])


def test_the_share_that_is_kept_is_the_written_one():
    """0.29 x 100 is 28.999999999999996."""
    ctx = example_context({"a": 100}, columns={"c": np.arange(100.0)}, targets=())
    chosen = selector("selective_dpo", columns=("c",), keep_share=0.29).select(np.arange(100), 100, ctx)
    assert chosen.rows.tolist() == list(range(29))


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"source": "external"}, "column: missing"),
        ({"column": "m"}, "no effect on implicit margins"),
        ({"source": "external", "column": "m", "beta": 0.1}, "beta: has no effect"),
        ({"band": [0.0, 1.0]}, "band: has no effect without"),
        ({"keep": "band", "band": [1.0, 0.0]}, "two rising numbers"),
        ({"name": "bees"}, "column: missing"),
        ({"name": "bees", "column": "m", "upper": [1.0, -3.0]}, "above lower"),
        ({"name": "bees", "column": "m", "fuse": "add", "quantiles": [0.1, 0.9]}, "no bounds"),
        ({"name": "selective_dpo"}, "columns: missing; give one of these"),
        ({"name": "selective_dpo", "first": ["a"]}, "first: give one of these"),
        ({"name": "selective_dpo", "half": "first", "keep_share": 0.6}, "keep_share: has no effect with 'half'"),
        ({"name": "selective_dpo", "half": "first", "beta": 0.2}, "beta: has no effect with 'half'"),
        ({"name": "selective_dpo", "columns": ["a"], "reference": "r"}, "reference: has no effect with 'columns'"),
        ({"name": "selective_dpo", "columns": ["a"], "split_seed": 1}, "split_seed: has no effect with 'columns'"),
        ({"name": "s2l", "proxies": ["a"], "min_points": 3}, "min_points: has no effect beside proxies"),
        ({"name": "mopps", "low": 0.2}, "low: has no effect under 'by: nearest'"),
        ({"name": "mopps", "by": "band", "target": 0.4}, "target: has no effect under 'by: band'"),
        ({"name": "bees", "column": "m", "lower": 0.0, "quantiles": [0.1, 0.9]}, "no effect beside quantiles"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(params, told, tmp_path):
    with pytest.raises(ConfigError, match=told):
        parse_dynamic({"interval_steps": 1, "warmup_steps": 1, "selector": {"name": "margin", **params}}, tmp_path)
