"""Against slow transcriptions with fixed numbers, and coverage and error rates by simulation."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from dataflex.compare.results import Results
from dataflex.compare.statistics import difference, holm, resampled_means
from dataflex.compare.suite import Claim
from dataflex.record.curves import at_compute


def test_against_scipy_and_a_loop():
    ours, theirs = [2.1, 1.7, 2.6, 2.2, 2.0], [2.4, 2.3, 2.5, 2.9, 2.1]
    found = difference(ours, theirs)
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert found.mean == pytest.approx(sum(gaps) / 5)
    assert found.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    means = sorted(sum(draw) / 5 for draw in itertools.product(gaps, repeat=5))
    place = stats.norm.cdf(-math.sqrt(5 / 4) * stats.t.ppf(0.975, 4)) * (len(means) - 1)
    below, part = int(place), place - int(place)
    low, high = (each[below] + (each[below + 1] - each[below]) * part for each in (means, means[::-1]))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert sorted(resampled_means(np.array(gaps))) == pytest.approx(means)
    few = difference(ours[:3], theirs[:3])
    ends = stats.t.interval(0.95, 2, np.mean(gaps[:3]), stats.sem(gaps[:3]))
    assert (few.low, few.high) == (pytest.approx(ends[0]), pytest.approx(ends[1]))


def test_few_and_equal_pairs():
    one = difference([1.0], [2.0])
    assert (one.pairs, one.mean, one.low, one.p) == (1, -1.0, None, None)
    assert math.isnan(difference([], []).mean)
    same = difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.mean, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    alike = difference([1.5, 2.5], [1.0, 2.0])
    assert (alike.mean, alike.low, alike.p) == (0.5, None, None)


@pytest.mark.parametrize("n", [3, 5, 12])
def test_nothing_is_found_where_nothing_is(n):
    """Of A/A comparisons p <= .05 comes in about 5 %, and about as many intervals miss 0."""
    rng = np.random.default_rng(8)
    trials = 600 if n < 12 else 150
    found = [difference(rng.normal(size=n), rng.normal(size=n)) for _ in range(trials)]
    wrong = np.mean([one.p <= 0.05 for one in found])
    missed = np.mean([not one.low <= 0 <= one.high for one in found])
    assert wrong == pytest.approx(0.05, abs=0.03)
    assert missed == pytest.approx(0.05, abs=0.05)


def test_holm_by_hand():
    """A test that came to no p is one of those that were meant."""
    assert holm([0.01, None, 0.04, 0.03]) == [0.04, None, 0.09, 0.09]
    assert holm([0.03, None, None]) == [pytest.approx(0.09), None, None]
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_curve_at_a_compute():
    curve = [(0.0, 4.0), (10.0, 3.0), (30.0, 2.0)]
    assert at_compute(curve, 20.0) == 2.5
    assert at_compute(curve, 30.0) == 2.0
    assert at_compute(curve, 30.1) is None
    assert at_compute(curve[1:], 9.9) is None
    assert at_compute([], 1.0) is None


def results_of(values, claims):
    """Results of a suite of five seeds without any training: ``values[arm]`` are its metric by seed."""
    seeds = tuple(range(5))
    suite = SimpleNamespace(arms=list(values), seeds=seeds, steps=3, baseline="static", claims=claims)
    outcomes = {
        (arm, 3, seed): SimpleNamespace(metrics={"eval_loss": float(found[seed])})
        for arm, found in values.items()
        for seed in seeds
    }
    return Results(suite=suite, outcomes=outcomes)


def claim(arm, **more):
    return Claim(claim="it is better", arm=arm, metric="eval_loss", better="less", **more)


def test_a_method_that_was_broken_is_not_held():
    """The claim that a method holds, it does not with its sign flipped, nor with a target that is none."""
    rng = np.random.default_rng(3)
    static = 2.7 + 0.05 * rng.normal(size=5)  # the seed's own part is common to the arms
    noise = {arm: 0.01 * rng.normal(size=5) for arm in ("less", "flipped", "astray", "close")}
    gains = {"less": -0.2, "flipped": 0.2, "astray": 0.0, "close": 0.01}
    values = {"static": static} | {arm: static + gains[arm] + noise[arm] for arm in noise}
    claims = [*map(claim, noise), claim("less", by=0.3), claim("less", than="flipped", by=0.3)]
    claims += [claim("close", by=-0.05), claim("flipped", by=-0.05), claim("less", by=-0.05)]
    judged = results_of(values, claims).judged()
    assert [line["verdict"] for line in judged[:1]] == ["held"]
    assert judged[1]["verdict"] == "not held"
    assert judged[2]["verdict"] in ("not held", "not decided")
    assert [line["verdict"] for line in judged[4:]] == ["not held", "held", "held", "not held", "held"]
    assert [line["why"] for line in judged[4:8]] == [
        "the difference is not more than 0.3", "", "", "it is worse by 0.05 or more",
    ]  # fmt: skip
    assert judged[6]["gain"] == pytest.approx(0.05 - np.mean(values["close"] - static))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "a and static were trained with other rows"),
        ({"model_name_or_path": "other"}, "a and static make other tokens of the same data"),
        ({"dataset": "other"}, ""),
    ],
)
def test_other_tokens_of_the_same_data_are_stated(changes, told):
    def outcome(fingerprint, **mapping):
        run = SimpleNamespace(started={"row_space": {"fingerprint": fingerprint}})
        return SimpleNamespace(run=run, job=SimpleNamespace(run=SimpleNamespace(mapping=mapping)))

    found, both = results_of({"static": np.zeros(5), "a": np.zeros(5)}, []), {"dataset": "d", "model_name_or_path": "m"}
    found.outcomes = {("static", 3, 0): outcome("1", **both), ("a", 3, 0): outcome("2", **{**both, **changes})}
    lines = list(found.unlike())
    assert len(lines) == bool(told)
    assert all(line.startswith(told) for line in lines)


def test_arms_that_failed_make_no_claim_easier():
    """p is .03 for the one arm that ran: with two others that failed it is corrected for three, the baseline not."""
    gaps = np.array([-0.4, -0.1, -0.3, -0.2, 0.05])
    p = stats.ttest_1samp(gaps, 0.0).pvalue
    assert 0.025 < p < 0.1
    found = results_of({"static": np.zeros(5), "a": gaps, "b": gaps, "c": gaps}, [claim(arm) for arm in "abc"])
    found.outcomes = {key: each for key, each in found.outcomes.items() if key[0] in ("static", "a")}
    (line,) = (line for line in found.compared("eval_loss", "steps") if line["arm"] == "a")
    assert (line["p"], line["p_holm"]) == (pytest.approx(p), pytest.approx(3 * p))
    assert [each["p_holm"] for each in found.judged()] == [pytest.approx(3 * p), None, None]


def test_suites_of_equal_arms_hold_nothing():
    """Of suites whose three arms are the baseline again, at most alpha hold any of their claims."""
    rng = np.random.default_rng(5)
    arms = ("first", "second", "third")
    held = [
        any(
            line["verdict"] == "held"
            for line in results_of(
                {arm: rng.normal(size=5) for arm in ("static", *arms)}, [claim(arm) for arm in arms]
            ).judged()
        )
        for _ in range(200)
    ]
    assert np.mean(held) <= 0.05
    alike = rng.normal(size=5)
    same = results_of({arm: alike for arm in ("static", *arms)}, [claim(arm) for arm in arms])
    assert [line["verdict"] for line in same.judged()] == ["not held"] * 3
    assert [line.get("p_holm") for line in same.compared("eval_loss", "steps")] == [None, 1.0, 1.0, 1.0]
