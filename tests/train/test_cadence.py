"""Several methods in one run, each at its own pace: what is asked when, what stands in between, and what is served."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.config.build import parse_dynamic
from dataflex.config.schema import DynamicConfig
from dataflex.errors import ConfigError
from dataflex.method import Selection
from dataflex.plan.plan import DataPlan
from dataflex.plan.schedule import Schedule
from dataflex.train.checkpoint import _FORMAT
from tests.train.test_controller import SIZES, built

STEPS, BATCH = 26, 8
BLOCK = {
    "keep_ratio": 0.6,
    "repeat": True,
    "selector": {"name": "random", "every": 10, "warmup_steps": 4},
    "mixer": {"name": "random", "every": 3},
}


@given(
    total=st.integers(1, 60),
    cadences=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 20)), min_size=2, max_size=3),
)
def test_merged_intervals_end_whenever_a_method_decides(total, cadences):
    own = {
        f"method {i}": Schedule(warmup_steps=warmup, interval_steps=every, total_steps=total)
        for i, (warmup, every) in enumerate(cadences)
    }
    merged = Schedule(interval_steps=1, total_steps=total, own=own)
    starts = {interval.start_step for each in own.values() for interval in each.intervals()}
    found = list(merged.intervals())
    assert [interval.start_step for interval in found] == sorted(starts)
    assert [interval.index for interval in found] == list(range(len(starts)))
    assert [interval.stop_step for interval in found] == [*sorted(starts)[1:], total]
    for interval in found:
        warm = all(interval.start_step < each.warmup_steps for each in own.values())
        assert interval.kind == ("warmup" if warm else "dynamic")


def controller(block, world=1, rank=0):
    return built(parse_dynamic(block, None), STEPS, BATCH, world=world, rank=rank)


def served_at(one, step):
    """Return the rows of a step [BATCH]."""
    plan = one.plan_for(step)
    first = (step - plan.interval.start_step) * BATCH
    return plan.rows[first : first + BATCH]


def listened(one):
    """Note at which steps the selector and the mixer are asked, and what they say."""
    asked = {"selector": {}, "mixer": {}}
    for kind, name in (("selector", "select"), ("mixer", "mix")):
        method = getattr(one, kind)
        if method is None:
            continue

        said_by = getattr(method, name)

        def ask(*args, inner=said_by, kind=kind):
            said = inner(*args)
            asked[kind][args[-1].interval.start_step] = (said, args[-1].interval)
            return said

        setattr(method, name, ask)
    return asked


def test_each_method_is_asked_at_its_own_steps_and_stands_in_between():
    one = controller(BLOCK)
    asked = listened(one)
    plans = {(plan := one.plan_for(step)).interval.start_step: plan for step in range(STEPS)}
    assert list(plans) == [0, 3, 4, 6, 9, 12, 14, 15, 18, 21, 24]
    assert list(asked["selector"]) == [4, 14, 24]
    assert list(asked["mixer"]) == [0, 3, 6, 9, 12, 15, 18, 21, 24]
    spans = [(said[1].start_step, said[1].stop_step) for said in asked["selector"].values()]
    assert spans == [(4, 14), (14, 24), (24, 26)]

    domain_of = one.space.domains.domain_of
    for start, (selection, own) in asked["selector"].items():
        times = np.zeros(len(domain_of), dtype=int)
        for at in (at for at in plans if start <= at < own.stop_step):
            rows = plans[at].rows
            assert np.isin(rows, selection.rows).all()
            times += np.bincount(rows, minlength=len(times))
            for domain in range(len(SIZES)):
                mates = times[selection.rows[domain_of[selection.rows] == domain]]
                assert mates.max() - mates.min() <= 1  # none again before all rows of its domain

    exact, served = np.zeros((2, len(SIZES)))
    for at, plan in plans.items():  # over new selections too
        mix = asked["mixer"][max(step for step in asked["mixer"] if step <= at)][0].proportions
        exact += mix / mix.sum() * len(plan.rows)
        served += np.bincount(domain_of[plan.rows], minlength=len(SIZES))
        assert np.abs(served - exact).max() < 1 + 1e-9


@pytest.mark.parametrize("every", [1, 2, 5])
def test_quotas_of_short_intervals_add_up_to_the_proportions(every):
    """Of 8 rows a step, a share of 0.05 is less than half a row: what is rounded off is carried over selections."""
    shares = np.array([0.65, 0.3, 0.05])
    mixer = {"name": "static", "proportions": dict(zip(SIZES, shares.tolist(), strict=True))}
    one = controller({"keep_ratio": 0.6, "repeat": True, "interval_steps": every, "selector": "random", "mixer": mixer})
    served = np.zeros(len(SIZES))
    for step in range(STEPS):
        served += one.space.domains.counts(served_at(one, step))
        if (step + 1) % every == 0:
            assert np.abs(served - shares * (step + 1) * BATCH).max() < 1 + 1e-9


def test_a_run_goes_on_where_nothing_was_kept_of_a_domain(monkeypatch, caplog):
    """Of 8 rows a step a share of 0.25 asks for 2; the log is told once, the record by each decision."""
    mixer = {"name": "static", "proportions": [0.5, 0.25, 0.25]}
    one = controller({"keep_ratio": 0.6, "repeat": True, "interval_steps": 1, "selector": "random", "mixer": mixer})
    reasons, served = [], []
    for step in range(6):
        kept = np.arange(sum(SIZES.values()) - (SIZES["papers"] if step in (2, 3, 4) else 0))
        monkeypatch.setattr(one.selector, "select", lambda pool, budget, ctx, kept=kept: Selection(rows=kept[-budget:]))
        served.append(one.space.domains.counts(served_at(one, step)).tolist())
        reasons.append(one.plan.trace["reason"])
    told = "the selector kept nothing of papers, whose share goes to the other domains"
    assert [told in reason for reason in reasons] == [False, False, True, True, True, False]
    assert [row[2] for row in served] == [2, 2, 0, 0, 0, 3]
    assert caplog.text.count(told) == 1


def test_the_keys_of_the_state_are_those_of_the_format():
    """Where they change, so must the number: a checkpoint of an older version is then refused by name."""
    kept = {
        *"selector mixer orderer sampler signals served totals ends_at limits resumed_epochs unplanned earlier".split(),
        *"ordered selected standing standing_until proportions until kept kept_weights nominal carried".split(),
    }
    mixing = {"interval_steps": 2, "mixer": "random", "selector": "all", "orderer": {"name": "saw", "by": "length"}}
    assert (_FORMAT, controller(mixing).state_dict().keys()) == (2, kept)
    streams = {*"names sizes seed block unit interleave forgotten position drawn residual order begun segments".split()}
    assert controller(mixing).sampler.state_dict().keys() == streams
    assert controller(BLOCK).state_dict().keys() == kept - {
        "orderer",
        "sampler",
        "ordered",
        "selected",
        "standing",
        "standing_until",
    } | {"repeats"}


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_resumed_at_any_step_on_other_ranks_it_serves_the_same_rows(stop):
    straight = controller(BLOCK)
    rows = np.concatenate([served_at(straight, step) for step in range(STEPS)])
    head = controller(BLOCK)
    first = [served_at(head, step) for step in range(stop)]
    tails = [controller(BLOCK, world=2, rank=rank) for rank in range(2)]
    for tail in tails:
        tail.plan = DataPlan.from_arrays(head.plan.to_arrays())
        tail.load_state_dict(head.state_dict())
    then = [[served_at(tail, step) for tail in tails] for step in range(stop, STEPS)]
    assert all(np.array_equal(*pair) for pair in then)
    assert np.array_equal(np.concatenate([*first, *(pair[0] for pair in then)]), rows)


def test_a_mixture_without_a_selector_has_the_cadence_of_its_mixer():
    own = controller({"mixer": {"name": "random", "every": 4, "warmup_steps": 2}})
    block = controller({"mixer": "random", "interval_steps": 4, "warmup_steps": 2})
    for step in range(STEPS):
        assert np.array_equal(own.plan_for(step).rows, block.plan_for(step).rows)


def test_the_block_gives_what_a_method_does_not_say():
    config = parse_dynamic({**BLOCK, "warmup_steps": 7, "weighter": "focal"}, None)
    assert (config.warmup("selector"), config.warmup("mixer")) == (4, 7)
    assert (config.every(config.selector), config.every(config.mixer)) == (10, 3)
    assert config.weighter.params.warmup_steps == 7
    own = parse_dynamic({**BLOCK, "warmup_steps": 7, "weighter": {"name": "focal", "warmup_steps": 2}}, None)
    assert own.weighter.params.warmup_steps == 2
    both = parse_dynamic(
        {**BLOCK, "warmup_steps": 7, "weighter": ["focal", {"name": "focal", "warmup_steps": 1}]}, None
    )
    assert [each.params.warmup_steps for each in both.weighter.params.of] == [7, 1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"selector": {"name": "random", "every": 0}}, "dynamic.selector.every: must be at least 1"),
        ({"selector": {"name": "random", "evry": 3}}, "dynamic.selector.evry: unknown key; did you mean 'every'?"),
        ({"weighter": {"name": "focal", "every": 3}}, "dynamic.weighter.every: unknown key"),
        ({"weighter": {"name": "focal", "burn_in_steps": 3}}, "did you mean 'warmup_steps'?"),
        ({"interval_steps": 5, "mixer": {"name": "random", "every": 3}}, "dynamic.interval_steps: has no effect"),
    ],
)
def test_bad_cadences_are_told(change, told):
    with pytest.raises(ConfigError) as error:
        parse_dynamic({**BLOCK, **change}, None)
    assert told in "\n".join(error.value.problems)


def test_the_default_cadence_is_the_blocks():
    assert DynamicConfig(interval_steps=4, warmup_steps=1).schedule(9).interval(5).start_step == 5
