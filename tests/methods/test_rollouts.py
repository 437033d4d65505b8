"""Prompt selectors and bandits over domains, against the papers' formulas, and in an environment with known prompts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dataflex.config.build import method_block, parse_dynamic
from dataflex.config.needs import unmet
from dataflex.method import RunFacts
from dataflex.mixers.bandits import slope
from dataflex.plan.proportions import softmax
from dataflex.plan.rollouts import RolloutAccount, advantages
from dataflex.selectors.rollouts import learning_impact, quotas
from dataflex.testing import example_context, example_rollouts

NAN = math.nan


def build(kind, name, **params):
    problems = []
    config = method_block(kind, {"name": name, **params}, f"dynamic.{kind}", problems)
    assert problems == []
    return config.build()


def rows_of(count):
    return np.arange(count, dtype=np.int64)


# ---------------------------------------------------------------- rewards of groups


def test_advantages_are_those_of_trl():
    rewards = np.array([[1.0, 0.0, 0.0, 0.0]])
    assert advantages(rewards)[0] == pytest.approx([1.499700, -0.499900, -0.499900, -0.499900], abs=1e-6)
    assert advantages(rewards, "none")[0] == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_advantages_leave_out_answers_without_a_reward():
    found = advantages(np.array([[1.0, NAN, 0.0, 0.0], [NAN, NAN, NAN, NAN], [0.5, NAN, NAN, NAN]]))
    whole = advantages(np.array([[1.0, 0.0, 0.0]]))[0]
    assert found[0, [0, 2, 3]].tolist() == whole.tolist()
    assert np.isnan(found[0, 1])
    assert np.isnan(found[1]).all()
    assert found[2, 0] == 0.0


def test_a_binary_group_s_mean_advantage_is_a_function_of_its_pass_rate():
    rewards = np.array([[1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert np.abs(advantages(rewards)).mean() == pytest.approx(0.810093, abs=2e-4)  # TRL adds 1e-4 to the deviation


@pytest.mark.parametrize(("rate", "chance"), [(0.05, 0.336580), (0.5, 0.992188), (0.9, 0.569533)])
def test_how_often_a_group_is_informative(rate, chance):
    draws = np.random.default_rng(0).random((40_000, 8)) < rate
    found = example_rollouts(draws.astype(float), num_rows=40_000).informative.mean()
    assert found == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / 40_000))
    assert 1 - rate**8 - (1 - rate) ** 8 == pytest.approx(chance, abs=1e-6)


def test_informative_groups_have_two_scored_answers_of_unequal_reward():
    rewards = [[1, 1, 1], [1, 0, 1], [NAN, 1, 1], [NAN, NAN, 1], [NAN, 0.1, 0], [NAN, NAN, NAN]]
    stats = example_rollouts(rewards)
    assert stats.informative.tolist() == [False, True, False, False, True, False]
    assert stats.pass_rate(0.5)[:5].tolist() == [1.0, pytest.approx(2 / 3), 1.0, 1.0, 0.0]
    assert stats.pass_rate(None)[:5] == pytest.approx([1.0, 2 / 3, 1.0, 1.0, 0.05])
    assert np.isnan(stats.pass_rate(0.5)[5])


def test_drawing_each_prompt_once_saves_nothing():
    draws = np.random.default_rng(1)
    account = RolloutAccount(40)
    for step in range(5):
        rewards = (draws.random((8, 4)) < 0.7).astype(float)
        stats = example_rollouts(rewards, rows=range(8 * step, 8 * step + 8), num_rows=40, step=step)
        account.take(stats, stats.informative)
    assert 0 < account.counts["informative"] < 40
    assert account.saved_answers == pytest.approx(0.0, abs=1e-9)


def test_saved_answers_are_counted_over_time():
    account = RolloutAccount(4)
    for step, rows, informative in ((0, (0, 1), (1, 0)), (1, (2, 3), (0, 0)), (2, (0, 2), (0, 1))):
        stats = example_rollouts([[1.0, 1.0 - i] for i in informative], rows=rows, num_rows=4, step=step)
        account.take(stats, stats.informative)
    # Shares of the three generations in which prompts were informative: row 0 from 1 at t=1 to 0 at t=3, row 2 from 0
    # at t=2 to 1 at t=3, rows 1 and 3 never.
    share = ((1 + 1) + 0 + (0 + 0.5) + 0) / 3 / 4
    assert account.uniform_share == pytest.approx(share)
    assert account.saved_answers == pytest.approx(2 * (2 / share - 6))
    again = RolloutAccount(4)
    again.load_state_dict(account.state_dict())
    assert (again.saved_answers, again.counts, again.line) == (account.saved_answers, account.counts, account.line)


def test_groups_of_one_prompt_are_joined():
    stats = example_rollouts([[1, 0], [NAN, 1], [0, 0], [1, 1]], rows=[7, 3, 7, 7], domains=[1, 0, 1, 1])
    joined = stats.by_prompt
    assert joined.rows.tolist() == [3, 7]
    assert joined.domains_P.tolist() == [0, 1]
    np.testing.assert_array_equal(joined.rewards_PG, [[NAN, 1, NAN, NAN, NAN, NAN], [1, 0, 0, 0, 1, 1]])
    assert joined.pass_rate(0.5).tolist() == [1.0, 0.5]
    assert joined.lengths_PG.sum() == stats.lengths_PG.sum()
    once = example_rollouts([[1, 0], [0, 0]], rows=[7, 3])
    assert once.by_prompt is once


def test_a_prompt_that_is_answered_twice_in_a_generation_counts_with_all_its_answers():
    twice = example_rollouts([[1, 1, 1, 1], [0, 0, 0, 0]], rows=[3, 3])
    mopps = build("selector", "mopps", discount=1.0)
    mopps.observe_rollouts(twice)
    assert (mopps.alpha[3], mopps.beta[3]) == (5.0, 5.0)
    for name in ("pass_band", "pass_schedule"):
        selector = build("selector", name)
        selector.observe_rollouts(twice)
        assert selector.rates[3] == 0.5
    greso = build("selector", "greso")
    greso.observe_rollouts(twice)
    assert (greso.easy_runs[3], greso.hard_runs[3]) == (0, 0)
    account = RolloutAccount(4)
    account.take(example_rollouts([[1, 0], [1, 1]], rows=[3, 3], num_rows=4), np.ones(2, dtype=np.bool_))
    assert account.uniform_share == 0.5  # one of the prompt's two groups was informative
    assert account.counts["groups"] == 2


def test_the_chance_of_greso_is_one():
    problems = []
    assert method_block("selector", {"name": "greso", "chance": 1.5}, "dynamic.selector", problems) is None
    assert "chance: must be at most 1" in problems[0]


# ---------------------------------------------------------------- selectors


def test_mopps_updates_posteriors_as_the_paper():
    mopps = build("selector", "mopps", discount=0.5)
    for step, right in ((0, 2), (1, 4)):
        mopps.observe_rollouts(example_rollouts([[1.0] * right + [0.0] * (8 - right)], rows=[3], step=step))
        a, b = mopps.alpha[3], mopps.beta[3]
        mean, var = a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))
        wanted = ((3, 7, 0.3, 0.019091), (6, 8, 0.428571, 0.016327))[step]
        assert (a, b, mean, var) == pytest.approx(wanted, abs=1e-6)
    assert mopps.alpha[4] == 1.0
    drawn = np.array([0.1, 0.48, 0.9, 0.55])
    assert mopps.choose(drawn, np.zeros(4), 2).tolist() == [1, 3]


def test_mopps_by_band_fills_up_by_distance():
    mopps = build("selector", "mopps", by="band")
    drawn, u = np.array([0.1, 0.4, 0.9, 0.6, 0.25]), np.array([0.1, 0.9, 0.2, 0.3, 0.4])
    assert mopps.choose(drawn, u, 2).tolist() == [3, 1]
    assert mopps.choose(drawn, u, 4).tolist() == [3, 1, 4, 0]


def test_mopps_draws_are_of_the_posterior_and_of_the_row_alone():
    mopps, few = build("selector", "mopps", candidates=None), build("selector", "mopps", candidates=None)
    rewards = [[1.0] * 6 + [0.0] * 2] * 64
    mopps.observe_rollouts(example_rollouts(rewards))
    few.observe_rollouts(example_rollouts(rewards))
    ctx = example_context()
    chosen = mopps.select(rows_of(64), 8, ctx)
    assert chosen.scores == pytest.approx([7 / 10] * 64)
    rest = few.select(np.setdiff1d(rows_of(64), chosen.rows), 8, ctx).rows
    assert mopps.select(rows_of(64), 16, ctx).rows.tolist() == [*chosen.rows, *rest]


def test_mopps_forgets_by_steps():
    mopps = build("selector", "mopps", forget="steps", discount=0.5)
    mopps.observe_rollouts(example_rollouts([[1.0] * 8], rows=[3], step=0))
    a, b = mopps.posterior(np.array([3]), 3)
    assert (a[0], b[0]) == pytest.approx((1 + 8 / 8, 1.0))


def test_greso_skips_as_the_paper():
    greso = build("selector", "greso")
    skips = greso.skipping(np.array([0, 1, 3, 7, 8]), 0.5)
    assert skips == pytest.approx([0, 0.5, 0.875, 0.99, 0.99], abs=2.5e-3)
    assert greso.skipping(np.array([3]), 0.5)[0] == 0.875
    for step, (first, second) in enumerate([(1.0, 0.0), (1.0, 0.0), (1.0, 1.0)]):
        greso.observe_rollouts(example_rollouts([[first] * 4, [second] * 4, [1, 0, 0, 0]], step=step))
    assert greso.easy_runs[:3].tolist() == [3, 1, 0]
    assert greso.hard_runs[:3].tolist() == [0, 0, 0]
    assert greso.chances.tolist() == [0.5, 0.5]  # not in the first epoch
    greso.epoch = 1
    greso.observe_rollouts(example_rollouts([[1.0] * 4, [0.0] * 4, *[[1, 0, 0, 0]] * 6], step=3))
    assert greso.chances == pytest.approx([0.49, 0.51])  # 1/8 is 1/12 or more, and less than 1/6


def test_greso_reads_each_prompt_once_an_epoch_and_skips_by_chance():
    greso = build("selector", "greso")
    read = np.concatenate([greso.select(rows_of(64), 16, example_context(index=i)).rows for i in range(4)])
    assert sorted(read.tolist()) == list(range(64))
    greso.observe_rollouts(example_rollouts([[1.0] * 4] * 32))  # of 64
    reads = np.zeros(64)
    for i in range(400):
        reads[greso.select(rows_of(64), 16, example_context(index=4 + i)).rows] += 1
    assert reads[:32].mean() / reads[32:].mean() == pytest.approx(0.5, abs=0.05)


def test_pass_band_leaves_out_what_was_dropped_until_an_epoch_has_passed():
    band = build("selector", "pass_band", low=0.2, high=0.8)
    rewards = [[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [NAN] * 5]
    stats = example_rollouts(rewards)
    assert band.keeps(stats).tolist() == [False, False, True, True, True, False]
    band.observe_rollouts(stats)
    for start, left_out in ((15, [0, 1, 5]), (16, [])):  # 64 prompts, 4 a step
        ctx = example_context(start_step=start, stop_step=start + 1)
        chosen = band.select(rows_of(64), 61, ctx).rows if left_out else band.select(rows_of(64), 64, ctx).rows
        assert sorted(set(range(64)) - set(chosen.tolist())) == left_out
    filled = band.select(rows_of(6), 5, example_context(start_step=1))
    assert sorted(filled.rows[:3].tolist()) == [2, 3, 4]
    assert "2 dropped before, to fill up" in filled.reason


@pytest.mark.parametrize("name", ["pass_band", "pass_schedule"])
def test_pass_rates_of_a_column(name):
    selector = build("selector", name, column="pass_rate")
    rates = np.array([None, 0.0, 0.2, 1.0, 0.9, NAN], dtype=object)
    refused, told = selector.refused_values("pass_rate", np.array([None, 0.0, 1.0, NAN, 1.1, "x", True], dtype=object))
    assert refused.tolist() == [False] * 4 + [True] * 3
    assert "from 0 to 1" in told
    ctx = example_context({"all": 6}, columns={"pass_rate": rates})
    left = {"pass_band": [0, 2, 4, 5], "pass_schedule": [0, 1, 2, 4, 5]}[name]
    assert sorted(selector.select(rows_of(6), 6, ctx).rows.tolist()) == left
    selector.observe_rollouts(example_rollouts([[1, 0]], rows=[3], num_rows=6))
    assert 3 in selector.select(rows_of(6), 6, ctx).rows.tolist()  # what the run saw is newer


def test_pass_schedule_fills_bins_by_the_target():
    rates = np.repeat([0.1, 0.5, 0.7, 0.9, 1.0], 100)
    schedule = build("selector", "pass_schedule", column="pass_rate")
    ctx = example_context({"all": 500}, start_step=25, total_sequences=400, columns={"pass_rate": rates})
    found = schedule.select(rows_of(500), 64, ctx)
    assert np.bincount(found.rows // 100, minlength=5).tolist() == [0, 21, 34, 9, 0]
    shares = softmax(-((np.array([0.1, 0.5, 0.7, 0.9]) - 0.65) ** 2) / (2 * 0.15**2))
    assert shares == pytest.approx([0.000668, 0.336392, 0.524645, 0.138295], abs=1e-6)
    assert found.reason.startswith("target 0.650: ")


def test_quotas_go_on_where_a_bin_is_empty():
    weights, counts = np.array([0.000668, 0.336392, 0.524645, 0.138295]), np.array([100, 5, 100, 100])
    none = np.zeros(4)
    assert quotas(weights, counts, 64, none)[0].sum() == 64
    assert quotas(weights, counts, 64, none)[0][1] == 5
    assert quotas(weights, np.array([1, 1, 1, 1]), 64, none)[0].tolist() == [1, 1, 1, 1]
    assert quotas(np.array([0.0, 1.0]), np.array([3, 1]), 3, none[:2])[0].tolist() == [2, 1]
    assert quotas(weights, np.zeros(4, dtype=np.int64), 3, none)[0].tolist() == [0, 0, 0, 0]


def test_bins_are_owed_what_their_quotas_were_rounded_off():
    """Of 4 prompts a decision a bin of a twentieth gets one in five."""
    given, carried = np.zeros(3), np.zeros(3)
    for _ in range(50):
        more, carried = quotas(np.array([0.7, 0.25, 0.05]), np.array([100, 100, 100]), 4, carried)
        given += more
        assert np.abs(carried).max() <= 1
    assert np.abs(given - [140, 50, 10]).max() <= 1


def test_pass_schedule_carries_the_rounding_over_decisions_and_a_resume():
    rates = np.repeat([0.6, 0.9], 100)
    ctx = example_context({"all": 200}, start_step=0, total_sequences=400, columns={"pass_rate": rates})
    one = build("selector", "pass_schedule", column="pass_rate", start=0.6, end=0.6, sigma=0.15)
    share, served = softmax(-((np.array([0.6, 0.9]) - 0.6) ** 2) / (2 * 0.15**2))[1], 0
    for number in range(40):
        if number == 20:
            resumed = build("selector", "pass_schedule", column="pass_rate", start=0.6, end=0.6, sigma=0.15)
            resumed.load_state_dict(one.state_dict())
            one = resumed
        served += int((one.select(rows_of(200), 2, ctx).rows >= 100).sum())
    assert abs(served - 80 * share) <= 1


def test_limr_keeps_curves_that_follow_the_mean():
    curves = np.array([[0.0, 0.5, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert learning_impact(curves) == pytest.approx([0.724138, 0.0, 0.0], abs=1e-6)
    gaps = np.vstack([curves, [[NAN, 0.5, 1.0], [0.0, 0.5, NAN], [NAN, NAN, 1.0]]])
    found = learning_impact(gaps)
    mean = np.array([1.5, 2.0, 3.0]) / 4  # the first missing value is the one after it; the others stay missing
    assert found[3] == pytest.approx(1 - ((np.array([0.5, 0.5, 1.0]) - mean) ** 2).sum() / ((1 - mean) ** 2).sum())
    assert np.isnan(found[4:]).all()
    assert learning_impact(np.ones((2, 3))).tolist() == [1.0, 1.0]


def test_limr_draws_from_a_column_of_lists():
    limr = build("selector", "limr", column="curves")
    columns = {"curves": np.empty(4, dtype=object)}
    columns["curves"][:] = [[0.0, 0.5, 1.0], np.array([0.0, 0.5, 1.0]), [0.0, 0.0, 0.0], [None, 0.5, 1.0]]
    chosen = limr.select(rows_of(4), 4, example_context({"all": 4}, columns=columns))
    assert sorted(chosen.rows.tolist()) == [0, 1, 3]
    odd = np.empty(5, dtype=object)
    odd[:] = [[0.1, 0.2], [0.1], None, "x", [True, 0.2]]
    refused, told = limr.refused_values("curves", odd)
    assert refused.tolist() == [False, True, True, True, True]
    assert "a list of 2 numbers" in told


@pytest.mark.parametrize(("name", "told"), [("mopps", False), ("greso", False), ("pass_band", True)])
def test_a_stage_without_answers_refuses_what_learns_from_rewards(name, told):
    block = {"selector": {"name": name}, "interval_steps": 1}
    (problem,) = unmet(parse_dynamic(block, Path()), RunFacts(stage="sft"))
    assert problem.startswith(f"dynamic.selector: {name} learns from rewards of answers that the model generates")
    assert ("or give it a 'column' of pass rates" in problem) == told
    if told:
        block["selector"]["column"] = "rate"
        assert [*unmet(parse_dynamic(block, Path()), RunFacts(stage="sft"))] == []


# ---------------------------------------------------------------- bandits over domains


def groups_of(values):
    """Return groups of two answers whose mean absolute advantages are the values, not divided by the deviation."""
    return [[2.0 * value, 0.0] for value in values]


@pytest.mark.parametrize(
    ("absent", "quality", "cold"),
    [
        ("decay", [0.5, 0.1, 0.1], [0.786986, 0.106507, 0.106507]),
        ("skip", [0.5, 0.2, 0.1], [0.736125, 0.164252, 0.099624]),
    ],
)
def test_sec_moves_as_the_paper_and_as_its_code(absent, quality, cold):
    sec = build("mixer", "sec", absent=absent, value="unnormalized", floor=0.0, temperature=0.2)
    sec.observe_rollouts(example_rollouts(groups_of([0.8, 0.4]), domains=[0, 1]))
    assert sec.quality == pytest.approx([0.4, 0.2, 0.0])
    sec.observe_rollouts(example_rollouts(groups_of([0.6, 0.2]), domains=[0, 2], step=1))
    assert sec.quality == pytest.approx(quality)
    assert sec.mix(example_context()).proportions == pytest.approx(cold, abs=1e-6)
    warm = build("mixer", "sec", floor=0.0)
    warm.meet(("web", "code", "math"))
    warm.quality = np.array([0.5, 0.1, 0.1])
    assert warm.mix(example_context()).proportions == pytest.approx([0.427234, 0.286383, 0.286383], abs=1e-6)


def test_sec_by_progress_is_the_change_of_the_mean_reward():
    sec = build("mixer", "sec", value="progress", rate=1.0)
    for step, rewards in enumerate(([[0, 0], [1, 0]], [[1, 0], [1, 0]])):
        sec.observe_rollouts(example_rollouts(rewards, domains=[0, 1], step=step))
    assert sec.quality.tolist() == [0.5, 0.0, 0.0]


def test_values_wait_for_enough_groups():
    sec = build("mixer", "sec", value="unnormalized", rate=1.0, min_groups=3)
    sec.observe_rollouts(example_rollouts(groups_of([0.8, 0.4]), domains=[0, 0]))
    assert sec.quality.tolist() == [0.0, 0.0, 0.0]
    sec.observe_rollouts(example_rollouts([*groups_of([0.6]), [NAN, NAN]], domains=[0, 1], step=1))
    assert sec.quality == pytest.approx([0.6, 0.0, 0.0])


@pytest.mark.parametrize(("value", "expected"), [("advantage", [0.0, 0.433, 0.433, 0.649]), ("progress", [0.0] * 4)])
def test_a_domain_that_waits_for_its_groups_does_not_decay(value, expected):
    sec = build("mixer", "sec", value=value, min_groups=2, absent="decay")
    sec.meet(("web", "code", "math"))
    sec.quality[1] = 1.0
    found = []
    for step in range(4):
        sec.observe_rollouts(example_rollouts([[1, 0, 0, 1]], domains=[0], step=step))
        found.append(sec.quality[0])
    assert found == pytest.approx(expected, abs=5e-4)
    assert sec.quality[1] == 0.5**4


def test_sec_by_progress_keeps_what_it_learned_while_a_domain_waits():
    sec = build("mixer", "sec", value="progress", min_groups=2, absent="decay")
    found = []
    for step, reward in enumerate([0, 0, 1, 1, 1]):
        sec.observe_rollouts(example_rollouts([[reward] * 4], domains=[0], step=step))
        found.append(sec.quality[0])
    assert found == [0.0, 0.0, 0.0, 0.5, 0.5]


def test_dump_holds_answers_back_until_there_are_enough_groups():
    dump = build("mixer", "dump_ucb", window=6, min_groups=2)
    value = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    for step, (rows, seen) in enumerate([([[1, 0, 0, 1]], 0), ([[0, 0, 0, NAN]], 7), ([[1, 0, 0, 1]], 7)]):
        dump.observe_rollouts(example_rollouts(rows, domains=[0], step=step))
        assert dump.seen.tolist() == [seen, 0, 0]
        answers = [value] * 3 + [0.0] * 3 if seen else [NAN] * 6
        assert dump.recent[0] == pytest.approx(answers, nan_ok=True)
        again = build("mixer", "dump_ucb", window=6, min_groups=2)
        again.load_state_dict(dump.state_dict())
        dump = again


def test_dump_bounds_are_the_paper_s():
    dump = build("mixer", "dump_ucb", floor=0.0)
    dump.meet(("web", "code", "math"))
    dump.seen = np.array([800.0, 240.0, 8.0])
    dump.recent[:] = np.array([0.3, 0.6, 0.1])[:, None]
    assert dump.bonus(dump.seen) == pytest.approx([0.131785, 0.240256, 1.243257], abs=1e-6)
    assert dump.mix(example_context()).proportions == pytest.approx([0.000109, 0.006496, 0.993395], abs=1e-6)
    warm = build("mixer", "dump_ucb", floor=0.0, temperature=1.0)
    warm.load_state_dict(dump.state_dict())
    assert warm.mix(example_context()).proportions == pytest.approx([0.200301, 0.301355, 0.498344], abs=1e-6)


def test_dump_counts_answers_and_keeps_the_newest():
    dump = build("mixer", "dump_ucb", window=3)
    dump.observe_rollouts(example_rollouts([[1, 0], [NAN, 1], [1, 0]], domains=[0, 1, 0]))
    assert dump.seen.tolist() == [4, 1, 0]
    value = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert dump.recent[0] == pytest.approx([value] * 3)
    assert dump.recent[1, -1] == 0.0


def test_tscl_follows_slopes():
    assert slope(np.array([0.1, 0.2, 0.25, 0.4])) == pytest.approx(0.095)
    assert slope(np.array([0.3])) == 0.0
    wanted = {
        (1.0, False): [0.348995, 0.317367, 0.333638],
        (0.02, False): [0.897625, 0.007766, 0.094609],
        (0.02, True): [0.982991, 0.008505, 0.008505],
    }
    for (temperature, signed), proportions in wanted.items():
        tscl = build("mixer", "tscl", floor=0.0, temperature=temperature, signed=signed)
        for step, means in enumerate([(0.1, 0.3, 0.5), (0.2, 0.3, 0.45), (0.25, 0.3, 0.4), (0.4, 0.3, 0.35)]):
            tscl.observe_rollouts(example_rollouts([[mean] * 2 for mean in means], domains=[0, 1, 2], step=step))
        assert tscl.mix(example_context()).proportions == pytest.approx(proportions, abs=1e-6)


def test_a_floor_holds_and_too_high_a_one_is_refused():
    tscl = build("mixer", "tscl", floor=0.2)
    tscl.observe_rollouts(example_rollouts([[0.0, 0.0]], domains=[0]))
    tscl.observe_rollouts(example_rollouts([[1.0, 1.0]], domains=[0], step=1))
    assert tscl.mix(example_context()).proportions.tolist() == pytest.approx([0.6, 0.2, 0.2])
    with pytest.raises(Exception, match=r"dynamic\.mixer\.floor: 0\.4 for each of 3 domains"):
        build("mixer", "tscl", floor=0.4).mix(example_context())


# ---------------------------------------------------------------- an environment with known best prompts


class Prompts:
    """400 prompts in two domains: three in four of ``web`` are too easy or too hard, of ``code`` none is."""

    def __init__(self):
        draws = np.random.default_rng(7)
        self.domains = np.repeat([0, 1], 200)
        self.rates = draws.uniform(0.35, 0.65, 400)
        self.rates[:75], self.rates[75:150] = 0.0, 1.0
        self.draws = np.random.default_rng(8)

    def informative(self):
        """Chance of each prompt that a group of 8 is informative."""
        return 1 - self.rates**8 - (1 - self.rates) ** 8

    def answer(self, rows, step):
        rewards = (self.draws.random((len(rows), 8)) < self.rates[rows, None]).astype(float)
        names = ("web", "code")
        return example_rollouts(rewards, rows=rows, domains=self.domains[rows], names=names, num_rows=400, step=step)


def regret(selector=None, mixer=None, steps=60, batch=16):
    """Return informative groups a generation below the best possible, over the last third, and the account."""
    world, account, lost = Prompts(), RolloutAccount(400), []
    chances = world.informative()
    for step in range(steps):
        ctx = example_context({"web": 200, "code": 200}, index=step, start_step=step, stop_step=step + 1)
        ctx = replace(ctx, global_batch=batch, total_sequences=steps * batch)
        if selector is not None:
            rows = selector.select(rows_of(400), batch, ctx).rows
        else:
            count = round(batch * mixer.mix(ctx).proportions[0])
            parts = ctx.rng("web").permutation(200)[:count], 200 + ctx.rng("code").permutation(200)[: batch - count]
            rows = np.concatenate(parts)
        stats = world.answer(rows.astype(np.int64), step)
        for method in (selector, mixer):
            if method is not None:
                method.observe_rollouts(stats)
        account.take(stats, stats.informative)
        lost.append(chances.max() * batch - chances[rows].sum())
    return np.mean(lost[-steps // 3 :]), account


UNIFORM_REGRET = 16 * 150 / 400  # prompts that are never informative


def test_uniform_drawing_loses_what_it_must():
    found, account = regret(build("selector", "random"))
    assert found == pytest.approx(UNIFORM_REGRET, rel=0.25)
    assert abs(account.saved_answers) < 0.1 * account.counts["answers"]


@pytest.mark.parametrize(
    ("name", "params", "least"),
    [
        ("pass_band", {"retry_steps": 1000}, 0.8),
        ("mopps", {}, 0.65),
        ("mopps", {"by": "band", "candidates": None, "discount": 1.0}, 0.65),
        ("greso", {}, 0.3),
        ("pass_schedule", {"start": 0.5, "end": 0.5}, 0.65),
    ],
)
def test_prompt_selectors_find_the_prompts_that_teach(name, params, least):
    found, account = regret(build("selector", name, **params))
    assert found < (1 - least) * UNIFORM_REGRET
    assert account.saved_answers > 0.1 * account.counts["answers"]


@pytest.mark.parametrize(("name", "params"), [("sec", {"temperature": 0.1}), ("dump_ucb", {})])
def test_bandits_find_the_domain_that_teaches(name, params):
    found, account = regret(mixer=build("mixer", name, **params))
    assert found < 0.7 * UNIFORM_REGRET
    assert account.saved_answers > 0.0


def learned(mixer, seed, steps=50, batch=16):
    """Return the pass rate of ``code`` after a run: each of its answered prompts raises it, ``web`` stays as it is."""
    draws, rate = np.random.default_rng(seed), 0.05
    for step in range(steps):
        ctx = example_context({"web": 8, "code": 8}, index=step)
        count = round(batch * (0.5 if mixer is None else mixer.mix(ctx).proportions[1]))
        domains = np.repeat([0, 1], [batch - count, count])
        rewards = (draws.random((batch, 8)) < np.where(domains == 1, rate, 0.5)[:, None]).astype(float)
        if mixer is not None:
            mixer.observe_rollouts(example_rollouts(rewards, domains=domains, names=("web", "code"), step=step))
        rate += 0.0015 * count
    return rate


@pytest.mark.parametrize("signed", [False, True])
def test_tscl_stays_with_the_domain_that_is_learned(signed):
    assert learned(None, 0) == pytest.approx(0.65)
    found = [learned(build("mixer", "tscl", window=20, signed=signed), seed) for seed in range(5)]
    assert min(found) > 0.7
    assert np.mean(found) > 0.78
