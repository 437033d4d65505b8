"""Token budgets, draws and quotas: golden numbers, slow transcriptions, properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.errors import ConfigError, DataError
from dataflex.select.choose import (
    Candidates,
    by_quota,
    gumbel_top_k,
    log_weights,
    multinomial,
    take_turns,
    token_budget,
    water_filling,
    weighted_with_replacement,
)
from dataflex.select.cluster import kmeans_labels
from dataflex.select.rules import RULES, Rule, choose


def stream(seed=0):
    return Candidates.stream(seed, "test", 0)


def candidates(**given_):
    count = len(next(iter(given_.values())))
    return Candidates(**{"rows": np.arange(count), "uniforms": stream(), **given_})


# ---------------------------------------------------------------- token budget


def slow_token_budget(scores, lengths, tokens, k, skip):
    order = sorted((i for i in range(len(scores)) if scores[i] == scores[i]), key=lambda i: (-scores[i], i))
    chosen, used = [], 0
    for i in order:
        if len(chosen) == k:
            break
        if used + lengths[i] > tokens:
            if skip:
                continue
            break
        chosen.append(i)
        used += lengths[i]
    return chosen


@pytest.mark.slow
@given(
    rows=st.lists(st.tuples(st.sampled_from([0.0, 1.0, 2.0, 3.0, float("nan")]), st.integers(0, 9)), max_size=30),
    tokens=st.integers(0, 60),
    k=st.integers(0, 30),
    skip=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_token_budget_equals_the_loop(rows, tokens, k, skip):
    scores, lengths = np.array([s for s, _ in rows]), np.array([n for _, n in rows], dtype=np.int64)
    found = token_budget(scores, lengths, tokens, k, skip=skip)
    assert found.tolist() == slow_token_budget(scores.tolist(), lengths.tolist(), tokens, k, skip)


def test_token_budget_goes_on_past_rows_that_do_not_fit():
    scores, lengths = np.array([5.0, 4, 3, 2, 1]), np.array([6, 7, 3, 2, 1])
    assert token_budget(scores, lengths, 10, 9).tolist() == [0, 2, 4]
    assert token_budget(scores, lengths, 10, 9, skip=False).tolist() == [0]
    rule = Rule.of("token_budget", tokens=10)
    assert choose(rule, candidates(scores=scores, lengths=lengths), 2).tolist() == [0, 2]


# ---------------------------------------------------------------- draws


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "expected"), [(2.0, [0.186, 0.307, 0.506]), (1.0, [0.090, 0.245, 0.665])])
def test_qurating_probabilities(temperature, expected):
    """First draws from scores 0, 1, 2."""
    log_w = log_weights(np.array([0.0, 1.0, 2.0]), temperature, False)
    p = np.exp(log_w) / np.exp(log_w).sum()
    np.testing.assert_allclose(p, expected, atol=5e-4)
    firsts = [gumbel_top_k(log_w, 1, stream(seed)("gumbel", np.array([3, 1, 2])))[0] for seed in range(6000)]
    np.testing.assert_allclose(np.bincount(firsts, minlength=3) / 6000, expected, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [Rule.of("gumbel_top_k"), Rule.of("multinomial")])
def test_inclusion_probabilities_of_two_out_of_three(rule):
    p = np.array([0.5, 0.3, 0.2])
    scores = np.log(p) if rule.name == "gumbel_top_k" else p
    counts = np.zeros(3)
    for seed in range(20_000):
        counts[choose(rule, candidates(scores=scores, uniforms=stream(seed)), 2)] += 1
    np.testing.assert_allclose(counts / 20_000, [0.8393, 0.6750, 0.4857], atol=0.01)


@given(seed=st.integers(0, 10_000), k=st.integers(0, 40), name=st.sampled_from(["gumbel_top_k", "multinomial"]))
@settings(max_examples=100, deadline=None)
def test_draws_do_not_depend_on_the_order_of_the_pool(seed, k, name):
    rng = np.random.default_rng(seed)
    rows, scores = rng.permutation(1000)[:30], rng.random(30)
    moved = rng.permutation(30)
    here = choose(Rule.of(name), candidates(scores=scores, rows=rows, uniforms=stream(seed)), k)
    there = choose(Rule.of(name), candidates(scores=scores[moved], rows=rows[moved], uniforms=stream(seed)), k)
    assert rows[here].tolist() == rows[moved][there].tolist()
    assert len(set(here.tolist())) == min(k, 30)


def test_multinomial_with_replacement_follows_the_weights():
    weights = np.array([0.0, 3.0, 1.0, 0.0])
    drawn = multinomial(weights, 8000, np.arange(4), stream(), replacement=True)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 8000, [0, 0.75, 0.25, 0], atol=0.02)
    softmax = Rule.of("multinomial", weights="softmax", temperature=2.0, replacement=True)
    drawn = choose(softmax, candidates(scores=np.array([0.0, 1.0, 2.0])), 8000)
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 8000, [0.186, 0.307, 0.506], atol=0.02)


def test_weights_of_zero_are_never_drawn():
    for replacement in (False, True):
        drawn = multinomial(np.array([0.0, 1.0, 0.0]), 3, np.arange(3), stream(), replacement=replacement)
        assert set(drawn.tolist()) == {1}
        assert len(drawn) == (3 if replacement else 1)
    assert weighted_with_replacement([0.0, 1.0, 0.0], 2, np.array([1e-300, 1 - 1e-16])).tolist() == [1, 1]


def test_softmax_weights_too_small_for_a_float_are_drawn_last():
    scores = np.array([0.0, -5000.0, -1.0, -9000.0])
    drawn = choose(Rule.of("multinomial", weights="softmax"), candidates(scores=scores), 4)
    assert drawn[2:].tolist() == [1, 3]
    assert sorted(drawn[:2].tolist()) == [0, 2]


def test_what_cannot_be_drawn_from_is_refused():
    with pytest.raises(DataError, match=r"some are negative\..*weights: softmax"):
        choose(Rule.of("multinomial"), candidates(scores=np.array([1.0, -1.0])), 1)
    with pytest.raises(DataError, match="weights of 2 rows are all 0"):
        choose(Rule.of("multinomial"), candidates(scores=np.zeros(2)), 1)
    with pytest.raises(ValueError, match="temperature: has no effect"):
        Rule.of("multinomial", temperature=2.0)


def test_equal_scores_can_be_standardized():
    assert log_weights(np.full(4, 3.0), 2.0, True).tolist() == [0.0] * 4
    np.testing.assert_allclose(log_weights(np.array([1.0, 3.0]), 2.0, True), [-0.5, 0.5])


# ---------------------------------------------------------------- turns


@given(lists=st.lists(st.permutations(range(12)), min_size=1, max_size=4), k=st.integers(0, 15))
@settings(max_examples=100, deadline=None)
def test_taking_turns_is_round_robin_over_given_orders(lists, k):
    found = take_turns([one[: max(k, 1)] for one in lists], k).tolist()
    taken, turn = [], 0
    while len(taken) < min(k, 12):
        taken.append(next(each for each in lists[turn % len(lists)] if each not in taken))
        turn += 1
    assert found == taken


def test_lists_that_run_out_are_left():
    assert take_turns([[0, 1], [0, 2, 3, 4]], 9).tolist() == [0, 2, 1, 3, 4]


# ---------------------------------------------------------------- quotas


def test_water_filling_of_s2l():
    assert water_filling([2, 10, 50], 30).tolist() == [2, 10, 18]
    assert water_filling([50, 2, 10], 30).tolist() == [18, 2, 10]
    assert water_filling([50, 50], 3).tolist() == [1, 2]


@given(sizes=st.lists(st.integers(0, 50), max_size=10), total=st.integers(0, 400))
@settings(max_examples=200, deadline=None)
def test_quotas_add_up_and_fit(sizes, total):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    for quota in ("water_filling", "proportional"):
        found = by_quota(groups, np.zeros(len(groups)), total, quota)
        assert len(set(found.tolist())) == len(found) == min(total, sum(sizes))
    found = water_filling(sizes, total)
    cut = [count for count, size in zip(found.tolist(), sizes, strict=True) if count < size]
    # Nobody who was cut got less than somebody else, but for the rounding down of one.
    assert not cut or max(found.tolist()) - min(cut) <= 1


def test_groups_give_their_best_rows():
    groups = np.array([0, 0, 0, 1, 1, 3])
    found = by_quota(groups, np.array([1.0, 9, 5, 2, 3, 0]), 4, "water_filling")
    assert found.tolist() == [1, 2, 4, 5]  # 1 of the single row, 1 of two, 2 of three
    rule = Rule.of("water_filling")
    assert choose(rule, candidates(scores=np.array([1.0, 9, 5, 2, 3, 0]), groups=groups), 4).tolist() == [1, 2, 4, 5]


@given(groups=st.lists(st.integers(0, 4), max_size=40), k=st.integers(0, 45), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_quota_rows_are_the_best_of_their_group(groups, k, seed):
    labels = np.array(groups, dtype=np.int64)
    preference = np.random.default_rng(seed).integers(0, 5, size=len(labels)).astype(float)
    found = by_quota(labels, preference, k, "water_filling").tolist()
    assert len(set(found)) == len(found) == min(k, len(labels))
    for group in set(groups):
        members = sorted(np.flatnonzero(labels == group).tolist(), key=lambda i: (-preference[i], i))
        own = [i for i in found if labels[i] == group]
        assert own == members[: len(own)]


def test_clusters_are_found_and_share_the_budget():
    rng = np.random.default_rng(0)
    centres = 20 * np.eye(4)
    sizes = [3, 40, 40, 80]
    vectors = np.concatenate([centre + rng.normal(size=(n, 4)) for centre, n in zip(centres, sizes, strict=True)])
    vectors = vectors.astype(np.float32)
    true = np.repeat(np.arange(4), sizes)
    labels = kmeans_labels(vectors, 4, np.random.default_rng(1))
    assert all(len(set(labels[true == group].tolist())) == 1 for group in range(4))
    rule = Rule.of("cluster_quota", clusters=4, within="random")
    found = choose(rule, candidates(vectors=vectors), 33)
    assert sorted(np.bincount(true[found]).tolist()) == [3, 10, 10, 10]
    again = choose(rule, candidates(vectors=vectors), 33)
    other = choose(rule, candidates(vectors=vectors, uniforms=stream(1)), 33)
    assert found.tolist() == again.tolist() != other.tolist()


def test_clusters_of_a_large_pool_are_found_on_a_sample(monkeypatch):
    monkeypatch.setattr("dataflex.select.cluster._FIT_ROWS", 20)
    vectors = np.repeat(20 * np.eye(3), 100, axis=0) + np.random.default_rng(0).normal(size=(300, 3))
    labels = kmeans_labels(vectors.astype(np.float32), 3, np.random.default_rng(0))
    assert [len(set(labels[100 * g : 100 * g + 100].tolist())) for g in range(3)] == [1, 1, 1]
    assert len(set(labels.tolist())) == 3


# ---------------------------------------------------------------- the table


def test_unknown_rules_are_refused_with_the_nearest_spelling():
    with pytest.raises(ConfigError, match="unknown rule 'kcenter'; did you mean 'k_center'"):
        Rule.of("kcenter")


@pytest.mark.parametrize("name", list(RULES))
@given(seed=st.integers(0, 1000), k=st.integers(0, 40), count=st.integers(0, 25))
@settings(max_examples=25, deadline=None)
def test_every_rule_gives_distinct_rows_within_the_budget(name, seed, k, count):
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-2, 3, size=(count, 3)).astype(np.float32)
    everything = Candidates(
        rows=rng.permutation(100)[:count],
        uniforms=stream(seed),
        scores=rng.integers(1, 4, size=count).astype(float),
        by_query=rng.integers(0, 4, size=(2, count)).astype(float),
        vectors=vectors,
        queries=rng.integers(-2, 3, size=(2, 3)).astype(np.float32),
        lengths=rng.integers(1, 5, size=count),
        groups=rng.integers(0, 3, size=count),
    )
    rule = Rule.of(name, **({"tokens": 10} if name == "token_budget" else {}))
    found = choose(rule, everything, k)
    assert found.dtype == np.int64
    assert len(set(found.tolist())) == len(found) <= min(k, count)
    assert set(found.tolist()) <= set(range(count))
    if name not in ("token_budget", "deita"):
        assert len(found) == min(k, count)
    assert choose(rule, everything, k).tolist() == found.tolist()


@pytest.mark.parametrize("name", [name for name, spec in RULES.items() if spec.ranks])
def test_a_ranking_rule_begins_alike_whatever_the_budget(name):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 3)).astype(np.float32)
    everything = candidates(
        scores=rng.random(60), by_query=rng.random((3, 60)), vectors=vectors, queries=vectors[:3] + np.float32(0.1)
    )
    long = choose(Rule.of(name), everything, 40).tolist()
    assert choose(Rule.of(name), everything, 15).tolist() == long[:15]
