"""Epochs in an orderer's order: against an oracle, wherever they are cut, with keys that change, over checkpoints."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.errors import CheckpointError, ComponentError
from dataflex.method import Orderer
from dataflex.orderers.pacing import Pacing
from dataflex.orderers.patterns import By, Saw, Shuffle, Sorting, Zigzag
from dataflex.plan.orders import OrderedEpochs, arranged
from dataflex.rng import stream
from dataflex.validate import order_of

LENGTH = By.of("length")
ORDERERS = {
    "sorting": lambda: Sorting(Sorting.Params(by=LENGTH)),
    "zigzag": lambda: Zigzag(Zigzag.Params(by=LENGTH, layers=3)),
    "saw": lambda: Saw(Saw.Params(by=LENGTH, jitter=3)),
    "shuffle": lambda: Shuffle(None),
    "pacing": lambda: Pacing(Pacing.Params(by=LENGTH, start=0.3)),
}
every_orderer = pytest.mark.parametrize("name", ORDERERS)


def keys_of(num, index=0):
    return np.round(stream(index, "keys").random(num) * 8)  # with ties


def epochs(name, rows, **options):
    return OrderedEpochs(np.asarray(rows), "a", 5, order_of(ORDERERS[name]()), **options)


def slow(name, rows, keys, number):
    """The order of one whole epoch, row by row."""
    by_key = sorted(rows, key=lambda row: (math.isnan(keys[row]), keys[row], row))
    return [by_key[rank] for rank in ORDERERS[name]().ranks(len(rows), stream(5, "order:a", number))]


def step_of(number):
    return number // 4


@pytest.mark.parametrize("name", [name for name in ORDERERS if name != "pacing"])
def test_epochs_are_those_of_the_oracle(name):
    rows = [3, 4, 7, 8, 9, 11, 15, 16, 17, 20, 21]
    keys = keys_of(24)
    keys[9] = math.nan
    stretch = epochs(name, rows)
    stretch.decide(0, keys, step_of, 10)
    wanted = [row for number in range(4) for row in slow(name, rows, keys, number)]
    assert stretch.take(0, 44).tolist() == wanted
    assert stretch.take(5, 20).tolist() == wanted[5:25]  # again, as after a rewind
    assert stretch.head(2, 3).tolist() == wanted[22:25]
    second = wanted[11:22] == wanted[:11]
    assert second == (name in ("sorting", "zigzag"))  # epoch 2 has the same order unless something is drawn


def test_equal_keys_keep_the_order_of_the_files_both_ways():
    stretch = epochs("sorting", range(6))
    keys = np.array([1.0, 0.0, 1.0, 0.0, math.nan, 1.0])
    stretch.decide(0, keys, step_of, 1)
    assert stretch.take(0, 6).tolist() == [1, 3, 0, 2, 5, 4]
    stretch.decide(6, -keys, step_of, 1)
    assert stretch.take(6, 6).tolist() == [0, 2, 5, 1, 3, 4]


@every_orderer
@given(cuts=st.lists(st.integers(1, 40), min_size=1, max_size=8), changes=st.booleans(), at=st.integers(0, 7))
def test_the_stream_is_the_same_however_it_is_cut_and_over_a_checkpoint(name, cuts, changes, at):
    """With keys that stay; with keys that change, a checkpoint changes nothing, and no row comes back in its epoch."""
    rows = np.flatnonzero(stream(9, "rows").random(40) < 0.7)
    total = sum(cuts)
    straight, cut, first = epochs(name, rows), epochs(name, rows), 0
    straight.decide(0, keys_of(40), step_of, 50)
    served = []
    resumed = epochs(name, rows)
    for number, count in enumerate(cuts):
        keys = keys_of(40, number if changes else 0)
        if number == at:
            resumed.load_state_dict(cut.state_dict(first))
        for each in (cut, resumed) if number >= at else (cut,):
            each.decide(first, keys, step_of, 50)
        part = cut.take(first, count).tolist()
        if number >= at:
            assert resumed.take(first, count).tolist() == part
        served += part
        first += count
    if not changes:
        assert served == straight.take(0, total).tolist()
    if name != "pacing":
        whole = [served[i : i + len(rows)] for i in range(0, total, len(rows))]
        assert all(len(set(each)) == len(each) for each in whole)
        assert all(sorted(each) == rows.tolist() for each in whole[:-1] + whole[-1:] * (total % len(rows) == 0))


def test_new_keys_fill_the_places_that_are_left_by_rank():
    """After half of a zigzag the second half of the same zigzag follows, over the rows that are left."""
    stretch = epochs("zigzag", range(9))
    stretch.decide(0, np.arange(9.0), step_of, 1)
    assert stretch.take(0, 4).tolist() == [0, 3, 6, 7]  # of 0 3 6 7 4 1 2 5 8
    assert stretch.wanted(4, 5).tolist() == [1, 2, 4, 5, 8]
    assert stretch.wanted(4, 6).tolist() == list(range(9))  # the next epoch needs them all
    keys = np.array([0, 50.0, 40, 0, 30, 20, 0, 0, 10])  # what is left is ranked 8 5 4 2 1; places have ranks 2 0 1 3 4
    stretch.decide(4, keys, step_of, 1)
    assert stretch.take(4, 5).tolist() == [4, 8, 5, 2, 1]


def test_a_pace_serves_the_easiest_rows_and_each_once_before_it_grows():
    stretch = epochs("pacing", range(100))
    keys = np.arange(100.0)[::-1].copy()
    stretch.decide(0, keys, step_of, 100)  # 30 rows at first, all at step 50: row 200 of the stream
    first = stretch.take(0, 30)
    assert sorted(first.tolist()) == list(range(70, 100))
    assert first.tolist() != sorted(first.tolist())
    share = 0.3 + 0.7 * step_of(30) / 50
    second = stretch.take(30, int(100 * share))
    assert sorted(second.tolist()) == list(range(100 - len(second), 100))
    later = stretch.take(0, 1000)
    starts, at = [], 0
    while at < 300:
        size = int(100 * min(1.0, 0.3 + 0.7 * step_of(at) / 50))
        assert sorted(later[at : at + size].tolist()) == list(range(100 - size, 100))
        starts.append(at)
        at += size
    assert len(starts) > 4


def test_only_so_many_rows_of_an_epoch_are_served():
    stretch = epochs("sorting", range(10), length=8)
    stretch.decide(0, np.arange(10.0), step_of, 1)
    assert stretch.take(0, 20).tolist() == [*range(8), *range(8), *range(4)]
    stretch.decide(12, np.arange(10.0)[::-1].copy(), step_of, 1)
    assert stretch.take(12, 5).tolist() == [9, 8, 7, 6, 9]


def test_a_stream_without_a_state_goes_on_as_if_these_keys_had_held():
    stretch = epochs("sorting", range(10))
    stretch.decide(13, np.arange(10.0), step_of, 1)
    assert stretch.take(13, 4).tolist() == [3, 4, 5, 6]


def test_a_finite_stream_ends():
    stretch = epochs("sorting", range(3), times=np.array([2, 1, 1]))
    stretch.decide(0, np.arange(3.0), step_of, 1)
    assert stretch.take(0, 4).tolist() == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="5 rows are wanted of an order that ends after 4"):
        stretch.take(0, 5)


def test_no_rows_and_other_rows():
    empty = epochs("sorting", [])
    empty.decide(0, np.arange(3.0), step_of, 1)
    assert empty.state_dict(0) == {}
    stretch = epochs("sorting", range(10))
    stretch.decide(0, np.arange(10.0), step_of, 1)
    with pytest.raises(CheckpointError, match="the order is of 10 rows, and there are 11"):
        epochs("sorting", range(11)).load_state_dict(stretch.state_dict(4))


# ---------------------------------------------------------------- rows that were laid out


def slow_arranged(rows, keys, groups, name):
    """Every group, every copy: sorted by hand, and put back into the group's places."""
    result = list(rows)
    for group in sorted(set(groups)):
        places = [i for i, each in enumerate(groups) if each == group]
        left, ordered, number = [rows[i] for i in places], [], 0
        while left:
            copy = sorted(set(left))
            for row in copy:
                left.remove(row)
            by_key = sorted(copy, key=lambda row: (math.isnan(keys[row]), keys[row], row))
            rng = stream(1, f"order:r/{group}", number)
            ordered += [by_key[rank] for rank in ORDERERS[name]().ranks(len(copy), rng)]
            number += 1
        for place, row in zip(places, ordered, strict=True):
            result[place] = row
    return result


