"""The mixture stream: against the slow sampler, over resumes, at caps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dataflex.errors import CheckpointError, ComponentError, DataError
from dataflex.plan import mixture, planner
from dataflex.plan.domains import Domains
from dataflex.plan.mixture import MixtureSampler, cap_limits, expected_epochs
from dataflex.plan.planner import ShuffledEpochs
from dataflex.state import load_state, save_state

from .slow_mixture import SlowMixture


def proportions_of(weights):
    return np.array(weights) / sum(weights)


@st.composite
def runs(draw):
    """Sizes of domains, block, and segments as (weights, sequences drawn)."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    weights = st.lists(st.sampled_from([0, 1, 2, 5, 40]), min_size=len(sizes), max_size=len(sizes)).filter(any)
    segments = draw(st.lists(st.tuples(weights, st.integers(0, 40)), min_size=1, max_size=4))
    return sizes, draw(st.integers(1, 12)), segments


def build(sizes, block, **options):
    return MixtureSampler(Domains.from_sizes([f"d{k}" for k in range(len(sizes))], sizes), 11, block, **options)


def slow_twin(fast, **options):
    starts = np.concatenate([[0], np.cumsum(fast.sizes)])
    rows = [list(range(starts[k], starts[k + 1])) for k in range(len(fast.names))]
    return SlowMixture(rows, fast.names, fast.seed, fast.block, **options)


@given(runs())
def test_equals_the_slow_sampler(run):
    sizes, block, segments = run
    fast = build(sizes, block)
    slow = slow_twin(fast)
    for step, (weights, count) in enumerate(segments):
        fast.append(proportions_of(weights), fast.position, step)
        slow.append(proportions_of(weights))
        assert fast.draw(count).tolist() == [slow.next() for _ in range(count)]
    assert fast.drawn.tolist() == slow.drawn


@given(runs(), st.integers(1, 2))
def test_equals_the_slow_sampler_at_caps(run, max_epochs):
    sizes, block, segments = run
    fast = build(sizes, block, max_epochs=max_epochs, at_cap="redistribute")
    slow = slow_twin(fast, limits=[max_epochs * size for size in sizes], redistribute=True)
    for step, (weights, count) in enumerate(segments):
        room = sum(limit - n for limit, n, w in zip(slow.limits, slow.drawn, weights, strict=True) if w)
        assume(room > 0)
        count = min(count, room)
        fast.append(proportions_of(weights), fast.position, step)
        slow.append(proportions_of(weights))
        assert fast.draw(count).tolist() == [slow.next() for _ in range(count)]
        assert [segment.start for segment in fast.segments] == slow.starts
    assert fast.drawn.tolist() == slow.drawn


@given(runs(), st.integers(1, 2))
def test_rows_beyond_every_cap_are_refused(run, max_epochs):
    sizes, block, segments = run
    fast = build(sizes, block, max_epochs=max_epochs, at_cap="redistribute")
    beyond = "every domain with a share is at its max_epochs"
    for step, (weights, count) in enumerate(segments):
        room = sum(max_epochs * size - n for size, n, w in zip(sizes, fast.drawn, weights, strict=True) if w)
        assume(room > 0)
        fast.append(proportions_of(weights), fast.position, step)
        assert len(fast.draw(min(count, room))) == min(count, room)
    fast.draw(room - min(count, room))
    with pytest.raises(DataError, match=beyond):
        fast.draw(1)

    def again():
        fast.append(proportions_of(weights), fast.position, len(segments))
        fast.draw(1)

    with pytest.raises(DataError, match=beyond):
        again()


@given(runs(), st.lists(st.integers(0, 17), max_size=12), st.sampled_from([1, 8, 1 << 19]))
def test_calls_of_any_size_give_one_stream(run, cuts, chunk):
    sizes, block, segments = run
    weights, _ = segments[0]
    whole, parts = build(sizes, block), build(sizes, block)
    for one in (whole, parts):
        one.append(proportions_of(weights), 0, 0)
    expected = whole.draw(sum(cuts)).tolist()
    original, mixture._CHUNK_IDS = mixture._CHUNK_IDS, chunk
    try:
        assert [row for cut in cuts for row in parts.draw(cut).tolist()] == expected
    finally:
        mixture._CHUNK_IDS = original


