"""Speed and memory of the torch-free core: plans, mixture draws and subset rules at 10 million rows.

    python benchmarks/core_decisions.py [--quick] [--check]

Every case runs twice: once for time, once under tracemalloc for the peak of memory it takes on top of
its inputs. Cases marked * must make at least a million ids a second (``--check`` fails otherwise).
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dataflex.plan.domains import Domains
from dataflex.plan.mixture import MixtureSampler
from dataflex.plan.plan import BatchShape, DataPlan
from dataflex.plan.planner import epoch_stream, spread
from dataflex.plan.schedule import Interval
from dataflex.rng import stream, uniforms
from dataflex.select.choose import gumbel_top_k, round_robin, top_k

GLOBAL_BATCH = 256
REQUIRED_IDS_PER_SECOND = 1e6


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def split(num_rows: int, shares: np.ndarray) -> list[int]:
    sizes = (shares * num_rows).astype(int)
    sizes[0] += num_rows - sizes.sum()
    return sizes.tolist()


def shape_of(world: int, rank: int = 0) -> BatchShape:
    """Global batches in micro-batches of 8 rows."""
    return BatchShape(
        micro_batch_size=8,
        accumulation=GLOBAL_BATCH // 8 // world,
        world=world,
        rank=rank,
        drop_last=False,
        shuffle=True,
    )


def whole_epoch_plan(num_rows: int) -> int:
    """One interval over a whole shuffled epoch, with its digest."""
    shape = shape_of(world=1)
    interval = Interval(index=0, kind="dynamic", start_step=0, stop_step=shape.steps_per_epoch(num_rows))
    rows = epoch_stream(np.arange(num_rows), interval, shape, time.perf_counter_ns())
    plan = DataPlan(interval=interval, rows=rows, global_batch=GLOBAL_BATCH, row_space="bench")
    plan.digest()
    return num_rows


def selected_plan(scores: np.ndarray) -> int:
    """The best tenth of the rows laid out over an interval."""
    steps = scores.size // 10 // GLOBAL_BATCH
    rows = spread(top_k(scores, steps * GLOBAL_BATCH), steps, GLOBAL_BATCH, stream(0, "order"), False)
    interval = Interval(index=0, kind="dynamic", start_step=0, stop_step=steps)
    DataPlan(interval=interval, rows=rows, global_batch=GLOBAL_BATCH, row_space="bench").digest()
    return scores.size


def shards(num_steps: int) -> int:
    """All micro-batches of four ranks, step by step."""
    interval = Interval(index=0, kind="dynamic", start_step=0, stop_step=num_steps)
    rows = np.arange(num_steps * GLOBAL_BATCH)
    plan = DataPlan(interval=interval, rows=rows, global_batch=GLOBAL_BATCH, row_space="bench")
    for step in range(num_steps):
        for rank in range(4):
            plan.shard(step, shape_of(world=4, rank=rank))
    return rows.size


def draw(domains: Domains, shares: np.ndarray, block: int, count: int, calls: int = 1) -> int:
    sampler = MixtureSampler(domains, seed=0, block=block)
    sampler.append(shares, 0, 0)
    for _ in range(calls):
        sampler.draw(count // calls)
    return count


def resume(domains: Domains, state: dict) -> int:
    """A fresh sampler takes up a state and draws one global batch."""
    sampler = MixtureSampler(domains, seed=0, block=GLOBAL_BATCH)
    sampler.load_state_dict(state)
    return sampler.draw(GLOBAL_BATCH).size


def group(num_rows: int, shares: np.ndarray) -> int:
    return of(num_rows, Domains.from_sizes(["web", "code", "math"], split(num_rows, shares)).rows(0))


def of(num_ids: int, chosen: np.ndarray) -> int:
    """Ids looked at, which is what a rule's speed is measured in."""
    assert chosen.size
    return num_ids


