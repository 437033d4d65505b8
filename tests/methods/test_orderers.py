"""Orders: golden values of the patterns, structure of what is drawn, paces, and what rows are ranked by."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.config.build import method_block
from dataflex.method import RunFacts
from dataflex.orderers.pacing import share_at
from dataflex.orderers.patterns import folding, jittered, segment, windowed, zigzag
from dataflex.registry import find
from dataflex.rng import stream
from dataflex.testing import FakeSignals, example_context

PATTERNS = ("sorting", "folding", "zigzag", "segment", "stair", "saw")


def build(name, **params):
    problems = []
    config = method_block("orderer", {"name": name, **params}, "dynamic.orderer", problems)
    assert problems == []
    return config.build()


def refused(name, **params):
    problems = []
    assert method_block("orderer", {"name": name, **params}, "dynamic.orderer", problems) is None
    return "\n".join(problems)


def ranks(name, count, seed=0, **params):
    return build(name, by="length", **params).ranks(count, stream(seed, "x")).tolist()


# ---------------------------------------------------------------- golden values of the original code


@pytest.mark.parametrize(
    ("found", "golden"),
    [
        (folding(6, 2), "0 2 4 1 3 5"),
        (zigzag(6, 2), "0 2 4 5 3 1"),
        (folding(9, 3), "0 3 6 1 4 7 2 5 8"),
        (zigzag(9, 3), "0 3 6 7 4 1 2 5 8"),
        (windowed(12, 2, 2, 0.25, zigzag), "0 1 2 3 5 7 8 6 4 9 10 11"),
        (windowed(12, 2, 2, 0.25, folding), "0 1 2 3 5 7 4 6 8 9 10 11"),
        (windowed(12, 3, 2, 0.25, zigzag), "0 1 3 5 6 4 2 7 9 10 8 11"),
    ],
)
def test_patterns_equal_the_original(found, golden):
    assert found.tolist() == [int(word) for word in golden.split()]


def test_defaults_equal_the_original_and_are_no_plain_sorting():
    assert ranks("stair", 20) == [0, 1, 2, 3, 4, 5, 6, 9, 12, 7, 10, 13, 8, 11, 14, 15, 16, 17, 18, 19]
    assert ranks("saw", 20) == [0, 1, 2, 3, 4, 5, 7, 8, 6, 9, 10, 11, 13, 14, 12, 15, 16, 17, 18, 19]
    assert ranks("folding", 10) == [0, 5, 1, 6, 2, 7, 3, 8, 4, 9]
    assert ranks("zigzag", 10) == [0, 5, 6, 1, 2, 7, 8, 3, 4, 9]
    assert ranks("sorting", 4) == [0, 1, 2, 3]


@given(count=st.integers(0, 200), layers=st.integers(1, 9), sections=st.integers(1, 5), ratio=st.floats(0, 0.5))
def test_every_pattern_is_a_permutation_and_without_folds_the_sorted_order(count, layers, sections, ratio):
    in_order = list(range(count))
    for fold in (folding, zigzag):
        assert sorted(fold(count, layers).tolist()) == in_order
        assert sorted(windowed(count, sections, layers, ratio, fold).tolist()) == in_order
        assert windowed(count, sections, 1, ratio, fold).tolist() == in_order
        assert windowed(count, 1, layers, ratio, fold).tolist() == in_order
        assert fold(count, 1).tolist() == in_order


@given(
    count=st.integers(0, 120),
    first=st.integers(0, 50),
    last=st.integers(0, 50),
    tails=st.tuples(st.sampled_from(("low", "high")), st.sampled_from(("low", "high"))),
)
def test_segment_keeps_its_parts(count, first, last, tails):
    found = segment(count, (first / 100, last / 100), tails, stream(1, "x")).tolist()
    assert sorted(found) == list(range(count))
    num_first, num_last = round(first / 100 * count), min(round(last / 100 * count), count - round(first / 100 * count))
    front, middle, back = found[:num_first], found[num_first : count - num_last], found[count - num_last :]
    if tails == ("low", "high"):
        assert [sorted(part) for part in (front, middle, back)] == [
            list(range(num_first)),
            list(range(num_first, count - num_last)),
            list(range(count - num_last, count)),
        ]
    elif tails[0] == tails[1]:
        ends = range(num_first + num_last) if tails[0] == "low" else range(count - num_first - num_last, count)
        assert sorted(front + back) == list(ends)
    else:
        assert sorted(front) == list(range(count - num_first, count))
        assert sorted(back) == list(range(num_last))


def test_segment_shuffles_each_part_anew():
    one, other = (ranks("segment", 200, seed) for seed in (0, 1))
    assert one != other
    assert one[:20] != sorted(one[:20])
    assert one[20:180] != sorted(one[20:180])
    assert one[180:] != sorted(one[180:])
    both = ranks("segment", 200, front="high", back="high")
    assert min(both[:20] + both[180:]) == 160
    assert max(both[:20]) > 180 > min(both[:20])


@pytest.mark.parametrize("name", PATTERNS)
def test_a_jitter_stays_within_its_windows(name):
    for count in (0, 5, 8, 103):
        plain = ranks(name, count)
        found = ranks(name, count, jitter=4)
        windows = [sorted(found[i : i + 4]) for i in range(0, count, 4)]
        if name != "segment":  # its parts were drawn before
            assert windows == [sorted(plain[i : i + 4]) for i in range(0, count, 4)]
            assert (found != plain) == (count > 4)
    assert jittered(np.arange(6), 6, stream(0, "a")).tolist() != jittered(np.arange(6), 6, stream(1, "a")).tolist()


def test_all_orders_of_a_window_are_as_likely():
    drawn = [tuple(jittered(np.arange(4), 3, stream(seed, "a")).tolist()) for seed in range(3000)]
    assert {each[3] for each in drawn} == {3}
    counts = [drawn.count(each) for each in set(drawn)]
    assert len(counts) == 6
    assert sum((count - 500) ** 2 / 500 for count in counts) < 25


@pytest.mark.parametrize(
    ("name", "params", "told"),
    [
        ("sorting", {}, "dynamic.orderer.by: missing"),
        ("sorting", {"by": "los"}, "did you mean 'loss'"),
        ("sorting", {"by": "column"}, "dynamic.orderer.by.column: missing"),
        ("sorting", {"by": "length", "jitter": 1}, "dynamic.orderer.jitter: a window of one row"),
        ("folding", {"by": "length", "layers": 1}, "dynamic.orderer.layers: must be at least 2"),
        ("saw", {"by": "length", "ratio": 0}, "dynamic.orderer.ratio: must be above 0"),
        ("saw", {"by": "length", "ratio": 0.2}, "dynamic.orderer.ratio: windows of 3 sections overlap beyond 0.1667"),
        ("stair", {"by": "length", "sections": 1}, "dynamic.orderer.sections: must be at least 2"),
        ("segment", {"by": "length", "front_percent": 60, "back_percent": 60}, "dynamic.orderer.front_percent"),
        ("segment", {"by": "length", "front_percent": 0, "back_percent": 0}, "dynamic.orderer.front_percent"),
        ("pacing", {"by": "length", "start": 1.0}, "dynamic.orderer.start: all rows are available"),
        ("pacing", {"by": "length", "full_at": 0}, "dynamic.orderer.full_at: must be above 0"),
        ("pacing", {"by": "length", "function": "cubic"}, "dynamic.orderer.function"),
    ],
)
def test_parameters_that_would_order_nothing_are_refused(name, params, told):
    assert told in refused(name, **params)


# ---------------------------------------------------------------- pacing


@pytest.mark.parametrize(
    ("function", "half"), [("linear", 600), ("quad", 400), ("root", 765), ("step", 200), ("exp", 205), ("log", 944)]
)
def test_paces_equal_the_paper(function, half):
    """N = 1000, T = 100, a = 0.5, b = 0.2: all but the middle of the way is 200 at first and 1000 at step 50."""
    pace = build("pacing", by="length", function=function)
    assert [int(1000 * pace.available(step, 100)) for step in (0, 25, 50, 99)] == [200, half, 1000, 1000]
    steps = build("pacing", by="length", function=function, full_at=50)
    assert [steps.available(step, 100) for step in range(60)] == [pace.available(step, 100) for step in range(60)]


def test_competence_grows_as_the_square_root():
    for start in (0.01, 0.2):
        assert share_at("competence", start, 0.0) == pytest.approx(start)
        assert share_at("competence", start, 0.5) == pytest.approx(math.sqrt(0.5 * (1 - start**2) + start**2))
        assert share_at("competence", start, 1.0) == 1.0


def test_a_pace_beyond_the_run_is_told():
    pace = build("pacing", by="length", full_at=50)
    assert list(pace.check(RunFacts())) == []
    assert list(pace.check(RunFacts(total_steps=50))) == []
    (problem,) = pace.check(RunFacts(total_steps=49))
    assert problem.key == "full_at"
    assert "the run has 49 steps" in problem.text


# ---------------------------------------------------------------- what rows are ranked by


def context(**given):
    return example_context({"a": 6}, lengths=[30, 10, 20, 10, 50, 40], **given)


def keys(by, rows=range(6), descending=False, **given):
    orderer = build("sorting", by=by, descending=descending)
    return orderer.sort_keys(np.array(rows), context(**given)).tolist()


def test_rows_are_ranked_by_what_is_named():
    assert keys("length") == [30, 10, 20, 10, 50, 40]
    assert keys("length", [4, 0]) == [50, 30]
    assert keys("length", descending=True) == [-30, -10, -20, -10, -50, -40]
    signals = FakeSignals([3.0, 1.0, math.nan, 2.0, 5.0, 4.0])
    np.testing.assert_equal(keys("loss", signals=signals), [3.0, 1.0, math.nan, 2.0, 5.0, 4.0])
    assert signals.asked == {"losses"}
    column = {"name": "column", "column": "level"}
    assert keys(column, columns={"level": np.array([1, 2, 3, 4, 5, 6])}) == [1, 2, 3, 4, 5, 6]
    assert keys({"name": "scores", "file": "f", "column": "c"}, columns={"f: c": np.arange(6.0)}) == [0, 1, 2, 3, 4, 5]
    assert keys("selector", [2, 3], scores=np.arange(6.0) / 2) == [1.0, 1.5]
    assert len({*keys("random")}) == 6
    assert keys("random") == keys("random", index=7)
    assert keys("random") != keys("random", seed=1)


@pytest.mark.parametrize("name", [*PATTERNS, "pacing"])
def test_what_is_named_is_required(name):
    def needs(by):
        return build(name, by=by).requires()

    assert needs("loss").signals == {"losses"}
    assert needs("loss").needs_interval
    assert needs("selector").selector_scores
    assert needs({"name": "column", "column": "level"}).columns == ("level",)
    (wanted,) = needs({"name": "scores", "file": "f", "column": "c"}).score_files
    assert (wanted.file, wanted.column) == ("f", "c")
    assert not needs("length").signals
    assert not needs("length").needs_interval


def test_values_that_are_no_numbers_are_refused():
    orderer = build("sorting", by={"name": "column", "column": "level"})
    values = np.array([1, None, 2.5, "3", math.nan, True, math.inf], dtype=object)
    refused_values, wanted = orderer.refused_values("level", values)
    assert refused_values.tolist() == [False, True, False, True, True, True, True]
    assert wanted == "a column to order by must hold finite numbers"
    assert not orderer.refused_values("level", np.array([1, 2]))[0].any()
    assert orderer.refused_values("level", np.array(["1"]))[0].all()


def test_the_record_says_the_order():
    assert build("saw", by="loss").reason == "order: saw of loss, smallest first"
    column = {"name": "column", "column": "level"}
    assert build("sorting", by=column, descending=True).reason == "order: sorting of column level, largest first"
    assert build("pacing", by="random").reason == "order: pacing of random, smallest first (linear from 20%)"
    assert find("orderer", "shuffle")(None).reason == "order: shuffle"