@settings(max_examples=40)
@given(st.integers(0, 120), st.integers(1, 24), st.data())
def test_resume_at_any_sequence_with_proportions_changed_three_times(stop, block, data):
    # The id stream is the same; no row comes twice inside an epoch.
    sizes, rows = [7, 30, 4], np.arange(41)
    mixes = [[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.0, 0.5, 0.5], [0.3, 0.3, 0.4]]
    changes = [0, *sorted(data.draw(st.lists(st.integers(0, 120), min_size=3, max_size=3)))]

    def advance(one, to):
        """Draw up to ``to``, appending a mix wherever a change is due, as the controller would."""
        parts = []
        while True:
            while len(one.segments) < 4 and changes[len(one.segments)] == one.position:
                one.append(mixes[len(one.segments)], one.position, one.position)
            later = [c for c in changes if c > one.position]
            if one.position == to:
                return np.concatenate([*parts, np.empty(0, dtype=np.int64)])
            parts.append(one.draw(min([to, *later]) - one.position))

    straight = advance(build(sizes, block), 120)
    first = build(sizes, block)
    head = advance(first, stop)
    second = build(sizes, block)
    second.load_state_dict(first.state_dict())
    assert np.concatenate([head, advance(second, 120)]).tolist() == straight.tolist()
    for low, size in zip((0, 7, 37), sizes, strict=True):
        served = straight[(straight >= low) & (straight < low + size)]
        for start in range(0, served.size, size):
            epoch = served[start : start + size].tolist()
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= set(rows[low : low + size].tolist())


def test_state_goes_through_files(tmp_path):
    one = build([7, 30], 8, max_epochs=3, at_cap="redistribute")
    one.append([0.5, 0.5], 0, 0, "first")
    one.draw(61)
    assert one.segments[-1].reason == "share of domains at their cap redistributed: 'd0' at 21 rows"
    save_state(tmp_path, "sampler", one.state_dict())
    two = build([7, 30], 8, max_epochs=3, at_cap="redistribute")
    two.load_state_dict(load_state(tmp_path, "sampler"))
    assert two.position == 61
    assert [s.reason for s in two.segments] == [s.reason for s in one.segments]
    assert two.draw(20).tolist() == one.draw(20).tolist()
    assert two.drawn.tolist() == one.drawn.tolist()


def test_a_fresh_sampler_has_a_state_too():
    one = build([7, 30], 8)
    one.load_state_dict(build([7, 30], 8).state_dict())
    one.append([0.5, 0.5], 0, 0)
    assert one.draw(3).size == 3


def test_the_stream_does_not_depend_on_other_domains():
    # A domain is known by its name: its own order stays when the list of domains grows.
    alone = MixtureSampler(Domains.from_sizes(["math"], [10]), 3, 4)
    more = MixtureSampler(Domains(names=("code", "math"), domain_of=np.repeat([1, 0], [10, 5])), 3, 4)
    alone.append([1.0], 0, 0)
    more.append([0.5, 0.5], 0, 0)
    mixed = more.draw(40)
    assert mixed[mixed < 10].tolist() == alone.draw(20).tolist()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda: build([7, 31], 8), "sizes of the mixture's domains changed"),
        (lambda: build([7, 30, 1], 8), "names of the mixture's domains changed"),
        (lambda: build([7, 30], 9), "block of the mixture's domains changed"),
        (lambda: MixtureSampler(Domains.from_sizes(["d1", "d0"], [7, 30]), 11, 8), "names of the mixture"),
        (lambda: MixtureSampler(Domains.from_sizes(["d0", "d1"], [7, 30]), 12, 8), r"seed .* \(11 -> 12\)"),
    ],
)
def test_a_foreign_state_is_refused(change, told):
    one = build([7, 30], 8)
    one.append([0.5, 0.5], 0, 0)
    with pytest.raises(CheckpointError, match=told):
        change().load_state_dict(one.state_dict())


def test_caps_may_be_raised_on_resume():
    one = build([4, 30], 4, max_epochs=1)
    one.append([0.5, 0.5], 0, 0)
    one.draw(8)
    with pytest.raises(DataError):
        one.draw(4)
    two = build([4, 30], 4, max_epochs=2)
    two.load_state_dict(one.state_dict())
    assert two.draw(8).size == 8


def test_error_at_a_cap_tells_numbers_and_changes_nothing():
    one = build([4, 30], 4, max_epochs=[1.5, np.inf])
    one.append([0.5, 0.5], 0, 0)
    with pytest.raises(DataError) as caught:
        one.draw(100)
    assert str(caught.value).startswith("domain 'd0' is used up after ")
    assert "max_epochs allows 6 draws of its 4 rows" in str(caught.value)
    assert one.position == 0
    assert one.drawn.tolist() == [0, 0]
    fresh = build([4, 30], 4)
    fresh.append([0.5, 0.5], 0, 0)
    assert one.draw(12).tolist() == fresh.draw(12).tolist()


