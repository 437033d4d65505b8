"""Who serves which row: against plain lists and against accelerate's own sharding."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler

from dataflex.errors import CheckpointError
from dataflex.plan.plan import BatchShape, DataPlan
from dataflex.plan.planner import epoch_fill, epoch_stream
from dataflex.plan.schedule import Interval


def interval(steps, start=0):
    return Interval(index=0, kind="dynamic", start_step=start, stop_step=start + steps)


def plan_of(rows, steps, **changes):
    rows = np.array(rows, dtype=np.int64)
    return DataPlan(
        **{"interval": interval(steps), "rows": rows, "global_batch": rows.size // steps, "row_space": "f", **changes}
    )


def shape_of(rank, world, size, num_micro, drop_last=False):
    return BatchShape(
        micro_batch_size=size, accumulation=num_micro, world=world, rank=rank, drop_last=drop_last, shuffle=False
    )


def shard(plan, step, *shape):
    return plan.shard(step, shape_of(*shape))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("num_micro", [1, 2, 3])
def test_ranks_together_serve_the_global_order(world, num_micro):
    size, steps, start = 3, 4, 7
    rows = np.random.default_rng(0).permutation(1000)[: steps * world * num_micro * size]
    plan = plan_of(rows, steps, interval=interval(steps, start))
    served = []
    for step in range(start, start + steps):
        shards = [shard(plan, step, rank, world, size, num_micro) for rank in range(world)]
        assert all(len(shard) == num_micro for shard in shards)
        served += [row for micro in range(num_micro) for shard in shards for row in shard[micro].tolist()]
    assert served == rows.tolist()


@pytest.mark.parametrize(("world", "num_micro"), [(1, 4), (2, 2), (4, 1)])
def test_another_number_of_ranks_serves_the_same_steps(world, num_micro):
    rows = np.random.default_rng(1).permutation(64)
    plan = plan_of(rows, 4)
    for step in range(4):
        served = [r for rank in range(world) for part in shard(plan, step, rank, world, 4, num_micro) for r in part]
        assert sorted(served) == sorted(rows[step * 16 : (step + 1) * 16].tolist())


def stock_batches(num_rows, size, world, rank, drop_last):
    """Micro-batches of one rank over one epoch, from torch and accelerate themselves."""
    sampler = BatchSampler(SequentialSampler(range(num_rows)), size, drop_last)
    if world == 1:
        return list(sampler)
    return [list(batch) for batch in BatchSamplerShard(sampler, world, rank, even_batches=True)]


@pytest.mark.slow
@settings(max_examples=300)
@given(st.integers(1, 70), st.integers(1, 4), st.sampled_from([1, 2, 3, 4]), st.integers(1, 3), st.booleans())
def test_an_epoch_in_file_order_is_that_of_accelerate(num_rows, size, world, num_micro, drop_last):
    assume(not drop_last or num_rows // size >= world)  # the stock loader would be empty; see test_planner
    shape = shape_of(0, world, size, num_micro, drop_last)
    pool = np.arange(num_rows)
    whole = interval(shape.steps_per_epoch(num_rows))
    plan = plan_of(
        epoch_stream(pool, whole, shape, 0), whole.steps, fill=epoch_fill(pool, whole, shape, 0), interval=whole
    )
    for rank in range(world):
        stock = stock_batches(num_rows, size, world, rank, drop_last)
        ours = [
            batch.tolist() for step in range(whole.steps) for batch in shard(plan, step, rank, world, size, num_micro)
        ]
        assert ours == stock
        assert len(ours) == shape.micro_batches_per_epoch(num_rows)


def test_a_short_step():
    plan = plan_of([0, 1, 2, 3, 4, -1, -1, -1], 1, fill=np.array([10, 11]))
    assert [b.tolist() for b in shard(plan, 0, 0, 1, 2, 4)] == [[0, 1], [2, 3], [4]]
    assert [b.tolist() for b in shard(plan, 0, 0, 2, 2, 2)] == [[0, 1], [4, 10]]
    assert [b.tolist() for b in shard(plan, 0, 1, 2, 2, 2)] == [[2, 3], [11, 10]]
    assert [b.tolist() for b in shard(plan, 0, 3, 4, 2, 1)] == [[11, 10]]


def test_a_short_step_without_fill_is_a_defect():
    plan = plan_of([0, 1, 2, -1], 1)
    assert [b.tolist() for b in shard(plan, 0, 0, 1, 4, 1)] == [[0, 1, 2]]
    with pytest.raises(AssertionError, match="no rows to fill it up with"):
        shard(plan, 0, 0, 2, 2, 1)


def test_a_shape_that_does_not_fit_is_a_defect():
    with pytest.raises(AssertionError, match="global batches of 8 sequences"):
        shard(plan_of(range(8), 1), 0, 0, 3, 1, 2)


def test_steps_and_ranks_outside_are_defects():
    plan = plan_of(range(8), 2, interval=interval(2, start=5))
    assert shard(plan, 6, 0, 1, 4, 1)[0].tolist() == [4, 5, 6, 7]
    for step, rank in ((4, 0), (7, 0), (5, 1)):
        with pytest.raises(AssertionError):
            shard(plan, step, rank, 1, 4, 1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rows": [0, 1, 2]}, "3 rows for 2 steps of 2 sequences"),
        ({"rows": [0, 1, -2, 3]}, "a row below -1"),
        ({"rows": [-1, 1, 2, 3]}, "after 'no row'"),
        ({"rows": [0, 1, -1, -1]}, "step 1 has no rows"),
        ({"fill": [-1]}, "fill must be"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes, told):
    good = {"rows": [0, 1, 2, 3], "fill": []}
    arrays = {key: np.array(v) for key, v in {**good, **changes}.items()}
    with pytest.raises(ValueError, match=told):
        DataPlan(interval=interval(2), global_batch=2, row_space="f", **arrays)


def test_a_plan_cannot_be_written_to_and_leaves_its_arguments_alone():
    rows = np.arange(4)
    plan = plan_of(rows, 1)
    with pytest.raises(ValueError, match="read-only"):
        plan.rows[0] = 9
    assert rows.flags.writeable


def test_digest_covers_what_ranks_must_agree_on():
    plan = plan_of([0, 1, 2, -1], 1, fill=np.array([5]))
    same = plan_of([0, 1, 2, -1], 1, fill=np.array([5]), trace={"seconds": 1.5})
    assert plan.digest() == same.digest()
    assert len(plan.digest()) == 32
    others = [
        replace(plan, rows=np.array([0, 2, 1, -1])),
        replace(plan, fill=np.array([6])),
        replace(plan, row_space="g"),
        replace(plan, interval=interval(1, start=1)),
        replace(plan, fill=np.empty(0, dtype=np.int64)),
        replace(plan, interval=interval(2), global_batch=2, rows=np.array([0, 1, 2, -1])),
    ]
    assert len({plan.digest(), *(other.digest() for other in others)}) == 1 + len(others)


def test_arrays_and_back_without_pickle():
    plan = plan_of([0, 1, 2, -1], 1, fill=np.array([5]), trace={"reason": "gr\u00f6\u00dfer", "n": [1, None]})
    file = io.BytesIO()
    np.savez(file, **plan.to_arrays())
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        back = DataPlan.from_arrays(arrays)
    assert back.digest() == plan.digest()
    assert back.trace == plan.trace
    assert back.interval == plan.interval


def test_broken_arrays_are_told():
    arrays = plan_of(range(4), 1).to_arrays()
    for broken in (
        {k: v for k, v in arrays.items() if k != "rows"},
        {**arrays, "meta": np.frombuffer(b"{}", dtype=np.uint8)},
        {**arrays, "meta": np.frombuffer(b"nonsense", dtype=np.uint8)},
        {**arrays, "rows": arrays["rows"][:3]},
    ):
        with pytest.raises(CheckpointError, match="plan cannot be read"):
            DataPlan.from_arrays(broken)
    newer = arrays["meta"].tobytes().replace(b'"format": 1', b'"format": 9')
    with pytest.raises(CheckpointError, match="plan has format 9; this version reads 1"):
        DataPlan.from_arrays({**arrays, "meta": np.frombuffer(newer, dtype=np.uint8)})
