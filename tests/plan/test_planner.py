"""Laying out the rows of an interval."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dataflex.errors import DataError
from dataflex.plan import planner
from dataflex.plan.domains import Domains
from dataflex.plan.plan import BatchShape
from dataflex.plan.planner import epoch_fill, epoch_stream, quota_rows, spread, warmup_rows
from dataflex.plan.schedule import Interval
from dataflex.rng import stream


def interval(start, stop, index=0):
    return Interval(index=index, kind="dynamic", start_step=start, stop_step=stop)


NONE = np.empty(0, dtype=np.int64)


def shape_of(size=2, num_micro=2, world=1, *, drop_last=False, shuffle=False):
    return BatchShape(
        micro_batch_size=size, accumulation=num_micro, world=world, rank=0, drop_last=drop_last, shuffle=shuffle
    )


@given(st.integers(1, 300), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_steps_are_those_of_the_stock_trainer(num_rows, size, num_micro, world, drop_last):
    assume(not drop_last or num_rows // size >= world)
    shape = shape_of(size, num_micro, world, drop_last=drop_last)
    # transformers.Trainer.set_initial_training_values over accelerate's BatchSamplerShard.
    batches = num_rows // size if drop_last else math.ceil(num_rows / size)
    length = batches // world if drop_last else math.ceil(batches / world)
    assert shape.micro_batches_per_epoch(num_rows) == length
    assert shape.steps_per_epoch(num_rows) == max(length // num_micro + int(length % num_micro > 0), 1)
    assert shape.rows_per_epoch(num_rows) == (length * world * size if drop_last else num_rows)


def test_layouts_that_cannot_be():
    with pytest.raises(DataError, match="dataloader_drop_last leaves nothing of 3 rows: 2 ranks x 2 sequences need 4"):
        shape_of(size=2, num_micro=1, world=2, drop_last=True).steps_per_epoch(3)
    with pytest.raises(DataError, match="no rows"):
        shape_of().micro_batches_per_epoch(0)


def slow_stream(pool, shape, seed, steps):
    """Every step of the run, epoch by epoch, as lists."""
    found, epoch = [], 0
    while len(found) < steps:
        order = stream(seed, "epoch", epoch).permutation(len(pool)) if shape.shuffle else range(len(pool))
        rows = [int(pool[i]) for i in order][: shape.rows_per_epoch(len(pool))]
        for start in range(0, len(rows), shape.global_batch):
            step = rows[start : start + shape.global_batch]
            found.append(step + [-1] * (shape.global_batch - len(step)))
        epoch += 1
    return found[:steps]


@given(st.integers(1, 30), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 20), st.integers(1, 20))
def test_epoch_stream_equals_walking_through_the_run(num_rows, size, shuffle, drop_last, start, steps):
    assume(not drop_last or num_rows >= size)
    shape = shape_of(size, 3, drop_last=drop_last, shuffle=shuffle)
    pool = np.arange(num_rows) * 7
    found = epoch_stream(pool, interval(start, start + steps), shape, 5)
    expected = slow_stream(pool, shape, 5, start + steps)[start:]
    assert found.reshape(steps, -1).tolist() == expected


def test_no_other_epoch_is_generated(monkeypatch):
    asked = []
    planner._epoch_order.cache_clear()
    monkeypatch.setattr(planner, "stream", lambda seed, name, index: asked.append(index) or stream(seed, name, index))
    epoch_stream(np.arange(10), interval(10**6 * 3 + 1, 10**6 * 3 + 4), shape_of(shuffle=True), 0)
    assert asked == [10**6, 10**6 + 1]


def test_every_epoch_is_a_permutation_of_the_pool():
    rows = epoch_stream(np.arange(10), interval(0, 9), shape_of(shuffle=True), 0).reshape(3, 12)
    for epoch in rows:
        assert sorted(epoch.tolist()) == [-1, -1, *range(10)]
    assert len({tuple(epoch) for epoch in rows.tolist()}) == 3


def test_fill_is_the_head_of_the_epoch_that_ends_short():
    pool, in_order, shuffling = np.arange(100, 110), shape_of(), shape_of(shuffle=True)
    assert epoch_fill(pool, interval(0, 2), in_order, 0).size == 0
    assert epoch_fill(pool, interval(0, 3), in_order, 0).tolist() == [100, 101, 102, 103]
    shuffled = epoch_stream(pool, interval(3, 6), shuffling, 0)
    assert epoch_fill(pool, interval(4, 6), shuffling, 0).tolist() == shuffled[:4].tolist()
    assert epoch_fill(pool[:8], interval(0, 9), in_order, 0).size == 0
    assert epoch_fill(pool[:3], interval(0, 1), in_order, 0).tolist() == [100, 101, 102]


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 6), st.booleans(), st.integers(0, 5))
def test_spread(num_rows, steps, batch, shuffle, seed):
    rows = np.random.default_rng(seed).permutation(1000)[:num_rows]
    wanted = steps * batch
    rng = np.random.default_rng(seed) if shuffle else None
    if num_rows < wanted:
        with pytest.raises(DataError):
            spread(rows, steps, batch, rng, False)
    found = spread(rows, steps, batch, rng, True)
    assert found.shape == (wanted,)
    counts = Counter(found.tolist())
    if num_rows >= wanted:
        assert counts == Counter(rows[:wanted].tolist())
        assert spread(rows, steps, batch, None, False).tolist() == rows[:wanted].tolist()
    else:
        assert set(counts) == set(rows.tolist())
        assert set(counts.values()) <= {wanted // num_rows, -(-wanted // num_rows)}
        for copy in range(wanted // num_rows):
            assert sorted(found[copy * num_rows : (copy + 1) * num_rows].tolist()) == sorted(rows.tolist())
    if not shuffle:
        assert found.tolist() == [int(rows[i % min(num_rows, wanted)]) for i in range(wanted)]


def test_spread_shuffles_each_copy_anew():
    found = spread(np.arange(50), 5, 25, np.random.default_rng(0), True)
    assert found[:50].tolist() != found[50:100].tolist()
    assert found[:50].tolist() != list(range(50))


def test_spread_tells_what_is_missing():
    with pytest.raises(DataError) as caught:
        spread(np.arange(9000), 50, 256, None, False, pool_rows=52_000)
    assert str(caught.value) == (
        "interval of 50 steps wants 12,800 rows; selector kept 9,000 of 52,000. "
        "Lower interval_steps or set 'repeat: true'."
    )
    with pytest.raises(DataError, match=r"wants 8 rows; selector kept 0\. Check the selector"):
        spread(np.empty(0, dtype=np.int64), 2, 4, None, True)


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 12))
def test_warmup_rows(num_rows, steps, batch):
    pool = np.arange(num_rows) + 1000
    found = warmup_rows(pool, interval(0, steps), batch, 3, NONE)
    wanted = steps * batch
    assert found.shape == (wanted,)
    assert found.dtype == np.int64
    counts = np.bincount(found - 1000, minlength=num_rows)
    assert counts.max() <= -(-wanted // num_rows)
    assert counts.min() >= wanted // num_rows
    assert found.tolist() == warmup_rows(pool, interval(0, steps), batch, 3, NONE).tolist()


def test_warmup_rows_are_uniform_and_differ_by_seed_and_interval():
    pool = np.arange(10)
    draws = [warmup_rows(pool, interval(0, 1, index), 3, 0, NONE) for index in range(5000)]
    counts = np.bincount(np.concatenate(draws), minlength=10)
    assert float(((counts - 1500) ** 2 / 1500).sum()) < 30
    first = np.bincount([d[0] for d in draws], minlength=10)
    assert float(((first - 500) ** 2 / 500).sum()) < 30
    large = np.arange(10**6)
    assert (
        warmup_rows(large, interval(0, 1), 8, 0, NONE).tolist()
        != warmup_rows(large, interval(0, 1), 8, 1, NONE).tolist()
    )


def test_a_small_domain_of_which_nothing_was_kept_waits():
    """Of 10 rows an interval a share of 0.02 asks for one in five; a share of 0.2 asks for two at once."""
    domains = Domains.from_sizes(["a", "b", "c"], [50, 50, 50])
    served, carried = np.zeros(3), np.zeros(3)

    def quota(kept, shares, index):
        return quota_rows(
            np.array(kept),
            np.array(shares),
            10,
            interval(index, index + 1, index),
            domains,
            seed=1,
            repeat=True,
            shuffle=True,
            earlier=NONE,
            carried=carried,
        )

    for index in range(100):
        rows, carried = quota(range(100), [0.6, 0.38, 0.02], index)
        served += domains.counts(rows)
    assert np.abs(served - [612, 388, 0]).max() <= 2
    assert carried[2] == 1.0
    served = np.zeros(3)
    for index in range(100, 150):
        rows, carried = quota(range(150), [0.6, 0.38, 0.02], index)
        served += domains.counts(rows)
    assert np.abs(served - [300, 190, 10]).max() <= 2
    carried = np.zeros(3)
    with pytest.raises(DataError, match="kept no row of any domain that the mixer serves \\('c'\\)"):
        quota(range(100), [0.0, 0.0, 1.0], 0)


def test_the_share_of_a_domain_of_which_nothing_was_kept_goes_to_the_others():
    """Of 10 rows an interval a share of 0.2 asks for two; once it is kept again it is owed one row beside them."""
    domains, carried = Domains.from_sizes(["a", "b", "c"], [50, 50, 50]), np.zeros(3)
    served = []
    for index, kept in enumerate([range(100), range(100), range(150)]):
        rows, carried = quota_rows(
            np.array(kept),
            np.array([0.4, 0.4, 0.2]),
            10,
            interval(index, index + 1, index),
            domains,
            seed=1,
            repeat=True,
            shuffle=True,
            earlier=NONE,
            carried=carried,
        )
        served.append(domains.counts(rows).tolist())
    assert served[:2] == [[5, 5, 0]] * 2
    assert served[2][2] == 3
    assert abs(served[2][0] - served[2][1]) <= 1
