"""Mixers against oracles, the sheets' numbers and their edge cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.errors import ConfigError, DataError
from dataflex.mixers.fixed import Size, Stage, Staged, Static, Temperature, Uniform, UniMax, allocate, tempered
from dataflex.testing import example_context
from tests.methods.oracles import oracle_temperature, oracle_unimax

SIZES = {"web": 40, "code": 20, "math": 4}
sizes_K = st.lists(st.integers(1, 10**9), min_size=1, max_size=8)


def mix(method, sizes=SIZES, **options):
    return method.mix(example_context(sizes, **options))


def proportions(method, sizes=SIZES, **options):
    return mix(method, sizes, **options).proportions.tolist()


def static(value):
    return Static(Static.Params(proportions=value))


def staged(*stages, interpolation="step"):
    built = tuple(Stage(start_step=start, proportions=value) for start, value in stages)
    return Staged(Staged.Params(stages=built, interpolation=interpolation))


# ---------------------------------------------------------------- static and the written proportions


def test_static_leaves_numbers_that_sum_to_one_as_written():
    assert proportions(static((0.6, 0.3, 0.1))) == [0.6, 0.3, 0.1]


def test_static_divides_by_the_sum_and_keeps_zero_as_never():
    assert proportions(static((7, 0, 1))) == pytest.approx([0.875, 0.0, 0.125], abs=1e-15)
    assert proportions(static({"math": 1.0, "web": 3.0, "code": 0})) == pytest.approx([0.75, 0.0, 0.25], abs=1e-15)
    assert proportions(static((1e308, 1e308, 0.0))) == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((), "proportions: is empty"),
        ((0.5, -0.5, 1.0), "proportions: 1 is -0.5, must be a finite number, 0 or more"),
        ((0.5, math.nan, 0.5), "proportions: 1 is nan, must be a finite number"),
        ((math.inf, 1.0, 1.0), "proportions: 0 is inf, must be"),
        ({"web": -1.0}, "proportions: web is -1.0, must be"),
        (("0.5", 0.5), "proportions: 0 is '0.5', must be a finite number"),
        ((True, 0.5), "proportions: 0 is True, must be a finite number"),
        ((0.0, 0.0, 0.0), "proportions: all are 0"),
    ],
)
def test_numbers_are_refused_before_any_data_is_read(value, message):
    with pytest.raises(ValueError, match=message):
        Static.Params(proportions=value)


def test_a_list_of_the_wrong_length_is_refused_with_the_domains():
    with pytest.raises(
        ConfigError, match=r"dynamic.mixer.proportions: 2 numbers for 3 domains; give one for each of web, code, math"
    ):
        mix(static((0.5, 0.5)))


def test_unknown_and_missing_names_are_told_together():
    with pytest.raises(ConfigError) as caught:
        mix(static({"wed": 1.0, "code": 1.0}))
    told = "(domains: web, code, math)"
    missing = "missing; every domain needs a number, 0 means never"
    assert caught.value.problems == [
        f"dynamic.mixer.proportions.wed: no such domain; did you mean 'web'? {told}",
        f"dynamic.mixer.proportions.web: {missing} {told}",
        f"dynamic.mixer.proportions.math: {missing} {told}",
    ]


# ---------------------------------------------------------------- uniform, size, temperature


def test_uniform_gives_every_domain_the_same():
    assert proportions(Uniform(Uniform.Params())) == pytest.approx([1 / 3] * 3, abs=1e-15)


def test_size_counts_the_unit_of_the_run():
    size = Size(Size.Params())
    assert proportions(size) == pytest.approx([40 / 64, 20 / 64, 4 / 64], abs=1e-15)
    lengths = np.repeat([1, 10, 100], [40, 20, 4])
    assert proportions(size, lengths=lengths, unit="tokens") == pytest.approx([40 / 640, 200 / 640, 400 / 640])


def test_temperature_numbers_of_the_sheet():
    sizes = np.array([1.0, 10.0, 100.0])
    np.testing.assert_allclose(tempered(sizes, 1.0), [0.00901, 0.09009, 0.90090], atol=5e-6)
    np.testing.assert_allclose(tempered(sizes, 2.0), [0.07061, 0.22329, 0.70610], atol=5e-6)
    np.testing.assert_allclose(tempered(sizes, math.inf), [1 / 3] * 3, atol=1e-15)


@given(sizes_K, st.floats(0.5, 20.0))
def test_temperature_equals_the_oracle(sizes, tau):
    np.testing.assert_allclose(tempered(np.array(sizes, dtype=float), tau), oracle_temperature(sizes, tau), rtol=1e-9)


def test_temperature_of_one_is_size_and_empty_domains_stay_out():
    assert proportions(Temperature(Temperature.Params(tau=1.0))) == pytest.approx(proportions(Size(Size.Params())))
    np.testing.assert_allclose(tempered(np.array([0.0, 1.0, 4.0]), 2.0), [0.0, 1 / 3, 2 / 3])
    np.testing.assert_allclose(tempered(np.array([0.0, 1.0, 4.0]), math.inf), [0.0, 0.5, 0.5])


def test_temperature_neither_over_nor_underflows():
    np.testing.assert_allclose(tempered(np.array([1e15, 1e15]), 0.01), [0.5, 0.5])
    np.testing.assert_allclose(tempered(np.array([1.0, 1e15]), 0.01), [0.0, 1.0])


# ---------------------------------------------------------------- unimax


def test_unimax_numbers_of_the_sheet():
    sizes = np.array([1.0, 10.0, 100.0])
    assert allocate(sizes, 60, 2).tolist() == [2.0, 20.0, 38.0]
    assert allocate(sizes, 300, 2).tolist() == [2.0, 20.0, 200.0]  # short by 78
    got = proportions(UniMax(UniMax.Params(max_epochs=2.0)), {"a": 1, "b": 10, "c": 100}, total_sequences=60)
    assert got == pytest.approx([0.0333333, 0.3333333, 0.6333333], abs=1e-6)


@pytest.mark.slow
@settings(max_examples=200)
@given(sizes_K, st.floats(0.01, 1.0), st.floats(0.5, 8.0))
def test_unimax_spends_the_budget_equally_up_to_the_caps(sizes, share, max_epochs):
    budget = share * max_epochs * sum(sizes)
    got = allocate(np.array(sizes, dtype=float), budget, max_epochs)
    np.testing.assert_allclose(got, oracle_unimax(sizes, budget, max_epochs), rtol=1e-7)
    assert got.sum() == pytest.approx(budget, rel=1e-9)
    assert (got <= max_epochs * np.array(sizes) * (1 + 1e-12)).all()


def test_unimax_does_not_depend_on_the_order_of_domains():
    assert allocate(np.array([100.0, 1.0, 10.0]), 60, 2).tolist() == [38.0, 2.0, 20.0]


def test_unimax_refuses_a_run_that_the_data_cannot_fill():
    with pytest.raises(DataError) as caught:
        mix(UniMax(UniMax.Params(max_epochs=2.0)), {"a": 1, "b": 10, "c": 100}, total_sequences=300)
    assert str(caught.value) == (
        "unimax: the run serves 300 sequences, but 2 epochs of all 111 are 222, short by 78. "
        "Set max_epochs: 2.71 or more, train fewer steps, or set overflow: repeat"
    )
    mix(UniMax(UniMax.Params(max_epochs=2.71)), {"a": 1, "b": 10, "c": 100}, total_sequences=300)


def test_unimax_repeats_in_proportion_to_the_caps_when_told_to():
    told = UniMax(UniMax.Params(max_epochs=2.0, overflow="repeat"))
    got = mix(told, {"a": 1, "b": 10, "c": 100}, total_sequences=300)
    np.testing.assert_allclose(got.proportions, np.array([2, 20, 200]) / 222)
    assert "short by 78: all domains repeat alike" in got.reason


def test_unimax_budget_in_tokens_is_sequences_times_the_mean_length():
    lengths = np.repeat([10, 1], [1, 110])  # 120 tokens in 111 rows
    unimax = UniMax(UniMax.Params(max_epochs=2.0))
    got = proportions(unimax, {"a": 1, "b": 10, "c": 100}, lengths=lengths, unit="tokens", total_sequences=111)
    np.testing.assert_allclose(got, allocate(np.array([10.0, 10.0, 100.0]), 120.0, 2.0) / 120.0)


# ---------------------------------------------------------------- staged


def at(method, step, sizes=None, stop=None):
    return mix(method, sizes or {"a": 5, "b": 5}, start_step=step, stop_step=stop or step + 10)


def test_staged_keeps_each_stage_until_the_next():
    method = staged((0, (1, 0)), (10, (0.5, 0.5)), (30, {"a": 1, "b": 3}))
    got = {step: at(method, step).proportions.tolist() for step in (0, 9, 10, 29, 30, 1000)}
    assert got == {0: [1.0, 0.0], 9: [1.0, 0.0], 10: [0.5, 0.5], 29: [0.5, 0.5], 30: [0.25, 0.75], 1000: [0.25, 0.75]}


def test_staged_linear_goes_straight_from_stage_to_stage():
    method = staged((0, (1, 0)), (10, (0, 1)), (20, (0, 1)), interpolation="linear")
    for step in range(0, 40):
        b = min(step / 10, 1.0)
        np.testing.assert_allclose(at(method, step).proportions, [1 - b, b], atol=1e-12)


def test_a_stage_inside_an_interval_is_told():
    method = staged((0, (1, 0)), (15, (0, 1)))
    got = at(method, 10, stop=20)
    assert got.proportions.tolist() == [1.0, 0.0]
    assert "the stage of step 15 takes effect at step 20" in got.reason
    assert "takes effect" not in at(method, 20, stop=30).reason


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "stages: the first must have start_step 0, found no stage"),
        (((5, (1.0,)),), "stages: the first must have start_step 0, found 5"),
        (((0, (1.0,)), (10, (1.0,)), (10, (1.0,))), "stages: start_step 10 must come after 10"),
        (((0, (1.0, -1.0)),), "proportions: 1 is -1.0, must be"),
    ],
)
def test_stages_are_checked_before_any_data_is_read(stages, message):
    with pytest.raises(ValueError, match=message):
        staged(*stages)


def test_a_later_stage_with_the_wrong_length_fails_at_the_first_decision():
    with pytest.raises(ConfigError, match=r"dynamic.mixer.stages\[1\].proportions: 1 numbers for 2 domains"):
        at(staged((0, (1, 1)), (10, (1,))), 0)
