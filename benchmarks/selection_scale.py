"""Time and peak memory of subset rules at scale: a million embeddings, a thousand queries, exact search.

    python benchmarks/selection_scale.py                      # the sizes of the promise
    python benchmarks/selection_scale.py --rows 50000 --queries 200 --cover-rows 10000 --top-k-rows 1000000
    python benchmarks/selection_scale.py --cases near,top_k --check

Every case is a process of its own, so that its peak of memory (ru_maxrss) is its own. Vectors lie in a file that is
mapped into memory: mapped pages count as memory too. They are made of clusters with near-duplicates in them, of length
one. ``--check`` fails where a case takes longer or more than promised: near, tsds and round_robin 10 minutes and 6 GB,
top_k 3 seconds, index 5 CPU seconds. ``index`` is what ``dataflex query`` does with rows in int8 and vectors of
targets: scores of all rows, and the columns of the file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from core_decisions import processor
from dataflex.config.schema import MethodConfig
from dataflex.offline.index import STORE, Index, Part
from dataflex.rng import stream
from dataflex.score_table import ScoreTable
from dataflex.select.choose import top_k
from dataflex.select.spread import apart, facility_location, k_center
from dataflex.selectors.influence import Less
from dataflex.selectors.nearest import Near, RdsPlus, Tsds
from dataflex.signals.kinds import Embedding
from dataflex.testing import FakeSignals, example_context

MOST_SECONDS = {"near": 600.0, "tsds": 600.0, "round_robin": 600.0, "top_k": 3.0}
MOST_CPU = {"index": 5.0}
MOST_GB = {"near": 6.0, "tsds": 6.0, "round_robin": 6.0}
CLUSTERS = 500
COPIES = 0.05  # share of the rows that nearly repeat the row before them
_BLOCK = 20_000


def make(path: Path, num_rows: int, dim: int, name: str) -> None:
    """Write vectors of length one: clusters of different width, some rows near-copies of the one before."""
    centres = stream(0, "centres").normal(size=(CLUSTERS, dim)).astype(np.float32)
    out = np.memmap(path, dtype=np.float32, mode="w+", shape=(num_rows, dim))
    rng = stream(0, name)
    for start in range(0, num_rows, _BLOCK):
        size = min(_BLOCK, num_rows - start)
        cluster = rng.integers(CLUSTERS, size=size)
        noise = rng.standard_normal(size=(size, dim), dtype=np.float32)
        block = centres[cluster] + noise * (0.4 + 1.2 * rng.random(size=(size, 1), dtype=np.float32))
        copies = 1 + np.flatnonzero(rng.random(size - 1) < COPIES)
        block[copies] = block[copies - 1] + 0.02 * noise[copies]
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        out[start : start + size] = block
    out.flush()


class Mapped(FakeSignals):
    """Answers questions for embeddings with mapped vectors, without copying them."""

    def __init__(self, vectors: np.ndarray, queries: np.ndarray) -> None:
        mapped = {Embedding: lambda _signal, _rows, target: vectors if target is None else queries}
        super().__init__(np.ones(1), targets={"target": np.ones(len(queries))}, values=mapped)


def opened(folder: Path, name: str, dim: int, count: int | None = None) -> np.ndarray:
    return np.asarray(np.memmap(folder / name, dtype=np.float32, mode="r").reshape(-1, dim)[:count])


def select(selector, folder: Path, size: argparse.Namespace) -> int:
    vectors, queries = opened(folder, "rows", size.dim, size.rows), opened(folder, "queries", size.dim)
    ctx = example_context({"all": len(vectors)}, signals=Mapped(vectors, queries))
    kept = selector.select(np.arange(len(vectors), dtype=np.int64), round(size.share * len(vectors)), ctx)
    print(kept.reason, file=sys.stderr)
    return len(kept.rows)


def cover(rule: Callable[[np.ndarray, int], np.ndarray], folder: Path, size: argparse.Namespace) -> int:
    vectors = opened(folder, "rows", size.dim, size.cover_rows)
    return len(rule(vectors, round(size.cover_share * len(vectors))))


def indexed(folder: Path, size: argparse.Namespace) -> tuple[Index, ScoreTable, np.ndarray]:
    """Return an index of rows in int8, what its table holds, and projected vectors of targets."""
    import torch

    from dataflex.signals.gradients.projection import packed, row_type

    vectors = torch.tensor(opened(folder, "rows", size.dim, size.index_rows))
    targets = opened(folder, "queries", size.dim, size.index_targets)
    kept = packed(vectors, torch.ones(len(vectors)), torch.eye(size.dim), row_type(size.dim, "int8"))
    (folder / STORE / "rows").mkdir(parents=True, exist_ok=True)
    np.save(folder / STORE / "rows/array.npy", kept)
    part = Part(checkpoint=None, rate=0.0, model="", rows="rows", projection="")
    index = Index(
        folder=folder, lf={}, params={"normalize": True}, seed=0, wide=0, parts=(part,), sample=np.zeros(0, np.int64)
    )
    zeros = np.zeros(len(vectors), dtype=np.int64)
    table = ScoreTable(
        datasets=("pool",),
        dataset_of=zeros,
        domains=("pool",),
        domain_of=zeros,
        position=np.arange(len(vectors)),
        tokens=zeros + 100,
        supervised_tokens=zeros + 50,
        columns={},
        provenance={},
    )
    return index, table, targets


def query(index: Index, table: ScoreTable, targets: np.ndarray) -> int:
    """Return how many columns a query of an index writes."""
    from dataflex.offline.querying import columns_of, scores_of

    names = tuple(f"target {place}" for place in range(len(targets)))
    method = MethodConfig(kind="selector", name="less", params=Less.Params(), targets=names)
    return len(columns_of(method, table, scores_of(index, (targets,)), seed=0))


CASES: dict[str, Callable[[Path, argparse.Namespace], int]] = {
    "near": lambda folder, size: select(Near(Near.Params()), folder, size),
    "round_robin": lambda folder, size: select(RdsPlus(RdsPlus.Params()), folder, size),
    "tsds": lambda folder, size: select(Tsds(Tsds.Params(sigma=0.1, c=0.1)), folder, size),
    "tsds_far": lambda folder, size: select(Tsds(Tsds.Params(sigma=0.1, alpha=0.0)), folder, size),
    "facility_location": lambda folder, size: cover(facility_location, folder, size),
    "k_center": lambda folder, size: cover(k_center, folder, size),
    "deita": lambda folder, size: cover(lambda v, k: apart(v, np.arange(len(v)), 0.9, k), folder, size),
    "top_k": lambda _, size: len(top_k(scores_of(size), size.top_k_rows // 10)),
    "index": lambda folder, size: query(*indexed(folder, size)),
}


def scores_of(size: argparse.Namespace) -> np.ndarray:
    return stream(0, "scores").random(size.top_k_rows)


def run_case(name: str, folder: Path, size: argparse.Namespace) -> None:
    """Run one case in this process and print what it took as JSON."""
    if name == "top_k":
        scores = scores_of(size)
        started, busy = time.perf_counter(), time.process_time()
        kept = len(top_k(scores, size.top_k_rows // 10))
    elif name == "index":
        import dataflex.offline.querying  # noqa: F401  (it takes seconds to import)

        made = indexed(folder, size)
        started, busy = time.perf_counter(), time.process_time()
        kept = query(*made)
    else:
        started, busy = time.perf_counter(), time.process_time()
        kept = CASES[name](folder, size)
    seconds, cpu = time.perf_counter() - started, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    print(json.dumps({"seconds": seconds, "cpu": cpu, "gb": peak, "kept": kept}))


def rows_of(name: str, size: argparse.Namespace) -> int:
    covers = ("facility_location", "k_center", "deita")
    if name == "index":
        return size.index_rows
    return size.top_k_rows if name == "top_k" else size.cover_rows if name in covers else size.rows


def most_rows(size: argparse.Namespace) -> int:
    return max(size.rows, size.cover_rows, size.index_rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--share", type=float, default=0.05, help="share of the rows that is selected")
    parser.add_argument("--cover-rows", type=int, default=100_000)
    parser.add_argument("--cover-share", type=float, default=0.1)
    parser.add_argument("--top-k-rows", type=int, default=10_000_000)
    parser.add_argument("--index-rows", type=int, default=100_000)
    parser.add_argument("--index-targets", type=int, default=100)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--folder", type=Path, help="where the vectors are made and kept; default: a temporary one")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    size = parser.parse_args()
    if size.case:
        run_case(size.case, size.folder, size)
        return 0
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(
        f"{processor()}, {os.cpu_count()} cores, OMP_NUM_THREADS {threads}; numpy {np.__version__}, "
        f"Python {platform.python_version()}; {size.dim} dimensions, {size.queries:,} queries"
    )
    broken = []
    with tempfile.TemporaryDirectory() as made:
        folder = size.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        for name, count in (("rows", most_rows(size)), ("queries", max(size.queries, size.index_targets))):
            path = folder / name
            if not path.is_file() or path.stat().st_size != 4 * size.dim * count:
                make(path, count, size.dim, name)
        print(f"{'case':<18} {'rows':>11} {'kept':>10} {'seconds':>9} {'cpu s':>8} {'peak GB':>8}")
        for name in size.cases.split(","):
            command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--case", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(done.stderr)
                return 1
            found = json.loads(done.stdout)
            told = f"{found['seconds']:>9.1f} {found['cpu']:>8.1f} {found['gb']:>8.2f}  {done.stderr.strip()}"
            print(f"{name:<18} {rows_of(name, size):>11,} {found['kept']:>10,} {told}", flush=True)
            limits = {"seconds": MOST_SECONDS, "cpu": MOST_CPU, "gb": MOST_GB}
            if any(found[what] > most.get(name, np.inf) for what, most in limits.items()):
                broken.append(name)
    if broken:
        print(f"slower or larger than promised: {', '.join(broken)}")
    return 1 if size.check and broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