def cases(num_rows: int) -> list[tuple[str, Callable[[], int]]]:
    three, many = np.array([0.6, 0.3, 0.1]), stream(0, "shares").dirichlet(np.full(500, 2.0))
    few_domains = Domains.from_sizes(["web", "code", "math"], split(num_rows, np.array([0.8, 0.15, 0.05])))
    many_domains = Domains.from_sizes([f"d{k}" for k in range(500)], split(num_rows, np.full(500, 1 / 500)))
    for domains in (few_domains, many_domains):
        domains.rows(0)
    scores = stream(0, "scores").random(num_rows)
    ids = np.arange(num_rows)
    queries = stream(0, "queries").random((50, num_rows // 200))
    tail = MixtureSampler(few_domains, seed=0, block=GLOBAL_BATCH)
    tail.append(three, 0, 0)
    tail.draw(num_rows // 3)
    state = tail.state_dict()
    far = {**state, "position": 10_000_000 * GLOBAL_BATCH}
    far["drawn"] = np.rint(three * far["position"]).astype(np.int64)
    million = f"{num_rows / 1e6:g}M"
    calls = num_rows // 12_800
    return [
        (f"* plan: shuffled epoch of {million} rows", lambda: whole_epoch_plan(num_rows)),
        (f"* plan: best tenth of {million} scores", lambda: selected_plan(scores)),
        ("* plan: shards of 4 ranks", lambda: shards(num_rows // 10_000)),
        (f"* mixture: {million} ids, 3 domains, block 16", lambda: draw(few_domains, three, 16, num_rows)),
        (f"* mixture: {million} ids, 3 domains, block 256", lambda: draw(few_domains, three, 256, num_rows)),
        (f"* mixture: {million} ids, 500 domains, block 1024", lambda: draw(many_domains, many, 1024, num_rows)),
        ("* mixture: the same, 12,800 ids a call", lambda: draw(many_domains, many, 1024, num_rows, calls)),
        ("  mixture: resume, then one batch", lambda: resume(few_domains, state)),
        ("  mixture: resume at step 10M, then one batch", lambda: resume(few_domains, far)),
        (f"* mixture: {million} ids, 500 domains, block 512", lambda: draw(many_domains, many, 512, num_rows)),
        (f"  domains: group {million} rows in 3", lambda: group(num_rows, three)),
        (f"  top_k: 5,000 of {million}", lambda: of(num_rows, top_k(scores, 5000))),
        (f"  top_k: half of {million}", lambda: of(num_rows, top_k(scores, num_rows // 2))),
        (
            f"  gumbel_top_k: 5,000 of {million}, with uniforms",
            lambda: of(num_rows, gumbel_top_k(scores, 5000, uniforms(0, "g", 0, ids))),
        ),
        (
            f"  round_robin: 50 queries x {queries.shape[1]:,} rows, best tenth",
            lambda: of(queries.size, round_robin(queries, queries.shape[1] // 10)),
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 million rows instead of 10")
    parser.add_argument("--check", action="store_true", help="fail when a case marked * makes under 1M ids/s")
    args = parser.parse_args()
    started = time.perf_counter()
    print(f"{processor()}, Python {platform.python_version()}, numpy {np.__version__}, {platform.system()}")
    print(f"\n{'case':<58} {'ids':>11} {'seconds':>8} {'M ids/s':>8} {'peak MB':>8} {'bytes/id':>8}")
    slow = []
    for name, run in cases(1_000_000 if args.quick else 10_000_000):
        start = time.perf_counter()
        num_ids = run()
        seconds = time.perf_counter() - start
        tracemalloc.start()
        run()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        rate = num_ids / seconds
        per_id = f"{rate / 1e6:>8.2f} {peak / 1e6:>8.1f} {peak / num_ids:>8.1f}"
        if num_ids <= GLOBAL_BATCH:  # a latency, not a speed
            per_id = f"{'-':>8} {peak / 1e6:>8.1f} {'-':>8}"
        print(f"{name:<58} {num_ids:>11,} {seconds:>8.3f} {per_id}")
        if name.startswith("*") and rate < REQUIRED_IDS_PER_SECOND:
            slow.append(name)
    print(f"\n{time.perf_counter() - started:.1f} s in all")
    if args.check and slow:
        print("under a million ids a second: " + "; ".join(slow))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
