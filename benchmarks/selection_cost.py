"""What a selection pass costs, as ratios to plain passes over the same batches within one run.

The 4M base model with LoRA rank 8 on all linear layers, real rows in length-bucketed batches. The
LESS pass makes exact Adam-preconditioned scores against 8 target vectors; its yardstick is a plain
batched forward + backward of the same batches. Passes take turns on every batch; a ratio is of the
time for all rows, each batch with its median over the repeats, in CPU seconds of this process (wall
clock beside it), so that what else runs on the machine counts as little as possible. Memory is the
peak of what torch allocates during a pass, from the profiler's record of every allocation, on top of
what was there before; resident memory says more about the allocator than about the pass.

    python benchmarks/selection_cost.py [--quick] [--check] [--model DIR] [--rows N] [--repeats N]

`make bench BENCH_MODEL=DIR` measures another model instead, for example SmolLM2-135M; by hand on few cores add
--rows 24 --repeats 2.

--check ends with 1 if a goal is missed. Goals: LESS fp32 <= 1.10, LESS bf16 <= 0.85 (only where this
processor multiplies bf16 matrices faster than fp32 ones), losses and embeddings <= 1.05 of a plain
forward, extra memory of a pass <= that of a training step.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

from support.selection_passes import DENSE, MAX_TOKENS, RANK, ROOT, TARGETS, TOKEN_BUDGET, Bench, memory

GOALS = {"less fp32": 1.10, "less bf16": 0.85, "losses": 1.05, "embeddings": 1.05}

Pair = tuple[float, float]


def alternate(bench: Bench, passes: list[str], batches: list[Any], repeats: int) -> dict[str, list[list[Pair]]]:
    """Return (CPU, wall) seconds by pass and batch, the passes taking turns on every batch."""
    seconds: dict[str, list[list[Pair]]] = {name: [[] for _ in batches] for name in passes}
    with bench.engine.observing(), bench.engine_bf16.observing():
        for repeat in range(repeats):
            for index, batch in enumerate(batches):
                for name in passes if repeat % 2 == 0 else passes[::-1]:
                    cpu, wall = time.process_time(), time.perf_counter()
                    getattr(bench, name)(batch)
                    seconds[name][index].append((time.process_time() - cpu, time.perf_counter() - wall))
    return seconds


def ratio(seconds: dict[str, list[list[Pair]]], name: str, to: str) -> Pair:
    """Ratio of the time for all batches, each batch with its median over the repeats: (CPU, wall)."""
    found = []
    for clock in (0, 1):
        totals = [
            sum(statistics.median(one[clock] for one in batch) for batch in seconds[which]) for which in (name, to)
        ]
        found.append(totals[0] / totals[1])
    return found[0], found[1]


def matrix_speeds(torch: Any) -> Pair:
    """Return fp32 and bf16 billions of multiply-adds a second of a matrix product of the model's size."""
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2048, 256).to(dtype), torch.randn(512, 256).to(dtype)
        best = min(_timed(lambda a=a, b=b: a @ b.t()) for _ in range(20))
        rates.append(2048 * 256 * 512 / best / 1e9)
    return rates[0], rates[1]


def _timed(run: Any) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def header(bench: Bench, args: argparse.Namespace, rates: Pair) -> str:
    import peft
    import transformers

    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    processor = names[0].partition(":")[2].strip() if names else platform.processor()
    numel = sum(shape.numel() for shape in bench.engine.shapes.values())
    return "\n".join(
        [
            f"processor {processor}, {os.cpu_count()} cores, {bench.torch.get_num_threads()} threads; "
            f"matrix products fp32 {rates[0]:.0f}, bf16 {rates[1]:.0f} G multiply-adds/s",
            f"python {platform.python_version()}, torch {bench.torch.__version__}, transformers "
            f"{transformers.__version__}, peft {peft.__version__}",
            f"model {args.model}, LoRA rank {RANK} on all linear layers ({numel:,} parameters), {TARGETS} targets, "
            f"{len(bench.rows)} rows of up to {MAX_TOKENS} tokens in {len(bench.batches)} batches of up to "
            f"{TOKEN_BUDGET} tokens, {args.repeats} repeats",
        ]
    )


LABELS = {
    "less fp32": ("less", "plain"),
    "less bf16": ("less_bf16", "plain"),
    "less bf16, to plain bf16": ("less_bf16", "plain_bf16"),
    "gradient norms": ("norms", "plain"),
    "sparse sketch to 8192": ("sketched", "plain"),
    "losses": ("losses", "forward_with_loss"),
    "embeddings": ("embeddings", "forward_with_loss"),
    "losses, to a forward without loss": ("losses", "forward"),
    "embeddings, to a forward without loss": ("embeddings", "forward"),
}


def times(bench: Bench, args: argparse.Namespace, rates: Pair) -> list[str]:
    """Print the ratios; return the goals that were missed."""
    missed: list[str] = []
    forwards = ["forward", "forward_with_loss", "losses", "embeddings"]
    passes = ["plain", "less", "less_bf16", "plain_bf16", "norms", "sketched"]
    alternate(bench, [*forwards, *passes], bench.batches[-1:], 1)  # warm up
    seconds = alternate(bench, passes, bench.batches, args.repeats)
    seconds |= alternate(bench, forwards, bench.batches, 2 * args.repeats)
    for label, (name, to) in LABELS.items():
        cpu, wall = ratio(seconds, name, to)
        goal = GOALS.get(label)
        text = f"  {label:<38} {cpu:6.3f} x {to:<18} (wall {wall:.3f})"
        if label == "less bf16" and rates[1] <= rates[0]:
            text += f"  goal {goal} does not apply: bf16 products are {rates[1] / rates[0]:.2f} x as fast as fp32 here"
        elif goal is not None:
            text += f"  goal {goal:.2f} {'met' if cpu <= goal else 'MISSED'}"
            missed += [label] if cpu > goal else []
        print(text, flush=True)
    slow = alternate(bench, ["less", "loop", "dense"], bench.batches[len(bench.batches) // 2 :][:1], 1)
    for label, name in (("one row at a time", "loop"), (f"dense projection to {DENSE}", "dense")):
        print(f"  {label:<38} {ratio(slow, name, 'less')[0]:6.2f} x less (exact, fp32)", flush=True)
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and repeats, under a minute")
    parser.add_argument("--check", action="store_true", help="end with 1 if a goal is missed")
    model = os.environ.get("BENCH_MODEL") or str(ROOT / "examples/models/base-4m")
    parser.add_argument("--model", default=model, help="folder of a causal model")
    parser.add_argument("--rows", type=int, default=0, help="rows of the pool")
    parser.add_argument("--repeats", type=int, default=0, help="passes over the rows")
    args = parser.parse_args()
    args.repeats = args.repeats or (2 if args.quick else 5)
    bench = Bench(args.model, args.rows or (16 if args.quick else 160))
    bench.prepare()
    rates = matrix_speeds(bench.torch)
    print(header(bench, args, rates))
    print("cost, as ratios of CPU seconds:", flush=True)
    missed = times(bench, args, rates)
    print("extra peak memory of the largest batch:", flush=True)
    growth = {name: memory(bench, name) for name in ("training_step", "less", "losses", "embeddings")}
    for name, megabytes in growth.items():
        print(f"  {name:<38} {megabytes:6.0f} MB, {megabytes / growth['training_step']:.2f} x a training step")
        missed += [f"memory of {name}"] if megabytes > 1.01 * growth["training_step"] else []
    print("goals missed: " + (", ".join(missed) or "none"))
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