@given(runs(), st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_stop_serves_exactly_up_to_the_cap(run, cuts):
    sizes, block, segments = run
    one = build(sizes, block, max_epochs=1, at_cap="stop")
    one.append(proportions_of(segments[0][0]), 0, 0)
    served = [row for cut in cuts for row in one.draw(cut).tolist()]
    free = build(sizes, block)
    free.append(proportions_of(segments[0][0]), 0, 0)
    expected = free.draw(sum(cuts)).tolist()
    assert served == expected[: len(served)]
    assert len(set(served)) == len(served)
    if len(served) < sum(cuts):
        assert expected[len(served)] in served, "the next one would have been a repetition"
        assert one.stopped_by
        assert one.draw(5).size == 0


def test_after_a_stop_another_mixture_goes_on():
    one = build([4, 30], 4, max_epochs=1, at_cap="stop")
    one.append([0.5, 0.5], 0, 0)
    head = one.draw(100)
    one.append([0.0, 1.0], head.size, 9)
    rows = one.draw(10)
    assert rows.size == 10
    assert rows.min() >= 4


def test_redistribute_uses_every_row_exactly_as_often_as_allowed():
    # With fractional caps: 1.5 epochs of 4 rows are 6 draws.
    one = build([4, 30, 10], 4, max_epochs=[1.5, 2, 3], at_cap="redistribute")
    one.append([0.6, 0.3, 0.1], 0, 5, "decided")
    rows = one.draw(96)
    assert one.drawn.tolist() == [6, 60, 30]
    seen = np.bincount(rows, minlength=44)
    assert seen[:4].max() == 2
    assert seen[4:34].tolist() == [2] * 30
    assert seen[34:].tolist() == [3] * 10
    assert [segment.decided_at_step for segment in one.segments] == [5] * len(one.segments)
    assert one.segments[1].proportions == pytest.approx([0.0, 0.75, 0.25])
    with pytest.raises(DataError, match="after 96 sequences every domain with a share is at its max_epochs"):
        one.draw(1)


def test_a_draw_that_fails_takes_back_its_redistributions():
    one = build([4, 8], 4, max_epochs=1, at_cap="redistribute")
    one.append([0.5, 0.5], 0, 0)
    with pytest.raises(DataError):
        one.draw(13)
    assert len(one.segments) == 1
    assert one.position == 0
    assert sorted(one.draw(12).tolist()) == list(range(12))
    assert len(one.segments) == 2


def test_redistribute_at_once_when_a_full_domain_is_asked_for_again():
    one = build([4, 300], 4, max_epochs=1, at_cap="redistribute")
    one.append([0.5, 0.5], 0, 0)
    one.draw(20)
    one.append([0.9, 0.1], 20, 5, "the mixer insists")
    assert [(s.start, s.reason[:9]) for s in one.segments[-2:]] == [(20, "the mixer"), (20, "share of ")]
    assert one.draw(50).min() >= 4


@given(runs(), st.integers(1, 3), st.integers(1, 120))
def test_plan_equals_what_is_realized(run, max_epochs, total):
    # Expected epochs against the stream, within a block.
    sizes, block, segments = run
    weights, _ = segments[0]
    total = min(total, max_epochs * sum(size for size, w in zip(sizes, weights, strict=True) if w))
    one = build(sizes, block, max_epochs=max_epochs, at_cap="redistribute")
    expected = expected_epochs(one.sizes, proportions_of(weights), total, max_epochs, "redistribute")
    one.append(proportions_of(weights), 0, 0)
    one.draw(total)
    realized = one.drawn / one.sizes
    assert (realized <= max_epochs).all()
    assert (np.abs(realized - expected) * one.sizes <= block + 1).all()


def test_expected_epochs():
    sizes, shares = np.array([10, 100]), np.array([0.5, 0.5])
    assert expected_epochs(sizes, shares, 100).tolist() == [5.0, 0.5]
    assert expected_epochs(sizes, shares, 100, 2, "error").tolist() == [5.0, 0.5]
    assert expected_epochs(sizes, shares, 100, [2, np.nan], "redistribute") == pytest.approx([2.0, 0.8])
    assert expected_epochs(sizes, shares, 100, 2, "stop") == pytest.approx([2.0, 0.2])
    assert expected_epochs(sizes, shares, 1000, 2, "redistribute") == pytest.approx([2.0, 2.0])
    assert expected_epochs(sizes, shares, 20, drawn=np.array([10, 50])).tolist() == [2.0, 0.6]


def test_cap_limits():
    assert cap_limits(np.array([100, 7]), [0.29, np.inf]).tolist() == [29, 2**63 - 1]
    assert cap_limits(np.array([100, 7]), 2).tolist() == [200, 14]
    assert cap_limits(np.array([100, 7]), [np.nan, 0.0]).tolist() == [2**63 - 1, 0]


def test_short_segments_do_not_starve_small_domains():
    # Every segment ends inside its first block, as when the block is longer than an interval.
    one = build([500, 500], 64)
    for step in range(400):
        one.append([0.98, 0.02], one.position, step)
        one.draw(16)
    assert one.drawn[1] == pytest.approx(0.02 * 6400, abs=3)


@pytest.mark.parametrize("drawn", [3, 16, 80, 100])
def test_deviations_do_not_add_up_over_segments_that_end_inside_blocks(drawn):
    """No domain is ahead of its share by more than one sequence and its share of a block, and the others by no more."""
    one = build([500] * 20, 24)
    shares = np.random.default_rng(0).dirichlet(np.full(20, 2.0))
    for step in range(300):
        one.append(shares, one.position, step)
        one.draw(drawn)
        ahead = one.drawn - shares * one.position
        assert (ahead <= 1 + 24 * shares).all()
        assert np.abs(ahead).max() < 5


def test_one_domain_micro_batches_stay_so_past_a_cap():
    """The cap of 10 sequences holds two whole micro-batches of 4."""
    one = build([10, 400, 400], 16, unit=4, max_epochs=[1, np.inf, np.inf], at_cap="redistribute")
    one.append([0.5, 0.25, 0.25], 0, 0)
    rows = one.draw(480)
    domains = np.searchsorted([10, 410], rows, side="right").reshape(-1, 4)
    assert (domains == domains[:, :1]).all()
    assert one.drawn.tolist()[0] == 8


def test_whole_blocks_over_segments_stay_close_to_the_sum_of_shares():
    one = build([500, 500, 500], 8)
    generator = np.random.default_rng(0)
    exact = np.zeros(3)
    for step in range(200):
        shares = generator.dirichlet(np.ones(3))
        one.append(shares, one.position, step)
        one.draw(8)
        exact += 8 * shares
        assert np.abs(one.drawn - exact).max() < 1.2


def test_bad_segments():
    one = build([5, 2], 4)
    with pytest.raises(ComponentError):
        one.append([0.5, 0.6], 0, 0)
    one.append([1.0, 0.0], 0, 0)
    one.draw(3)
    with pytest.raises(AssertionError, match="segment starts at 2, but the next sequence is 3"):
        one.append([1.0, 0.0], 2, 0)


def test_the_first_segment_may_start_anywhere():
    late, early = build([7, 30], 8), build([7, 30], 8)
    late.append([0.5, 0.5], 1000, 10)
    early.append([0.5, 0.5], 0, 0)
    assert late.draw(50).tolist() == early.draw(50).tolist()
    assert late.position == 1050


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_epochs_above_and_below_the_threshold(monkeypatch, size):
    monkeypatch.setattr(planner, "_SMALL", 10)
    rows = np.arange(100, 100 + size)

    def one():
        return ShuffledEpochs(rows, "d", 5)

    whole = one().take(0, 6 * size)
    for e in range(6):
        assert sorted(whole[e * size : (e + 1) * size].tolist()) == rows.tolist()
    if size > 2:
        assert len({tuple(whole[e * size : (e + 1) * size].tolist()) for e in range(6)}) > 4
    walking, generator = one(), np.random.default_rng(0)
    for _ in range(30):
        first = int(generator.integers(0, 5 * size))
        count = int(generator.integers(1, 6 * size - first + 1))
        expected = whole[first : first + count].tolist()
        assert walking.take(first, count).tolist() == expected
        assert one().take(first, count).tolist() == expected


def test_rows_beyond_32_bits():
    rows = np.array([5, 2**40])
    assert sorted(ShuffledEpochs(rows, "d", 0).take(0, 2).tolist()) == rows.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("interleave", ["shuffled", "even"])
@pytest.mark.parametrize("unit", [1, 4])
def test_a_log_of_thousands_of_segments_is_forgotten_but_not_its_stream(interleave, unit):
    """One decision per step, as online mixers make them; resumed at two places far apart."""
    domains, rng = Domains.from_sizes(["a", "b", "c"], [50, 30, 7]), np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(3), size=1000)

    def fresh():
        return MixtureSampler(domains, seed=5, block=8, unit=unit, interleave=interleave)

    whole, resumed, served = fresh(), fresh(), []
    for step, share in enumerate(shares):
        whole.append(share, step * 8, step)
        served.append(whole.draw(8).tolist())
        if step in (400, 900):
            state = whole.state_dict()
            assert len(state["segments"]["start"]) <= 128
            resumed = fresh()
            resumed.load_state_dict(state)
        elif step > 400:
            resumed.append(share, step * 8, step)
            assert resumed.draw(8).tolist() == served[-1]
    counts = np.bincount(domains.domain_of[np.concatenate(served)], minlength=3)
    assert np.abs(counts - 8 * shares.sum(axis=0)).max() < 8 * unit
    assert len({label for row in served for label in row}) == 87
