"""Laying out the rows of an interval."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dataflex.errors import ConfigError, DataError
from dataflex.plan import planner
from dataflex.plan.planner import EpochLayout, epoch_fill, epoch_stream, spread, warmup_rows
from dataflex.plan.schedule import Interval
from dataflex.rng import stream


def interval(start, stop, index=0):
    return Interval(index=index, kind="dynamic", start_step=start, stop_step=stop)


def layout_of(num_rows, size=2, num_micro=2, world=1, drop_last=False):
    return EpochLayout(
        num_rows=num_rows,
        global_batch=size * num_micro * world,
        micro_batch_size=size,
        world=world,
        drop_last=drop_last,
    )


@given(st.integers(1, 300), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_steps_are_those_of_the_stock_trainer(num_rows, size, num_micro, world, drop_last):
    assume(not drop_last or num_rows // size >= world)
    layout = layout_of(num_rows, size, num_micro, world, drop_last)
    # transformers.Trainer.set_initial_training_values over accelerate's BatchSamplerShard.
    batches = num_rows // size if drop_last else math.ceil(num_rows / size)
    length = batches // world if drop_last else math.ceil(batches / world)
    assert layout.micro_batches_per_epoch == length
    assert layout.steps_per_epoch == max(length // num_micro + int(length % num_micro > 0), 1)
    assert layout.accumulation == num_micro
    in_steps = [layout.rows_in_step(step) for step in range(layout.steps_per_epoch)]
    assert sum(in_steps) == (length * world * size if drop_last else num_rows)
    assert all(n == layout.global_batch for n in in_steps[:-1])
    assert in_steps[-1] > 0
    assert layout.rows_in_step(7 * layout.steps_per_epoch) == in_steps[0]


def test_layouts_that_cannot_be():
    with pytest.raises(ConfigError, match="a global batch of 6 sequences cannot be split over 4 ranks with 1"):
        EpochLayout(num_rows=10, global_batch=6, micro_batch_size=1, world=4)
    with pytest.raises(DataError, match="dataloader_drop_last leaves nothing of 3 rows: 2 ranks x 2 sequences need 4"):
        layout_of(3, size=2, num_micro=1, world=2, drop_last=True)
    with pytest.raises(DataError, match="no rows"):
        layout_of(0)


def slow_stream(pool, layout, seed, shuffle, steps):
    """Every step of the run, epoch by epoch, as lists."""
    found, epoch = [], 0
    while len(found) < steps:
        order = stream(seed, "epoch", epoch).permutation(len(pool)) if shuffle else range(len(pool))
        rows = [int(pool[i]) for i in order][: layout.rows_per_epoch]
        for start in range(0, len(rows), layout.global_batch):
            step = rows[start : start + layout.global_batch]
            found.append(step + [-1] * (layout.global_batch - len(step)))
        epoch += 1
    return found[:steps]


@given(st.integers(1, 30), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 20), st.integers(1, 20))
def test_epoch_stream_equals_walking_through_the_run(num_rows, size, shuffle, drop_last, start, steps):
    assume(not drop_last or num_rows >= size)
    layout = layout_of(num_rows, size=size, num_micro=3, drop_last=drop_last)
    pool = np.arange(num_rows) * 7
    found = epoch_stream(pool, interval(start, start + steps), layout, 5, shuffle)
    expected = slow_stream(pool, layout, 5, shuffle, start + steps)[start:]
    assert found.reshape(steps, -1).tolist() == expected


def test_no_other_epoch_is_generated(monkeypatch):
    asked = []
    planner._epoch_order.cache_clear()
    monkeypatch.setattr(planner, "stream", lambda seed, name, index: asked.append(index) or stream(seed, name, index))
    layout = layout_of(10)
    epoch_stream(np.arange(10), interval(10**6 * 3 + 1, 10**6 * 3 + 4), layout, 0, True)
    assert asked == [10**6, 10**6 + 1]


def test_every_epoch_is_a_permutation_of_the_pool():
    layout = layout_of(10)
    rows = epoch_stream(np.arange(10), interval(0, 9), layout, 0, True).reshape(3, 12)
    for epoch in rows:
        assert sorted(epoch.tolist()) == [-1, -1, *range(10)]
    assert len({tuple(epoch) for epoch in rows.tolist()}) == 3


def test_fill_is_the_head_of_the_epoch_that_ends_short():
    pool, layout = np.arange(100, 110), layout_of(10)
    assert epoch_fill(pool, interval(0, 2), layout, 0, False).size == 0
    assert epoch_fill(pool, interval(0, 3), layout, 0, False).tolist() == [100, 101, 102, 103]
    shuffled = epoch_stream(pool, interval(3, 6), layout, 0, True)
    assert epoch_fill(pool, interval(4, 6), layout, 0, True).tolist() == shuffled[:4].tolist()
    assert epoch_fill(pool[:8], interval(0, 9), layout_of(8), 0, False).size == 0
    assert epoch_fill(pool[:3], interval(0, 1), layout_of(3), 0, False).tolist() == [100, 101, 102]


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
    found = warmup_rows(pool, interval(0, steps), batch, 3)
    wanted = steps * batch
    assert found.shape == (wanted,)
    assert found.dtype == np.int64
    counts = np.bincount(found - 1000, minlength=num_rows)
    assert counts.max() <= -(-wanted // num_rows)
    assert counts.min() >= wanted // num_rows
    assert found.tolist() == warmup_rows(pool, interval(0, steps), batch, 3).tolist()


def test_warmup_rows_are_uniform_and_differ_by_seed_and_interval():
    pool = np.arange(10)
    draws = [warmup_rows(pool, interval(0, 1, index), 3, 0) for index in range(5000)]
    counts = np.bincount(np.concatenate(draws), minlength=10)
    assert float(((counts - 1500) ** 2 / 1500).sum()) < 30
    first = np.bincount([d[0] for d in draws], minlength=10)
    assert float(((first - 500) ** 2 / 500).sum()) < 30
    large = np.arange(10**6)
    assert warmup_rows(large, interval(0, 1), 8, 0).tolist() != warmup_rows(large, interval(0, 1), 8, 1).tolist()
    with pytest.raises(DataError, match="no rows"):
        warmup_rows(np.empty(0, dtype=np.int64), interval(0, 1), 3, 0)