@pytest.mark.parametrize("name", [name for name in ORDERERS if name != "pacing"])  # which goes with no selector
@given(rows=st.lists(st.integers(0, 12), min_size=1, max_size=40), seed=st.integers(0, 5), num_groups=st.integers(1, 4))
def test_rows_are_arranged_group_by_group_and_copy_by_copy(name, rows, seed, num_groups):
    group_of = stream(seed, "groups").integers(0, num_groups, size=13)
    keys = keys_of(13, seed)
    rows = np.array(rows)
    groups = group_of[rows]
    found = arranged(rows, keys, groups, order_of(ORDERERS[name]()), 1, "r")
    assert found.tolist() == slow_arranged(rows.tolist(), keys, groups.tolist(), name)
    assert sorted(found.tolist()) == sorted(rows.tolist())
    assert group_of[found].tolist() == groups.tolist()


def test_ranks_that_are_no_permutation_are_told():
    class Broken(Orderer):
        name = "broken"

        def ranks(self, count, rng):
            return np.zeros(count, dtype=np.int64)

    with pytest.raises(ComponentError, match=r"orderer 'broken' gave ranks \[0, 0, 0\], no permutation of 0 to 2"):
        arranged(np.arange(3), np.zeros(3), np.zeros(3, dtype=np.int64), order_of(Broken(None)), 0, "r")
